"""A model file, whoever wrote it: run, its network found and tried out, its recipe read.

What is wrong with it is said in one line, with the line of the file.
"""

import contextlib
import copy
import importlib.util
import inspect
import io
import sys
import traceback
from pathlib import Path
from types import ModuleType

import torch
import torchsummary
from torch import nn
from torch.nn.parameter import is_lazy

import cifar10
from errors import UsageError
from recipes import Recipe
from support.files import HERE
from support.provenance import code_digest

# Whose files a run's settings may name; a file that came along in output/ is none of ours.
OUR_FOLDERS = (HERE, HERE / "baselines")


def find(choice: str) -> Path:
    """The absolute path of the model file that 1, 2, 3 or a path means.

    Raises:
        UsageError: no such file.
    """
    path = HERE / f"model_{choice}.py" if choice in ("1", "2", "3") else Path(choice)
    if path.suffix != ".py" or not path.is_file():
        raise UsageError(f"{choice!r} is neither 1, 2 or 3 nor the path of a model file (.py)")
    return path.resolve()


def of_run(
    folder: Path, settings: dict, model: str | None = None, named: Path | None = None
) -> str:
    """The path of the file that a run trained: the repository's, or the one that the user names.

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
        theirs = HERE / settings["model_file"]
        ours = [
            path for path in (theirs, HERE / theirs.name) if path.resolve().parent in OUR_FOLDERS
        ]
        found = [path for path in ours if path.is_file()] + [theirs] * (theirs == named)
        if not found:
            raise UsageError(
                f"{folder} was trained with {theirs}, which is no file of this repository; a model "
                "file is run as code, so name it yourself with --model (or copy it, for a teacher, "
                "beside model_2.py)"
            )
        model = str(found[0])
    path = find(model)
    try:
        digest = code_digest(path)
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if trained not in (None, digest):
        raise UsageError(
            f"{folder} was trained with other code than {path} holds now; put that back, or name "
            "the file that was trained: --model FILE"
        )
    return model


def execute(path: Path) -> tuple[ModuleType, str]:
    """The file as a module, and the digest of its code.

    Raises:
        UsageError: it cannot be run.
    """
    try:
        digest = code_digest(path)
        # By a name of its own: it may be called utils.py, or model_2.py too.
        spec = importlib.util.spec_from_file_location(f"{path.stem}_{digest[:12]}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module  # where dataclasses look for it
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))  # for what the file imports from beside it
        spec.loader.exec_module(module)
        if torch.get_default_dtype() != torch.float32:
            torch.set_default_dtype(torch.float32)
            raise TypeError("it changes torch's default dtype, which must stay float32")
    except (Exception, SystemExit) as error:  # whatever somebody's code may raise
        raise UsageError(f"{path} cannot be run: {_reason(error, path)}") from None
    return module, digest


def network_class(path: Path, module: ModuleType) -> type[nn.Module]:
    """The one nn.Module class of the file that is nobody's part.

    Raises:
        UsageError: none, or several.
    """
    found = [
        value
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, nn.Module)
        and value.__module__ == module.__name__
        and not name.startswith("_")
        and _needs_no_arguments(value)
    ]
    bases = {base for value in found for base in value.__mro__[1:]}
    found = [value for value in dict.fromkeys(found) if value not in bases]
    if len(found) != 1:
        names = ", ".join(value.__name__ for value in found) or "none"
        raise UsageError(
            f"{path} must define one network (an nn.Module that is built without arguments); "
            f"found: {names}; begin the names of its parts with an underscore"
        )
    return found[0]


def _needs_no_arguments(network: type) -> bool:
    return all(
        parameter.default is not parameter.empty
        or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        for parameter in inspect.signature(network).parameters.values()
    )


def recipe(path: Path, module: ModuleType, key: str) -> Recipe | None:
    """The RECIPE or PUBLISHED dictionary of the file, checked; None where there is none.

    Raises:
        UsageError: something in it is wrong.
    """
    recipe = getattr(module, key, None)
    if recipe is not None and not isinstance(recipe, dict):
        raise UsageError(f"{path}, {key}: it is no dictionary")
    try:
        return None if recipe is None else Recipe.read(recipe)
    except ValueError as error:
        raise UsageError(f"{path}, {key}: {error}") from None


def try_out(path: Path, build: type[nn.Module]) -> tuple[int, str]:
    """The number of parameters, and why it takes contiguous images only ("" if it takes both).

    Raises:
        UsageError: it does not turn images into 10 logits each, or cannot be trained.
    """
    failures, name = [], build.__name__
    for layout in (torch.channels_last, torch.contiguous_format):
        try:
            model = build()
            if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
                raise UsageError(
                    f"{path}: {name} has lazy layers, which have no weights before the first "
                    "image; give their sizes"
                )
            model = model.to(memory_format=layout)
            for mode in ("", " in training"):
                logits = model.train(bool(mode))(torch.zeros(2, 3, 32, 32).to(memory_format=layout))
                shape = tuple(getattr(logits, "shape", ())) or f"a {type(logits).__name__}"
                if shape != (2, len(cifar10.CLASSES)):
                    raise UsageError(
                        f"{path}: {name}{mode} turns 2 images into {shape}; it must be (2, 10)"
                    )
                if any(p.requires_grad for p in model.parameters()) and not logits.requires_grad:
                    raise UsageError(
                        f"{path}: no gradient leads from {name}{mode}'s logits to its parameters"
                    )
            if logits.requires_grad:
                logits.sum().backward()
            if any(
                p.is_complex() or (p.grad is not None and p.grad.is_sparse)
                for p in model.parameters()
            ):
                raise UsageError(
                    f"{path}: {name} has complex weights or sparse gradients, which no recipe's "
                    "optimizer takes"
                )
            torch.save(model.state_dict(), state := io.BytesIO())
            torch.load(io.BytesIO(state.getvalue()), weights_only=True)  # as a checkpoint is read
        except UsageError:
            raise
        except (Exception, SystemExit) as error:  # whatever somebody's code may raise
            failures.append(_reason(error, path))
            continue
        return sum(parameter.numel() for parameter in model.parameters()), "".join(failures)
    raise UsageError(f"{path}: {name} fails on images (2, 3, 32, 32): {failures[-1]}")


def _reason(error: BaseException, path: Path) -> str:
    """The error in one line, with the last line of the file that led to it."""
    trace = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in trace if frame.f_code.co_filename == str(path)]
    place = f"line {lines[-1]}: " if lines else ""
    if isinstance(error, SystemExit):
        return f"{place}it ends the program (sys.exit)"
    return f"{place}{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")


def scale_dropout(model: nn.Module, factor: float) -> None:
    """Multiplies the probability of every dropout of the model by the recipe's factor.

    Dropout layers of all kinds, and the `dropout` of attention and of recurrent layers.

    Raises:
        UsageError: a probability would be 1 or more.
    """
    for module in model.modules() if factor != 1 else ():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            name = "p"
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            name = "dropout"
        else:
            continue
        probability = getattr(module, name) * factor
        if probability >= 1:
            raise UsageError(f"dropout {factor:g} makes a probability of {probability:g}")
        setattr(module, name, probability)


def summary_table(model: nn.Module) -> str:
    """torchsummary's table for an image (3, 32, 32); one line where it cannot make one.

    torchsummary prints, draws images at random, runs the model in train mode (which moves
    BatchNorm's statistics), and wants it on the CPU; so it gets a copy, and the generator is put
    back. It knows no recurrent layers, no attention, and no layers that return a dictionary: none
    of that keeps a network from being trained.
    """
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text), torch.random.fork_rng(devices=[]):
            torchsummary.summary(copy.deepcopy(model).cpu(), (3, 32, 32), device="cpu")
    except Exception as error:  # whatever it stumbles over
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return f"torchsummary can make no table of {type(model).__name__}: {reason}\n"
    return text.getvalue()
