"""Train a small CNN on CIFAR-10: the door of this repository.

    python train.py                              # asks which model and how many epochs
    python train.py --model 2 --epochs 20        # asks nothing
    python train.py --model my_net.py            # your own file: one network class and a RECIPE
    python train.py --model 2 --dry-run          # all of it in seconds, on data/sample

Everything a run writes lands in a folder of its own, output/YYYYMMDD-HHMMSS-model_2/.
"""

import argparse
import ast
import importlib.util
import inspect
import math
import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import NamedTuple, TextIO

import albumentations as A
import numpy as np
import torch
from torch import nn

import cifar10
import plots
import runs
import utils
from batched import BatchedTransform, UnknownTransformError

HERE = Path(__file__).resolve().parent
DEFAULT_MODEL, DEFAULT_EPOCHS = "2", 20
MOST_EPOCHS = 10_000
TEST_BATCH = 500


class UsageError(ValueError):
    """Something asked for that cannot be done; the message says what, why and what to do."""


# ---------------------------------------------------------------- what is asked for


class ArgumentParser(argparse.ArgumentParser):
    """Argparse whose errors are one line, without the usage above it."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def whole_number(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    """A parser of whole numbers in a range, for argparse and for the questions."""
    allowed = f"a whole number from {lowest} " + (f"to {highest}" if highest else "up")

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < lowest or (highest is not None and value > highest):
            raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")
        return value

    return parse


def real_number(positive: bool) -> Callable[[str], float]:
    """A parser of finite numbers above 0 (positive) or from 0 up."""
    allowed = "a number above 0" if positive else "a number from 0 up"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < 0 or (positive and value == 0):
            raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")
        return value

    return parse


def recipe_entry(text: str) -> tuple[str, object]:
    """KEY=VALUE as a key of the recipe and a number or a word."""
    key, equals, value = text.partition("=")
    known = [field.name for field in fields(utils.Recipe)]
    if not equals or key not in known:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not KEY=VALUE with a KEY out of {', '.join(known)}"
        )
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


parse_epochs = whole_number(1, MOST_EPOCHS)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what it leaves out is None, or the default that --help shows."""
    parser = ArgumentParser(
        prog="train.py",
        description="Train a small CNN on CIFAR-10. Asks for the model and the epochs unless told.",
    )
    add = parser.add_argument
    add("--model", help="1, 2, 3, or a path to a model file of your own, which is run as code")
    add("--epochs", type=parse_epochs, help="passes over the training images")
    add(
        "--recipe",
        choices=("tuned", "published"),
        default="tuned",
        help="the model file's RECIPE, or its PUBLISHED one, for comparison (tuned)",
    )
    add("--batch-size", type=whole_number(1), help="instead of the recipe's")
    add("--lr", type=real_number(positive=True), help="peak learning rate, instead of the recipe's")
    add("--weight-decay", type=real_number(positive=False), help="instead of the recipe's")
    add(
        "--set",
        type=recipe_entry,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other key of the recipe, such as label_smoothing=0.1; may be given repeatedly",
    )
    add("--seed", type=whole_number(0, 2**32 - 1), default=0, help="of all that is random (0)")
    add("--device", help="cuda, cuda:1, mps or cpu (default: the first of these that is there)")
    add("--data-dir", default="data", help="where CIFAR-10 lies or is put (data)")
    add("--output-dir", default="output", help="where the run's folder is made (output)")
    add(
        "--loader",
        choices=("batched", "albumentations"),
        default="batched",
        help="augment whole batches on the device, or image by image in worker processes "
        "(batched, where every transform has a batched form)",
    )
    add(
        "--workers",
        type=whole_number(0, 256),
        help="worker processes of the albumentations loader (one a core, at most 8; 0 = none)",
    )
    add(
        "--compile",
        action="store_true",
        help="torch.compile the training pass (slower on the CPU, not yet measured on a GPU)",
    )
    add(
        "--val-split",
        type=whole_number(1),
        metavar="N",
        help="hold out N training images and report them each epoch; the test set is read once, "
        "at the end",
    )
    add(
        "--download-timeout",
        type=real_number(positive=False),
        default=60.0,
        metavar="SECONDS",
        help="how long a download may crawl before the next source is tried (60; 0 = for ever)",
    )
    add(
        "--dry-run",
        action="store_true",
        help="one short epoch (or --epochs) on the images in data/sample, without network",
    )
    return parser.parse_args(arguments)


