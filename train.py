"""Train a small CNN on CIFAR-10: the door of this repository.

    python train.py                              # asks which model and how many epochs
    python train.py --model 2 --epochs 20        # asks nothing
    python train.py --model my_net.py            # your own file: one network class and a RECIPE
    python train.py --model 2 --dry-run          # all of it in seconds, on data/sample
    python train.py --resume                     # goes on with the newest run that was cut off

Everything a run writes lands in a folder of its own, output/YYYYMMDD-HHMMSS-model_2/.
"""

import argparse
import hashlib
import json
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C during the slow imports below ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
from torch import nn

import cifar10
import cli
import networks
import plots
import recipes
import runs
import utils
from errors import Error, UsageError
from fast.batched import A
from networks import Network, load_network
from runs import Interrupts

DEFAULT_MODEL, DEFAULT_EPOCHS = "2", 20
OUR_RECIPE = "2"  # whose recipe --recipe ours is
# What has to be the same when a run is gone on with.
SETTLED = (
    "network",
    "parameters",
    "recipe",
    "teacher",
    "train_transform",
    "data_sha256",
    "val_split",
)


def choose(args: argparse.Namespace) -> tuple[Network, int]:
    """The network and the number of epochs: from the flags, else asked for, else the defaults."""
    questions = cli.Questions(sys.stdin) if args.model is None or args.epochs is None else None
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
    return network, questions.ask("How many epochs?", str(DEFAULT_EPOCHS), cli.parse_epochs)


# ---------------------------------------------------------------- one run


class StorageError(Error, OSError):
    """The run's folder cannot be written; the message says how to go on later."""


class Split(NamedTuple):
    """Images that are evaluated: "test" or "val", uint8 (N, 32, 32, 3), labels uint8 (N,)."""

    name: str
    images: np.ndarray
    labels: np.ndarray


@dataclass
class Training:
    """One run, assembled: the network, all that moves it, and the images it sees."""

    network: Network
    epochs: int
    recipe: recipes.Recipe
    settings: dict  # what a repetition needs, as settings.json holds it
    device: torch.device
    precision: utils.Precision  # of the training steps
    exact: utils.Precision  # of the evaluation
    loader: utils.Loader
    test_transform: A.Compose
    reported: Split  # after each epoch
    test_split: Split  # at the end
    model: nn.Module
    compiled: nn.Module  # the same model, or its compiled form
    teacher: utils.Teacher | None
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    history: runs.History
    pictures: dict[str, bytes]  # that can be drawn before the training
    summary: str  # torchsummary's table
    intro: list[str]  # first lines of the log
    seconds: float = 0.0  # of all sessions so far

    def evaluate(self, split: Split) -> utils.Evaluation:
        """One pass over the split in float32."""
        loader = utils.make_loader(
            split.images,
            split.labels,
            self.test_transform,
            utils.TEST_BATCH,
            shuffle=False,
            device=self.device,
            precision=self.exact,
        )
        return utils.test(self.model, loader, self.device, self.exact, split.name)

    def weights(self) -> dict:
        """The checkpoint of an epoch, without what only going on needs."""
        return {
            "network": self.network.build.__name__,
            "epoch": len(self.history.rows),
            "model": self.model.state_dict(),
            "recipe": asdict(self.recipe),
            "mean": self.settings["mean"],
            "std": self.settings["std"],
            "history": self.history.rows,
        }

    def checkpoint(self) -> dict:
        """All that going on after this epoch needs."""
        return self.weights() | {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random_state": utils.random_state(self.device),
            "seconds": self.seconds,
        }

    def restore(self, path: Path) -> None:
        """Takes up where the checkpoint was written.

        Raises:
            utils.CheckpointError: damaged, of another network, or no checkpoint of such a run.
            OSError: it cannot be read.
        """
        utils.load_weights(self.model, path)
        checkpoint = utils.read_checkpoint(path)
        try:
            rows = [dict(row) for row in checkpoint["history"]]
            if not 1 <= len(rows) <= self.epochs or len(rows) != checkpoint["epoch"]:
                raise ValueError(f"a history of {len(rows)} epochs")
            self.history.rows = rows
            self.history.summary()  # fails where a column is missing
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            for parameter, state in self.optimizer.state.items():
                for name, value in state.items():
                    shape = tuple(getattr(value, "shape", ()))
                    if shape not in ((), tuple(parameter.shape)):
                        raise ValueError(f"the optimizer's {name} is {shape}")
            self.scheduler.load_state_dict(checkpoint["scheduler"])
            if self.scheduler.last_epoch != len(rows) * len(self.loader):  # it counts steps
                raise ValueError(f"a schedule at step {self.scheduler.last_epoch}")
            self.scaler.load_state_dict(checkpoint["scaler"])
            self.seconds = float(checkpoint["seconds"])
            utils.restore_random_state(checkpoint["random_state"], self.device)
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise utils.CheckpointError(f"{path} is no checkpoint of this run: {reason}") from None


