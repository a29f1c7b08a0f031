"""One run's folder: settings, log, metrics, checkpoints, pictures.

    run = Run.create("output", "model_2")     # output/20261120-093000-model_2/
    run.log("a line")                         # on the screen and in train.log
    run = Run.reopen(newest_unfinished("output"))

Every file is written under a temporary name, flushed to disk and renamed: it is there whole or
not at all, and a run that is cut off keeps what it had. The log alone grows by appended lines; one
that was cut off is dropped when the run goes on. While a process works in a folder it
holds the lock file in it, so that no second one goes on with the same run.
"""

import contextlib
import csv
import io
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Protocol

import filelock
import torch
from annotated_types import Len
from pydantic import BaseModel, FiniteFloat, NonNegativeInt, PositiveInt, ValidationError

from errors import UsageError

PACKAGES = (
    "torch",
    "torchvision",
    "albumentations",
    "opencv-python-headless",
    "numpy",
    "torchsummary",
    "matplotlib",
)


class Scores(Protocol):
    """Anything with a loss and an accuracy, such as utils.Metrics."""

    loss: float
    accuracy: float


class RunError(UsageError):
    """A run's folder that cannot be used; the message says which file and why."""


class Run:
    """A run's folder, open for writing; closed by `close` or at the end of a `with`."""

    SETTINGS, RESULTS, LOG, LOCK = "settings.json", "results.json", "train.log", ".lock"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = filelock.FileLock(folder / self.LOCK)
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise RunError(f"{folder} is in use: another process trains this run") from None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the folder."""
        self._lock.release()  # the file stays: deleting it could let two processes in

    @classmethod
    def create(cls, output_dir: str | Path, name: str) -> "Run":
        """Makes `output_dir/YYYYMMDD-HHMMSS-name`, with -2, -3 ... behind it if that is taken.

        Raises:
            OSError: the folder cannot be made.
        """
        stem = f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
        number = 1
        while True:
            folder = Path(output_dir) / (stem if number == 1 else f"{stem}-{number}")
            try:
                folder.mkdir(parents=True)  # fails if it exists: two runs never share one
                return cls(folder)
            except FileExistsError:
                if not folder.is_dir():  # a file in the way, of this folder or of output_dir
                    raise
                number += 1

    @classmethod
    def reopen(cls, folder: str | Path) -> "Run":
        """A run that was cut off, to go on with it in the same folder and log.

        Raises:
            RunError: no run, a finished one, or one that another process trains.
        """
        folder = Path(folder)
        if not (folder / cls.SETTINGS).is_file():
            raise RunError(f"{folder} is not a run's folder: there is no {cls.SETTINGS} in it")
        if is_finished(folder):
            raise RunError(f"{folder} is finished; there is nothing to go on with")
        run = cls(folder)
        whole, newline, cut_off = run._read_log().rpartition("\n")
        if cut_off:
            run.write(cls.LOG, whole + newline)
        return run

    def log(self, line: str = "") -> None:
        """Prints the line and adds it to train.log."""
        print(line, flush=True)
        with open(self.folder / self.LOG, "a", encoding="utf-8", errors="replace") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def logged(self, beginning: str) -> bool:
        """Whether a line of the log begins so."""
        return any(line.startswith(beginning) for line in self._read_log().splitlines())

    def _read_log(self) -> str:
        log = self.folder / self.LOG
        return log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""

    def write(self, name: str, content: str | bytes) -> Path:
        """Writes a whole file of the run; returns its path."""
        return write_file(self.folder / name, content)

    def write_json(self, name: str, value: object) -> Path:
        """Writes a value of dicts, lists, strings and numbers as indented JSON."""
        return self.write(name, json.dumps(value, indent=2) + "\n")

    def write_csv(self, name: str, rows: list[dict]) -> Path:
        """Writes rows of the same keys, the keys as header."""
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return self.write(name, text.getvalue())

    def save_checkpoint(self, name: str, checkpoint: dict) -> Path:
        """Writes tensors, numbers, strings, lists and dicts for `torch.load(weights_only=True)`."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        return self.write(name, buffer.getvalue())


def read_json(path: Path) -> dict:
    """A JSON file that holds an object.

    Raises:
        RunError: missing or damaged.
    """
    try:
        value = json.loads(path.read_text())
        text = json.dumps(value, ensure_ascii=False).encode()  # half a character is an error here
        if rb"\u0000" in text:
            raise ValueError("a zero byte in it, which no path can hold")
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise RunError(f"{path} holds no settings")
    return value


