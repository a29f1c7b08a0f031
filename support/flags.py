"""The flags of train.py: read, stored in settings.json, and read again when a run goes on."""

import argparse
import ast
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import cifar10
import cli
import networks
import parallel
from errors import UsageError
from recipes import Recipe
from support.files import HERE, stored_path

# What may be given anew when a run is gone on with; everything else stays as it began.
FREE_ON_RESUME = ("resume", "model", "device", "data_dir", "output_dir", "download_timeout")
# Flags that runs of older versions do not have; they did what the default does.
LATER = {"no_test"}
LONGEST_WAIT = 86_400  # seconds; operating systems take no waits of any length


def parser() -> cli.ArgumentParser:
    """The command line of train.py."""
    flags = cli.ArgumentParser(
        prog="train.py",
        description="Train a small CNN on CIFAR-10. Asks for the model and the epochs unless told.",
    )
    add, number = flags.add_argument, cli.whole_number(1)
    add("--model", help="1, 2, 3, or a path to a model file of your own, which is run as code")
    add("--epochs", type=cli.parse_epochs, help="passes over the training images")
    add(
        "--recipe",
        choices=("tuned", "published", "ours"),
        default="tuned",
        help="the model file's RECIPE; its PUBLISHED one, for comparison; or, for any network, the "
        "recipe of model 2 (tuned)",
    )
    add("--batch-size", type=number, help="instead of the recipe's")
    add(
        "--lr",
        type=cli.real_number(positive=True),
        help="peak learning rate, instead of the recipe's",
    )
    add("--weight-decay", type=cli.real_number(positive=False), help="instead of the recipe's")
    add(
        "--set",
        type=recipe_entry,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other key of the recipe, such as label_smoothing=0.1; may be given repeatedly",
    )
    add("--seed", type=cli.whole_number(0, 2**32 - 1), default=0, help="of all that is random (0)")
    add("--device", help="cuda, cuda:1, mps or cpu (default: the first of these that is there)")
    add(
        "--loader",
        choices=("batched", "albumentations"),
        default="batched",
        help="augment whole batches on the device, or image by image in worker processes "
        "(batched, where every transform has a batched form)",
    )
    add(
        "--workers",
        type=cli.whole_number(0, 256),
        help="worker processes of the albumentations loader (one a core, at most 8; 0 = none)",
    )
    add(
        "--val-split",
        type=number,
        metavar="N",
        help="hold out N training images and report them each epoch; the test set is read once, "
        "at the end",
    )
    add("--no-test", action="store_true", help="with --val-split: the test set is not read at all")
    add(
        "--download-timeout",
        type=cli.real_number(positive=False, highest=LONGEST_WAIT),
        default=cifar10.STALL_SECONDS,
        metavar="SECONDS",
        help="how long a download may crawl before the next source is tried (60; 0 = for ever)",
    )
    cli.add_data_flags(flags)
    add(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN_FOLDER",
        help="go on with a run that was cut off, in its folder and with its settings (without a "
        "folder: the newest unfinished run of --output-dir)",
    )
    return flags


def choose(args: argparse.Namespace) -> tuple[str, int]:
    """The model and the epochs: as the flags say, or asked for.

    Raises:
        UsageError: nobody is there to answer, or there is nothing to evaluate.
    """
    if args.no_test and args.val_split is None:
        raise UsageError("--no-test leaves nothing to evaluate; hold images out with --val-split N")
    model, epochs = args.model, args.epochs
    if not parallel.answers() and (model is None or (epochs is None and not args.dry_run)):
        raise UsageError(
            "torchrun has started this anew, and what was answered is lost; give --model and "
            "--epochs"
        )
    if model is None:
        print("Networks for CIFAR-10:")
        for number in ("1", "2", "3"):
            network = networks.load_network(number)
            name, recipe = network.build.__name__, network.recipe
            print(
                f"  {number}  {name}  {network.parameters:>9,} parameters, target "
                f"{recipe.target_accuracy:g} % within {recipe.target_epochs} epochs"
            )
        model = str(cli.ask("Which model?", "2", networks.load_network).file)
    if epochs is None:
        epochs = 1 if args.dry_run else cli.ask("How many epochs?", "20", cli.parse_epochs)
    return model, epochs