class Questions:
    """Asks on a terminal, reads answers from a pipe, takes the defaults where there is neither."""

    PATIENCE = 1.0  # seconds that a pipe may stay silent before it counts as empty

    def __init__(self, stdin: TextIO | None) -> None:
        self.terminal = stdin is not None and stdin.isatty()
        self.answers = iter(()) if self.terminal else self._piped(stdin)

    def ask(self, question: str, default: str, parse: Callable[[str], object]) -> object:
        """The parsed answer; a wrong one is explained and asked again.

        Raises:
            EOFError: the terminal's user ended the input.
            UsageError: the last answer on a pipe was a wrong one.
        """
        wrong = None
        while True:
            if self.terminal:
                text = input(f"{question} [{default}]: ").strip()
            else:
                text = next(self.answers, None)
                if text is None and wrong:
                    raise UsageError(f"{wrong} (and no other answer followed)")
                text = (text or "").strip()
                print(f"{question} [{default}]: {text}")
            try:
                return parse(text or default)
            except (argparse.ArgumentTypeError, UsageError) as error:
                wrong = str(error)
                print(f"  {wrong}")

    def _piped(self, stdin: TextIO | None) -> Iterator[str]:
        if stdin is None:
            return
        try:
            file = stdin.fileno()
            text = b""
            while select.select([file], [], [], self.PATIENCE)[0]:
                if not (more := os.read(file, 65536)):
                    break
                text += more
        except (OSError, ValueError):  # no file behind it; or Windows, which selects sockets only
            text = stdin.read().encode()
        yield from text.decode(errors="replace").splitlines()


class Network(NamedTuple):
    """A model file: its name, network class, recipe, and the recipe that it was published with."""

    name: str
    build: Callable[[], nn.Module]
    recipe: utils.Recipe
    published: utils.Recipe | None

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.build().parameters())


def load_network(choice: str) -> Network:
    """The network and recipe of model 1, 2, 3 or of a file, which is run as code.

    A network is a torch.nn.Module class of that file that can be built without arguments; blocks
    that need arguments, or whose name starts with an underscore, are taken for its parts.

    Raises:
        UsageError: no such file, or not exactly one network and a good RECIPE in it.
    """
    path = HERE / f"model_{choice}.py" if choice in ("1", "2", "3") else Path(choice)
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
    return Network(path.stem, networks[0], recipe, published)


def _read_recipe(path: Path, name: str, recipe: object) -> utils.Recipe:
    try:
        if not isinstance(recipe, dict):
            raise ValueError("it is no dictionary")
        return utils.Recipe.from_dict(recipe)
    except ValueError as error:
        raise UsageError(f"{path}, {name}: {error}") from None


def _needs_no_arguments(network: type) -> bool:
    return all(
        parameter.default is not parameter.empty
        or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        for parameter in inspect.signature(network).parameters.values()
    )


def choose(args: argparse.Namespace) -> tuple[Network, int]:
    """The network and the number of epochs: from the flags, else asked for, else the defaults."""
    questions = Questions(sys.stdin) if args.model is None or args.epochs is None else None
    if args.model is None:
        print("Networks for CIFAR-10:")
        for number in ("1", "2", "3"):
            network = load_network(number)
            recipe = network.recipe
            print(
                f"  {number}  {network.build.__name__}  {network.parameters:>9,} parameters, "
                f"target {recipe.target_accuracy:g} % within {recipe.target_epochs} epochs"
            )
        network = questions.ask("Which model?", DEFAULT_MODEL, load_network)
    else:
        network = load_network(args.model)
    if args.epochs is not None:
        return network, args.epochs
    if args.dry_run:
        return network, 1
    return network, questions.ask("How many epochs?", str(DEFAULT_EPOCHS), parse_epochs)


