"""Learning rate range test: one short training during which the learning rate rises all the way.

    python -m tools.find_lr --model 2
    python -m tools.find_lr --model my_net.py --shape linear --low 0.001 --high 1

The loss first falls, fastest where the learning rate suits, then rises where it is too high (Smith,
2017, https://arxiv.org/abs/1506.01186). The suggestion is the rate of the steepest fall of the
smoothed loss. It is a hint for the first try, not a substitute for trying (`--val-split`): the test
knows nothing of the long descent that follows a peak. Written are PNG and CSV; no weights are kept.
"""

import argparse
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import cli
import networks
import plots
import recipes
import runs
import utils
from support import workers

SMOOTHING = 0.05  # weight of the newest step in the running mean
DIVERGED = 4.0  # times the lowest smoothed loss: nothing more is to be learnt after it
SKIPPED = 0.1  # share of the steps at the start, where the running mean still settles
SHAPES = {"exponential": np.geomspace, "linear": np.linspace}


def range_test(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: utils.Loader,
    criterion: Callable[[Tensor, Tensor], Tensor],
    rates: np.ndarray,
    device: utils.Device,
    clip_norm: float = 0.0,
) -> np.ndarray:
    """Trains the model, a step for each of the learning rates, float (steps,).

    They are the first group's; those of other groups (Muon has several) rise in proportion.
    Gradients are shortened as by `utils.train`.
    Ends early once the smoothed loss is DIVERGED times its lowest, or no number any more.

    Returns:
        A row a step, float64 (steps, 3): rate, loss in nats, accuracy in percent, both smoothed.
    """
    shares = [group["lr"] / optimizer.param_groups[0]["lr"] for group in optimizer.param_groups]
    scaler = torch.amp.GradScaler(device.where.type, enabled=device.dtype == torch.float16)
    model.train()
    rows, means, lowest = [], np.zeros(2), math.inf
    for step, (rate, (images, labels)) in enumerate(zip(rates, endless(loader), strict=False), 1):
        images, labels = device.take(images, labels)
        with device.autocast():
            logits = model(images)
        loss = criterion(logits.float(), labels)
        accuracy = 100 * (logits.argmax(dim=1) == labels).float().mean()
        # A running mean without the zeros that it starts from (Adam's bias correction).
        means += SMOOTHING * (np.array([loss.item(), accuracy.item()]) - means)
        smoothed = means / (1 - (1 - SMOOTHING) ** step)
        if not smoothed[0] < DIVERGED * lowest:  # so written, NaN ends it too
            break
        lowest = min(lowest, smoothed[0])
        rows.append((rate, *smoothed))
        for group, share in zip(optimizer.param_groups, shares, strict=True):
            group["lr"] = rate * share
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if clip_norm:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        scaler.step(optimizer)
        scaler.update()
    return np.array(rows).reshape(-1, 3)


def endless(loader: utils.Loader) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one epoch after the other."""
    for epoch in itertools.count(1):
        loader.sampler.set_epoch(epoch)
        yield from loader


def suggestion(rows: np.ndarray) -> float:
    """The rate against whose logarithm the smoothed loss falls fastest; `rows` of `range_test`.

    Raises:
        cli.UsageError: the loss never falls.
    """
    rates, losses, _ = rows[math.ceil(SKIPPED * len(rows)) :].T
    falling = losses.argmin() + 1 if len(losses) else 0
    if falling < 3:
        raise cli.UsageError("the loss never fell; give a lower --low and --high, or more --steps")
    slopes = np.gradient(losses[:falling], np.log(rates[:falling]))
    return float(rates[slopes.argmin()])


def picture(rows: np.ndarray, suggested: float, peak: float, title: str) -> bytes:
    """Smoothed loss and accuracy against the learning rate, with two rates marked."""
    rates, losses, accuracies = rows.T
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    figure.suptitle(f"Learning rate range test: {title}")
    panels = figure.subplots(1, 2)
    names = ("smoothed cross-entropy (nats)", "smoothed accuracy on the training batches (%)")
    found, given = f"steepest fall of the loss: {suggested:.3g}", f"peak of the recipe: {peak:g}"
    for axes, values, name in zip(panels, (losses, accuracies), names, strict=True):
        axes.plot(rates, values, color=plots.TRAIN)
        axes.axvline(suggested, color=plots.MARK, linestyle="--", label=found)
        axes.axvline(peak, color=plots.TEST, linestyle=":", label=given)
        axes.set(xlabel="learning rate", ylabel=name, xscale="log")
        axes.grid(alpha=0.3)
    panels[0].set_ylim(0.95 * losses.min(), 1.05 * min(losses.max(), 2 * losses[0]))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return plots.png(figure)


def find(args: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    if args.low >= args.high:
        raise cli.UsageError(f"--low {args.low:g} must be below --high {args.high:g}")
    network = networks.load_network(args.model)
    recipe, device = network.recipe, network.fitting(utils.Device.pick(args.device))
    data = cli.load_data(args)
    images, labels = data.train_images, data.train_labels
    transform = recipe.train_transform(*utils.channel_stats(images), epochs=1)
    how = {"shuffle": True, "seed": args.seed, "workers": workers.choose(transform)[0]}
    size = min(recipe.batch_size, len(images))
    loader = utils.make_loader(images, labels, transform, size, device, **how)
    utils.seed_everything(args.seed)
    model = networks.prepare(network.build(), device, recipe)
    optimizer = recipes.make_optimizer(model, recipe, device.dtype)
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    rates = SHAPES[args.shape](args.low, args.high, args.steps)
    rows = range_test(model, optimizer, loader, criterion, rates, device, recipe.clip_norm)
    # Its worker processes end at once, not when the garbage collector waits five seconds for each:
    # frames of PyTorch's first optimizer keep this one alive.
    del loader
    best, last = suggestion(rows), rows[-1, 0]
    title = f"{network.build.__name__}, {recipe.optimizer}, batch {size}"
    with runs.Run.create(args.output_dir, f"find_lr-{network.name}") as run:
        names = ("lr", "loss", "accuracy")
        run.write_csv("find_lr.csv", [dict(zip(names, row, strict=True)) for row in rows.tolist()])
        run.write("find_lr.png", picture(rows, best, recipe.lr, title))
        run.log(f"{title}: {len(rows)} steps, learning rate {args.low:g} to {last:.4g}")
        run.log(f"The loss falls fastest at {best:.4g}; the recipe's peak is {recipe.lr:g}")
        run.log(f"Results: {run.folder}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = cli.ArgumentParser(prog="tools.find_lr", description="Learning rate range test.")
    add = parser.add_argument
    add("--model", default="2", help="1, 2, 3 or a model file (2)")
    add("--low", type=cli.real_number(positive=True), default=1e-4, help="first rate (0.0001)")
    add("--high", type=cli.real_number(positive=True), default=10.0, help="last rate (10)")
    add("--steps", type=cli.whole_number(20, 100_000), default=200, help="of training (200)")
    add("--shape", choices=SHAPES, default="exponential", help="of the rise")
    add("--seed", type=cli.whole_number(0, 2**32 - 1), default=0, help="of all that is random (0)")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")
    cli.add_data_flags(parser)
    return cli.run(parser, find, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
