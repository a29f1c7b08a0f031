"""settings.json read as what it should hold, and what going on with a run refuses."""

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated

from annotated_types import Len
from pydantic import BaseModel, FiniteFloat, NonNegativeInt, PositiveInt, ValidationError

from errors import UsageError, first_of
from recipes import Recipe
from support.files import read_json

NAME = "settings.json"
# What has to be the same when a run is gone on with.
SETTLED = (
    "network", "parameters", "epochs", "seed", "recipe", "teacher", "train_transform",
    "data_sha256", "val_split",
)  # fmt: skip


DEFAULTS = {each.name: each.default for each in fields(Recipe) if each.default is not MISSING}


class RunError(UsageError):
    """A run's folder that cannot be used; the message says which file and why."""


class InUseError(RunError):
    """A run that another process trains."""


class Settings(BaseModel, strict=True):
    """What is read of settings.json; it holds more, and of an older version's run less."""

    network: str | None = None
    model_file: str | None = None
    model_sha256: str | None = None
    parameters: PositiveInt | None = None
    epochs: PositiveInt | None = None
    recipe_name: str | None = None
    recipe: dict | None = None
    teacher: dict | None = None
    seed: NonNegativeInt | None = None
    val_split: PositiveInt | None = None
    dry_run: bool = False
    device: str | None = None
    mean: Annotated[list[FiniteFloat], Len(3, 3)] | None = None
    std: Annotated[list[FiniteFloat], Len(3, 3)] | None = None
    data_sha256: dict | None = None
    arguments: dict | None = None


def read(folder: Path, model: type[BaseModel] = Settings) -> dict:
    """A run's settings.json.

    Raises:
        RunError: missing or damaged; names the file and the value.
    """
    path = folder / NAME
    if not path.is_file():
        raise RunError(f"{folder} is not a run's folder: there is no {path.name} in it")
    return validated(path, read_json(path), model)


def validated(path: Path, values: dict, model: type[BaseModel]) -> dict:
    """The same values, which came from the file.

    Raises:
        RunError: one is missing, or of another kind; names the file and the value.
    """
    try:
        model.model_validate(values)
    except ValidationError as error:
        raise RunError(f"{path} is damaged: {first_of(error)}") from None
    return values


def with_defaults(recipe: dict) -> dict:
    """A stored recipe; keys that its older version did not know yet get their defaults."""
    return DEFAULTS | recipe


def refuse_changes(folder: Path, before: dict, now: dict) -> None:
    """Looks whether a run is gone on with as it began.

    Raises:
        UsageError: what is SETTLED changed, or the checkpoint is gone.
    """
    for key in SETTLED:
        old, new = before.get(key), json.loads(json.dumps(now[key]))
        if key == "recipe" and isinstance(old, dict):
            old = with_defaults(old)
        if old == new:
            continue
        what = ""
        if isinstance(old, dict) and isinstance(new, dict) and key != "train_transform":
            changed = [name for name in new if old.get(name) != new[name]]
            parts = (f"{name}: {old.get(name)} then, {new[name]} now" for name in changed)
            what = f" ({', '.join(parts)})"
        raise UsageError(
            f"{folder}: its {key} is not what it began with{what}; put that back, or start "
            "a new run"
        )
    left = [name for name in ("weights.pt", "best.pt", "log.csv") if (folder / name).is_file()]
    if left and not (folder / "last.pt").is_file():
        raise UsageError(
            f"{folder}/last.pt is gone, without which nothing can go on, though epochs were "
            f"finished ({', '.join(left)}); put it back, or start a new run"
        )