class Settings(BaseModel, strict=True):
    """What is read of settings.json; it holds more, and of an older version's run less."""

    network: str | None = None
    model_file: str | None = None
    model_sha256: str | None = None
    parameters: PositiveInt | None = None
    epochs: PositiveInt | None = None
    recipe_name: str | None = None
    recipe: dict | None = None
    teacher: dict | None = None
    seed: NonNegativeInt | None = None
    val_split: PositiveInt | None = None
    dry_run: bool = False
    device: str | None = None
    mean: Annotated[list[FiniteFloat], Len(3, 3)] | None = None
    std: Annotated[list[FiniteFloat], Len(3, 3)] | None = None
    data_sha256: dict | None = None
    arguments: dict | None = None


def read_settings(folder: Path, model: type[BaseModel] = Settings) -> dict:
    """A run's settings.json.

    Raises:
        RunError: missing or damaged; names the file and the value.
    """
    return validated(folder / Run.SETTINGS, read_json(folder / Run.SETTINGS), model)


def validated(path: Path, values: dict, model: type[BaseModel]) -> dict:
    """The same values, which came from the file.

    Raises:
        RunError: one is missing, or of another kind; names the file and the value.
    """
    try:
        model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        found = "missing" if first["type"] == "missing" else f"{first['input']!r:.60}"
        raise RunError(f"{path} is damaged: {key} is {found}: {first['msg']}") from None
    return values


def write_file(path: Path, content: str | bytes) -> Path:
    """Writes a file whole or not at all; returns its path.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def is_finished(folder: Path) -> bool:
    """Whether the run went through all of its epochs and wrote its results."""
    try:
        return read_json(folder / Run.RESULTS).get("completed") is True
    except RunError:
        return False


def newest_unfinished(output_dir: str | Path) -> Path:
    """The newest run of the folder that is neither finished nor being trained just now.

    Raises:
        RunError: there is none.
    """
    for folder in sorted(Path(output_dir).glob("[0-9]*-[0-9]*-*"), reverse=True):
        if (folder / Run.SETTINGS).is_file() and not is_finished(folder):
            try:
                Run(folder).close()
            except RunError:  # in use
                continue
            return folder
    raise RunError(f"there is no unfinished run in {output_dir}; give --resume a run's folder")


class History:
    """The figures of a run, a row an epoch, and what follows from them.

    A row holds epoch, lr (at the end of the epoch), train_loss, train_acc, then {split}_loss and
    {split}_acc of the split that is evaluated each epoch ("test" or "val"), train_seconds and
    test_seconds. Losses are in nats, accuracies in percent.
    """

    def __init__(self, split: str, epochs: int, target: float, target_epochs: int) -> None:
        self.split = split
        self.epochs = epochs
        self.target = target
        self.target_epochs = target_epochs
        self.rows: list[dict] = []

    def add(
        self,
        *,
        lr: float,
        train: Scores,
        evaluated: Scores,
        train_seconds: float,
        test_seconds: float,
    ) -> None:
        """Adds the row of the next epoch."""
        self.rows.append(
            {
                "epoch": len(self.rows) + 1,
                "lr": lr,
                "train_loss": train.loss,
                "train_acc": train.accuracy,
                f"{self.split}_loss": evaluated.loss,
                f"{self.split}_acc": evaluated.accuracy,
                "train_seconds": train_seconds,
                "test_seconds": test_seconds,
            }
        )

    @property
    def accuracies(self) -> list[float]:
        """Of the evaluated split, an epoch each, in percent."""
        return [row[f"{self.split}_acc"] for row in self.rows]

    @property
    def best_epoch(self) -> int:
        """The first epoch of the highest accuracy."""
        return self.accuracies.index(max(self.accuracies)) + 1

    @property
    def target_epoch(self) -> int | None:
        """The first epoch at or above the target, if any."""
        reached = (epoch for epoch, value in enumerate(self.accuracies, 1) if value >= self.target)
        return next(reached, None)

    def beginning(self) -> str:
        """How the last epoch's line begins."""
        return f"Epoch [{len(self.rows):>{len(str(self.epochs))}}/{self.epochs}]"

    def line(self) -> str:
        """The last epoch in one line, with the time left and its marks."""
        row = self.rows[-1]
        epoch = row["epoch"]
        seconds = [past["train_seconds"] + past["test_seconds"] for past in self.rows]
        line = (
            f"{self.beginning()} - "
            f"Train: {row['train_acc']:5.2f}% | "
            f"{self.split.capitalize()}: {self.accuracies[-1]:5.2f}% | "
            f"loss {row['train_loss']:.3f}/{row[f'{self.split}_loss']:.3f} | "
            f"lr {row['lr']:.4f} | {seconds[-1]:.1f}s"
        )
        if epoch < self.epochs:
            line += f" | {duration(sum(seconds) / epoch * (self.epochs - epoch))} left"
        if self.best_epoch == epoch:
            line += " | best so far"
        if self.target_epoch == epoch:
            line += f" | target {self.target:g}% reached"
        return line

    def summary(self) -> dict:
        """The figures that matter at the end; accuracies in percent."""
        last = self.rows[-1]
        return {
            "epochs_asked": self.epochs,
            "epochs_done": last["epoch"],
            "split": self.split,
            "last_accuracy": self.accuracies[-1],
            "best_accuracy": max(self.accuracies),
            "best_epoch": self.best_epoch,
            "target_accuracy": self.target,
            "target_epochs": self.target_epochs,
            "target_reached_at": self.target_epoch,
            "train_accuracy": last["train_acc"],
            "gap_points": last["train_acc"] - self.accuracies[-1],
            "train_seconds": sum(row["train_seconds"] for row in self.rows),
            "test_seconds": sum(row["test_seconds"] for row in self.rows),
        }

    def table(self, evaluated: str, accuracy: float, seconds: float, folder: Path) -> str:
        """The results as a table; `evaluated` ("test" or "val") and `accuracy` are the final."""
        figures = self.summary()
        reached = figures["target_reached_at"]
        best = "best.pt" if (folder / "best.pt").is_file() else "its weights are gone"
        rows = (
            (
                f"final {evaluated} accuracy",
                f"{accuracy:.2f} %  (epoch {figures['epochs_done']}, last.pt)",
            ),
            (
                f"best {self.split} accuracy",
                f"{figures['best_accuracy']:.2f} %  (epoch {figures['best_epoch']}, {best}; "
                f"picked by looking at the {self.split} set)",
            ),
            (
                f"target {self.target:g} % within {self.target_epochs}",
                f"reached at epoch {reached}" if reached else "not reached",
            ),
            (
                f"train/{self.split} gap",
                f"{figures['gap_points']:+.2f} points  (train: augmented, during the epoch)",
            ),
            (
                "time",
                f"{duration(seconds)}  (training {duration(figures['train_seconds'])}, "
                f"evaluation {duration(figures['test_seconds'])})",
            ),
            ("pictures and log", str(folder)),
        )
        width = max(len(label) for label, _ in rows)
        rule = "-" * 80
        return "\n".join([rule, *(f"{label:<{width}}  {value}" for label, value in rows), rule])