def recipe_of(args: argparse.Namespace, network: networks.Network) -> Recipe:
    """The network's recipe with the values that the command line gives instead.

    Raises:
        UsageError: no published recipe, or a value out of its range.
    """
    if args.recipe == "ours":
        recipe = networks.load_network("2").recipe
    else:
        recipe = network.published if args.recipe == "published" else network.recipe
    if recipe is None:
        raise UsageError(f"{network.name} has no PUBLISHED recipe; leave out --recipe published")
    given = {name: getattr(args, name) for name in ("lr", "weight_decay", "batch_size")}
    given = {name: value for name, value in given.items() if value is not None} | dict(args.set)
    try:
        recipe = Recipe.read(asdict(recipe) | given)
        return replace(recipe, teacher=teacher_path(recipe.teacher, HERE / recipe.teacher))
    except ValueError as error:
        raise UsageError(f"recipe: {error}") from None


def batch_may_shrink(args: argparse.Namespace) -> bool:
    """Whether few images may shrink the batch: in a dry run, unless a flag gives its size."""
    return args.dry_run and args.batch_size is None and "batch_size" not in dict(args.set)


def differences(recipe: Recipe) -> dict[str, object]:
    """What of a recipe is not the plain default, or has none, by its key."""
    values = {field: getattr(recipe, field.name) for field in fields(recipe)}
    return {field.name: value for field, value in values.items() if value != field.default}


def to_store(args: argparse.Namespace) -> dict:
    """The command line as settings.json holds it, on whichever machine and in whichever folder."""
    stored = {name: value for name, value in vars(args).items() if name not in ("resume", "model")}
    return stored | {name: stored_path(stored[name]) for name in ("data_dir", "output_dir")}


def resumed(folder: Path, stored: dict | None, given: Sequence[str] | None) -> argparse.Namespace:
    """The command line of a run that goes on: as it began, and what is given anew.

    Raises:
        UsageError: what was stored is none, or a flag differs from it that has to stay.
    """
    flags, damaged = parser(), f"{folder}/settings.json is damaged"
    known = set(to_store(flags.parse_args([])))
    if not stored or not known - LATER <= set(stored) <= known:
        raise UsageError(
            f"{folder}/settings.json does not say how the run was started; it comes from another "
            "version of this code"
        )
    try:
        began = [text for name, value in stored.items() for text in _as_flag(name, value)]
        before = flags.parse_args(began)
        again = json.loads(json.dumps(to_store(before)))
        wrong = [name for name, value in again.items() if value != stored.get(name, value)]
        if wrong or before.epochs is None:
            name = (wrong or ["epochs"])[0]
            raise ValueError(f"{name} is {stored[name]!r:.60}")
    except (UsageError, ValueError, TypeError) as error:
        raise UsageError(f"{damaged}: {error}") from None
    args = flags.parse_args([*began, *(sys.argv[1:] if given is None else given)])
    for name, value in vars(before).items():
        now, flag = getattr(args, name), "--" + name.replace("_", "-")
        if name in FREE_ON_RESUME or now == value or (name == "set" and dict(now) == dict(value)):
            continue
        if name == "epochs":
            raise UsageError(
                f"{folder} was laid out for {value} epochs, and its learning rate ends there; "
                f"leave --epochs out, or start a new run of {now}"
            )
        raise UsageError(
            f"{folder} began with {flag} {value}, and going on cannot change that; leave {flag} "
            "out, or start a new run"
        )
    teacher = dict(args.set).get("teacher")
    if teacher and not (HERE / teacher).exists():
        raise UsageError(f"{folder} learns from {HERE / teacher}, which is gone; put it back")
    return args


def _as_flag(name: str, value: object) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if name == "set" and isinstance(value, list):
        pairs = [
            (key, HERE / entry if key == "teacher" and entry else entry) for key, entry in value
        ]
        return [f"{flag}={key}={entry}" for key, entry in pairs]
    if not isinstance(value, str | int | float | None):
        raise ValueError(f"{name} is {value!r:.60}")
    if name in ("data_dir", "output_dir"):
        return [f"{flag}={HERE / str(value)}"]
    if value is True:
        return [flag]
    return [] if value is None or value is False else [f"{flag}={value}"]


def teacher_path(name: str, *places: str | Path) -> str:
    """The stored_path of a teacher in the first of the places that is there, or output/reference.

    Of one that is nowhere, where the repository's folder would have it; of no name, no path.
    """
    if not name:
        return ""
    places = *places, networks.REFERENCE / name
    return stored_path(next(filter(os.path.exists, places), HERE / name))


def recipe_entry(text: str) -> tuple[str, object]:
    """KEY=VALUE as a key of the recipe and a number or a word; a teacher as its path from HERE."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not KEY=VALUE")
    if key == "teacher" and value:
        return key, teacher_path(value, value, HERE / value)
    try:
        with warnings.catch_warnings(action="ignore"):  # of what only resembles Python
            return key, ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return key, value
