"""Which network to choose: every run beside every published figure, as a table and a picture.

    python -m tools.compare                          # the reference runs
    python -m tools.compare output/RUN output/RUN2   # these runs

Runs that differ in their seed alone are one row, mean ± standard deviation. Accuracy is that of
the final weights on the test set; the best epoch's, picked by looking at it, stands beside it. The
table has every run; the pictures leave out those of far too few epochs (MOST_BELOW).
"""

import argparse
import csv
import functools
import statistics
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox
from pydantic import BaseModel, FiniteFloat, NonNegativeInt, PositiveInt, TypeAdapter, conlist
from torch.utils.flop_counter import FlopCounterMode

import cli
import networks
import plots
import runs
from support import settings as stored
from support.files import HERE, read_json

# Class name to what load_network takes, and the authors' own report, by their logs: percent, after
# how many epochs, and the epoch of 85 %. Of C1C2C3C4 and DilatedCNN the best epoch is reported.
PUBLISHED = {
    "CNN_Model_1": ("1", 87.3, 100, 49),
    "CNN_Model_2": ("2", 87.3, 100, 61),
    "CNN_Model_3": ("3", 86.4, 100, 66),
    "C1C2C3C4": ("baselines/c1c2c3c4.py", 85.13, 69, 69),
    "CifarNet": ("baselines/cifarnet.py", 87.88, 250, None),
    "DilatedCNN": ("baselines/dilated_cnn.py", 80.3, 11, None),
    "ResNet": ("baselines/resnet.py", 92.22, 24, None),
}
NETWORKS = {name: choice for name, (choice, *_) in PUBLISHED.items()}
# Points below its network's published figure at which a run is taken for one of far too few epochs,
# which says nothing of its network, and left out of the pictures: so far a recipe lacks 1.4 at most
# by itself (model 2 after 10 epochs), CifarNet after 10 of its published 250 epochs lacked 27.
MOST_BELOW = 5.0
# What --recipe was, in other words: a baseline's own RECIPE is its published one where known.
SOURCES = {"tuned": "the file's RECIPE", "ours": "model 2's RECIPE", "published": "PUBLISHED"}
# A row's keys, as in compare.csv, to title and format in the table; a value not known is None.
COLUMNS = {
    "network": ("network", ""),  # the class; of a file not of this repository, "Class (file.py)"
    "source": ("recipe", ""),  # "published", or the recipe, what was changed in it, the seeds
    "changes": None,  # "", or what was changed in the recipe: ", distilled from CNN_Model_1"
    "epochs": ("epochs", ""),
    "parameters": ("parameters", ","),
    "megabytes": ("MB", ".2f"),  # of float32 weights
    "macs": ("MACs (million)", ".1f"),  # multiply-adds an image
    "final": ("final accuracy (%)", ".2f"),
    "final_std": None,
    "best": ("best (%)", ".2f"),
    "to_target": ("epochs to 85 %", "g"),
    "gap": ("train/test gap", "+.2f"),  # points
    "seconds": ("s an epoch", ".1f"),
    "device": ("device", ""),
}


class Settings(stored.Settings, strict=True):
    """What a training that is compared must say of itself."""

    network: str
    parameters: PositiveInt
    epochs: PositiveInt
    seed: NonNegativeInt
    device: str
    recipe: dict
    recipe_name: Literal[tuple(SOURCES)] = "tuned"
    teacher: dict[str, str] | None = None
    command: str = ""


class Results(BaseModel, strict=True):
    """What is read of results.json."""

    target_accuracy: FiniteFloat
    final_accuracy: FiniteFloat
    best_accuracy: FiniteFloat
    gap_points: FiniteFloat
    train_seconds: FiniteFloat
    epochs_done: PositiveInt
    target_reached_at: PositiveInt | None = None


