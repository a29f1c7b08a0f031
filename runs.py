"""One run's folder, and the state of a training that is saved in it.

    run = Run.create("output", "model_2")     # output/20261120-093000-model_2/
    run.log("a line")                         # on the screen and in train.log

Files are written whole or not at all, so a run that is cut off keeps what it had. The log alone
grows by appended lines; one that was cut off is dropped when the run goes on. While a process works
in a folder it holds the lock file in it, so that no second one goes on with the run.
"""

import contextlib
import io
import json
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import filelock
import torch
from torch import nn

from errors import Error, UsageError
from parallel import ALONE, Team
from support import files
from support import settings as run_settings
from support.files import CheckpointError, load_weights, read_checkpoint, read_json, write_file
from support.history import History
from support.settings import NAME, InUseError, RunError


class StorageError(Error, OSError):
    """The run's folder cannot be written; the message says how to go on later."""


class Run:
    """A run's folder, open for writing until the end of a `with`.

    Under torchrun the first process writes; with `writes` False the others' methods do nothing.
    Once `resume_command` is set, what interrupts the `with` is reported together with it.
    """

    SETTINGS, RESULTS, LOG, LOCK, PAGE = NAME, "results.json", "train.log", ".lock", "report.html"

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder, self.writes = folder, writes
        self.resume_command = ""
        self._lock = filelock.FileLock(folder / self.LOCK)
        try:
            if writes:
                self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise InUseError(f"{folder} is in use: another process trains this run") from None

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
    def reopen(cls, folder: Path) -> "Run":
        """A run that was cut off, to go on with it in the same folder and log.

        Raises:
            RunError: it is finished, or another process trains it.
        """
        run = cls(folder)
        if is_finished(folder):
            run.close()
            raise RunError(f"{folder} is finished; there is nothing to go on with")
        whole, newline, cut_off = run.read_log().rpartition("\n")
        if cut_off:
            run.write(cls.LOG, whole + newline)
        return run

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        try:
            begun = (self.folder / self.SETTINGS).is_file()
            if not self.resume_command or not begun or not self.writes:
                return
            if isinstance(error, OSError):
                raise StorageError(
                    f"{error}; what was finished lies in {self.folder}: when this is mended, go on "
                    f"with {self.resume_command}"
                ) from None
            if isinstance(error, KeyboardInterrupt):
                finished = "Interrupted, but the run is finished: all of it has been written"
                self.log(
                    finished if is_finished(self.folder) else f"Go on with: {self.resume_command}"
                )
        finally:
            self.close()

    def close(self) -> None:
        """Lets go of the folder."""
        self._lock.release()  # the file stays: deleting it could let two processes in

    def log(self, line: str = "") -> None:
        """Prints the line and adds it to train.log."""
        if not self.writes:
            return
        print(line, flush=True)
        with open(self.folder / self.LOG, "a", encoding="utf-8", errors="replace") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read_log(self) -> str:
        """What was logged so far."""
        log = self.folder / self.LOG
        return log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""

    def write(self, name: str, content: str | bytes) -> Path:
        """Writes a whole file of the run; returns its path."""
        return write_file(self.folder / name, content) if self.writes else self.folder / name

    def remove(self, *names: str) -> None:
        """Deletes files of the run, those that are there."""
        for name in names if self.writes else ():
            (self.folder / name).unlink(missing_ok=True)

    def write_json(self, name: str, value: object) -> Path:
        """Writes a value of dicts, lists, strings and numbers as indented JSON."""
        return self.write(name, json.dumps(value, indent=2) + "\n")

    def write_csv(self, name: str, rows: list[dict]) -> Path:
        """Writes rows of the same keys, the keys as header."""
        return self.write(name, files.as_csv(rows))

    def save_checkpoint(self, name: str, checkpoint: dict) -> Path:
        """Writes tensors, numbers, strings, lists and dicts for `torch.load(weights_only=True)`."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        return self.write(name, buffer.getvalue())


def begin(folder: Path | None, output_dir: str | Path, name: str, team: Team) -> Run:
    """The run's folder: a new one, or `folder` to go on in; open for the team's first process.

    Raises:
        OSError, RunError: as Run.create and Run.reopen.
    """
    run = None
    if team.first:
        run = Run.reopen(folder) if folder else Run.create(output_dir, name)
    where = team.once(lambda: run.folder)
    return run or Run(where, writes=False)


def is_finished(folder: Path) -> bool:
    """Whether the run went through all of its epochs and wrote its results."""
    try:
        return read_json(folder / Run.RESULTS).get("completed") is True
    except UsageError:
        return False


def unfinished(folder: str, output_dir: str | Path) -> tuple[Path, dict]:
    """The run to go on with, and its settings; "" is the newest of output_dir that nobody trains.

    Raises:
        RunError: there is none, it is finished, or another process trains it.
    """
    if folder:
        settings = run_settings.read(Path(folder))
        Run.reopen(Path(folder)).close()
        return Path(folder), settings
    for newest in sorted(Path(output_dir).glob("[0-9]*-[0-9]*-*"), reverse=True):
        if (newest / Run.SETTINGS).is_file() and not is_finished(newest):
            with contextlib.suppress(InUseError):
                return unfinished(str(newest), output_dir)
    raise RunError(f"there is no unfinished run in {output_dir}; give --resume a run's folder")


@dataclass
class State:
    """All that moves while a network is trained, saved and restored as one."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    history: History
    steps_per_epoch: int
    about: dict  # what else a checkpoint tells: network, recipe, seed, mean, std

    def save(self, run: Run) -> None:
        """Everything of the epoch that just ended; last.pt first, from which the rest follows."""
        rows = self.history.rows
        weights = {"epoch": len(rows), "model": self.model.state_dict(), "history": rows}
        movers = ("optimizer", "scheduler", "scaler")
        moved = {name: getattr(self, name).state_dict() for name in movers}
        run.save_checkpoint("last.pt", self.about | weights | moved)
        self._save_rest(run)
        run.log(self.history.line())

    def _save_rest(self, run: Run) -> None:
        rows, weights = self.history.rows, self.model.state_dict()
        run.save_checkpoint("weights.pt", weights)
        if self.history.best_epoch == len(rows):
            best = {"epoch": len(rows), "model": weights, "history": rows}
            run.save_checkpoint("best.pt", self.about | best)
        run.write_csv("log.csv", rows)

    def restore(self, run: Run, team: Team = ALONE) -> bool:
        """Takes up where last.pt was written, with files that were not written any more.

        Returns:
            Whether there was one; without it no epoch had been finished.

        Raises:
            CheckpointError: damaged, of another network, or no checkpoint of such a run.
            OSError: it cannot be read, or the rest not be written.
        """
        path = run.folder / "last.pt"
        self.history.rows = []  # an epoch that is not in last.pt is done again
        checkpoint = team.once(lambda: read_checkpoint(path) if path.is_file() else None)
        if checkpoint is None:
            return False
        load_weights(self.model, path, checkpoint)
        try:
            stored = checkpoint | {"recipe": run_settings.with_defaults(checkpoint["recipe"])}
            others = [key for key, value in self.about.items() if stored[key] != value]
            if others:
                raise ValueError(f"its {others[0]} is another")
            rows = [dict(row) for row in checkpoint["history"]]
            if not 1 <= len(rows) <= self.history.epochs or len(rows) != checkpoint["epoch"]:
                raise ValueError(f"a history of {len(rows)} epochs")
            self.history.rows = rows
            self.history.summary()  # fails where a column is missing
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            files.check_state(self.optimizer)
            self.scheduler.load_state_dict(checkpoint["scheduler"])
            if self.scheduler.last_epoch != len(rows) * self.steps_per_epoch:  # it counts steps
                raise ValueError(f"a schedule at step {self.scheduler.last_epoch}")
            if dict(checkpoint["scaler"]) and self.scaler.is_enabled():  # else on another device
                self.scaler.load_state_dict(checkpoint["scaler"])
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise CheckpointError(f"{path} is no checkpoint of this run: {reason}") from None
        run.remove(run.RESULTS, run.PAGE)  # of an earlier epoch
        self._save_rest(run)
        if self.history.beginning() not in run.read_log():  # the process ended between the two
            run.log(self.history.line())
        return True
