"""Networks: a model file's class and recipes, its trained weights, and a teacher made of them.

    network = networks.load_network("2")             # or the path of a model file
    trained = networks.load_trained("model_2")       # or a run's folder, or a file of weights
    logits = trained.network(trained.transform(image=image)["image"][None])

What is wrong with a model file, or with a folder of weights, is said in one line.
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import utils
from errors import UsageError
from fast import cpu
from fast.batched import A
from recipes import Recipe
from support import model_files
from support import settings as run_settings
from support.files import HERE, load_weights
from support.teachers import NAME as ANSWERS
from support.teachers import Replay, Teacher, batch_seed
from utils import Device

REFERENCE = HERE / "output" / "reference"


class Network(NamedTuple):
    """A model file: its network class, its recipe, and the recipe that it was published with."""

    file: Path  # absolute
    digest: str  # provenance.code_digest of the file
    build: Callable[[], nn.Module]
    parameters: int
    recipe: Recipe
    published: Recipe | None
    only_contiguous: str  # why it takes no channels_last images; "" if it does

    @property
    def name(self) -> str:
        return self.file.stem

    def fitting(self, device: Device) -> Device:
        """The device, in a layout that the network takes."""
        return replace(device, layout=torch.contiguous_format) if self.only_contiguous else device


def prepare(model: nn.Module, device: Device, recipe: Recipe | None = None) -> nn.Module:
    """The same model, changed in place: on the device, sped up on the CPU, the recipe's dropout."""
    model = model.to(device.where, memory_format=device.layout)
    if device.where.type == "cpu":
        cpu.keep_freed_memory()
        cpu.speed_up(model)
    if recipe is not None:
        model_files.scale_dropout(model, recipe.dropout)
    return model


# ---------------------------------------------------------------- model files


def load_network(choice: str) -> Network:
    """The network and recipe of model 1, 2, 3 or of a file, which is run as code.

    A network is a torch.nn.Module class of that file that can be built without arguments; blocks
    that need arguments, whose name starts with an underscore, or that the network is derived from,
    are taken for its parts.

    Raises:
        UsageError: no such file, or not exactly one network and a good RECIPE in it.
    """
    path = model_files.find(choice)
    module, digest = model_files.execute(path)
    build = model_files.network_class(path, module)
    recipe, published = (model_files.recipe(path, module, k) for k in ("RECIPE", "PUBLISHED"))
    if recipe is None:
        raise UsageError(f"{path} has no RECIPE dictionary; take model_2.py's as a pattern")
    parameters, only_contiguous = model_files.try_out(path, build)
    return Network(path, digest, build, parameters, recipe, published, only_contiguous)


# ---------------------------------------------------------------- trained weights


class Trained(NamedTuple):
    """A trained network, and what its run says of it."""

    source: Network
    network: nn.Module  # in eval mode, on the CPU
    transform: A.Compose | None  # that its images need; None for weights without a run
    file: Path
    settings: dict  # empty for weights without a run

    @property
    def name(self) -> str:
        return self.source.build.__name__


def load_trained(path: str | Path, model: str | None = None, named: Path | None = None) -> Trained:
    """A trained network: one that comes with this repository, a run's, or a file of weights.

    A model file is run as code, and a run's folder may come from anybody: only files of this
    repository are taken because a run names them. Whichever file it is, its code must be that
    which was trained.

    Args:
        path: "model_1", "model_2_distilled" or another of output/reference; a run's folder; or a
            weights.pt, last.pt or best.pt.
        model: 1, 2, 3 or the model file; None: what the run says.
        named: a model file that the user has named, so that the run may name it too.

    Raises:
        UsageError: no such weights, nothing says whose they are, they are another code's, or the
            run's settings.json is damaged.
        files.CheckpointError: the file does not hold this network's weights.
    """
    known = REFERENCE / path
    path = known if not Path(path).exists() and known.is_dir() else Path(path)
    folder = path if path.is_dir() else path.parent
    file = path / "weights.pt" if path.is_dir() else path
    if not file.is_file():
        ours = sorted(found.parent.name for found in REFERENCE.glob("*/weights.pt"))
        raise UsageError(
            f"{file} is not there; give a run's folder, a file of weights, or a name out of "
            f"{', '.join(ours)}"
        )
    settings = run_settings.read(folder) if (folder / run_settings.NAME).is_file() else {}
    if model is None and not settings:
        raise UsageError(f"nothing beside {file} says which network it is; give --model")
    source = load_network(model_files.of_run(folder, settings, model, named))
    network, transform = source.build(), None
    load_weights(network, file)
    if settings.get("mean") and settings.get("std"):
        transform = utils.test_transform(settings["mean"], settings["std"])
    return Trained(source, network.eval(), transform, file, settings)


def load_teacher(
    folder: str, student: Path, held_out: int | None, device: Device, dry_run: bool = False,
    began: dict | None = None,  # of a run that goes on: what its settings.json says
) -> tuple[Teacher | Replay | None, dict | None]:  # fmt: skip
    """The network that a recipe's `teacher` names, or its answers, and what settings.json says.

    The user has named one model file, the student's: a teacher of the same may be run as well.

    Raises:
        UsageError: no such run, or it was trained on other images than this one will be.
        files.CheckpointError: its weights are damaged.
    """
    if not folder:
        return None, None
    folder = HERE / folder  # as settings.json holds it
    if (folder / ANSWERS).is_file():
        return (replay := Replay(folder, began)), replay.describe()
    trained = load_trained(folder, named=student)
    theirs = trained.settings.get("val_split")
    if theirs != held_out:
        raise UsageError(
            f"the teacher in {folder} was trained with --val-split {theirs}, this run has "
            f"{held_out}, so they know different images; train one with the same --val-split"
        )
    if trained.settings.get("dry_run") and not dry_run:
        raise UsageError(f"the teacher in {folder} is a dry run's; give one of CIFAR-10")
    device = trained.source.fitting(device)
    digest = hashlib.sha256(trained.file.read_bytes()).hexdigest()
    teacher = Teacher(prepare(trained.network, device), device, batch_seed(digest))
    return teacher, {"network": trained.name, "weights_sha256": digest}
