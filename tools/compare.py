"""Which network to choose: every run beside every published figure, as a table and a picture.

    python -m tools.compare                          # the reference runs
    python -m tools.compare output/RUN output/RUN2   # these runs

Runs that differ in their seed alone are one row, mean ± standard deviation. Accuracy is that of
the final weights on the test set; the best epoch's, picked by looking at it, stands beside it.

The table has every run. The pictures leave out those that were stopped at the start (MOST_BELOW).
"""

import argparse
import csv
import functools
import io
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import BaseModel, Field, FiniteFloat, NonNegativeInt, PositiveInt, Strict
from torch.utils.flop_counter import FlopCounterMode

import cli
import networks
import plots
import runs
import utils

REFERENCE = utils.HERE / "output" / "reference"
# Class name to what load_network takes.
NETWORKS = {
    "CNN_Model_1": "1",
    "CNN_Model_2": "2",
    "CNN_Model_3": "3",
    "C1C2C3C4": "baselines/c1c2c3c4.py",
    "CifarNet": "baselines/cifarnet.py",
    "DilatedCNN": "baselines/dilated_cnn.py",
    "ResNet": "baselines/resnet.py",
}
# Points below the published figure of its network at which a run is left out of the pictures: so
# far a recipe does not fall behind by itself (the worst, C1C2C3C4 after 10 of 69 epochs, lacks
# 3.2), a training that was stopped at its start does (ResNet after 2 of 24 epochs lacks 50), and
# says nothing of its network.
MOST_BELOW = 5.0


class Row(NamedTuple):
    """A line of the table; percentages, seconds; None where nothing is known."""

    network: str  # the class; of a file that is not this repository's, "Class (file.py)"
    source: str  # "published", or the recipe, what was changed in it, and the seeds
    changes: str  # "", or what was changed in the recipe: ", distilled from CNN_Model_1"
    epochs: int
    parameters: int
    megabytes: float  # of float32 weights
    macs: float | None  # multiply-adds an image, in millions
    final: float | None
    final_std: float | None
    best: float | None
    to_target: float | None  # epochs until 85 %
    gap: float | None  # points, train minus test
    seconds: float | None  # an epoch
    device: str


class Published(NamedTuple):
    """What was reported elsewhere; epochs is when the figure was reached."""

    final: float
    epochs: int
    to_target: int | None


# The authors' own reports, by their logs; of C1C2C3C4 and DilatedCNN the best epoch is reported.
PUBLISHED = {
    "CNN_Model_1": Published(87.3, 100, 49),
    "CNN_Model_2": Published(87.3, 100, 61),
    "CNN_Model_3": Published(86.4, 100, 66),
    "C1C2C3C4": Published(85.13, 69, 69),
    "CifarNet": Published(87.88, 250, None),
    "DilatedCNN": Published(80.3, 11, None),
    "ResNet": Published(92.22, 24, None),
}
# What --recipe was, in other words: a baseline's own RECIPE is mostly its published one.
SOURCES = {"tuned": "the file's RECIPE", "ours": "model 2's RECIPE", "published": "PUBLISHED"}
COLUMNS = {
    "network": "network",
    "source": "recipe",
    "epochs": "epochs",
    "parameters": "parameters",
    "megabytes": "MB",
    "macs": "MACs (million)",
    "final": "final accuracy (%)",
    "best": "best (%)",
    "to_target": "epochs to 85 %",
    "gap": "train/test gap",
    "seconds": "s an epoch",
    "device": "device",
}


@functools.cache
def size_of(network: str) -> tuple[int, float]:
    """(parameters, millions of multiply-adds an image of 32x32)."""
    choice = NETWORKS[network]
    path = str(utils.HERE / choice) if choice.endswith(".py") else choice
    model = networks.load_network(path).build().eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, 3, 32, 32))
    macs = counter.get_total_flops() / 2e6  # it counts a multiplication and an addition as two
    return sum(parameter.numel() for parameter in model.parameters()), macs


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The finished trainings on the test set among these folders, and one level below them.

    Raises:
        cli.UsageError: a folder that is not there, or holds none.
    """
    found = []
    for folder in folders:
        inside = [folder, *sorted(folder.glob("*"))] if folder.is_dir() else []
        here = [path for path in inside if _is_training(path)]
        if not here:
            raise cli.UsageError(f"{folder} holds no finished training (settings and results)")
        found += here
    return found


def _is_training(folder: Path) -> bool:
    if not (folder / runs.Run.SETTINGS).is_file() or not runs.is_finished(folder):
        return False
    settings = runs.read_settings(folder)
    return not settings.get("dry_run") and not settings.get("val_split")


class Training(NamedTuple):
    """What a run's files say, of the keys that are read here; checked."""

    folder: Path
    settings: dict
    results: dict

    @property
    def own(self) -> bool:
        """Whether the network is this repository's of that name, not a class of another file."""
        network = self.settings["network"]
        file = self.settings.get("model_file")
        return network in NETWORKS and file in (None, _file_of(network))

    @property
    def network(self) -> str:
        """The class's name; of a file that is not this repository's, with the file's."""
        network, file = self.settings["network"], self.settings.get("model_file")
        return network if self.own or file is None else f"{network} ({Path(file).name})"

    @property
    def macs(self) -> float | None:
        """Millions of multiply-adds an image; None where the file of the network is not here."""
        if not self.own:
            return None
        parameters, macs = size_of(self.settings["network"])
        return macs if parameters == self.settings["parameters"] else None  # edited since

    @property
    def short_of(self) -> float | None:
        """The published figure, in percent, if the run is so far below it that it was stopped."""
        if not self.own or self.settings["network"] not in PUBLISHED:
            return None
        figure = PUBLISHED[self.settings["network"]].final
        return figure if figure - self.results["final_accuracy"] > MOST_BELOW else None


