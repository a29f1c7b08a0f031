"""Command lines: what train.py and the tools are asked for, and how they report what went wrong.

Nothing here trains: text in, checked values out.
"""

import argparse
import ast
import contextlib
import math
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Annotated, Literal, TextIO

import torch
from pydantic import BaseModel, FiniteFloat, NonNegativeInt, PositiveInt, Strict

import cifar10
import recipes
from errors import Error, UsageError

MOST_EPOCHS = 10_000
LARGEST = recipes.LARGEST
# What a flag that is not given means; of the others, that nothing was asked for.
DEFAULTS = {
    "recipe": "tuned",
    "set": [],
    "seed": 0,
    "data_dir": "data",
    "output_dir": "output",
    "loader": "batched",
    "compile": False,
    "download_timeout": 60.0,
    "dry_run": False,
}
# What may be given anew when a run is gone on with; everything else stays as it began.
FREE_ON_RESUME = ("resume", "model", "device", "data_dir", "output_dir", "download_timeout")


class StoredArguments(BaseModel, strict=True):
    """What settings.json holds of a command line."""

    model: str
    epochs: PositiveInt
    recipe: Literal["tuned", "published", "ours"]
    batch_size: PositiveInt | None
    lr: FiniteFloat | None
    weight_decay: FiniteFloat | None
    set: list[Annotated[tuple[str, object], Strict(False)]]
    seed: NonNegativeInt
    device: str | None
    data_dir: str
    output_dir: str
    loader: str
    workers: NonNegativeInt | None
    compile: bool
    val_split: PositiveInt | None
    download_timeout: FiniteFloat
    dry_run: bool


class ArgumentParser(argparse.ArgumentParser):
    """Argparse whose errors are one line, without the usage above it."""

    def error(self, message: str) -> None:
        raise UsageError(f"{message}; see --help")


def run(
    parser: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace], int | None],
    arguments: Sequence[str] | None = None,
) -> int:
    """Parses the arguments and does the work; returns the exit status, which the work may choose.

    0: done. 1: it could not be done. 2: something else has to be asked for. 130 and the like: a
    signal. Errors are one line on standard error; a traceback is a fault of this repository.
    """
    program, status = parser.prog, None
    _prepare_streams()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as the doors set it for their imports
        with contextlib.suppress(ValueError):  # not the main thread, which has no signals
            signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = work(parser.parse_args(arguments))
    except KeyboardInterrupt as error:
        print(f"\n{program}: interrupted", file=sys.stderr)
        return getattr(error, "status", 130)
    except (Error, OSError) as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return getattr(error, "status", 1)
    except torch.OutOfMemoryError:
        print(f"{program}: error: out of GPU memory; give a smaller --batch-size", file=sys.stderr)
        return 1
    except (Exception, SystemExit) as error:
        place = _line_of_model_file(error)
        if place is None:
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"{program}: error: {place}: {reason}", file=sys.stderr)
        return 1
    return status or 0


def _prepare_streams() -> None:
    """Output that is closed, or knows few characters, ends no work."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell: without this, the next file would take its place
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (open until the process ends)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _line_of_model_file(error: BaseException) -> str | None:
    """Where in a model file the error arose, if in one: whatever somebody's network may raise."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if isinstance(frame.f_globals.get("RECIPE"), dict):
            return f"{frame.f_code.co_filename}, line {line}"
    return None


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """--data-dir, --output-dir and --dry-run, as train.py has them, for the tools."""
    add = parser.add_argument
    add("--data-dir", default="data", help="where CIFAR-10 lies or is put (data)")
    add("--output-dir", default="output", help="where the results are put (output)")
    add("--dry-run", action="store_true", help="on the images in data/sample, without network")


def load_data(args: argparse.Namespace) -> cifar10.CIFAR10:
    """CIFAR-10, or its sample in a dry run."""
    if not args.dry_run:
        return cifar10.load_cifar10(args.data_dir, getattr(args, "download_timeout", 60.0))
    data = cifar10.load_sample()
    print(f"Dry run: {len(data.train_images)} training and {len(data.test_images)} test images")
    return data