# ---------------------------------------------------------------- one run


class Split(NamedTuple):
    """Images that are evaluated: "test" or "val", uint8 (N, 32, 32, 3), labels uint8 (N,)."""

    name: str
    images: np.ndarray
    labels: np.ndarray


def run_training(network: Network, epochs: int, args: argparse.Namespace) -> None:
    """Assembles everything, trains, and writes the run's folder.

    Raises:
        UsageError, cifar10.DataError, OSError: nothing could be trained or written.
        utils.DivergedError, KeyboardInterrupt: stopped; the finished epochs are reported first.
    """
    device = utils.pick_device(args.device)
    precision = utils.pick_precision(device)
    data = load_data(args)
    images, labels, reported, test_split = split(data, args.val_split)
    recipe = choose_recipe(network, args, len(images))
    mean, std = utils.channel_stats(images)
    train_transform = utils.train_transform(mean, std, recipe.augmentation(epochs))
    test_transform = utils.test_transform(mean, std)
    batched, workers, loader_line = choose_loader(args, train_transform)
    # Accuracies are claims, so they are computed in float32, where every machine finds the same.
    exact = precision._replace(dtype=torch.float32)
    train_loader = utils.make_loader(
        images,
        labels,
        train_transform,
        recipe.batch_size,
        shuffle=True,
        batched=batched,
        seed=args.seed,
        workers=workers,
        device=device,
        precision=precision,
    )

    def loader_of(split: Split) -> utils.Loader:
        return utils.make_loader(
            split.images,
            split.labels,
            test_transform,
            TEST_BATCH,
            shuffle=False,
            device=device,
            precision=exact,
        )

    reported_loader = loader_of(reported)

    summary = utils.summary_table(network.build())  # draws random numbers, so before the seed
    utils.seed_everything(args.seed)
    model = network.build().to(device, memory_format=precision.memory_format)
    utils.scale_dropout(model, recipe.dropout)
    if device.type == "cpu":
        utils.keep_freed_memory()
        utils.speed_up_on_cpu(model)
    trained_model = torch.compile(model) if args.compile else model
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    optimizer = utils.make_optimizer(model, recipe, precision.dtype)
    scheduler = utils.make_scheduler(optimizer, recipe, epochs * len(train_loader))
    scaler = torch.amp.GradScaler(device.type, enabled=precision.dtype == torch.float16)
    torch.backends.cudnn.benchmark = True  # every batch but the last has the same shape

    run = runs.Run.create(args.output_dir, network.name)
    settings = {
        "network": network.build.__name__,
        "parameters": network.parameters,
        "epochs": epochs,
        "recipe_name": args.recipe,
        "recipe": asdict(recipe),
        "augmentation": recipe.augmentation(epochs),
        "seed": args.seed,
        "loader": "batched" if batched else "albumentations",
        "workers": workers,
        "val_split": args.val_split,
        "dry_run": args.dry_run,
        "device": utils.describe(device),
        "precision": str(precision.dtype),
        "memory_format": str(precision.memory_format),
        "mean": mean,
        "std": std,
        "train_transform": A.to_dict(train_transform),
        "data_sha256": cifar10.digests(data),
    }
    run.write_json("settings.json", settings | runs.environment())
    run.write("summary.txt", summary)
    run.write("augmentations.png", draw_augmentations(images, labels, train_transform, mean, std))
    run.log(f"Device: {utils.describe(device)}, {precision.dtype}, {precision.memory_format}")
    run.log(
        f"Network: {network.build.__name__}, {network.parameters:,} parameters, for {epochs} "
        f"epoch{'s' if epochs > 1 else ''} of {len(images):,} images, seed {args.seed}"
    )
    run.log(f"Recipe: {', '.join(f'{key} {value}' for key, value in asdict(recipe).items())}")
    run.log(loader_line)
    run.log(f"Output: {run.folder}")

    history = runs.History(reported.name, epochs, recipe.target_accuracy, recipe.target_epochs)
    stopped = None
    started = time.perf_counter()
    try:
        for epoch in range(1, epochs + 1):
            train_loader.sampler.set_epoch(epoch)
            epoch_start = time.perf_counter()
            trained = utils.train(
                trained_model,
                train_loader,
                criterion,
                optimizer,
                scheduler,
                scaler,
                device,
                precision,
            )
            train_end = time.perf_counter()
            tested = utils.test(model, reported_loader, device, exact, reported.name)
            history.add(
                lr=scheduler.get_last_lr()[0],
                train=trained,
                evaluated=tested,
                train_seconds=train_end - epoch_start,
                test_seconds=time.perf_counter() - train_end,
            )
            evaluation = tested
            weights = {
                "network": network.build.__name__,
                "epoch": epoch,
                "model": model.state_dict(),
                "recipe": asdict(recipe),
                "mean": mean,
                "std": std,
                "history": history.rows,
            }
            training = {
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "scaler": scaler.state_dict(),
                "generator": train_loader.generator.get_state() if batched else None,
            }
            run.save_checkpoint("last.pt", weights | training)
            run.save_checkpoint("weights.pt", weights["model"])
            if history.best_epoch == epoch:
                run.save_checkpoint("best.pt", weights)
            run.write_csv("log.csv", history.rows)
            run.log(history.line())
    except (KeyboardInterrupt, utils.DivergedError) as error:
        stopped = error
        run.log(f"Stopped in epoch {len(history.rows) + 1}: {str(error) or 'Ctrl-C'}")
    if not history.rows:
        raise stopped
    evaluated = reported
    if stopped is None and reported is not test_split:
        evaluated = test_split
        evaluation = utils.test(model, loader_of(test_split), device, exact)
    seconds = time.perf_counter() - started
    results = history.summary() | {
        "completed": stopped is None,
        "evaluated": evaluated.name,
        "final_loss": evaluation.loss,
        "final_accuracy": evaluation.accuracy,
        "total_seconds": seconds,
    }
    run.write_json("results.json", results)
    draw_results(run, network, history, evaluated, evaluation)
    run.log(f"\n{network.build.__name__}, {network.parameters:,} parameters")
    run.log(history.table(evaluated.name, evaluation.accuracy, seconds, run.folder))
    if stopped is not None:
        raise stopped


