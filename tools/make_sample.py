"""Draws `data/sample/`, the real CIFAR-10 images that tests and --dry-run use without network.

    python -m tools.make_sample

100 training and 20 test images of each class, drawn with seed 0; a row of 32x32 tiles a class.
Prints the digests that cifar10.SAMPLE_SHA256 has to hold.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image

import cifar10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default="data", help="folder with CIFAR-10 (default: data)")
    parser.add_argument("--sample-dir", default="data/sample", help="default: data/sample")
    args = parser.parse_args()

    data = cifar10.load_cifar10(args.data_dir)
    folder = Path(args.sample_dir)
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    rows = []
    arrays = []
    for split, per_class in (("train", 100), ("test", 20)):
        images = getattr(data, f"{split}_images")
        labels = getattr(data, f"{split}_labels")
        # (10 classes, per_class): where in the official order each chosen image stands
        chosen = np.stack(
            [
                np.sort(generator.choice(np.flatnonzero(labels == label), per_class, replace=False))
                for label in range(len(cifar10.CLASSES))
            ]
        )
        sheet = images[chosen].transpose(0, 2, 1, 3, 4).reshape(10 * 32, per_class * 32, 3)
        Image.fromarray(sheet).save(folder / f"{split}.png", optimize=True)
        # Column by column, so that every stretch of ten images holds each class once.
        for column in range(per_class):
            for label, name in enumerate(cifar10.CLASSES):
                rows.append((split, label, column, name, chosen[label, column]))
        order = chosen.T.reshape(-1)
        arrays += [images[order], labels[order]]
    with open(folder / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("split", "row", "column", "class", "index"))
        writer.writerows(rows)
    for name, digest in cifar10.digests(cifar10.CIFAR10(*arrays)).items():
        print(f'    "{name}": "{digest}",')


if __name__ == "__main__":
    main()