@functools.cache
def size_of(name: str) -> tuple[int, float, float]:
    """(parameters, megabytes of float32 weights, millions of multiply-adds an image of 32x32)."""
    choice = NETWORKS[name]
    network = networks.load_network(str(HERE / choice) if "/" in choice else choice)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network.build().eval()(torch.zeros(1, 3, 32, 32))
    macs = counter.get_total_flops() / 2e6  # it counts a multiplication and an addition as two
    return network.parameters, network.parameters * 4 / 1e6, macs


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The finished trainings on the test set among these folders, and one level below them.

    Raises cli.UsageError for a folder that is not there or holds none.
    """
    found = []
    for folder in folders:
        files = [*folder.glob("settings.json"), *sorted(folder.glob("*/settings.json"))]
        finished = [file.parent for file in files if runs.is_finished(file.parent)]
        said = [(path, stored.read(path)) for path in finished]
        here = [path for path, s in said if not s.get("dry_run") and not s.get("val_split")]
        if not here:
            raise cli.UsageError(
                f"{folder} holds no finished training on the test set (dry runs and runs with "
                "--val-split are left out)"
            )
        found += here
    return list({path.resolve(): path for path in found}.values())  # each once


def changes(settings: dict) -> str:
    """What a run's command asked for instead of the file's recipe: "", or ", lr 0.03, ..."."""
    parser = cli.ArgumentParser(add_help=False)  # takes shortened flags, as train.py does
    for flag in ("--batch-size", "--lr", "--weight-decay", "--set"):
        parser.add_argument(flag, action="append", nargs="?", const="", default=[])
    asked = vars(parser.parse_known_args(settings.get("command", "").split())[0])
    entries = [entry.strip("'").partition("=")[0] for entry in asked.pop("set")]
    keys = [*(flag for flag, given in asked.items() if given), *entries]
    values = {key: settings["recipe"][key] for key in keys if key in settings["recipe"]}
    if "network" in (settings.get("teacher") or {}) and values.pop("teacher", None):
        teacher = settings["teacher"]
        views = f" ({teacher['views']} views)" if "views" in teacher else ""
        several = teacher["network"].count(" and ") + 1
        taught_by = teacher["network"] if several < 3 else f"{several} networks"
        values = {"distilled from": taught_by + views} | values
    return "".join(f", {key} {value}" for key, value in values.items())


def read_training(folder: Path) -> dict:
    """The row of a finished run, and its folder, seed, what tells it from others, and `short_of`.

    Raises stored.RunError for a file that is missing or damaged, naming it and the key.
    """
    settings, path = stored.read(folder, Settings), folder / runs.Run.RESULTS
    results = stored.validated(path, read_json(path), Results)
    name, file, recipe = settings["network"], settings.get("model_file"), settings["recipe"]
    choice, figure, *_ = PUBLISHED.get(name, (None, None))
    ours = choice is not None and file in (None, choice, f"model_{choice}.py")
    parameters, _, macs = size_of(name) if ours else (None, None, None)
    recipe_name = settings.get("recipe_name", "tuned")
    row = {key: settings[key] for key in ("epochs", "parameters", "device", "seed")}
    row |= {
        "folder": folder,
        "network": name if ours or file is None else f"{name} ({Path(file).name})",
        "source": SOURCES[recipe_name] + changes(settings),
        "changes": changes(settings),
        "megabytes": row["parameters"] * 4 / 1e6,
        "macs": macs if row["parameters"] == parameters else None,  # else it was edited since
        "final": results["final_accuracy"],
        "best": results["best_accuracy"],
        "to_target": results.get("target_reached_at") if results["target_accuracy"] == 85 else None,
        "gap": results["gap_points"],
        "seconds": results["train_seconds"] / results["epochs_done"],
    }
    row["short_of"] = figure if ours and figure - row["final"] > MOST_BELOW else None
    # Older runs, without a digest, tell networks of one name apart by their parameters alone.
    same = [row["network"], row["parameters"], settings.get("model_sha256"), row["epochs"]]
    same += [recipe_name, sorted(recipe.items()), settings.get("teacher")]
    return row | {"alike": str(same)}


def measured(trainings: Sequence[dict]) -> list[dict]:
    """A row for each network (by its code, where that is known), recipe and number of epochs.

    A seed counts once: a second run of it is no other sample, and begins another row.
    """
    rows, groups, seen = [], defaultdict(list), Counter()
    for training in trainings:
        seen[repeated := (training["alike"], training["seed"])] += 1
        groups[training["alike"], seen[repeated]].append(training)
    for members in groups.values():
        row = {key: members[0].get(key) for key in COLUMNS}
        for key in ("final", "best", "to_target", "gap", "seconds"):
            values = [training[key] for training in members]
            row[key] = None if None in values else statistics.mean(values)
        if len(members) > 1:
            row["final_std"] = statistics.stdev(training["final"] for training in members)
        seeds = sorted({training["seed"] for training in members})
        rows.append(row | {"source": f"{row['source']}, seed {', '.join(map(str, seeds))}"})
    return rows


def markdown(rows: Sequence[dict]) -> str:
    """The table as Markdown."""
    shown = {key: column for key, column in COLUMNS.items() if column}
    lines = [[title for title, _ in shown.values()], ["---"] * len(shown)]
    for row in rows:
        cells = {key: "" if row[key] is None else format(row[key], shown[key][1]) for key in shown}
        if row["final_std"] is not None:
            cells["final"] += f" ± {row['final_std']:.2f}"
        lines.append(list(cells.values()))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def pareto(rows: Sequence[dict]) -> list[dict]:
    """Rows that no other beats with as few parameters, by rising size."""
    front = []
    for row in sorted(rows, key=lambda row: (row["parameters"], -row["final"])):
        if not front or row["final"] > front[-1]["final"]:
            front.append(row)
    return front


def curve(folder: Path) -> list[float]:
    """Test accuracy, in percent, after each epoch; none for a run without its table (log.csv).

    Raises stored.RunError for a table without epochs, or whose test_acc is no number.
    """
    table = folder / "log.csv"
    try:
        with open(table, newline="") as file:
            values = [row.get("test_acc") for row in csv.DictReader(file)]
        return TypeAdapter(conlist(FiniteFloat, min_length=1)).validate_python(values)
    except FileNotFoundError:
        return []
    except (ValueError, csv.Error):
        raise stored.RunError(f"{table}: test_acc must be a number for each epoch") from None


def _axes(size: tuple[float, float], title: str, xlabel: str, note: str) -> Axes:
    """Axes over a logarithmic scale, with the note as small print at the figure's lower edge."""
    figure = Figure(figsize=size, layout="constrained")
    if note:
        text = textwrap.fill(note, int(size[0] * 17))  # so many of these letters fit in a line
        figure.supxlabel(text, x=0.01, ha="left", fontsize=7, color="dimgray")
    axes = figure.add_subplot(xscale="log", title=title, xlabel=xlabel, ylabel="accuracy (%)")
    axes.grid(alpha=0.3)
    return axes