def load_data(args: argparse.Namespace) -> cifar10.CIFAR10:
    """CIFAR-10, or its sample in a dry run."""
    if not args.dry_run:
        return cifar10.load_cifar10(args.data_dir, args.download_timeout)
    data = cifar10.load_sample()
    print(f"Dry run: {len(data.train_images)} training and {len(data.test_images)} test images")
    return data


def choose_loader(args: argparse.Namespace, transform: A.Compose) -> tuple[bool, int, str]:
    """Whether the loader is the batched one, its number of workers, and a line that says so."""
    reason = "as --loader asks"
    if args.loader == "batched":
        try:
            BatchedTransform.from_compose(transform)
        except UnknownTransformError as error:
            reason = f"because there is no batched form of {error}"
        else:
            idle = "" if args.workers is None else "; --workers is for --loader albumentations"
            return True, 0, f"Loader: batched, on the device{idle}"
    workers = utils.default_workers() if args.workers is None else args.workers
    return False, workers, f"Loader: albumentations in {workers} worker processes, {reason}"


def split(
    data: cifar10.CIFAR10, held_out: int | None
) -> tuple[np.ndarray, np.ndarray, Split, Split]:
    """Training images and labels, the split to report each epoch, and the test split."""
    test_split = Split("test", data.test_images, data.test_labels)
    if held_out is None:
        return data.train_images, data.train_labels, test_split, test_split
    size = len(data.train_images)
    if held_out >= size:
        raise UsageError(f"--val-split {held_out} is too large; give a number from 1 to {size - 1}")
    kept, out = utils.validation_split(size, held_out)
    val_split = Split("val", data.train_images[out], data.train_labels[out])
    return data.train_images[kept], data.train_labels[kept], val_split, test_split


