"""Learning rate range test: one short training during which the learning rate rises all the way.

    python -m tools.find_lr --model 2
    python -m tools.find_lr --model my_net.py --shape linear --low 0.001 --high 1

The loss first falls, fastest where the learning rate suits, then rises where it is too high (Smith,
2017, https://arxiv.org/abs/1506.01186). The suggestion is the rate of the steepest fall of the
smoothed loss. It is a hint for the first try, not a substitute for trying (`--val-split`): the test
knows nothing of the long descent that follows a peak. Written are PNG and CSV; no weights are kept.
"""

import argparse
import copy
import math
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import cli
import networks
import plots
import recipes
import runs
import utils

SMOOTHING = 0.05  # weight of the newest step in the running mean
DIVERGED = 4.0  # times the lowest smoothed loss: nothing more is to be learnt after it
SKIPPED = 0.1  # share of the steps at the start, where the running mean still settles


class Point(NamedTuple):
    """A step of the test: loss in nats, accuracy in percent, both smoothed."""

    lr: float
    loss: float
    accuracy: float


def rates(low: float, high: float, steps: int, shape: str) -> np.ndarray:
    """The learning rate of each step, float64 (steps,): "exponential" or "linear"."""
    if shape == "linear":
        return np.linspace(low, high, steps)
    return np.geomspace(low, high, steps)


def range_test(
    model: nn.Module,
    loader: utils.Loader,
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
    values: np.ndarray,
    device: torch.device,
    precision: utils.Precision,
) -> list[Point]:
    """Trains a copy of the model, a step for each learning rate; the model itself is untouched.

    With groups of several rates (Muon's) all rise in proportion; `values` are the first group's.
    Ends early once the smoothed loss is DIVERGED times its lowest, or no number any more.
    """
    model = copy.deepcopy(model).train()
    optimizer = optimizer_of(model)
    shares = [group["lr"] / optimizer.param_groups[0]["lr"] for group in optimizer.param_groups]
    scaler = torch.amp.GradScaler(device.type, enabled=precision.dtype == torch.float16)
    points: list[Point] = []
    loss_mean = hit_mean = weight = 0.0
    lowest, epoch, batches = math.inf, 0, iter(())
    for value in values:
        batch = next(batches, None)
        if batch is None:
            epoch += 1
            loader.sampler.set_epoch(epoch)
            batches = iter(loader)
            batch = next(batches)
        images, labels = batch
        images = images.to(device, memory_format=precision.memory_format, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        for group, share in zip(optimizer.param_groups, shares, strict=True):
            group["lr"] = value * share
        optimizer.zero_grad()
        with precision.autocast(device):
            logits = model(images)
        loss = criterion(logits.float(), labels)
        if not math.isfinite(loss.item()):
            break
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        # A running mean without the zeros that it starts from (Adam's bias correction).
        weight = (1 - SMOOTHING) * weight + SMOOTHING
        loss_mean += SMOOTHING * (loss.item() - loss_mean)
        hits = (logits.argmax(dim=1) == labels).float().mean().item()
        hit_mean += SMOOTHING * (hits - hit_mean)
        points.append(Point(float(value), loss_mean / weight, 100 * hit_mean / weight))
        lowest = min(lowest, points[-1].loss)
        if points[-1].loss > DIVERGED * lowest:
            break
    return points


def suggestion(points: Sequence[Point]) -> float:
    """The learning rate where the smoothed loss falls fastest against the logarithm of the rate.

    Raises:
        cli.UsageError: the loss never falls.
    """
    start = math.ceil(SKIPPED * len(points))
    losses = np.array([point.loss for point in points])[start:]
    places = np.log([point.lr for point in points])[start:]
    lowest = int(np.argmin(losses)) + 1 if len(losses) else 0
    if lowest < 3:
        raise cli.UsageError("the loss never fell; give a lower --low and --high, or more --steps")
    slopes = np.gradient(losses[:lowest], places[:lowest])
    return points[start + int(np.argmin(slopes))].lr


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = cli.ArgumentParser(prog="tools.find_lr", description="Learning rate range test.")
    add = parser.add_argument
    add("--model", default="2", help="1, 2, 3 or a model file (2)")
    add("--low", type=cli.real_number(positive=True), default=1e-4, help="first rate (0.0001)")
    add("--high", type=cli.real_number(positive=True), default=10.0, help="last rate (10)")
    add("--steps", type=cli.whole_number(20, 100_000), default=200, help="of training (200)")
    add("--shape", choices=("exponential", "linear"), default="exponential", help="of the rise")
    add("--seed", type=cli.whole_number(0, 2**32 - 1), default=0, help="of all that is random (0)")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")
    cli.add_data_flags(parser)
    return cli.run(parser, find, arguments)


def find(args: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    if args.low >= args.high:
        raise cli.UsageError(f"--low {args.low:g} must be below --high {args.high:g}")
    network = networks.load_network(args.model)
    device = utils.pick_device(args.device)
    precision = network.precision(device)
    data = cli.load_data(args)
    recipe = network.recipe
    transform = recipe.train_transform(*utils.channel_stats(data.train_images), epochs=1)
    chosen = utils.choose_loader(transform)
    loader = utils.make_loader(
        data.train_images,
        data.train_labels,
        transform,
        min(recipe.batch_size, len(data.train_images)),
        shuffle=True,
        device=device,
        precision=precision,
        batched=chosen.batched,
        workers=chosen.workers,
        seed=args.seed,
    )
    utils.seed_everything(args.seed)
    points = range_test(
        network.ready(recipe, device, precision),
        loader,
        nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing),
        lambda copied: recipes.make_optimizer(copied, recipe, precision.dtype),
        rates(args.low, args.high, args.steps, args.shape),
        device,
        precision,
    )
    best = suggestion(points)
    title = f"{network.build.__name__}, {recipe.optimizer}, batch {recipe.batch_size}"
    run = runs.Run.create(args.output_dir, f"find_lr-{network.name}")
    with run:
        run.write_csv("find_lr.csv", [point._asdict() for point in points])
        run.write("find_lr.png", plots.range_test(points, best, recipe.lr, title))
        run.log(f"{title}: {len(points)} steps, learning rate {args.low:g} to {points[-1].lr:.4g}")
        run.log(f"The loss falls fastest at {best:.4g}; the recipe's peak is {recipe.lr:g}")
        run.log(f"Results: {run.folder}")


if __name__ == "__main__":
    sys.exit(main())