def _place(text: Annotation, name: str, x: float, y: float) -> Bbox:
    """Moves a name beside its point, in points of print; what it then covers, in pixels."""
    text.set(text=name, position=(x, y), ha=("right", "left")[x > 0], va=("top", "bottom")[y > 0])
    return text.get_window_extent()


def _gaps(box: Bbox, points: np.ndarray) -> np.ndarray:
    """How far a name is from each of the points (N, 2), in pixels; 0 inside it."""
    return np.hypot(*np.maximum(0, np.maximum(box.min - points, points - box.max)).T)


def comparison(rows: Sequence[dict], note: str = "") -> bytes:
    """Accuracy against parameters, published and measured, with the Pareto front, as PNG."""

    def columns(rows: Sequence[dict]) -> list[list]:
        return [[row[key] or 0 for row in rows] for key in ("parameters", "final", "final_std")]

    axes = _axes((14, 12), "Test accuracy against the size of the network", "parameters", note)
    label = "Pareto front: nothing smaller is more accurate"
    sizes, finals, _ = columns(pareto(rows))
    axes.step(sizes, finals, "--", where="post", color=plots.MARK, alpha=0.7, label=label)
    reports = [row for row in rows if row["source"] == "published"]
    own = [row for row in rows if row["source"] != "published"]
    look = {"color": plots.TEST, "markerfacecolor": "white", "label": "published"}
    axes.errorbar(*columns(reports), fmt="s", capsize=3, **look)
    axes.errorbar(*columns(own), fmt="o", capsize=3, color=plots.TRAIN, label="measured here")
    sizes, finals, spreads = columns(rows)
    axes.set(xlim=(min(sizes) / 6, max(sizes) * 4), ymargin=0.1)  # room for the names
    axes.figure.legend(loc="outside upper center", ncols=3)
    axes.figure.draw_without_rendering()  # settles the layout, so that places can be compared
    points = axes.transData.transform(list(zip(sizes, finals, strict=True)))
    highest = axes.transData.transform(list(zip(sizes, np.add(finals, spreads), strict=True)))
    taken = [  # each point and its error bar, whose halves are alike
        Bbox.from_extents(x - 5, 2 * y - high - 5, x + 5, high + 5)
        for (x, y), (_, high) in zip(points, highest, strict=True)
    ]
    # Each name stands where it covers no other name or point and is nearest to its own point, if
    # there is such a place in the axes; the front may pass behind it.
    for row in [*own, *reports]:
        name, point = "{network}{changes}, {epochs} epochs", (row["parameters"], row["final"])
        shapes = [textwrap.fill(name.format(**row), width) for width in (50, 34)]  # the wide first
        look = {"size": 8, "zorder": 3, "bbox": {"fc": "w", "ec": "none", "alpha": 0.8, "pad": 0.5}}
        text = axes.annotate("", point, (0, 0), textcoords="offset points", **look)
        text.set_in_layout(False)  # else a name that leaves the axes would move them, and all names
        ways = [(7, 5), (7, -5), (-7, 5), (-7, -5)][:: -1 if row in reports else 1]
        places = [(x, away * y) for away in range(1, 10) for x, y in ways]
        places = [(shape, *place) for shape in shapes for place in places]
        boxes = [_place(text, *place) for place in places]
        here = axes.transData.transform(point)
        faults = [
            (
                box.x0 < axes.bbox.x0 or box.x1 > axes.bbox.x1,
                box.count_overlaps(taken),
                _gaps(box, points).min() < _gaps(box, here[None])[0] - 1,
            )
            for box in boxes
        ]
        taken.append(_place(text, *places[faults.index(min(faults))]))
    return plots.png(axes.figure)


