"""Command lines: what train.py and the tools are asked for, and how they tell what went wrong."""

import argparse
import contextlib
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

import torch

import cifar10
from errors import Error, UsageError

MOST_EPOCHS, LARGEST = 10_000, 1e15  # of flags: far above all sense


class ArgumentParser(argparse.ArgumentParser):
    """Argparse whose errors are one line, without the usage above it."""

    def error(self, message: str) -> None:
        raise UsageError(f"{message}; see --help")


class Interruption(KeyboardInterrupt):
    """Ctrl-C, or the system's wish that the process ends; `status` is what it exits with."""

    def __init__(self, number: int) -> None:
        super().__init__("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)
        self.status = 128 + number  # as shells report it


def _interrupt(number: int, _frame: object) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):  # once is enough: what is done is being saved now
        signal.signal(each, signal.SIG_IGN)
    if hasattr(signal, "SIGCHLD"):  # it may have ended the DataLoader's workers, too
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    raise Interruption(number)


def run(
    parser: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace], int | None],
    arguments: Sequence[str] | None = None,
) -> int:
    """Parses the arguments and does the work; returns the exit status, which the work may choose.

    0: done. 1: it could not be done. 2: something else has to be asked for. 130 and the like: a
    signal. Errors are one line on standard error; a traceback is a fault of this repository.
    """
    program, before = parser.prog, {}
    _prepare_streams()
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not the main thread, which has no signals
                before[number] = signal.signal(number, _interrupt)
        return work(parser.parse_args(arguments)) or 0
    except KeyboardInterrupt as error:
        print(f"\n{program}: interrupted", file=sys.stderr)
        return getattr(error, "status", 130)
    except (Error, OSError) as error:
        reason, status = str(error), getattr(error, "status", 1)
    except torch.OutOfMemoryError:
        reason, status = "out of GPU memory; give a smaller --batch-size", 1
    except (Exception, SystemExit) as error:
        place = _line_of_model_file(error)
        if place is None and not str(error).startswith("DataLoader worker"):  # one was killed
            raise
        reason, status = f"{place or program}: {type(error).__name__}: {error}".splitlines()[0], 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    print(f"{program}: error: {' '.join(reason.splitlines())}", file=sys.stderr)
    return status


def _prepare_streams() -> None:
    """Streams that are closed, or know few characters, end no work."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell: without this, the next file would take its place
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (open until the process ends)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _line_of_model_file(error: BaseException) -> str | None:
    """Where in a model file the error arose, if in one: whatever somebody's network may raise."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if isinstance(frame.f_globals.get("RECIPE"), dict):
            return f"{frame.f_code.co_filename}, line {line}"
    return None


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


def real_number(positive: bool) -> Callable[[str], float]:
    """A parser of numbers up to LARGEST, above 0 (positive) or from 0 up."""
    allowed = f"a number {'above 0' if positive else 'from 0 up'}, {LARGEST:g} at most"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value <= LARGEST or (positive and value == 0):
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
        return cifar10.load_cifar10(args.data_dir, getattr(args, "download_timeout", 60.0))
    data = cifar10.load_sample()
    print(f"Dry run: {len(data.train_images)} training and {len(data.test_images)} test images")
    return data
