"""Draws `data/sample/`, the real CIFAR-10 images that tests and --dry-run use without network.

    python -m tools.make_sample

100 training and 20 test images of each class, drawn with seed 0; a row of 32x32 tiles a class.
Prints the digests that cifar10.SAMPLE_SHA256 has to hold.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import cifar10
import cli


def work(args: argparse.Namespace) -> None:
    """Writes train.png, test.png and labels.csv."""
    data = cifar10.load_cifar10(args.data_dir)
    folder = Path(args.sample_dir)
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    rows, arrays = [("split", "row", "column", "class", "index")], []
    for split, per_class in (("train", 100), ("test", 20)):
        images, labels = getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")
        found = [np.flatnonzero(labels == label) for label in range(10)]
        # (10 classes, per_class): where in the official order each chosen image stands
        chosen = np.sort([generator.choice(places, per_class, replace=False) for places in found])
        sheet = images[chosen].transpose(0, 2, 1, 3, 4).reshape(10 * 32, per_class * 32, 3)
        Image.fromarray(sheet).save(folder / f"{split}.png", optimize=True)
        # Column by column, so that every stretch of ten images holds each class once.
        for column in range(per_class):
            for label, name in enumerate(cifar10.CLASSES):
                rows.append((split, label, column, name, chosen[label, column]))
        order = chosen.T.reshape(-1)
        arrays += [images[order], labels[order]]
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    for name, digest in cifar10.digests(cifar10.CIFAR10(*arrays)).items():
        print(f'    "{name}": "{digest}",')


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = cli.ArgumentParser("tools.make_sample", description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default="data", help="folder with CIFAR-10 (default: data)")
    parser.add_argument("--sample-dir", default="data/sample", help="default: data/sample")
    return cli.run(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
