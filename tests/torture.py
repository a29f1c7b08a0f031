"""Kills trainings at random instants and resumes them: nothing may be lost, and no bit may differ.

    python -m tests.torture 1000

A round is a SIGKILL to a real training on data/sample, somewhere between its first line and its
last; what lies in the run's folder then must be whole, and `--resume` must go on with it until,
some kills later, it is finished with exactly the weights of a training that nobody disturbed.
Three runs of four train by the default path, every fourth with two worker processes.

Pictures are one pixel here: drawing takes most of so short a run, and all files are written by
the same function. The instants follow from --seed, but where they hit depends on the machine.
"""

import argparse
import csv
import hashlib
import io
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

import cli
import plots
import runs
import train
from errors import Error
from support import files
from support.history import duration
from tests import forked
from tests.conftest import run_in

EPOCHS, LONGEST = 3, 300  # seconds of a run
PIXEL = io.BytesIO()
Image.new("RGB", (1, 1)).save(PIXEL, "PNG")
NETWORK = """
from torch import nn

RECIPE = dict(optimizer="muon", lr=0.05, weight_decay=5e-4, schedule="onecycle", batch_size=100,
              target_accuracy=85.0, target_epochs=60, label_smoothing=0.1)


class Small(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Dropout(0.2), nn.Conv2d(16, 16, 3, stride=2, groups=16, bias=False),
            nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(16, 10),
        )
"""


# Of four runs.
KINDS = ((), (), (), ("--loader", "albumentations", "--workers", "2"))


class TortureError(Error):
    """A run that lost something, or was not what it would have been."""


def spawn(arguments: Sequence[str], screen: Path) -> int:
    """Forks a process that runs train.py with these arguments; returns its number.

    A fork, because importing PyTorch anew would take longer than the whole run.
    """
    with open(screen, "wb") as file:
        return forked.fork(lambda: train.main(arguments), 0, file.fileno(), file.fileno())