def run_training(
    network: Network,
    epochs: int,
    args: argparse.Namespace,
    interrupts: Interrupts,
    run: runs.Run | None = None,
) -> None:
    """Assembles everything, trains, and writes the run's folder; goes on with `run` if given.

    Raises:
        UsageError, cifar10.DataError, OSError: nothing could be trained or written.
        utils.DivergedError, KeyboardInterrupt: stopped; the finished epochs are reported first.
    """
    training = assemble(network, epochs, args, cli.load_data(args))
    fresh = run is None
    if fresh:
        run = runs.Run.create(args.output_dir, network.name)
    with run:
        try:
            (begin if fresh else go_on)(training, run)
            evaluation, stopped = fit(training, run, interrupts)
            if evaluation is not None:
                with interrupts.held():
                    report(training, run, evaluation, stopped)
            if stopped is not None:
                raise stopped
        except OSError as error:
            raise StorageError(
                f"{error}; what was finished lies in {run.folder}: when this is mended, go on with "
                f"{resume_command(run, network)}"
            ) from None
        except KeyboardInterrupt:
            if runs.is_finished(run.folder):
                run.log("Interrupted, but the run is finished: all of it has been written")
            elif (run.folder / run.SETTINGS).is_file():
                run.log(f"Go on with: {resume_command(run, network)}")
            raise


def resume_command(run: runs.Run, network: Network) -> str:
    """What the user types to go on; he names the model file where a run may not (networks.py)."""
    ours = network.file.parent in networks.OUR_FOLDERS
    model = [] if ours else ["--model", str(network.file)]
    return shlex.join(["python", "train.py", "--resume", str(run.folder), *model])


def assemble(
    network: Network, epochs: int, args: argparse.Namespace, data: cifar10.CIFAR10
) -> Training:
    """Everything that a run needs, up to its first step.

    Raises:
        UsageError, utils.DeviceError: something asked for cannot be done.
    """
    device = utils.pick_device(args.device)
    precision = network.precision(device)
    images, labels, reported, test_split = split(data, args.val_split)
    recipe = choose_recipe(network, args, len(images))
    mean, std = utils.channel_stats(images)
    train_transform = recipe.train_transform(mean, std, epochs)
    chosen = utils.choose_loader(train_transform, args.loader, args.workers)
    loader = utils.make_loader(
        images,
        labels,
        train_transform,
        recipe.batch_size,
        shuffle=True,
        batched=chosen.batched,
        seed=args.seed,
        workers=chosen.workers,
        device=device,
        precision=precision,
    )
    teacher, taught_by = load_teacher(network, recipe, args.val_split, device)
    utils.seed_everything(args.seed)
    model = network.build()
    summary = utils.summary_table(model)
    model = networks.prepare(model, device, precision)
    recipes.scale_dropout(model, recipe.dropout)
    optimizer = recipes.make_optimizer(model, recipe, precision.dtype)
    torch.backends.cudnn.benchmark = True  # every batch but the last has the same shape
    why = network.only_contiguous
    described = f"{utils.describe(device)}, {precision.dtype}, {precision.memory_format}"
    return Training(
        network=network,
        epochs=epochs,
        recipe=recipe,
        settings={
            "network": network.build.__name__,
            "model_file": utils.stored_path(network.file),
            "model_sha256": network.digest,
            "parameters": network.parameters,
            "epochs": epochs,
            "recipe_name": args.recipe,
            "recipe": asdict(recipe),
            "teacher": taught_by,
            "augmentation": recipe.augmentation(epochs),
            "seed": args.seed,
            "loader": "batched" if chosen.batched else "albumentations",
            "workers": chosen.workers,
            "val_split": args.val_split,
            "dry_run": args.dry_run,
            "device": utils.describe(device),
            "precision": str(precision.dtype),
            "memory_format": str(precision.memory_format),
            "mean": mean,
            "std": std,
            "train_transform": A.to_dict(train_transform),
            "data_sha256": cifar10.digests(data),
            "arguments": stored_arguments(vars(args) | {"epochs": epochs}, network),
        },
        device=device,
        precision=precision,
        # Accuracies are claims: in float32 every machine finds the same, but for rounding.
        exact=precision._replace(dtype=torch.float32),
        loader=loader,
        test_transform=utils.test_transform(mean, std),
        reported=reported,
        test_split=test_split,
        model=model,
        compiled=torch.compile(model) if args.compile else model,
        teacher=teacher,
        criterion=nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing),
        optimizer=optimizer,
        scheduler=recipes.make_scheduler(optimizer, recipe, epochs * len(loader)),
        scaler=torch.amp.GradScaler(device.type, enabled=precision.dtype == torch.float16),
        history=runs.History(reported.name, epochs, recipe.target_accuracy, recipe.target_epochs),
        summary=summary,
        pictures={
            "augmentations.png": draw_augmentations(images, labels, train_transform, mean, std)
        },
        intro=[
            f"Device: {described}",
            f"Network: {network.build.__name__}, {network.parameters:,} parameters, for {epochs} "
            f"epoch{'s' if epochs > 1 else ''} of {len(images):,} images, seed {args.seed}",
            f"Recipe: {', '.join(f'{key} {value}' for key, value in asdict(recipe).items())}",
            chosen.line,
            *([f"Layout: contiguous, since channels_last fails: {why}"] if why else []),
        ],
    )


