"""Command lines: what train.py and the tools are asked for, and how they tell what went wrong."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence

import torch

import cifar10
from errors import Error, UsageError
from parallel import INTERRUPTED, first_to_tell
from support import process

MOST_EPOCHS, LARGEST = 10_000, 1e15  # of flags: far above all sense


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

    0: done. 1: it failed. 2: the request has to be changed. 128 + n: ended by signal n. Errors are
    one line on standard error; a traceback is a bug of this repository.
    """
    program = parser.prog
    with process.steady():
        try:
            return work(parser.parse_args(arguments)) or 0
        except KeyboardInterrupt as error:
            if first_to_tell(INTERRUPTED):
                print(f"\n{program}: {INTERRUPTED}", file=sys.stderr)
            return getattr(error, "status", 130)
        except (Error, OSError) as error:
            reason, status = str(error), getattr(error, "status", 1)
        except torch.OutOfMemoryError:
            reason, status = "out of GPU memory; take smaller batches (train.py --batch-size)", 1
        except (Exception, SystemExit) as error:
            place = process.line_of_model_file(error)
            if place is None and not str(error).startswith("DataLoader worker"):  # one was killed
                raise
            reason, status = f"{place or program}: {type(error).__name__}: {error}", 1
            reason = reason.splitlines()[0]
        if first_to_tell(reason):
            print(f"{program}: error: {' '.join(reason.splitlines())}", file=sys.stderr)
        return status


def ask(question: str, default: str, parse: Callable[[str], object]) -> object:
    """The parsed answer, from a terminal or a pipe; a wrong one is explained and asked again.

    Raises:
        SystemExit: the terminal's user ended the input.
        UsageError: the last answer on a pipe was a wrong one; without any, the default is taken.
    """
    wrong = None
    while True:
        try:
            text = input(f"{question} [{default}]: ").strip()
        except EOFError:
            if sys.stdin.isatty():
                print("\nno answer, nothing was done")
                raise SystemExit(0) from None
            if wrong:
                raise UsageError(f"{wrong} (and no other answer followed)") from None
            text = ""
        if not sys.stdin.isatty():
            print(text)
        try:
            return parse(text or default)
        except (argparse.ArgumentTypeError, UsageError) as error:
            wrong = str(error)
            print(f"  {wrong}")


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


def real_number(positive: bool, highest: float = LARGEST) -> Callable[[str], float]:
    """A parser of numbers up to the highest, above 0 (positive) or from 0 up."""
    allowed = f"a number {'above 0' if positive else 'from 0 up'}, {highest:g} at most"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value <= highest or (positive and value == 0):
            raise argparse.ArgumentTypeError(f"{text!r:.60} is not {allowed}")
        return value

    return parse


parse_epochs = whole_number(1, MOST_EPOCHS)


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """--data-dir, --output-dir and --dry-run, as train.py and the tools have them."""
    add = parser.add_argument
    add("--data-dir", default="data", help="where CIFAR-10 lies or is put (data)")
    add("--output-dir", default="output", help="where the results are put (output)")
    add("--dry-run", action="store_true", help="on the images in data/sample, without network")


def load_data(args: argparse.Namespace) -> cifar10.CIFAR10:
    """CIFAR-10, or its sample in a dry run."""
    if not args.dry_run:
        seconds = getattr(args, "download_timeout", cifar10.STALL_SECONDS)
        return cifar10.load_cifar10(args.data_dir, seconds)
    data = cifar10.load_sample()
    print(f"Dry run: {len(data.train_images)} training and {len(data.test_images)} test images")
    return data
