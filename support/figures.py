"""What a run's files tell, read for its page: settings, figures, epochs, commands."""

import csv
import shlex
from pathlib import Path

from pydantic import BaseModel, FiniteFloat, NonNegativeInt, PositiveInt, TypeAdapter

from support import model_files
from support import settings as stored
from support.files import HERE, read_json
from support.history import duration

RESULTS, LOG = "results.json", "log.csv"
LARGEST = 5_000_000  # bytes of a table: 10,000 epochs are 1 MB


class Settings(stored.Settings, strict=True):
    """What a page shows by name of settings.json; the rest it shows as it is."""

    command: str | None = None
    processes: PositiveInt = 1


class Results(BaseModel, strict=True):
    """What is read of results.json, or of an unfinished run's log.csv; older runs hold less."""

    completed: bool = False
    evaluated: str | None = None
    split: str | None = None
    final_accuracy: FiniteFloat | None = None
    final_loss: FiniteFloat | None = None
    last_accuracy: FiniteFloat | None = None
    best_accuracy: FiniteFloat | None = None
    best_epoch: PositiveInt | None = None
    gap_points: FiniteFloat | None = None
    target_accuracy: FiniteFloat | None = None
    target_epochs: PositiveInt | None = None
    target_reached_at: PositiveInt | None = None
    epochs_done: NonNegativeInt = 0
    train_seconds: FiniteFloat | None = None
    test_seconds: FiniteFloat | None = None
    total_seconds: FiniteFloat | None = None


def read(folder: Path) -> tuple[dict, dict, list[dict]]:
    """Settings as they were written, all fields of Results, and the epochs' rows of log.csv.

    Raises:
        RunError, UsageError: settings.json or results.json is missing or damaged; without
            results.json, the figures are those of log.csv.
    """
    settings, path = stored.read(folder, Settings), folder / RESULTS
    rows = read_rows(folder / LOG)
    results = read_json(path) if path.is_file() else {}
    if not path.is_file() and rows:
        accuracies = [row[f"{split_of(rows)}_acc"] for row in rows]
        best = max(accuracies)
        results = {"last_accuracy": accuracies[-1], "split": split_of(rows)}
        results |= {"best_accuracy": best, "best_epoch": accuracies.index(best) + 1}
        results["epochs_done"] = len(rows)
    figures = Results(**stored.validated(path, results, Results)).model_dump()
    return settings, figures, rows


def read_rows(path: Path) -> list[dict[str, float]]:
    """The epochs of a log.csv; none if it is missing, damaged or of another kind."""
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:  # a pipe would be waited for
            return []
        with open(path, newline="", encoding="utf-8") as file:
            rows = TypeAdapter(list[dict[str, FiniteFloat]]).validate_python(
                list(csv.DictReader(file))
            )
    except (OSError, ValueError, csv.Error):
        return []
    needed = {"epoch", "train_acc", "train_loss", f"{split_of(rows)}_acc", f"{split_of(rows)}_loss"}
    good = rows and needed <= set(rows[0])
    sane = all(0 <= value <= 100 for row in rows for key, value in row.items() if "_acc" in key)
    return rows if good and sane else []


def split_of(rows: list[dict]) -> str:
    """What was evaluated each epoch: "val" or "test"."""
    return "val" if rows and "val_acc" in rows[0] else "test"


def state(figures: dict) -> str:
    """finished, interrupted, or, without results, unfinished: being trained or cut off."""
    if figures["completed"]:
        return "finished"
    return "unfinished" if figures["final_accuracy"] is None else "interrupted"


def headline(settings: dict, figures: dict) -> list[tuple[str, str, str]]:
    """What a run comes to: name, figure and remark, of those that are known."""
    f, found = figures, []

    def add(name: str, value: object, form: str, remark: str = "") -> None:
        if value is not None:
            found.append((name, form.format(value), remark))

    split = f["split"] or "test"
    final, of = f["final_accuracy"], f["evaluated"] or split
    accuracy = f["last_accuracy"] if final is None else final
    add(f"accuracy, {of} set", accuracy, "{:.2f} %", f"weights after epoch {f['epochs_done']}")
    add("loss", f["final_loss"], "{:.4f}", f"cross-entropy, {of} set")
    remark = f"epoch {f['best_epoch']}, picked by looking at the {split} set"
    add(f"best {split} accuracy", f["best_accuracy"], "{:.2f} %", remark)
    if f["target_accuracy"] is not None:
        reached = f["target_reached_at"]
        told = f"epoch {reached}" if reached else "not reached"
        add(f"target {f['target_accuracy']:g} %", told, "{}", f"within {f['target_epochs']} epochs")
    add(f"train/{split} gap", f["gap_points"], "{:+.2f} points")
    add("parameters", settings.get("parameters"), "{:,}", settings.get("network") or "")
    add("epochs", f["epochs_done"], "{}", f"of {settings.get('epochs', '?')}")
    if f["total_seconds"] is not None:
        parts = (("training", "train_seconds"), ("evaluation", "test_seconds"))
        told = [f"{part} {duration(f[key])}" for part, key in parts if f[key] is not None]
        add("time", duration(f["total_seconds"]), "{}", ", ".join(told))
    add("seed", settings.get("seed"), "{}", f"recipe: {settings.get('recipe_name') or 'tuned'}")
    add("device", settings.get("device"), "{}", str(settings.get("precision") or ""))
    return found


def command(settings: dict) -> str | None:
    """What repeats the run: its command, with what was asked for at the start."""
    given = settings.get("command")
    if len(given or "") > 10_000:
        return None
    try:
        words = shlex.split(given or "")
    except ValueError:
        return given
    if not words:
        return None
    asked = {"--model": settings.get("model_file"), "--epochs": settings.get("epochs")}
    for flag, value in asked.items():
        given = any(word.startswith(flag[:3]) for word in words)  # flags may be shortened
        words += [] if given or value is None else [flag, str(value)]
    if settings.get("processes", 1) > 1:
        words[:1] = ["torchrun", "--standalone", "--nproc-per-node", str(settings["processes"])]
    return shlex.join(words)


def resume(folder: Path, settings: dict) -> str:
    """What goes on with the run."""
    file = HERE / (settings.get("model_file") or "model_2.py")
    named = [] if file.parent in model_files.OUR_FOLDERS else ["--model", str(file)]
    return shlex.join(["python", "train.py", "--resume", str(folder), *named])
