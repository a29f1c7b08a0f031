"""Test accuracy over minutes of training: the usual way's run beside one of ours.

    python -m tools.minutes USUAL_FOLDER OURS_FOLDER [--bench output/.../bench.json]

The folders hold log.csv, of tools.usual or train.py. Minutes are of training, without evaluation.
With --bench an epoch takes as long as 50,000 images at that way's median speed there: a published
recipe that our loop trained gives the usual way's epochs, the bench its time.
"""

import argparse
import csv
import sys
from itertools import accumulate
from pathlib import Path

import cli
import plots
import runs


def read_log(folder: Path) -> tuple[list[float], list[float]]:
    """Minutes of training until the end of every epoch, and the test accuracies there in percent.

    Raises:
        cli.UsageError: no log.csv with epochs in it, or without one of the columns.
    """
    path = folder / "log.csv"
    try:
        rows = list(csv.DictReader(path.read_text().splitlines()))
        minutes = list(accumulate(float(row["train_seconds"]) / 60 for row in rows))
        accuracies = [float(row["test_acc"]) for row in rows]
        if not rows:
            raise ValueError("no epoch in it")
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"no column {error}" if isinstance(error, KeyError) else error
        raise cli.UsageError(f"{path} cannot be read: {reason}") from None
    return minutes, accuracies


def epoch_minutes(path: Path, way: str) -> float:
    """Minutes of training on 50,000 images, at the median speed that a bench.json has for the way.

    Raises:
        runs.RunError: no such file, or not of tools.bench.
    """
    try:
        return 50_000 / runs.read_json(path)["images_per_second"][way]["median"] / 60
    except (KeyError, TypeError, ZeroDivisionError):
        raise runs.RunError(f"{path} holds no speed of {way!r}; is it of tools.bench?") from None


def draw(args: argparse.Namespace) -> None:
    """Writes the picture and prints the table."""
    curves = {}
    for way, folder in (("usual", args.usual), ("ours", args.ours)):
        minutes, accuracies = read_log(folder)
        name = f"{way}: {folder.resolve().name}"
        if args.bench and args.bench_for in (way, "both"):
            epoch = epoch_minutes(args.bench, way)
            minutes = [epoch * (number + 1) for number in range(len(accuracies))]
            name += f"\n(seconds an epoch: tools.bench, {60 * epoch:,.0f})"
        pairs = zip(minutes, accuracies, strict=True)
        reached = next((minute for minute, value in pairs if value >= args.target), None)
        curves[name] = (minutes, accuracies, reached)
        best = f"not reached, at most {max(accuracies):.2f} %"
        when = f"{reached:,.2f} minutes" if reached else best
        print(f"{way:<6}{args.target:g} % on the test set: {when}")
    usual, ours = (reached for _, _, reached in curves.values())
    if usual and ours:
        print(f"ratio {usual / ours:.2f}")
    picture = plots.accuracy_over_minutes(curves, args.target, "Test accuracy over training time")
    print(f"Picture: {runs.write_file(args.output, picture)}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = cli.ArgumentParser(prog="tools.minutes", description="Draw accuracy over minutes.")
    add = parser.add_argument
    add("usual", type=Path, help="folder with the log.csv of the usual way")
    add("ours", type=Path, help="folder with the log.csv of a run of train.py")
    add("--bench", type=Path, metavar="BENCH_JSON", help="whose seconds an epoch are taken")
    add("--bench-for", choices=("usual", "ours", "both"), default="both", help="for which (both)")
    add("--target", type=cli.real_number(positive=True), default=85.0, help="in percent (85)")
    add("--output", type=Path, default="minutes.png", help="the picture (minutes.png)")
    return cli.run(parser, draw, arguments)


if __name__ == "__main__":
    sys.exit(main())
