"""What CIFAR-10 looks like: counts, samples, colours, class means, and images in both splits.

    python -m tools.explore                    # pictures and report.md in output/explore/

Reading: the test set is balanced and has the training set's colours; but some test images have
nearly the same picture among the training images, so that a test accuracy flatters a little
(Barz and Denzler, 2020, https://arxiv.org/abs/1902.00423, found 3.3 % by eye).
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import cifar10
import cli
import plots
import utils
from support import files

# The correlation from which on two images count as nearly the same: of the pairs just above it,
# most are the same picture, and a few only have the same sky (the end of near_duplicates.png).
NEAR = 0.95
SIDE = 16  # they are compared at half their size, which forgives re-encoding and small shifts
TEST_CHUNK = 250
SHOWN = 12


class Pairs(NamedTuple):
    """Test images and the training image that each is most like, most alike first."""

    test: np.ndarray  # int (N,)
    train: np.ndarray  # int (N,)
    similarity: np.ndarray  # float (N,), correlation from -1 to 1


def samples(images: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """That many images of each class, no two the same, uint8 (10, count, 32, 32, 3)."""
    draw = np.random.default_rng(0)
    places = [draw.permutation(np.flatnonzero(labels == label))[:count] for label in range(10)]
    return images[np.stack(places)]


def mean_images(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mean image of each class, uint8 (10, 32, 32, 3), rounded."""
    means = [images[labels == label].mean(axis=0) for label in range(10)]
    return np.stack(means).round().astype(np.uint8)


def histograms(images: np.ndarray) -> np.ndarray:
    """How many pixels of each channel have each grey level, int (3, 256)."""
    return np.stack([np.bincount(grey, minlength=256) for grey in images.reshape(-1, 3).T])


def exact_duplicates(test: np.ndarray, train: np.ndarray) -> int:
    """Test images that are, byte for byte, among the training images."""
    known = {image.tobytes() for image in train}
    return sum(image.tobytes() in known for image in test)


def near_duplicates(test: np.ndarray, train: np.ndarray, least: float = NEAR) -> Pairs:
    """Test images with a training image, or its mirror image, that correlates at least so much.

    The correlation is over the colours of all pixels at half size, each image less its mean and
    at length 1: brightness and contrast do not matter.
    """
    known = torch.cat([_descriptors(train), _descriptors(train[:, :, ::-1])])
    best = [(chunk @ known.T).max(dim=1) for chunk in _descriptors(test).split(TEST_CHUNK)]
    similarity, partner = (torch.cat(chunks).numpy() for chunks in zip(*best, strict=True))
    order = np.argsort(-similarity, kind="stable")[: (similarity >= least).sum()]
    return Pairs(order, partner[order] % len(train), similarity[order])


