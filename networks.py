"""Networks: a model file's class and recipes, and what trained weights it has.

    network = networks.load_network("2")                                # or a path to a model file
    trained = networks.load_trained(Path("output/reference/model_2"))   # with its weights

What is wrong with a model file, or with a folder of weights, is said in one line.
"""

import ast
import hashlib
import importlib.util
import inspect
import io
import sys
import tokenize
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

import cifar10
import recipes
import runs
import utils
from errors import UsageError
from fast import cpu

# Whose files a run's settings may name; a file that came along in output/ is none of ours.
OUR_FOLDERS = (utils.HERE, utils.HERE / "baselines")


class Network(NamedTuple):
    """A model file: its network class, its recipe, and the recipe that it was published with."""

    file: Path  # absolute
    digest: str  # `code_digest` of the file
    build: Callable[[], nn.Module]
    parameters: int
    recipe: recipes.Recipe
    published: recipes.Recipe | None
    only_contiguous: str  # why it takes no channels_last images; "" if it does

    @property
    def name(self) -> str:
        return self.file.stem

    def precision(self, device: torch.device) -> utils.Precision:
        """The device's precision, in a layout that the network takes."""
        precision = utils.pick_precision(device)
        if self.only_contiguous:
            return precision._replace(memory_format=torch.contiguous_format)
        return precision

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


def find_file(choice: str) -> Path:
    """The absolute path of the model file that 1, 2, 3 or a path means.

    Raises:
        UsageError: no such file.
    """
    path = utils.HERE / f"model_{choice}.py" if choice in ("1", "2", "3") else Path(choice)
    if path.suffix != ".py" or not path.is_file():
        raise UsageError(f"{choice!r} is neither 1, 2 or 3 nor the path of a model file (.py)")
    return path.resolve()


def load_network(choice: str) -> Network:
    """The network and recipe of model 1, 2, 3 or of a file, which is run as code.

    A network is a torch.nn.Module class of that file that can be built without arguments; blocks
    that need arguments, whose name starts with an underscore, or that the network is derived from,
    are taken for its parts.

    Raises:
        UsageError: no such file, or not exactly one network and a good RECIPE in it.
    """
    path = find_file(choice)
    try:
        digest = code_digest(path)
        module = _run_file(path, digest)
    except (Exception, SystemExit) as error:  # whatever somebody's code may raise
        raise UsageError(f"{path} cannot be run: {_reason(error, path)}") from None
    build = _network_class(path, module)
    if not isinstance(getattr(module, "RECIPE", None), dict):
        raise UsageError(f"{path} has no RECIPE dictionary; take model_2.py's as a pattern")
    recipe = _read_recipe(path, "RECIPE", module.RECIPE)
    published = getattr(module, "PUBLISHED", None)
    if published is not None:
        published = _read_recipe(path, "PUBLISHED", published)
    parameters, only_contiguous = _try_out(path, build)
    return Network(path, digest, build, parameters, recipe, published, only_contiguous)


def _run_file(path: Path, digest: str) -> ModuleType:
    """The file as a module, by a name of its own: it may be called utils.py, or model_2.py too."""
    name = f"{path.stem}_{digest[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # for what the file imports from beside it
    spec.loader.exec_module(module)
    return module


def _network_class(path: Path, module: ModuleType) -> type[nn.Module]:
    classes = [
        value
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, nn.Module)
        and value.__module__ == module.__name__
        and not name.startswith("_")
        and _needs_no_arguments(value)
    ]
    bases = {base for value in classes for base in value.__mro__[1:]}
    classes = [value for value in dict.fromkeys(classes) if value not in bases]
    if len(classes) != 1:
        found = ", ".join(value.__name__ for value in classes) or "none"
        raise UsageError(
            f"{path} must define one network (an nn.Module that is built without arguments); "
            f"found: {found}; begin the names of its parts with an underscore"
        )
    return classes[0]


def _try_out(path: Path, build: type[nn.Module]) -> tuple[int, str]:
    """The number of parameters, and why it takes contiguous images only ("" if it takes both).

    Raises:
        UsageError: it does not turn images into 10 logits each, or cannot be trained.
    """
    failures = []
    for layout in (torch.channels_last, torch.contiguous_format):
        try:
            model = build()
            if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
                raise UsageError(
                    f"{path}: {build.__name__} has lazy layers, which have no weights before the "
                    "first image; give their sizes"
                )
            model = model.to(memory_format=layout)
            for training in (False, True):
                _try_images(path, model.train(training), layout)
        except UsageError:
            raise
        except (Exception, SystemExit) as error:  # whatever somebody's code may raise
            failures.append(_reason(error, path))
            continue
        return sum(parameter.numel() for parameter in model.parameters()), "".join(failures)
    raise UsageError(f"{path}: {build.__name__} fails on images (2, 3, 32, 32): {failures[-1]}")


def _try_images(path: Path, model: nn.Module, layout: torch.memory_format) -> None:
    """Two images, in the layout and mode of a training or an evaluation."""
    logits = model(torch.zeros(2, 3, 32, 32).contiguous(memory_format=layout))
    shape = tuple(getattr(logits, "shape", ())) or f"a {type(logits).__name__}"
    name = type(model).__name__ + (" in training" if model.training else "")
    if shape != (2, len(cifar10.CLASSES)):
        raise UsageError(f"{path}: {name} turns 2 images into {shape}; it must be (2, 10)")
    trainable = any(parameter.requires_grad for parameter in model.parameters())
    if trainable and not logits.requires_grad:
        raise UsageError(f"{path}: no gradient leads from {name}'s logits to its parameters")