def choose_recipe(network: Network, args: argparse.Namespace, size: int) -> utils.Recipe:
    """The network's recipe with the values that the command line gives instead.

    Raises:
        UsageError: no published recipe, a value out of its range, or batches of more than the
            `size` training images.
    """
    recipe = network.recipe if args.recipe == "tuned" else network.published
    if recipe is None:
        raise UsageError(f"{network.name} has no PUBLISHED recipe; leave out --recipe published")
    given = {name: getattr(args, name) for name in ("lr", "weight_decay", "batch_size")}
    given = {name: value for name, value in given.items() if value is not None} | dict(args.set)
    try:
        recipe = replace(recipe, **given)
        utils.scale_dropout(network.build(), recipe.dropout)
    except ValueError as error:
        raise UsageError(f"recipe: {error}") from None
    if args.dry_run and "batch_size" not in given:
        # The recipe's batches were not chosen for so few images.
        recipe = replace(recipe, batch_size=min(recipe.batch_size, size))
    if recipe.batch_size > size:
        raise UsageError(
            f"the batch size {recipe.batch_size} is above the number of training images; "
            f"give --batch-size a number from 1 to {size}"
        )
    return recipe


def draw_results(
    run: runs.Run,
    network: Network,
    history: runs.History,
    evaluated: Split,
    evaluation: utils.Evaluation,
) -> None:
    """Writes the pictures that end a run: curves, confusion, classes, mistakes."""
    labels = evaluation.labels.numpy()
    confidences, predictions = (
        tensor.numpy() for tensor in evaluation.logits.softmax(dim=1).max(dim=1)
    )
    matrix = np.zeros((len(cifar10.CLASSES),) * 2, dtype=np.int64)
    np.add.at(matrix, (labels, predictions), 1)
    wrong = np.flatnonzero(predictions != labels)
    shown = wrong[np.argsort(-confidences[wrong], kind="stable")][:30]
    name = network.build.__name__
    where = f"{name}, {evaluated.name} set, epoch {len(history.rows)}"
    run.write("curves.png", plots.curves(history.rows, history.split, history.target, name))
    run.write(
        "confusion_matrix.png",
        plots.confusion_matrix(
            matrix, cifar10.CLASSES, f"{where}: {evaluation.accuracy:.2f} % correct"
        ),
    )
    run.write(
        "class_accuracy.png",
        plots.class_accuracy(matrix, cifar10.CLASSES, f"Accuracy by class: {where}"),
    )
    run.write(
        "misclassified.png",
        plots.misclassified(
            evaluated.images[shown],
            labels[shown],
            predictions[shown],
            confidences[shown],
            cifar10.CLASSES,
            f"{where}: the {len(shown)} most confident of {len(wrong):,} mistakes",
        ),
    )


def draw_augmentations(
    images: np.ndarray, labels: np.ndarray, transform: A.Compose, mean: utils.RGB, std: utils.RGB
) -> bytes:
    """The first image of each class and five draws of the transform, as a picture."""
    present = [label for label in range(len(cifar10.CLASSES)) if (labels == label).any()]
    raw = np.stack([images[np.argmax(labels == label)] for label in present])
    transform.set_random_seed(0)
    draws = []
    for _ in range(5):
        tensors = torch.stack([transform(image=image)["image"] for image in raw])
        pixels = tensors.permute(0, 2, 3, 1).numpy() * np.array(std) + np.array(mean)
        draws.append((255 * pixels).round().clip(0, 255).astype(np.uint8))
    classes = tuple(cifar10.CLASSES[label] for label in present)
    return plots.augmentations(raw, draws, classes, "What the network is shown in training")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = parse_arguments(arguments)
    try:
        network, epochs = choose(args)
        run_training(network, epochs, args)
    except KeyboardInterrupt:
        print("\ntrain.py: interrupted", file=sys.stderr)
        return 130
    except EOFError:
        print("\ntrain.py: no answer, nothing was trained")
        return 0
    except (UsageError, utils.DeviceError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except (cifar10.DataError, utils.DivergedError, OSError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError:
        print("train.py: error: out of GPU memory; give a smaller --batch-size", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