def begin(training: Training, run: runs.Run) -> None:
    """The first files of a new run; settings.json last, since it makes the folder a run's."""
    run.write("summary.txt", training.summary)
    for name, picture in training.pictures.items():
        run.write(name, picture)
    run.write_json("settings.json", training.settings | runs.environment())
    for line in training.intro:
        run.log(line)
    run.log(f"Output: {run.folder}")


def go_on(training: Training, run: runs.Run) -> None:
    """Brings the training, and files that were not written any more, to the last epoch's end.

    Raises:
        UsageError: the recipe or the data changed since the run began, or last.pt is gone.
        utils.CheckpointError: last.pt is damaged or not of this run.
    """
    before = runs.read_settings(run.folder)
    now = json.loads(json.dumps(training.settings))
    for key in SETTLED:
        if before.get(key) != now[key]:
            raise UsageError(
                f"{run.folder}: its {key} is not what it began with"
                f"{_difference(before, now, key)}; put that back, or start a new run"
            )
    path, history = run.folder / "last.pt", training.history
    if not path.is_file():
        left = [
            name for name in ("weights.pt", "best.pt", "log.csv") if (run.folder / name).is_file()
        ]
        if left:
            raise UsageError(
                f"{path} is gone, without which nothing can go on, though epochs were finished "
                f"({', '.join(left)}); put it back, or start a new run"
            )
        run.log("Resumed from the start: no epoch had been finished")
        return
    training.restore(path)
    if not run.logged(history.beginning()):  # the process ended between the two
        run.log(history.line())
    save_epoch(training, run)
    run.log(f"Resumed after epoch {len(history.rows)}, on {utils.describe(training.device)}")


def _difference(before: dict, now: dict, key: str) -> str:
    if key not in ("recipe", "data_sha256"):
        return ""
    old, new = before.get(key) or {}, now[key]
    changed = [name for name in new if old.get(name) != new[name]]
    return f" ({', '.join(f'{name}: {old.get(name)} then, {new[name]} now' for name in changed)})"


def save_epoch(training: Training, run: runs.Run) -> None:
    """Everything of the epoch that just ended; last.pt first, from which the rest follows."""
    checkpoint = training.checkpoint()
    run.save_checkpoint("last.pt", checkpoint)
    run.save_checkpoint("weights.pt", checkpoint["model"])
    if training.history.best_epoch == checkpoint["epoch"]:
        run.save_checkpoint("best.pt", training.weights())
    run.write_csv("log.csv", training.history.rows)