def _file_of(network: str) -> str:
    choice = NETWORKS[network]
    return choice if choice.endswith(".py") else f"model_{choice}.py"


class Target(BaseModel, strict=True):
    """What is read of a recipe."""

    target_accuracy: FiniteFloat


class Arguments(BaseModel, strict=True):
    """What is read of a command line."""

    set: list[Annotated[tuple[str, object], Strict(False)]] = Field(default_factory=list)


class Settings(runs.Settings, strict=True):
    """What a training that is compared must say of itself."""

    network: str
    parameters: PositiveInt
    epochs: PositiveInt
    seed: NonNegativeInt
    device: str
    recipe: Target
    recipe_name: Literal[tuple(SOURCES)] = "tuned"
    arguments: Arguments | None = None
    teacher: dict[str, str] | None = None


class Results(BaseModel, strict=True):
    """What is read of results.json."""

    final_accuracy: FiniteFloat
    best_accuracy: FiniteFloat
    gap_points: FiniteFloat
    train_seconds: FiniteFloat
    epochs_done: PositiveInt
    target_reached_at: PositiveInt | None = None


def read_training(folder: Path) -> Training:
    """The settings and results of a finished run.

    Raises:
        runs.RunError: a file is missing or damaged, or a key has a value of another kind.
    """
    path = folder / runs.Run.RESULTS
    results = runs.validated(path, runs.read_json(path), Results)
    return Training(folder, runs.read_settings(folder, Settings), results)


def changes(settings: dict) -> str:
    """What a run was asked for instead of the file's recipe: "", or ", lr 0.03, ..."."""
    asked = settings.get("arguments") or {}
    flags = {name: asked.get(name) for name in ("batch_size", "lr", "weight_decay")}
    values = {name: value for name, value in flags.items() if value is not None}
    values |= dict(asked.get("set") or [])
    teacher = settings.get("teacher")
    if teacher and "network" in teacher and "teacher" in values:
        del values["teacher"]
        values = {"distilled from": teacher["network"]} | values
    return "".join(f", {name} {value}" for name, value in values.items())


def measured(trainings: Sequence[Training]) -> list[Row]:
    """A row for each network (by its code, where that is known), recipe and number of epochs."""
    groups: dict[tuple, list[Training]] = {}
    for training in trainings:
        settings = training.settings
        key = (
            training.network,
            settings.get("model_sha256"),
            settings["parameters"],  # older runs tell networks of one name apart by this alone
            settings.get("recipe_name") or "tuned",
            settings["epochs"],
            json.dumps(settings["recipe"], sort_keys=True),
        )
        groups.setdefault(key, []).append(training)
    rows = []
    for (network, _, _, recipe, epochs, _), members in groups.items():
        settings = members[0].settings
        every = [member.results for member in members]
        finals = [results["final_accuracy"] for results in every]
        reached = [results.get("target_reached_at") for results in every]
        target = settings["recipe"]["target_accuracy"] == 85.0 and None not in reached
        seeds = sorted({member.settings["seed"] for member in members})
        rows.append(
            Row(
                network=network,
                source=f"{SOURCES[recipe]}{changes(settings)}, seed {', '.join(map(str, seeds))}",
                changes=changes(settings),
                epochs=epochs,
                parameters=settings["parameters"],
                megabytes=settings["parameters"] * 4 / 1e6,
                macs=members[0].macs,
                final=statistics.mean(finals),
                final_std=statistics.stdev(finals) if len(finals) > 1 else None,
                best=statistics.mean(results["best_accuracy"] for results in every),
                to_target=statistics.mean(reached) if target else None,
                gap=statistics.mean(results["gap_points"] for results in every),
                seconds=statistics.mean(
                    results["train_seconds"] / results["epochs_done"] for results in every
                ),
                device=settings["device"],
            )
        )
    return rows


