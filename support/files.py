"""Files that are there whole or not at all: written aside and renamed, checked when read."""

import csv
import io
import json
import os
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from errors import Error, UsageError

HERE = Path(__file__).resolve().parents[1]


class CheckpointError(Error, ValueError):
    """A file that is damaged, or does not hold what is wanted of it."""


def stored_path(path: str | Path) -> str:
    """A path as files of a run hold it: from the repository if it lies in it, else absolute.

    `HERE / stored_path(path)` is the path again, from whichever folder, and for what lies in the
    repository on whichever machine.
    """
    path = Path(os.path.realpath(path))  # Path.resolve fails where links go in circles
    return path.relative_to(HERE).as_posix() if path.is_relative_to(HERE) else str(path)


def as_csv(rows: list[dict]) -> str:
    """Rows of the same keys as CSV, the keys as header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_file(path: Path, content: str | bytes) -> Path:
    """Writes a file whole or not at all; returns its path.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        part.unlink(missing_ok=True)  # a folder may come from anybody: a link would be followed
        with open(part, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        error.filename = str(path)  # a full disk does not name it
        raise
    finally:
        part.unlink(missing_ok=True)
    return path


def read_json(path: Path) -> dict:
    """A JSON file that holds an object.

    Raises:
        UsageError: missing or damaged.
    """
    try:
        value = json.loads(path.read_text())
        text = json.dumps(value, ensure_ascii=False).encode()  # half a character is an error here
        if rb"\u0000" in text:
            raise ValueError("a zero byte in it, which no path can hold")
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds no settings")
    return value


def read_checkpoint(path: str | Path) -> dict:
    """What torch.save wrote into the file, read as data, not code, its checksums compared.

    PyTorch's own reader passes over the checksums that its files carry: it would take flipped
    bits for weights, and where a flipped bit makes an entry a folder, whatever lay in memory. So it
    gets a copy that Python's has read.

    Raises:
        CheckpointError: damaged, or something else than a checkpoint; names the file.
        OSError: it cannot be read.
    """
    content, copy = Path(path).read_bytes(), io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file, zipfile.ZipFile(copy, "w") as whole:
            for entry in file.infolist():
                whole.writestr(entry.filename, file.read(entry))  # fails on a wrong checksum
        copy.seek(0)
        checkpoint = torch.load(copy, map_location="cpu", weights_only=True)
    except Exception as error:  # broken files raise many kinds of error
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is not a whole checkpoint: {reason}") from None
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} is no checkpoint: it holds a {type(checkpoint).__name__}")
    return checkpoint


def load_weights(model: nn.Module, path: str | Path, read: dict | None = None) -> None:
    """Puts the weights of a file (weights.pt, last.pt or best.pt) into the model.

    Args:
        read: what `read_checkpoint` gave for it, if it has been read.

    Raises:
        CheckpointError: damaged, or another network's; names the file and the mismatch.
        OSError: it cannot be read.
    """
    weights = read_checkpoint(path) if read is None else read
    if isinstance(weights.get("model"), dict):
        weights = weights["model"]
    wanted = {name: _shape(value) for name, value in model.state_dict().items()}
    found = {name: _shape(value) for name, value in weights.items()}
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            raise CheckpointError(
                f"{path} does not hold the weights of {type(model).__name__}: {name} is "
                f"{found.get(name, 'missing')} there, {wanted.get(name, 'missing')} here"
            )
    model.load_state_dict(weights)


def check_state(optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError where the state of a parameter has another shape than the parameter."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            shape = tuple(getattr(value, "shape", ()))
            if shape not in ((), tuple(parameter.shape)):
                raise ValueError(f"the optimizer's {name} is {shape}")


def _shape(value: object) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
