"""The usual way: a training as most repositories write it, to measure ours against.

    python -m tools.usual --model 2 --until 85       # the published recipe, all of CIFAR-10
    python -m tools.usual --resume output/20261121-120000-usual-model_2

A data set that augments image by image with Albumentations, a DataLoader with a worker for each
core, float32, contiguous, `.item()` every step. Nothing of ours but the network, the recipe's
numbers and the pictures' pipeline. `tools.bench` times this same code; `log.csv` has the columns of
train.py's, so that both can be drawn over minutes (`tools.minutes`).
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

import cli
import networks
import recipes
import runs
import utils


class UsualDataset(Dataset):
    """Item by item as torchvision's CIFAR10: from array to PIL image, then through the transform.

    Args:
        images, labels: uint8 (N, 32, 32, 3) and uint8 (N,).
        transform: of a PIL image, to a float32 tensor (3, 32, 32).
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, transform: Callable[[Image.Image], object]
    ) -> None:
        self.images, self.labels, self.transform = images, labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


class FromPIL:
    """An Albumentations pipeline as a torchvision-style transform of a PIL image."""

    def __init__(self, compose: Callable[..., dict]) -> None:
        self.compose = compose

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.compose(image=np.array(image))["image"]


def train_epoch(
    model: nn.Module,
    loader: DataLoader,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    device: torch.device,
) -> utils.Metrics:
    """One epoch, the textbook's loop; mean loss in nats and accuracy in percent."""
    model.train()
    running_loss = correct = total = 0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        outputs = model(images)
        loss = criterion(outputs, labels)
        loss.backward()
        optimizer.step()
        scheduler.step()
        running_loss += loss.item() * len(labels)
        correct += (outputs.argmax(dim=1) == labels).sum().item()
        total += len(labels)
    return utils.Metrics(running_loss / total, 100 * correct / total)


def test_epoch(
    model: nn.Module, loader: DataLoader, criterion: nn.Module, device: torch.device
) -> utils.Metrics:
    """One pass in eval mode; mean loss in nats and accuracy in percent."""
    model.eval()
    loss = correct = total = 0
    with torch.no_grad():
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            outputs = model(images)
            loss += criterion(outputs, labels).item() * len(labels)
            correct += (outputs.argmax(dim=1) == labels).sum().item()
            total += len(labels)
    return utils.Metrics(loss / total, 100 * correct / total)


test_epoch.__test__ = False  # pytest would take the name for a test's


def train(args: object) -> None:
    """Trains by the published recipe until its last epoch, or the first at --until, into a folder.

    Raises:
        cli.UsageError: the network has no published recipe.
    """
    data = cli.load_data(args)
    device = utils.pick_device(args.device)
    network = networks.load_network(args.model)
    recipe = network.published
    if recipe is None:
        raise cli.UsageError(f"{network.name} has no PUBLISHED recipe, which this trains by")
    mean, std = utils.channel_stats(data.train_images)
    augment = FromPIL(recipe.train_transform(mean, std, args.epochs))
    plain = FromPIL(utils.test_transform(mean, std))
    options = {"num_workers": utils.default_workers(), "pin_memory": device.type == "cuda"}
    train_set = UsualDataset(data.train_images, data.train_labels, augment)
    test_set = UsualDataset(data.test_images, data.test_labels, plain)
    train_loader = DataLoader(train_set, recipe.batch_size, shuffle=True, **options)
    test_loader = DataLoader(test_set, 500, **options)
    torch.manual_seed(args.seed)
    model = network.build().to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = recipes.make_optimizer(model, recipe)
    scheduler = recipes.make_scheduler(optimizer, recipe, args.epochs * len(train_loader))
    history = runs.History("test", args.epochs, args.until, args.epochs)
    if args.resume:
        run = runs.Run(Path(args.resume))
        last = utils.read_checkpoint(run.folder / "last.pt")
        model.load_state_dict(last["model"])
        optimizer.load_state_dict(last["optimizer"])
        scheduler.load_state_dict(last["scheduler"])
        history.rows = last["history"]
    else:
        run = runs.Run.create(args.output_dir, f"usual-{network.name}")
        about = {"network": network.build.__name__, "seed": args.seed, "until": args.until}
        run.write_json("usual.json", about | runs.environment())
    with run:
        for epoch in range(len(history.rows) + 1, args.epochs + 1):
            torch.manual_seed(1000 * args.seed + epoch)
            start = time.perf_counter()
            trained = train_epoch(model, train_loader, criterion, optimizer, scheduler, device)
            middle = time.perf_counter()
            tested = test_epoch(model, test_loader, criterion, device)
            end = time.perf_counter()
            history.add(
                lr=scheduler.get_last_lr()[0],
                train=trained,
                evaluated=tested,
                train_seconds=middle - start,
                test_seconds=end - middle,
            )
            checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoint |= {"scheduler": scheduler.state_dict(), "history": history.rows}
            run.save_checkpoint("last.pt", checkpoint)
            run.write_csv("log.csv", history.rows)
            print(history.line(), flush=True)
            if tested.accuracy >= args.until:
                break
        print(f"Results: {run.folder}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = cli.ArgumentParser(prog="tools.usual", description="Train the usual way.")
    add = parser.add_argument
    add("--model", default="2", help="1, 2, 3 or a model file with a PUBLISHED recipe (2)")
    add("--epochs", type=cli.parse_epochs, default=100, help="that the schedule spans (100)")
    add(
        "--until",
        type=cli.real_number(positive=True),
        default=100.0,
        help="stop after the first epoch at this test accuracy, in percent",
    )
    add("--seed", type=cli.whole_number(0, 2**32 - 1), default=0, help="of the training (0)")
    add("--device", help="cuda, mps or cpu (default: the first of these that is there)")
    add("--resume", metavar="FOLDER", help="go on after the last whole epoch of this folder")
    cli.add_data_flags(parser)
    return cli.run(parser, train, arguments)


if __name__ == "__main__":
    sys.exit(main())
