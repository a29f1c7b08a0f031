"""Test accuracy over minutes of training: the usual way's run beside one of ours.

    python -m tools.minutes USUAL_FOLDER OURS_FOLDER [--bench output/.../bench.json]

The folders hold log.csv, of tools.usual or train.py. Minutes are of training, without evaluation.
With --bench an epoch takes as long as 50,000 images at that way's median speed there: a published
recipe that our loop trained gives the usual way's epochs, the bench its time.
"""

import argparse
import csv
import json
import sys
from itertools import accumulate
from pathlib import Path

from matplotlib.figure import Figure

import cli
import plots
from support import files


def read_curve(folder: Path, way: str, bench: Path | None) -> tuple[list[float], list[float]]:
    """Minutes of training until the end of every epoch, and the test accuracies there in percent.

    Raises:
        cli.UsageError: no log.csv with epochs in it, or no bench.json with that way's speed.
    """
    path = folder / "log.csv"
    try:
        rows = list(csv.DictReader(path.read_text().splitlines()))
        accuracies = [float(row["test_acc"]) for row in rows]
        seconds = [float(row["train_seconds"]) for row in rows]
        if not rows:
            raise ValueError("no epoch in it")
        if bench:
            path = bench
            speed = json.loads(path.read_text())["images_per_second"][way]["median"]
            seconds = [50_000 / speed] * len(rows)
        if not min(seconds) > 0:
            raise ValueError("an epoch of no time")
    except (OSError, ValueError, TypeError, KeyError, ZeroDivisionError, csv.Error) as error:
        reason = f"there is no {error} in it" if isinstance(error, KeyError) else error
        raise cli.UsageError(f"{path} cannot be read: {reason}") from None
    return [total / 60 for total in accumulate(seconds)], accuracies


def draw(args: argparse.Namespace) -> None:
    """Writes the picture and prints the table."""
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes = figure.subplots()
    reached = []
    ways = {"usual": (args.usual, plots.TRAIN), "ours": (args.ours, plots.TEST)}
    for way, (folder, color) in ways.items():
        bench = args.bench if args.bench_for in (way, "both") else None
        minutes, accuracies = read_curve(folder, way, bench)
        name = f"{way}: {folder.resolve().name}"
        if bench:
            name += f"\n(seconds an epoch: tools.bench, {60 * minutes[0]:,.0f})"
        above = [place for place, value in enumerate(accuracies) if value >= args.target]
        when = f"{minutes[above[0]]:,.2f} minutes" if above else "not reached"
        best = "" if above else f", at most {max(accuracies):.2f} %"
        print(f"{way:<6}{args.target:g} % on the test set: {when}{best}")
        label = f"{name}\n{args.target:g} %: {when}"
        axes.plot(minutes, accuracies, color=color, marker="o", markersize=3, label=label)
        if above:
            reached.append(minutes[above[0]])
            axes.axvline(reached[-1], color=color, linestyle=":")
    if len(reached) == 2:
        print(f"ratio {reached[0] / reached[1]:.2f}")
    axes.axhline(args.target, color=plots.MARK, linestyle="--", label=f"{args.target:g} %")
    axes.set(title="Test accuracy over training time", xscale="log", ylabel="test accuracy (%)")
    axes.set_xlabel("minutes of training (logarithmic)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", ncols=3)
    print(f"Picture: {files.write_file(args.output, plots.png(figure))}")


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