def fit(
    training: Training, run: runs.Run, interrupts: Interrupts
) -> tuple[utils.Evaluation | None, Exception | KeyboardInterrupt | None]:
    """Trains the epochs that are left.

    Returns:
        The evaluation to report (None if no epoch was finished), and what stopped the training
        before its end, if anything.
    """
    history, stopped, evaluation = training.history, None, None
    before, started = training.seconds, time.perf_counter()
    try:
        for epoch in range(len(history.rows) + 1, training.epochs + 1):
            training.loader.sampler.set_epoch(epoch)
            epoch_start = time.perf_counter()
            trained = utils.train(
                training.compiled,
                training.loader,
                training.criterion,
                training.optimizer,
                training.scheduler,
                training.scaler,
                training.device,
                training.precision,
                training.recipe.clip_norm,
                training.teacher,
            )
            train_end = time.perf_counter()
            tested = training.evaluate(training.reported)
            with interrupts.held():
                history.add(
                    lr=training.scheduler.get_last_lr()[0],
                    train=trained,
                    evaluated=tested,
                    train_seconds=train_end - epoch_start,
                    test_seconds=time.perf_counter() - train_end,
                )
                evaluation = tested
                training.seconds = before + time.perf_counter() - started
                save_epoch(training, run)
                run.log(history.line())
        if evaluation is None or training.reported is not training.test_split:
            evaluation = training.evaluate(training.test_split)
    except (KeyboardInterrupt, utils.DivergedError) as error:
        stopped = error
        done = len(history.rows)
        where = f"epoch {done + 1}" if done < training.epochs else "the last evaluation"
        run.log(f"Stopped in {where}: {str(error) or 'Ctrl-C'}")
        if not history.rows:
            return None, stopped
    if evaluation is None:  # no epoch since it was resumed; the weights may be half-way on
        utils.load_weights(training.model, run.folder / "weights.pt")
        evaluation = training.evaluate(training.reported)
    return evaluation, stopped


def report(
    training: Training,
    run: runs.Run,
    evaluation: utils.Evaluation,
    stopped: Exception | KeyboardInterrupt | None,
) -> None:
    """The pictures, the results table, and last results.json, which ends a run."""
    network, history = training.network, training.history
    evaluated = training.reported if stopped is not None else training.test_split
    draw_results(run, network, history, evaluated, evaluation)
    run.log(f"\n{network.build.__name__}, {network.parameters:,} parameters")
    run.log(history.table(evaluated.name, evaluation.accuracy, training.seconds, run.folder))
    results = history.summary() | {
        "completed": stopped is None,
        "evaluated": evaluated.name,
        "final_loss": evaluation.loss,
        "final_accuracy": evaluation.accuracy,
        "total_seconds": training.seconds,
    }
    run.write_json("results.json", results)


def stored_arguments(given: dict, network: Network | None = None) -> dict:
    """The command line as settings.json holds it: a later --resume may start in another folder."""
    stored = {name: value for name, value in given.items() if name != "resume"}
    for name in ("data_dir", "output_dir"):
        if name in stored:
            stored[name] = utils.stored_path(stored[name])
    if "set" in stored:
        stored["set"] = _with_teacher(stored["set"], utils.stored_path)
    if network is not None:
        stored["model"] = utils.stored_path(network.file)
    return stored


def _with_teacher(pairs: list, changed: Callable[[str], str]) -> list[list]:
    """The recipe's keys and values from the command line, with the teacher's path changed."""
    return [
        [key, changed(value) if key == "teacher" and value and isinstance(value, str) else value]
        for key, value in pairs
    ]