def whole_number(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    """A parser of whole numbers in a range, for argparse and for the questions."""
    allowed = f"a whole number from {lowest} " + (f"to {highest}" if highest else "up")

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < lowest or (highest is not None and value > highest):
            raise argparse.ArgumentTypeError(f"{text!r:.60} is not {allowed}")
        return value

    return parse


def real_number(positive: bool) -> Callable[[str], float]:
    """A parser of numbers up to LARGEST, above 0 (positive) or from 0 up."""
    allowed = "a number above 0" if positive else "a number from 0 up"
    allowed += f", {LARGEST:g} at most"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value <= LARGEST or (positive and value == 0):
            raise argparse.ArgumentTypeError(f"{text!r:.60} is not {allowed}")
        return value

    return parse


def recipe_entry(text: str) -> tuple[str, object]:
    """KEY=VALUE as a key of the recipe and a number or a word."""
    key, equals, value = text.partition("=")
    known = [field.name for field in fields(recipes.Recipe)]
    if not equals or key not in known:
        raise argparse.ArgumentTypeError(
            f"{text!r:.60} is not KEY=VALUE with a KEY out of {', '.join(known)}"
        )
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return key, value


parse_epochs = whole_number(1, MOST_EPOCHS)


def training_parser() -> ArgumentParser:
    """The command line of train.py; what it leaves out is None."""
    parser = ArgumentParser(
        prog="train.py",
        description="Train a small CNN on CIFAR-10. Asks for the model and the epochs unless told.",
    )
    add = parser.add_argument
    add("--model", help="1, 2, 3, or a path to a model file of your own, which is run as code")
    add("--epochs", type=parse_epochs, help="passes over the training images")
    add(
        "--recipe",
        choices=("tuned", "published", "ours"),
        help="the model file's RECIPE; its PUBLISHED one, for comparison; or, for any network, the "
        "recipe of model 2 (tuned)",
    )
    add("--batch-size", type=whole_number(1), help="instead of the recipe's")
    add("--lr", type=real_number(positive=True), help="peak learning rate, instead of the recipe's")
    add("--weight-decay", type=real_number(positive=False), help="instead of the recipe's")
    add(
        "--set",
        type=recipe_entry,
        action="append",
        metavar="KEY=VALUE",
        help="any other key of the recipe, such as label_smoothing=0.1; may be given repeatedly",
    )
    add("--seed", type=whole_number(0, 2**32 - 1), help="of all that is random (0)")
    add("--device", help="cuda, cuda:1, mps or cpu (default: the first of these that is there)")
    add("--data-dir", help="where CIFAR-10 lies or is put (data)")
    add("--output-dir", help="where the run's folder is made (output)")
    add(
        "--loader",
        choices=("batched", "albumentations"),
        help="augment whole batches on the device, or image by image in worker processes "
        "(batched, where every transform has a batched form)",
    )
    add(
        "--workers",
        type=whole_number(0, 256),
        help="worker processes of the albumentations loader (one a core, at most 8; 0 = none)",
    )
    add(
        "--compile",
        action="store_true",
        default=None,
        help="torch.compile the training pass (slower on the CPU, not yet measured on a GPU)",
    )
    add(
        "--val-split",
        type=whole_number(1),
        metavar="N",
        help="hold out N training images and report them each epoch; the test set is read once, "
        "at the end",
    )
    add(
        "--download-timeout",
        type=real_number(positive=False),
        metavar="SECONDS",
        help="how long a download may crawl before the next source is tried (60; 0 = for ever)",
    )
    add(
        "--dry-run",
        action="store_true",
        default=None,
        help="one short epoch (or --epochs) on the images in data/sample, without network",
    )
    add(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN_FOLDER",
        help="go on with a run that was cut off, in its folder and with its settings (without a "
        "folder: the newest unfinished run of --output-dir)",
    )
    return parser


class Questions:
    """Asks on a terminal, reads answers from a pipe, takes the defaults where there is neither."""

    PATIENCE = 1.0  # seconds that a pipe may stay silent before it counts as empty

    def __init__(self, stdin: TextIO | None) -> None:
        self.terminal = stdin is not None and stdin.isatty()
        self.answers = iter(()) if self.terminal else self._piped(stdin)

    def ask(self, question: str, default: str, parse: Callable[[str], object]) -> object:
        """The parsed answer; a wrong one is explained and asked again.

        Raises:
            EOFError: the terminal's user ended the input.
            UsageError: the last answer on a pipe was a wrong one.
        """
        wrong = None
        while True:
            if self.terminal:
                text = input(f"{question} [{default}]: ").strip()
            else:
                text = next(self.answers, None)
                if text is None and wrong:
                    raise UsageError(f"{wrong} (and no other answer followed)")
                text = (text or "").strip()
                print(f"{question} [{default}]: {text}")
            try:
                return parse(text or default)
            except (argparse.ArgumentTypeError, UsageError) as error:
                wrong = str(error)
                print(f"  {wrong}")

    def _piped(self, stdin: TextIO | None) -> Iterator[str]:
        if stdin is None:
            return
        try:
            file = stdin.fileno()
            text = b""
            while select.select([file], [], [], self.PATIENCE)[0]:
                if not (more := os.read(file, 65536)):
                    break
                text += more
        except (OSError, ValueError):  # no file behind it; or Windows, which selects sockets only
            text = stdin.read().encode()
        yield from text.decode(errors="replace").splitlines()