def _reason(error: BaseException, path: Path) -> str:
    """The error in one line, with the last line of the file that led to it."""
    lines = [
        line
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_filename == str(path)
    ]
    place = f"line {lines[-1]}: " if lines else ""
    if isinstance(error, SystemExit):
        return f"{place}it ends the program (sys.exit)"
    return f"{place}{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")


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


# ---------------------------------------------------------------- which code it is


def code_digest(path: Path) -> str:
    """SHA-256 (hexadecimal) of a model file's code, and of all files of its own that it imports.

    Comments, docstrings and recipes are left out: weights stay this network's when a remark or
    its RECIPE changes, and are another's as soon as its code does. Modules and packages beside the
    file count, and this repository's; not what lies elsewhere, or is read by other means than
    import.

    Raises:
        OSError, SyntaxError, ValueError: it cannot be read as Python.
    """
    codes: dict[Path, str] = {}
    unread = [path]
    while unread:
        file = unread.pop()
        if file not in codes:
            tree, codes[file] = _code_of(file)
            unread += _imported_files(tree, file, path.parent)
    first, *rest = codes.values()
    return hashlib.sha256("\0".join([first, *sorted(rest)]).encode()).hexdigest()


def _imported_files(tree: ast.Module, file: Path, folder: Path) -> list[Path]:
    """The files of the repository, and of the model file's folder, that a file imports."""
    found = []
    for node in ast.walk(tree):
        # What is loaded already comes first, as for Python itself: this repository's.
        roots = [utils.HERE, folder]
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module or ''}.{alias.name}".strip(".") for alias in node.names]
            if node.level:
                roots = [file.parents[node.level - 1]]
        else:
            continue
        for parts in (name.split(".") for name in names):
            for count in range(1, len(parts) + 1):
                places = [root.joinpath(*parts[:count]) for root in roots]
                files = [
                    file
                    for place in places
                    for file in (place / "__init__.py", place.with_name(f"{place.name}.py"))
                    if file.is_file()
                ]
                found += files[:1]
    return found


def _code_of(path: Path) -> tuple[ast.Module, str]:
    """A file's syntax tree, and its lines of code."""
    with tokenize.open(path) as file:  # in the encoding that its first lines may name
        source = file.read()
    tree = ast.parse(source, str(path))
    lines = source.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    remarks = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]
    settings = [
        node
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and ast.unparse(getattr(node, "target", None) or node.targets[0]) in ("RECIPE", "PUBLISHED")
    ]
    for node in sorted([*remarks, *settings], key=lambda node: (-node.lineno, -node.col_offset)):
        first, last = node.lineno - 1, node.end_lineno - 1
        # Columns are counted in bytes of UTF-8.
        before = lines[first].encode()[: node.col_offset].decode()
        after = lines[last].encode()[node.end_col_offset :].decode()
        lines[first : last + 1] = [before + after]
    return tree, "\n".join(line.rstrip() for line in lines if line.strip())


# ---------------------------------------------------------------- trained weights


class Trained(NamedTuple):
    """A trained network, and what its run says of it."""

    source: Network
    network: nn.Module  # in eval mode, on the CPU
    file: Path
    settings: dict  # empty for weights without a run

    @property
    def name(self) -> str:
        return self.source.build.__name__


def load_trained(path: Path, model: str | None = None, named: Path | None = None) -> Trained:
    """The network of a run's folder or of a file of weights.

    A model file is run as code, and a run's folder may come from anybody: only files of this
    repository are taken because a run names them. Whichever file it is, its code must be that
    which was trained.

    Args:
        path: the folder, or weights.pt, last.pt or best.pt.
        model: 1, 2, 3 or the model file; None: what the run says.
        named: a model file that the user has named, so that the run may name it too.

    Raises:
        UsageError: no such weights, nothing says whose they are, or they are another code's.
        runs.RunError: the run's settings.json is damaged.
        utils.CheckpointError: the file does not hold this network's weights.
    """
    folder = path if path.is_dir() else path.parent
    file = path / "weights.pt" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{file} is not there; give a run's folder or a file of weights")
    settings = {}
    if (folder / runs.Run.SETTINGS).is_file():
        settings = runs.read_settings(folder)
    if model is None and not settings:
        raise UsageError(f"nothing beside {file} says which network it is; give --model")
    source = network_of(folder, settings, model, named)
    network = source.build()
    utils.load_weights(network, file)
    return Trained(source, network.eval(), file, settings)


def network_of(
    folder: Path, settings: dict, model: str | None = None, named: Path | None = None
) -> Network:
    """The network that a run trained, of the repository's file or the one that the user names.

    Raises:
        UsageError: it is no file of the repository and none was named, or the code is another.
    """
    trained = settings.get("model_sha256")
    if model is None:
        if trained is None or settings.get("model_file") is None:
            raise UsageError(
                f"{folder} does not say with which model file it was trained; it comes from an "
                "older version of this code; name that file: --model FILE"
            )
        theirs = utils.HERE / settings["model_file"]
        places = (theirs, utils.HERE / theirs.name)
        ours = [path for path in places if path.resolve().parent in OUR_FOLDERS and path.is_file()]
        ours += [path for path in (theirs,) if path == named]
        if not ours:
            raise UsageError(
                f"{folder} was trained with {theirs}, which is no file of this repository; a model "
                "file is run as code, so name it yourself with --model (or copy it, for a teacher, "
                "beside model_2.py)"
            )
        model = str(ours[0])
    path = find_file(model)
    try:
        digest = code_digest(path)
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if trained not in (None, digest):
        raise UsageError(
            f"{folder} was trained with other code than {path} holds now; put that back, or name "
            "the file that was trained: --model FILE"
        )
    return load_network(model)