def duration(seconds: float) -> str:
    """Seconds as "48s", "4m12s" or "1h05m"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def environment() -> dict:
    """What besides the settings a repetition of this run needs: versions, commit, command."""
    return {
        "command": shlex.join([Path(sys.executable).name, *_program(), *sys.argv[1:]]),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.processor(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changes": (_git("status", "--porcelain", "--untracked-files=no") or "").splitlines(),
    }


def _program() -> list[str]:
    """What was started, as one types it in the repository's folder, on whichever machine."""
    path, here = Path(sys.argv[0]).resolve(), Path(__file__).resolve().parent
    if not path.is_relative_to(here):
        return [path.name]
    path = path.relative_to(here)
    return ["-m", ".".join(path.with_suffix("").parts)] if len(path.parts) > 1 else [str(path)]


def _git(*arguments: str) -> str | None:
    """What git says of the code's own folder; None without git or outside a repository."""
    try:
        result = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.rstrip()


class Interruption(KeyboardInterrupt):
    """Ctrl-C, or the system's wish that the process ends; `status` is what it exits with."""

    def __init__(self, number: int) -> None:
        super().__init__("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)
        self.status = 128 + number  # as shells report it


class Interrupts:
    """Turns SIGINT and SIGTERM into Interruption, but not in the middle of work that is `held`."""

    def __init__(self) -> None:
        self.holding = False
        self.pending: int | None = None
        self.before: dict[int, object] = {}

    def __enter__(self) -> "Interrupts":
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not the main thread, which has no signals
                self.before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: object) -> None:
        if self.holding:
            self.pending = number
        else:
            raise Interruption(number)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """What happens inside happens whole; an interruption waits for its end."""
        self.holding = True
        try:
            yield
        finally:
            self.holding = False
        if self.pending is not None:
            number, self.pending = self.pending, None
            raise Interruption(number)