class Curve(NamedTuple):
    """One run's test accuracy, in percent, after each epoch."""

    network: str
    label: str
    accuracies: list[float]


def curves(trainings: Sequence[Training]) -> list[Curve]:
    """A curve for each run, of those that have their table (log.csv).

    Raises:
        runs.RunError: a table without epochs, or whose test_acc is no number.
    """
    found = []
    for training in trainings:
        table, settings = training.folder / "log.csv", training.settings
        if not table.is_file():
            continue
        try:
            with open(table, newline="") as file:
                accuracies = [float(row["test_acc"]) for row in csv.DictReader(file)]
        except (KeyError, TypeError, ValueError, csv.Error):
            accuracies = []
        if not accuracies or not all(map(math.isfinite, accuracies)):
            raise runs.RunError(f"{table}: test_acc must be a number for each epoch")
        label = (
            f"{training.network}{changes(settings)}, {settings['epochs']} epochs, "
            f"seed {settings['seed']}"
        )
        found.append(Curve(training.network, label, accuracies))
    return found


def left_out(trainings: Sequence[Training]) -> str:
    """What of these the pictures do not show, and why, in a line; "" if they show all."""
    names = [
        f"{each.network} after {each.settings['epochs']} epochs "
        f"({each.results['final_accuracy']:.2f} %, published {each.short_of:.2f} %)"
        for each in trainings
        if each.short_of is not None
    ]
    if not names:
        return ""
    return (
        f"Not in the pictures, because more than {MOST_BELOW:g} points below the published figure "
        f"(stopped at the start): {'; '.join(names)}"
    )


def published() -> list[Row]:
    """A row for each network that has a published figure."""
    rows = []
    for network, report in PUBLISHED.items():
        parameters, macs = size_of(network)
        rows.append(
            Row(
                network, "published", "", report.epochs, parameters, parameters * 4 / 1e6, macs,
                report.final, None, None, report.to_target, None, None, "",
            )
        )  # fmt: skip
    return rows


def cells(row: Row) -> list[str]:
    """The row's values as text."""
    spread = "" if row.final_std is None else f" ± {row.final_std:.2f}"
    return [
        row.network,
        row.source,
        str(row.epochs),
        f"{row.parameters:,}",
        f"{row.megabytes:.2f}",
        *(_form(row.macs, ".1f"), _form(row.final, ".2f") + spread, _form(row.best, ".2f")),
        *(_form(row.to_target, "g"), _form(row.gap, "+.2f"), _form(row.seconds, ".1f")),
        row.device,
    ]


def _form(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def markdown(rows: Sequence[Row]) -> str:
    """The table as Markdown."""
    lines = [list(COLUMNS.values()), ["---"] * len(COLUMNS), *map(cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def comma_separated(rows: Sequence[Row]) -> str:
    """The table as CSV, with full digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Row._fields)
    writer.writerows(rows)
    return text.getvalue()


def pareto(rows: Sequence[Row]) -> list[Row]:
    """Rows that no other beats with as few parameters, by rising size."""
    front, best = [], -math.inf
    for row in sorted(rows, key=lambda row: (row.parameters, -row.final)):
        if row.final > best:
            front.append(row)
            best = row.final
    return front


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = cli.ArgumentParser(
        prog="tools.compare", description="All runs beside all published figures."
    )
    add = parser.add_argument
    add("runs", nargs="*", type=Path, help="folders of runs, or of folders of runs (the reference)")
    add("--output-dir", default="output", help="where the results are put (output)")

    def work(args: argparse.Namespace) -> None:
        trainings = [read_training(folder) for folder in find_runs(args.runs or [REFERENCE])]
        shown = [training for training in trainings if training.short_of is None]
        lines, reports, note = curves(shown), published(), left_out(trainings)
        rows = [*reports, *measured(trainings)]
        rows.sort(
            key=lambda row: (-row.parameters, row.network, row.source != "published", row.epochs)
        )
        points = [*reports, *measured(shown)]
        with runs.Run.create(args.output_dir, "compare") as run:
            run.write("compare.md", markdown(rows))
            run.write("compare.csv", comma_separated(rows))
            run.write("compare.png", plots.comparison(points, pareto(points), note))
            run.write("progress.png", plots.progress(lines, reports, note))
            run.log(markdown(rows))
            if note:
                run.log(note)
            run.log(f"Results: {run.folder}")

    return cli.run(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
