"""What CIFAR-10 looks like: counts, samples, colours, class means, and images in both splits.

    python -m tools.explore                    # pictures and report.md in output/explore/

Reading: the test set is balanced and has the training set's colours; but some test images have
nearly the same picture among the training images, so that a test accuracy flatters a little
(Barz and Denzler, 2020, https://arxiv.org/abs/1902.00423, found 3.3 % by eye).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import cifar10
import cli
import plots
import runs
import utils

# The correlation from which on two images count as nearly the same: of the pairs just above it,
# most are the same picture, and a few only have the same sky (the end of near_duplicates.png).
NEAR = 0.95
SIDE = 16  # they are compared at half their size, which forgives re-encoding and small shifts
TEST_CHUNK = 500
SHOWN = 12


class Pairs(NamedTuple):
    """Test images and the training image that each is most like, most alike first."""

    test: np.ndarray  # int (N,)
    train: np.ndarray  # int (N,)
    similarity: np.ndarray  # float (N,), correlation from -1 to 1


def class_counts(labels: np.ndarray) -> np.ndarray:
    """Images of each class, int (10,)."""
    return np.bincount(labels, minlength=len(cifar10.CLASSES))


def samples(images: np.ndarray, labels: np.ndarray, count: int, seed: int = 0) -> dict:
    """Class name to `count` of its images, drawn without repetition (all, if it has fewer)."""
    draw = np.random.default_rng(seed)
    chosen = {}
    for label, name in enumerate(cifar10.CLASSES):
        found = np.flatnonzero(labels == label)
        chosen[name] = images[draw.permutation(found)[:count]]
    return chosen


def mean_images(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mean image of each class, uint8 (10, 32, 32, 3), rounded."""
    means = [images[labels == label].mean(axis=0) for label in range(len(cifar10.CLASSES))]
    return np.stack(means).round().astype(np.uint8)


def histograms(images: np.ndarray) -> np.ndarray:
    """How many pixels of each channel have each grey level, int (3, 256)."""
    return np.stack(
        [np.bincount(images[..., channel].ravel(), minlength=256) for channel in range(3)]
    )


def exact_duplicates(test: np.ndarray, train: np.ndarray) -> int:
    """Test images that are, byte for byte, among the training images."""
    known = {image.tobytes() for image in train}
    return sum(image.tobytes() in known for image in test)


def near_duplicates(test: np.ndarray, train: np.ndarray, least: float = NEAR) -> Pairs:
    """Test images with a training image, or its mirror image, that correlates at least so much.

    The correlation is over the colours of all pixels at half size, each image less its mean and
    at length 1: brightness and contrast do not matter.
    """
    normalised = _descriptors(train, mirrored=False)
    mirrored = _descriptors(train, mirrored=True)
    best, partner = [], []
    for chunk in _descriptors(test, mirrored=False).split(TEST_CHUNK):
        values, indices = torch.stack(
            [(chunk @ other.T).max(dim=1)[0] for other in (normalised, mirrored)]
        ).max(dim=0)
        best.append(values)
        partner.append(
            torch.where(
                indices == 0,
                (chunk @ normalised.T).argmax(dim=1),
                (chunk @ mirrored.T).argmax(dim=1),
            )
        )
    similarity, train_index = torch.cat(best).numpy(), torch.cat(partner).numpy()
    order = np.argsort(-similarity, kind="stable")
    order = order[similarity[order] >= least]
    return Pairs(order, train_index[order], similarity[order])


def _descriptors(images: np.ndarray, mirrored: bool) -> torch.Tensor:
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    small = F.adaptive_avg_pool2d(tensor.flip(3) if mirrored else tensor, SIDE).flatten(1)
    return F.normalize(small - small.mean(dim=1, keepdim=True), dim=1)


def report(data: cifar10.CIFAR10, pairs: Pairs) -> str:
    """The findings as Markdown."""
    mean, std = utils.channel_stats(data.train_images)
    exact = exact_duplicates(data.test_images, data.train_images)
    train, test = class_counts(data.train_labels), class_counts(data.test_labels)
    other = sum(data.test_labels[pairs.test] != data.train_labels[pairs.train])
    count = len(data.test_images)
    counts = "\n".join(
        f"| {name} | {train[label]:,} | {test[label]:,} |"
        for label, name in enumerate(cifar10.CLASSES)
    )
    picture = (
        "\n![Pairs of a test and a training image](near_duplicates.png)\n"
        if len(pairs.test)
        else ""
    )
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
{picture}"""


def pair_images(data: cifar10.CIFAR10, pairs: Pairs) -> tuple[np.ndarray, list[str]]:
    """Each pair side by side on white, uint8 (N, 32, 68, 3), and its classes and similarity."""
    gap = np.full((len(pairs.test), 32, 4, 3), 255, dtype=np.uint8)
    images = (data.test_images[pairs.test], gap, data.train_images[pairs.train])
    labels = [
        f"{cifar10.CLASSES[data.test_labels[test]]} | {cifar10.CLASSES[data.train_labels[train]]}"
        f"  {similarity:.3f}"
        for test, train, similarity in zip(*pairs, strict=True)
    ]
    return np.concatenate(images, axis=2), labels


def pictures(data: cifar10.CIFAR10, pairs: Pairs) -> dict[str, bytes]:
    """File name to PNG."""
    mean, std = utils.channel_stats(data.train_images)
    splits = {"train": data.train_labels, "test": data.test_labels}
    drawn = {
        "class_counts.png": plots.class_counts(
            {name: class_counts(labels) for name, labels in splits.items()},
            cifar10.CLASSES,
            "Images of each class",
        ),
        "samples.png": plots.image_rows(
            samples(data.train_images, data.train_labels, 8), "Eight training images of each class"
        ),
        "histograms.png": plots.channel_histograms(
            histograms(data.train_images), mean, std, "Grey levels of all training pixels"
        ),
        "mean_images.png": plots.labelled_images(
            mean_images(data.train_images, data.train_labels),
            list(cifar10.CLASSES),
            5,
            "Mean training image of each class",
        ),
    }
    if len(pairs.test):
        images, labels = pair_images(data, pairs)
        shown, title = list(range(len(labels))), f"Test image | training image: {len(labels)} pairs"
        if len(shown) > 2 * SHOWN:
            shown = shown[:SHOWN] + shown[-SHOWN:]
            title += f", the {SHOWN} most and the {SHOWN} least alike of them"
        drawn["near_duplicates.png"] = plots.labelled_images(
            images[shown], [labels[index] for index in shown], 4, title
        )
    return drawn


def explore(data: cifar10.CIFAR10, folder: Path) -> list[Path]:
    """Writes the pictures and the report; returns their paths."""
    pairs = near_duplicates(data.test_images, data.train_images)
    files = {**pictures(data, pairs), "report.md": report(data, pairs)}
    folder.mkdir(parents=True, exist_ok=True)
    return [runs.write_file(folder / name, content) for name, content in files.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = cli.ArgumentParser(
        prog="tools.explore", description="Pictures of, and figures on, the CIFAR-10 images."
    )
    cli.add_data_flags(parser)

    def work(args: argparse.Namespace) -> None:
        for path in explore(cli.load_data(args), Path(args.output_dir) / "explore"):
            print(path)

    return cli.run(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
