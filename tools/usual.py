"""The usual way: a training as most repositories write it, to measure ours against.

    python -m tools.usual --model 2 --until 85       # the published recipe, all of CIFAR-10
    python -m tools.usual --model 2 --resume output/20261121-120000-usual-model_2

Albumentations augments image by image in a DataLoader worker for each core; float32, contiguous,
`.item()` every step. Nothing of ours but the network, the recipe's numbers and the pictures'
pipeline. `tools.bench` times this same code; `tools.minutes` draws `log.csv` beside train.py's.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import cifar10
import cli
import networks
import recipes
import runs
import utils
from support import model_files, provenance, workers
from support.files import CheckpointError, read_checkpoint, read_json
from support.history import History


class UsualDataset(Dataset):
    """Images uint8 (N, 32, 32, 3) and labels, item by item as torchvision's CIFAR10 gives them.

    The transform makes a float32 tensor (3, 32, 32) of a PIL image.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: Callable) -> None:
        self.images, self.labels, self.transform = images, labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def albumented(compose: Callable[..., dict], image: Image.Image) -> Tensor:
    """A PIL image through an Albumentations pipeline."""
    return compose(image=np.array(image))["image"]


def run_epoch(
    model: nn.Module,
    loader: DataLoader,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> utils.Metrics:
    """The textbook's loop, which trains, or without an optimizer evaluates.

    Returns the mean loss in nats and the accuracy in percent.
    """
    device = next(model.parameters()).device
    training = optimizer is not None
    model.train(training)
    running_loss = correct = total = 0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        with torch.set_grad_enabled(training):
            outputs = model(images)
            loss = criterion(outputs, labels)
        if training:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        running_loss += loss.item() * len(labels)
        correct += (outputs.argmax(dim=1) == labels).sum().item()
        total += len(labels)
    return utils.Metrics(running_loss / total, 100 * correct / total)


def reopen(folder: Path, asked: dict, parts: dict, history: History) -> runs.Run:
    """A folder to go on in, the parts and the history set to where its training stopped.

    Raises:
        cli.UsageError, CheckpointError: another training's folder, or damaged files in it.
    """
    begun = read_json(folder / "usual.json")
    other = {key: begun[key] for key, value in asked.items() if begun.get(key, value) != value}
    if other:
        found = ", ".join(f"{key} {value!r:.60}" for key, value in other.items())
        raise cli.UsageError(
            f"{folder} was begun with {found}; give --model, --epochs, --seed and the data as they "
            "were then"
        )
    run = runs.Run(folder)
    last = read_checkpoint(folder / "last.pt")
    try:
        for name, part in parts.items():
            part.load_state_dict(last[name])
        # Raises where something else than a row of ours is there.
        history.rows = [row for row in last["history"] if row["test_acc"] >= 0]
    except Exception as error:  # what does not fit raises many kinds of error
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"{folder / 'last.pt'} does not fit: {reason}") from None
    return run


def train(args: argparse.Namespace) -> None:
    """Trains by the published recipe until its last epoch, or the first at --until, into a folder.

    Raises:
        cli.UsageError: no published recipe; or nothing in the folder to go on with.
    """
    device, network = utils.Device.pick(args.device).where, networks.load_network(args.model)
    recipe = network.published
    if recipe is None:
        raise cli.UsageError(f"{network.name} has no PUBLISHED recipe, which this trains by")
    beyond = [key for key in ("clip_norm", "label_smoothing", "teacher") if getattr(recipe, key)]
    if beyond:
        raise cli.UsageError(
            f"{network.name}'s PUBLISHED recipe has {beyond[0]}, which the usual way does without; "
            "train it by train.py --recipe published"
        )
    data = cli.load_data(args)
    mean, std = utils.channel_stats(data.train_images)
    augment = partial(albumented, recipe.train_transform(mean, std, args.epochs))
    normalize = partial(albumented, utils.test_transform(mean, std))
    train_set = UsualDataset(data.train_images, data.train_labels, augment)
    test_set = UsualDataset(data.test_images, data.test_labels, normalize)
    options = {"num_workers": workers.default_workers(), "pin_memory": device.type == "cuda"}
    train_loader = DataLoader(train_set, recipe.batch_size, shuffle=True, **options)
    test_loader = DataLoader(test_set, 500, **options)
    torch.manual_seed(args.seed)
    model, criterion = network.build().to(device), nn.CrossEntropyLoss()
    model_files.scale_dropout(model, recipe.dropout)
    optimizer = recipes.make_optimizer(model, recipe)
    scheduler = recipes.make_scheduler(optimizer, recipe, args.epochs * len(train_loader))
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    history = History("test", args.epochs, args.until, args.epochs)
    asked = {"network": network.build.__name__, "epochs": args.epochs, "seed": args.seed}
    asked |= {"dry_run": args.dry_run, "data_sha256": cifar10.digests(data)}
    asked["recipe"] = asdict(recipe)
    if args.resume:
        run = reopen(args.resume, asked, parts, history)
    else:
        run = runs.Run.create(args.output_dir, f"usual-{network.name}")
        run.write_json("usual.json", asked | {"until": args.until} | provenance.environment())
    with run:
        while len(history.rows) < args.epochs and history.target_epoch is None:
            torch.manual_seed(1000 * args.seed + len(history.rows) + 1)
            start = time.perf_counter()
            trained = run_epoch(model, train_loader, criterion, optimizer, scheduler)
            middle = time.perf_counter()
            tested = run_epoch(model, test_loader, criterion)
            end = time.perf_counter()
            seconds = middle - start, end - middle
            history.add(scheduler.get_last_lr()[0], trained, tested, seconds)
            states = {name: part.state_dict() for name, part in parts.items()}
            run.save_checkpoint("last.pt", states | {"history": history.rows})
            run.write_csv("log.csv", history.rows)
            print(history.line(), flush=True)
        print(f"Results: {run.folder}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = cli.ArgumentParser(prog="tools.usual", description="Train the usual way.")
    add, percent = parser.add_argument, cli.real_number(positive=True)
    add("--model", default="2", help="1, 2, 3 or a model file with a PUBLISHED recipe (2)")
    add("--epochs", type=cli.parse_epochs, default=100, help="that the schedule spans (100)")
    add("--until", type=percent, default=100.0, help="stop at this test accuracy, in percent (100)")
    add("--seed", type=cli.whole_number(0, 2**32 - 1), default=0, help="of the training (0)")
    add("--device", help="cuda, mps or cpu (default: the first of these that is there)")
    add("--resume", type=Path, metavar="FOLDER", help="go on after this folder's last whole epoch")
    cli.add_data_flags(parser)
    return cli.run(parser, train, arguments)


if __name__ == "__main__":
    sys.exit(main())