def _descriptors(images: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float()
    small = F.adaptive_avg_pool2d(tensor, SIDE).flatten(1)
    return F.normalize(small - small.mean(dim=1, keepdim=True), dim=1)


def report(data: cifar10.CIFAR10, pairs: Pairs) -> str:
    """The findings as Markdown."""
    mean, std = utils.channel_stats(data.train_images)
    exact = exact_duplicates(data.test_images, data.train_images)
    labels = (data.train_labels, data.test_labels)
    columns = (np.bincount(split, minlength=10) for split in labels)
    other = sum(data.test_labels[pairs.test] != data.train_labels[pairs.train])
    count = len(data.test_images)
    rows = zip(cifar10.CLASSES, *columns, strict=True)
    counts = "\n".join(f"| {name} | {train:,} | {test:,} |" for name, train, test in rows)
    picture = "\n![Pairs of a test and a training image](near_duplicates.png)\n"
    return f"""# CIFAR-10, explored

{len(data.train_images):,} training and {count:,} test images of 32x32 pixels, three channels.

| class | train | test |
|---|---|---|
{counts}

![Number of images of each class](class_counts.png)

![Images of each class](samples.png)

| channel | mean | standard deviation |
|---|---|---|
| red | {mean[0]:.4f} | {std[0]:.4f} |
| green | {mean[1]:.4f} | {std[1]:.4f} |
| blue | {mean[2]:.4f} | {std[2]:.4f} |

Over all training pixels, in units of the full range 255.

![Histogram of each channel](histograms.png)

![Mean image of each class](mean_images.png)

## Test images that are (nearly) in the training set

- {exact} of {count:,} are there byte for byte.
- {len(pairs.test)} ({len(pairs.test) / count:.2%}) have a training image, or a mirrored one, that
  correlates with them by {NEAR} or more at half size; {other} of these pairs have different labels.
{picture if len(pairs.test) else ""}"""


def pictures(data: cifar10.CIFAR10, pairs: Pairs) -> dict[str, bytes]:
    """File name to PNG; near_duplicates.png only if there are any."""
    images, labels, classes = data.train_images, data.train_labels, cifar10.CLASSES
    chosen, means = np.concatenate(samples(images, labels, 8)), mean_images(images, labels)
    drawn = {
        "class_counts.png": draw_counts(data),
        "samples.png": image_grid(chosen, 8, "Eight training images of each class", left=classes),
        "histograms.png": draw_histograms(images),
        "mean_images.png": image_grid(means, 5, "Mean training image of each class", classes),
    }
    return drawn | ({"near_duplicates.png": draw_pairs(data, pairs)} if len(pairs.test) else {})


def draw_pairs(data: cifar10.CIFAR10, pairs: Pairs) -> bytes:
    """Each pair side by side under its classes and similarity; of many, the first and the last."""
    title = f"Test image | training image: {len(pairs.test)} pairs"
    if len(pairs.test) > 2 * SHOWN:
        pairs = Pairs(*(np.concatenate([column[:SHOWN], column[-SHOWN:]]) for column in pairs))
        title += f", the {SHOWN} most and the {SHOWN} least alike of them"
    gap = np.full((len(pairs.test), 32, 4, 3), 255, dtype=np.uint8)
    both = (data.test_images[pairs.test], gap, data.train_images[pairs.train])
    names = np.array(cifar10.CLASSES)
    classes = names[data.test_labels[pairs.test]], names[data.train_labels[pairs.train]]
    rows = zip(*classes, pairs.similarity, strict=True)
    labels = [f"{test} | {train}  {similarity:.3f}" for test, train, similarity in rows]
    return image_grid(np.concatenate(both, axis=2), 4, title, labels)


def draw_counts(data: cifar10.CIFAR10) -> bytes:
    """Bars of the images of each class, one for each split."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots()
    for split, labels, x in (("train", data.train_labels, -0.2), ("test", data.test_labels, 0.2)):
        counts, name = np.bincount(labels, minlength=10), f"{split}, {len(labels):,} images"
        drawn = axes.bar(np.arange(10) + x, counts, 0.4, label=name)
        axes.bar_label(drawn, fmt="{:,.0f}", padding=2, fontsize=8)
    axes.set_xticks(range(10), cifar10.CLASSES)
    axes.set(ylabel="images", title="Images of each class")
    axes.margins(y=0.1)
    figure.legend(loc="outside lower right", ncols=2)
    return plots.png(figure)


def draw_histograms(images: np.ndarray) -> bytes:
    """How often each grey level occurs in each channel, with its mean and standard deviation."""
    figure = Figure(figsize=(15, 4), layout="constrained")
    figure.suptitle("Grey levels of all training pixels")
    panels = figure.subplots(1, 3, sharey=True)
    columns = (panels, ("red", "green", "blue"), histograms(images), *utils.channel_stats(images))
    for axes, name, counts, mean, std in zip(*columns, strict=True):
        axes.bar(range(256), 100 * counts / counts.sum(), width=1, color=f"tab:{name}", alpha=0.7)
        axes.axvline(255 * mean, color="black", label=f"mean {mean:.4f}")
        look = {"color": "black", "alpha": 0.1, "label": f"± std {std:.4f}"}
        axes.axvspan(255 * (mean - std), 255 * (mean + std), **look)
        axes.set(title=name, xlabel="grey level", xlim=(-0.5, 255.5))
        axes.legend()
    panels[0].set_ylabel("share of the pixels (%)")
    return plots.png(figure)


def image_grid(
    images: np.ndarray,
    columns: int,
    title: str,
    above: Sequence[str] = (),
    left: Sequence[str] = (),
) -> bytes:
    """Rows of images (N, height, width, 3), uint8, with labels above each or left of each row."""
    rows, wide = -(-len(images) // columns), images.shape[2] / images.shape[1]
    size = (1.4 * wide * columns + bool(left), (1.4 + 0.25 * bool(above)) * rows + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, image, label in zip_longest(grid.flat, images, above):
        axes.set(xticks=[], yticks=[], frame_on=False)
        axes.set_title(label, fontsize=9)
        if image is not None:
            axes.imshow(image)
    for axes, name in zip(grid[:, 0], left, strict=False):
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
    return plots.png(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = cli.ArgumentParser("tools.explore", description="Pictures of and figures on CIFAR-10.")
    cli.add_data_flags(parser)

    def work(args: argparse.Namespace) -> None:
        data = cli.load_data(args)
        pairs = near_duplicates(data.test_images, data.train_images)
        folder = Path(args.output_dir) / "explore"
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in {**pictures(data, pairs), "report.md": report(data, pairs)}.items():
            print(files.write_file(folder / name, content))

    return cli.run(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