def progress(trainings: Sequence[dict], reports: Sequence[dict], note: str = "") -> bytes:
    """Test accuracy by epoch: each network's best run as a labelled line, the others in faint grey.

    The best ends highest. Published figures are diamonds. Raises stored.RunError as `curve` does.
    """
    title = "Test accuracy by epoch: each network's best run, and published figures as diamonds"
    axes = _axes((15, 7), title, "epoch (logarithmic)", note)
    curves = [(row, values) for row in trainings if (values := curve(row["folder"]))]
    names = dict.fromkeys(row["network"] for row in [*reports, *(row for row, _ in curves)])
    colors = {name: f"C{number % 10}" for number, name in enumerate(names)}
    faint = {"color": "grey", "alpha": 0.35, "linewidth": 0.8}
    best = set()
    for row, values in sorted(curves, key=lambda each: -each[1][-1]):
        network, look = row["network"], faint | {"zorder": 1}  # behind the best
        if network not in best:
            best.add(network)
            # The marker is at its end, where another line may go on.
            look = {"color": colors[network], "linewidth": 2, "marker": "o", "markevery": [-1]}
            label = "{network}{changes}, {epochs} epochs, seed {seed}: ".format(**row)
            # Long lines would squeeze the axes.
            look["label"] = textwrap.fill(f"{label}{values[-1]:.2f}", 60)
        axes.plot(range(1, len(values) + 1), values, **look)
    if others := len(curves) - len(best):
        axes.plot([], [], label=f"other runs ({others})", **faint)
    places = [(row["epochs"], row["final"]) for row in reports]
    for row in sorted(reports, key=lambda row: -row["final"]):
        place = places.pop(places.index((row["epochs"], row["final"])))
        look = {"color": colors[row["network"]], "markeredgecolor": "black", "zorder": 3}
        look["markersize"] = 6 + 5 * places.count(place)  # so that equal figures are all seen
        look["label"] = "{network}, published: {final:.2f} at {epochs}".format(**row)
        axes.plot(*place, "D", **look)
    axes.set_xticks(ticks := [1, 2, 5, 10, 20, 50, 100, 200], list(map(str, ticks)))
    axes.minorticks_off()
    axes.figure.legend(loc="outside right upper", fontsize=8)
    return plots.png(axes.figure)


def work(args: argparse.Namespace) -> None:
    """Reads the runs, then writes the tables and the pictures into a folder of their own."""
    trainings = [read_training(folder) for folder in find_runs(args.runs or [networks.REFERENCE])]
    shown = [training for training in trainings if training["short_of"] is None]
    text = "{network} after {epochs} epochs ({final:.2f} %, published {short_of:.2f} %)"
    names = [text.format(**training) for training in trainings if training not in shown]
    why = f"more than {MOST_BELOW:g} points below the published figure (far too few epochs)"
    note = f"Not in the pictures, because {why}: {'; '.join(names)}" if names else ""
    reports = []
    for name, (_, final, epochs, to_target) in PUBLISHED.items():
        values = (name, "published", "", epochs, *size_of(name), final, None, None, to_target)
        reports.append(dict.fromkeys(COLUMNS) | dict(zip(COLUMNS, values, strict=False)))
    rows = reports + sorted(measured(trainings), key=lambda row: row["epochs"])
    rows.sort(key=lambda row: (-row["parameters"], row["network"]))
    points, lines = comparison(reports + measured(shown), note), progress(shown, reports, note)
    with runs.Run.create(args.output_dir, "compare") as run:
        run.write("compare.md", markdown(rows))
        run.write_csv("compare.csv", rows)
        run.write("compare.png", points)
        run.write("progress.png", lines)
        run.log("\n".join([markdown(rows), *filter(None, [note]), f"Results: {run.folder}"]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = cli.ArgumentParser(prog="tools.compare", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, help="runs or their folders (the reference)")
    parser.add_argument("--output-dir", default="output", help="where the results are put (output)")
    return cli.run(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