def wait(process: int, seconds: float) -> int | None:
    """The exit status of the process; None if it had to be killed after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def weights_of(folder: Path) -> str:
    """SHA-256 of all the final weights."""
    weights = files.read_checkpoint(folder / "weights.pt")
    digest = hashlib.sha256()
    for name, value in weights.items():
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_files(folder: Path) -> None:
    """Every file of the folder is whole.

    Raises:
        TortureError, or whatever a reader raises on a broken file.
    """
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue  # the lock, or what was being written at the last instant
        if path.suffix == ".pt":
            files.read_checkpoint(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png":
            Image.open(path).verify()
        elif path.suffix == ".html":
            if not path.read_text().endswith("</html>\n"):
                raise TortureError(f"{path} is cut off")
        elif path.suffix == ".csv":
            with open(path, newline="") as file:
                epochs = [int(row["epoch"]) for row in csv.DictReader(file, strict=True)]
            if epochs != list(range(1, len(epochs) + 1)):
                raise TortureError(f"{path} lists the epochs {epochs}")
        elif not path.read_text().endswith("\n"):
            raise TortureError(f"{path} is cut off")


def check_finished(folder: Path, wanted: str) -> None:
    """The finished run has every epoch once, in its log and table, and the wanted weights."""
    check_files(folder)
    if weights_of(folder) != wanted:
        raise TortureError(f"{folder} ended with other weights than the undisturbed run")
    log = (folder / "train.log").read_text()
    for epoch in range(1, EPOCHS + 1):
        if log.count(f"Epoch [{epoch}/{EPOCHS}] - ") != 1:
            raise TortureError(f"{folder}/train.log does not hold epoch {epoch} exactly once")
    with open(folder / "log.csv", newline="") as file:
        if sum(1 for _ in csv.DictReader(file)) != EPOCHS:
            raise TortureError(f"{folder}/log.csv does not hold {EPOCHS} epochs")


class Torture:
    """Runs, kills and resumes in a folder of its own."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.draw = random.Random(seed)
        self.screen = root / "screen.txt"
        self.network = root / "small.py"
        self.network.write_text(NETWORK)
        self.rounds = self.kills = self.resumed = self.finished = 0
        self.undisturbed: dict[tuple[str, ...], tuple[str, float]] = {}
        drawn = PIXEL.getvalue()
        for name in ("curves", "confusion_matrix", "class_accuracy", "misclassified"):
            setattr(plots, name, lambda *_: drawn)
        plots.augmentations = lambda *_: drawn
        torch.set_num_threads(1)  # a forked process cannot use the threads of another

    def arguments(self, output: Path, kind: Sequence[str]) -> list[str]:
        return [
            *("--dry-run", "--model", str(self.network), "--epochs", str(EPOCHS)),
            *("--output-dir", str(output), *kind),
        ]

    def reference(self, kind: tuple[str, ...]) -> tuple[str, float]:
        """Weights and duration of a training of that kind that nobody disturbs."""
        if kind not in self.undisturbed:
            output = self.root / f"undisturbed-{len(self.undisturbed)}"
            started = time.monotonic()
            status = wait(spawn(self.arguments(output, kind), self.screen), LONGEST)
            seconds = time.monotonic() - started
            self.expect(status == 0, status)
            folder = run_in(output)
            self.undisturbed[kind] = weights_of(folder), seconds
        return self.undisturbed[kind]

    def expect(self, good: bool, status: int | None) -> None:
        if not good:
            raise TortureError(f"exit status {status}:\n{self.screen.read_text()}")

    def run(self, rounds: int, kinds: Sequence[tuple[str, ...]] = KINDS) -> None:
        """Until that many more kills have hit a living training; the last run is finished."""
        self.rounds = self.kills + rounds
        for kind in itertools.cycle(kinds):
            if self.kills == self.rounds:
                break
            self.one_run(self.root / f"run-{self.finished}", kind)

    def one_run(self, output: Path, kind: tuple[str, ...]) -> None:
        wanted, seconds = self.reference(kind)
        arguments, folder = self.arguments(output, kind), None
        while True:
            process = spawn(arguments, self.screen)
            enough = self.kills == self.rounds
            status = wait(process, LONGEST if enough else self.draw.uniform(0, seconds))
            if status is not None:
                break
            self.expect(not enough, status)
            self.kills += 1
            made = [path for path in output.glob("*") if path.is_dir()]
            if len(made) > 1:
                raise TortureError(f"a resumed run made a second folder: {made}")
            if made and (made[0] / runs.Run.SETTINGS).is_file():
                folder = made[0]
                check_files(folder)
                if not runs.is_finished(folder):
                    self.resumed += 1
                    # Both forms of --resume must find it.
                    named = ["--resume", str(folder)] if self.draw.random() < 0.5 else ["--resume"]
                    arguments = [*named, "--output-dir", str(output)]
                    arguments += ["--model", str(self.network)]
                    continue
                status = 0
                break
            # Nothing of the run had been written: it starts once more, under the same name.
            for path in made:
                for file in path.iterdir():
                    file.unlink()
                path.rmdir()
        self.expect(status == 0, status)
        folder = run_in(output)
        check_finished(folder, wanted)
        self.finished += 1


def torture(args: argparse.Namespace) -> int:
    """Does so many rounds, and tells what they found; an interruption tells what was found so far.

    Raises:
        TortureError: something was lost.
    """
    started, status = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as root:
        found = Torture(Path(root), args.seed)
        try:
            found.run(args.rounds)
        except KeyboardInterrupt:
            status = 130
        except Exception as error:
            raise TortureError(f"after {found.kills} kills: {error}") from error
    print(
        f"{found.kills} kills, {found.resumed} resumed, {found.finished} runs finished with the "
        f"weights of the undisturbed run, bit for bit; {duration(time.monotonic() - started)}, "
        f"seed {args.seed}"
    )
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = cli.ArgumentParser(
        prog="tests.torture",
        description="SIGKILL trainings at random instants, resume them, compare their weights.",
    )
    add = parser.add_argument
    add("rounds", type=cli.whole_number(1), help="how many kills")
    add("--seed", type=cli.whole_number(0), default=0, help="of the instants (0)")
    return cli.run(parser, torture, arguments)


if __name__ == "__main__":
    sys.exit(main())