def with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """What was not given, filled in."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(**(vars(args) | cli.DEFAULTS | given))


def reopen(args: argparse.Namespace) -> tuple[runs.Run, Network, int, argparse.Namespace]:
    """The run to go on with, its network, epochs and command line.

    Raises:
        UsageError: a flag differs from the run's.
        runs.RunError: no such run, or nothing to go on with.
    """
    folder = args.resume or runs.newest_unfinished(args.output_dir or cli.DEFAULTS["output_dir"])
    run = runs.Run.reopen(folder)
    try:
        settings = runs.read_settings(run.folder)
        stored = settings.get("arguments") or {}
        if set(stored) != set(vars(args)) - {"resume"}:
            raise runs.RunError(
                f"{run.folder}/settings.json does not say how the run was started; it comes from "
                "another version of this code"
            )
        runs.validated(run.folder / run.SETTINGS, stored, cli.StoredArguments)
        given = {name: value for name, value in vars(args).items() if value is not None}
        for name, value in stored_arguments(given).items():
            if name in cli.FREE_ON_RESUME or json.loads(json.dumps(value)) == stored[name]:
                continue
            flag = "--" + name.replace("_", "-")
            if name == "epochs":
                raise UsageError(
                    f"{run.folder} was laid out for {stored['epochs']} epochs, and its learning "
                    f"rate ends there; leave --epochs out, or start a new run of {args.epochs}"
                )
            raise UsageError(
                f"{run.folder} began with {flag} {stored[name]}, and going on cannot change that; "
                f"leave {flag} out, or start a new run"
            )
        network = networks.network_of(run.folder, settings, args.model)
        free = {name: given[name] for name in cli.FREE_ON_RESUME if name in given}
        filled = argparse.Namespace(**(stored | {"resume": args.resume}))
        filled.data_dir, filled.output_dir = (
            str(utils.HERE / path) for path in (filled.data_dir, filled.output_dir)
        )
        filled.set = _with_teacher(filled.set, lambda path: str(utils.HERE / path))
        return run, network, filled.epochs, argparse.Namespace(**(vars(filled) | free))
    except BaseException:
        run.close()
        raise


def load_teacher(
    network: Network, recipe: recipes.Recipe, held_out: int | None, device: torch.device
) -> tuple[utils.Teacher | None, dict | None]:
    """The network that the recipe distills from, and what settings.json says of it.

    Raises:
        UsageError: no such run, or it was trained on other images than this one will be.
        utils.CheckpointError: its weights are damaged.
    """
    if not recipe.teacher:
        return None, None
    folder = utils.HERE / recipe.teacher  # as settings.json holds it
    # The user has named one model file, this run's: a teacher of the same may be run as well.
    trained = networks.load_trained(folder, named=network.file)
    theirs = trained.settings.get("val_split")
    if theirs != held_out:
        raise UsageError(
            f"the teacher in {folder} was trained with --val-split {theirs}, this run has "
            f"{held_out}, so they know different images; train one with the same --val-split"
        )
    precision = trained.source.precision(device)
    teacher = networks.prepare(trained.network, device, precision)
    return utils.Teacher(teacher, recipe.teacher_weight, precision), {
        "network": trained.name,
        "weights_sha256": hashlib.sha256(trained.file.read_bytes()).hexdigest(),
    }


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


def choose_recipe(network: Network, args: argparse.Namespace, size: int) -> recipes.Recipe:
    """The network's recipe with the values that the command line gives instead.

    Raises:
        UsageError: no published recipe, a value out of its range, or batches of more than the
            `size` training images.
    """
    recipe = {
        "tuned": network.recipe,
        "published": network.published,
        "ours": load_network(OUR_RECIPE).recipe,
    }[args.recipe]
    if recipe is None:
        raise UsageError(f"{network.name} has no PUBLISHED recipe; leave out --recipe published")
    given = {name: getattr(args, name) for name in ("lr", "weight_decay", "batch_size")}
    given = {name: value for name, value in given.items() if value is not None} | dict(args.set)
    try:
        recipe = replace(recipe, **given)
    except (ValueError, TypeError) as error:  # TypeError: a key of another version's recipe
        raise UsageError(f"recipe: {error}") from None
    if recipe.teacher:
        recipe = replace(recipe, teacher=utils.stored_path(recipe.teacher))
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
        draws.append(utils.to_pixels(tensors, mean, std))
    classes = tuple(cifar10.CLASSES[label] for label in present)
    return plots.augmentations(raw, draws, classes, "What the network is shown in training")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""

    def work(args: argparse.Namespace) -> None:
        with Interrupts() as interrupts:
            if args.resume is not None:
                run, network, epochs, filled = reopen(args)
                run_training(network, epochs, filled, interrupts, run)
                return
            filled = with_defaults(args)
            try:
                network, epochs = choose(filled)
            except EOFError:
                print("\ntrain.py: no answer, nothing was trained")
                return
            run_training(network, epochs, filled, interrupts)

    return cli.run(cli.training_parser(), work, arguments)


if __name__ == "__main__":
    sys.exit(main())
