"""A run as one page, report.html, and all runs of a folder as another, index.html.

Pages are made from the files of the runs alone, so they can be made again at any time (`python -m
tools.report`). They load nothing: the pictures lie in them, and a policy forbids the rest. Any
further picture (*.png) of a run's folder is shown with the Title and Description that it carries.
"""

import base64
import contextlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import filelock
import jinja2
from PIL import Image

import plots
import runs
from support import figures
from support.files import HERE, write_file

PAGE, INDEX, LOCK = runs.Run.PAGE, "index.html", ".index.lock"
# A run's pictures in the order of the page: heading, and a text for those that carry none.
PICTURES = {
    "curves": ("Curves", "Loss, accuracy and learning rate by epoch."),
    "confusion_matrix": ("Confusion matrix", "A row a true class, a column a predicted one."),
    "class_accuracy": ("Accuracy by class", "A bar a class, best on top."),
    "misclassified": ("Most confident mistakes", "True class, predicted class, confidence."),
    "augmentations": ("Augmentations", "An image of each class, raw and in five draws."),
}
# The index's columns: heading, and the format of a number; None is text.
COLUMNS = {
    "name": ("run", None), "accuracy": ("accuracy (%)", ".2f"), "curve": ("curve", None),
    "network": ("network", None), "split": ("set", None), "best": ("best (%)", ".2f"),
    "epochs": ("epochs", ",d"), "target_epoch": ("target at epoch", ",d"),
    "parameters": ("parameters", ",d"), "minutes": ("minutes", ",.1f"), "seed": ("seed", "d"),
    "recipe": ("recipe", None), "state": ("state", None), "device": ("device", None),
}  # fmt: skip
LARGEST, LONGEST = 20_000_000, 1_000_000  # bytes of a picture, and of a log, in a page
SPARK = (104, 32)  # pixels of a small curve


def write_page(run: runs.Run) -> None:
    """report.html of a run whose results are written, and do not depend on it.

    Whatever fails is told in a line.
    """
    _attempt(run, PAGE, lambda: run.log(f"Page: {run.write(PAGE, page(run.folder))}"))


def write_index(run: runs.Run) -> None:
    """index.html beside the run; like write_page."""
    _attempt(run, INDEX, lambda: update_index(run.folder.parent))


def add_pictures(folder: Path, pictures: dict[str, bytes]) -> str:
    """Puts pictures, by file name, into the folder of a run that has a page, and into the page.

    Returns:
        Where the page is, or why they are not in it, in a line; nothing where there is no page.
    """
    path = folder / PAGE
    try:
        if not pictures or not path.is_file():
            return ""
        with contextlib.closing(runs.Run(folder)) as run:  # nobody else writes there meanwhile
            for name, picture in pictures.items():
                run.write(name, picture)
            return f"Page with {', '.join(pictures)}: {run.write(PAGE, page(folder))}"
    except Exception as error:  # a folder that nobody may write to, odd files in it
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return f"Not in {path}: {reason}"


def _attempt(run: runs.Run, name: str, write: Callable[[], object]) -> None:
    try:
        if run.writes:
            write()
    except Exception as error:  # whatever odd files lie there
        reason = (str(error) or type(error).__name__).splitlines()[0]
        with contextlib.suppress(OSError):  # on a full disk the screen alone takes the line
            run.log(f"No {name}: {reason}; for one later: python -m tools.report {run.folder}")


def update_index(folder: Path) -> Path:
    """Writes index.html of all runs in the folder; returns its path.

    Under a lock: of runs that end at once, the last one to write has seen them all.

    Raises:
        OSError: it cannot be written, or another process is at it for a minute.
    """
    with filelock.FileLock(folder / LOCK, timeout=60):
        return write_file(folder / INDEX, index(folder))


def page(folder: Path) -> bytes:
    """A run's page, of its files.

    Raises:
        UsageError: settings.json or results.json is missing or damaged.
        OSError: a file cannot be read.
    """
    settings, found, rows = figures.read(folder)
    recipe, elsewhere = settings.get("recipe") or {}, ("recipe", "mean", "std", "command")
    return _render(
        "report.html.j2",
        name=folder.resolve().name,
        network=settings.get("network") or "a network",
        state=figures.state(found),
        dry_run=settings.get("dry_run"),
        headline=figures.headline(settings, found),
        command=figures.command(settings),
        resume=figures.resume(folder, settings),
        pictures=pictures(folder, rows, found["target_accuracy"]),
        recipe={key: _shown(value) for key, value in recipe.items()},
        settings={k: _shown(value) for k, value in settings.items() if k not in elsewhere},
        summary=_text(folder / "summary.txt"),
        log=_text(folder / runs.Run.LOG),
    )


