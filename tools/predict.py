"""What a trained network takes pictures for.

    python -m tools.predict cat.jpg boat.png                       # by model 1 of this repository
    python -m tools.predict cat.jpg --weights output/RUN

A picture is cropped to its central square and made 32x32 pixels: all that the network sees.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import cifar10
import cli
import networks
import utils
from tools import evaluate, pictures

SHOWN = 3  # classes a picture


def predict(files: Sequence[Path], weights: Path, model: str | None, data_dir: str) -> list[str]:
    """A line for each picture: the likeliest classes with their probabilities.

    Raises:
        cli.UsageError, utils.CheckpointError: no such weights, or not a picture.
    """
    images = [pictures.read_picture(path) for path in files]
    trained = networks.load_trained(weights, model)
    transform = evaluate.transform_of(trained, data_dir)
    tensors = torch.stack([transform(image=image)["image"] for image in images])
    with torch.inference_mode():
        probabilities, classes = trained.network(tensors).softmax(dim=1).sort(descending=True)
    lines = []
    for path, shares, labels in zip(files, probabilities, classes, strict=True):
        answers = [
            f"{cifar10.CLASSES[label]} {share:.1%}"
            for label, share in zip(labels[:SHOWN].tolist(), shares[:SHOWN].tolist(), strict=True)
        ]
        lines.append(f"{path}: {', '.join(answers)}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = cli.ArgumentParser(
        prog="tools.predict", description="What a trained network takes pictures for."
    )
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE", help="picture files")
    add(
        "--weights",
        type=Path,
        default=utils.HERE / "output/reference/model_1",
        help="a run's folder",
    )
    add("--model", help="1, 2, 3 or a model file (default: what the run says)")
    add("--data-dir", default="data", help="where CIFAR-10 lies, for weights without a run (data)")

    def work(args: argparse.Namespace) -> None:
        for line in predict(args.images, args.weights, args.model, args.data_dir):
            print(line)

    return cli.run(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
