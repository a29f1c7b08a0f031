"""Networks: a model file's class and recipes, and what trained weights it has.

    network = networks.load_network("2")                                # or a path to a model file
    trained = networks.load_trained(Path("output/reference/model_2"))   # with its weights

What is wrong with a model file, or with a folder of weights, is said in one line.
"""

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import cifar10
import cpu
import recipes
import runs
import utils
from cli import UsageError


class Network(NamedTuple):
    """A model file: its name, network class, recipe, and the recipe that it was published with."""

    choice: str  # 1, 2, 3 or the file's absolute path
    name: str
    build: Callable[[], nn.Module]
    recipe: recipes.Recipe
    published: recipes.Recipe | None

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.build().parameters())

    def ready(
        self, recipe: recipes.Recipe, device: torch.device, precision: utils.Precision
    ) -> nn.Module:
        """The network with fresh weights, as a training by the recipe takes it on the device."""
        model = prepare(self.build(), device, precision)
        recipes.scale_dropout(model, recipe.dropout)
        return model


def prepare(network: nn.Module, device: torch.device, precision: utils.Precision) -> nn.Module:
    """The same network on the device, laid out in memory and on the CPU sped up."""
    network = network.to(device, memory_format=precision.memory_format)
    if device.type == "cpu":
        cpu.keep_freed_memory()
        cpu.speed_up(network)
    return network


def load_network(choice: str) -> Network:
    """The network and recipe of model 1, 2, 3 or of a file, which is run as code.

    A network is a torch.nn.Module class of that file that can be built without arguments; blocks
    that need arguments, or whose name starts with an underscore, are taken for its parts.

    Raises:
        UsageError: no such file, or not exactly one network and a good RECIPE in it.
    """
    path = utils.HERE / f"model_{choice}.py" if choice in ("1", "2", "3") else Path(choice)
    if path.suffix != ".py" or not path.is_file():
        raise UsageError(f"{choice!r} is neither 1, 2 or 3 nor the path of a model file (.py)")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever somebody's code may raise
        raise UsageError(f"{path} cannot be run: {type(error).__name__}: {error}") from None
    networks = [
        value
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, nn.Module)
        and value.__module__ == module.__name__
        and not name.startswith("_")
        and _needs_no_arguments(value)
    ]
    if len(networks) != 1:
        found = ", ".join(network.__name__ for network in networks) or "none"
        raise UsageError(
            f"{path} must define one network (an nn.Module that is built without arguments); "
            f"found: {found}"
        )
    if not isinstance(getattr(module, "RECIPE", None), dict):
        raise UsageError(f"{path} has no RECIPE dictionary; take model_2.py's as a pattern")
    recipe = _read_recipe(path, "RECIPE", module.RECIPE)
    published = getattr(module, "PUBLISHED", None)
    if published is not None:
        published = _read_recipe(path, "PUBLISHED", published)
    try:
        with torch.inference_mode():
            shape = tuple(networks[0]().eval()(torch.zeros(2, 3, 32, 32)).shape)
    except Exception as error:  # whatever somebody's code may raise
        raise UsageError(
            f"{path}: {networks[0].__name__} fails on images (2, 3, 32, 32): {error}"
        ) from None
    if shape != (2, len(cifar10.CLASSES)):
        raise UsageError(
            f"{path}: {networks[0].__name__} turns 2 images into {shape}; it must be (2, 10)"
        )
    own = choice not in ("1", "2", "3")
    return Network(
        str(path.resolve()) if own else choice, path.stem, networks[0], recipe, published
    )


def _read_recipe(path: Path, name: str, recipe: object) -> recipes.Recipe:
    try:
        if not isinstance(recipe, dict):
            raise ValueError("it is no dictionary")
        return recipes.Recipe.from_dict(recipe)
    except ValueError as error:
        raise UsageError(f"{path}, {name}: {error}") from None


def _needs_no_arguments(network: type) -> bool:
    return all(
        parameter.default is not parameter.empty
        or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        for parameter in inspect.signature(network).parameters.values()
    )


class Trained(NamedTuple):
    """A trained network, and what its run says of it."""

    name: str
    network: nn.Module
    file: Path
    settings: dict  # empty for weights without a run


def load_trained(path: Path, model: str | None = None) -> Trained:
    """The network of a run's folder or of a file of weights.

    Raises:
        UsageError: no such weights, or nothing says whose they are.
        utils.CheckpointError: the file does not hold this network's weights.
    """
    folder = path if path.is_dir() else path.parent
    file = path / "weights.pt" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{file} is not there; give a run's folder or a file of weights")
    settings = {}
    if (folder / runs.Run.SETTINGS).is_file():
        settings = runs.read_json(folder / runs.Run.SETTINGS)
    if model is None:
        model = settings.get("network", "").removeprefix("CNN_Model_")
        if model not in ("1", "2", "3"):
            model = settings.get("arguments", {}).get("model")
        if model is None:
            raise UsageError(f"nothing beside {file} says which network it is; give --model")
    chosen = load_network(model)
    network = chosen.build()
    utils.load_weights(network, file)
    return Trained(chosen.build.__name__, network.eval(), file, settings)