def pictures(folder: Path, rows: list[dict], target: float | None) -> list[dict]:
    """The pictures of a run: name, title, text, size in pixels, and the PNG as a data URI."""
    found, names = [], {path.stem for path in folder.glob("[!.]*.png")}
    for name in [*PICTURES, *sorted(names - set(PICTURES))]:
        path = folder / f"{name}.png"
        try:
            if not path.is_file() or path.stat().st_size > LARGEST:
                continue
            content = path.read_bytes()
            with (
                warnings.catch_warnings(action="ignore"),
                Image.open(path, formats=["PNG"]) as image,
            ):
                image.load()
        except Exception:  # missing, or damaged, of which Pillow tells in many ways
            continue
        said = image.info
        title, text = PICTURES.get(name, (said.get("Title") or name, name))
        if name == "curves" and rows:
            text = plots.told_curves(rows, figures.split_of(rows), target)
        found.append({"name": name, "title": title, "text": said.get("Description") or text})
        uri = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        found[-1] |= {"size": image.size, "uri": uri}
    return found


def index(folder: Path) -> bytes:
    """The page of all runs in the folder, newest first; a damaged one is shown as such."""
    rows = []
    for path in sorted(folder.glob("*/" + runs.Run.SETTINGS), reverse=True):
        run = path.parent
        row = dict.fromkeys(COLUMNS) | {"name": run.name, "href": None, "values": []}
        try:
            if (run / PAGE).is_file():
                row["href"] = f"{quote(os.fsencode(run.name))}/{PAGE}"
            row |= _row(run)
        except Exception as error:  # one odd run must not hide the others
            reason = (str(error) or type(error).__name__).splitlines()[0]
            row["state"] = reason.replace(f"{run}{os.sep}", "")
        rows.append(row)
    values = [value for row in rows for value in row["values"]]
    for row in rows:
        if row["values"]:
            row["curve"] = curve(row["values"], row["asked"], min(values), max(values))
    return _render("index.html.j2", rows=rows, columns=COLUMNS, folder=folder.resolve().name)


def _row(folder: Path) -> dict:
    settings, found, rows = figures.read(folder)
    seconds, final = found["total_seconds"], found["final_accuracy"]
    return {
        "network": settings.get("network"),
        "accuracy": found["last_accuracy"] if final is None else final,
        "split": found["evaluated"] or found["split"],
        "best": found["best_accuracy"],
        "epochs": found["epochs_done"],
        "target_epoch": found["target_reached_at"],
        "parameters": settings.get("parameters"),
        "minutes": None if seconds is None else seconds / 60,
        "state": figures.state(found) + (", dry run" if settings.get("dry_run") else ""),
        "recipe": settings.get("recipe_name"),
        "seed": settings.get("seed"),
        "device": settings.get("device"),
        "asked": settings.get("epochs") or 1,
        "values": [row[f"{figures.split_of(rows)}_acc"] for row in rows],
    }


def curve(values: list[float], epochs: int, low: float, high: float) -> dict:
    """A small curve, from `low` to `high` percent over so many epochs: SVG's points, and a text."""
    (width, height), end = SPARK, max(epochs, len(values), 2) - 1
    points = [
        (4 + (width - 8) * at / end, height - 4 - (height - 8) * (value - low) / (high - low or 1))
        for at, value in enumerate(values)
    ]
    text = f"accuracy by epoch: from {values[0]:.1f} to {values[-1]:.1f} %"
    return {"points": [f"{x:.1f},{y:.1f}" for x, y in points], "text": text}


def _shown(value: object) -> tuple[str, bool]:
    """A value as text, and whether it is long."""
    if value is None or isinstance(value, str | bool | int | float):
        return "" if value is None else str(value), False
    line = json.dumps(value, ensure_ascii=False)
    return (line, False) if len(line) <= 60 else (json.dumps(value, indent=2), True)


def _text(path: Path) -> str:
    """The file's text, of a long one the end; none if it is missing."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - LONGEST))
        return file.read(LONGEST).decode(errors="replace").replace("\0", "")


def _render(template: str, **values: object) -> bytes:
    """The page; names and texts come from anybody, so each of them is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.get_template(template).render(values | {"spark": SPARK})
    return text.encode("utf-8", "replace")  # a folder's name may hold half a character
