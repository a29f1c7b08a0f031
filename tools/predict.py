"""What a trained network takes pictures for.

    python -m tools.predict cat.jpg boat.png                       # by model 1 of this repository
    python -m tools.predict cat.jpg --weights output/RUN           # or model_3_int8.onnx
    python -m tools.predict cat.jpg --explain                      # and a picture: where it looks

A picture is cropped to its central square and made 32x32 pixels: all that the network sees.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import cifar10
import cli
import networks
import runs
import utils
from tools import evaluate, explain, pictures
from tools.exported import Exported

SHOWN = 3  # classes a picture


def probabilities(
    trained: networks.Trained | Exported, images: list[np.ndarray], args: argparse.Namespace
) -> np.ndarray:
    """Of each class, float32 (N, 10), for uint8 images (32, 32, 3)."""
    if isinstance(trained, Exported):
        return trained(np.stack(images))
    transform = evaluate.transform_of(trained, args.data_dir)
    tensors = torch.stack([transform(image=image)["image"] for image in images])
    with torch.inference_mode():
        logits = trained.network(tensors)
    if logits.shape != (len(images), len(cifar10.CLASSES)) or not logits.isfinite().all():
        what = f"an answer of {tuple(logits.shape)}" if logits.isfinite().all() else "NaN"
        raise cli.UsageError(f"{trained.name} gives {what} for {len(images)} pictures; mend it")
    return logits.softmax(dim=1).numpy()


def predict(args: argparse.Namespace) -> None:
    """Prints a line for each picture: the likeliest classes with their probabilities.

    With --explain one more: the path of a picture of where the network looks.
    """
    images = [pictures.read_picture(path) for path in args.images]
    trained = evaluate.load(args.weights, args.model)
    on_cpu = utils.Device(torch.device("cpu"))
    look = explain.GradCam(trained, on_cpu) if args.explain else None
    rows = probabilities(trained, images, args)
    for path, row in zip(args.images, rows, strict=True):
        likeliest = np.argsort(-row)[:SHOWN]
        print(f"{path}:", ", ".join(f"{cifar10.CLASSES[k]} {row[k]:.1%}" for k in likeliest))
    if look:
        transform = evaluate.transform_of(trained, args.data_dir)
        picture = explain.of_pictures(look, args.images, np.stack(images), rows, transform)
        with runs.Run.create(args.output_dir, f"predict-{trained.name}") as run:
            print(f"{explain.TITLE}: {run.write(explain.FILE, picture)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = cli.ArgumentParser(prog="tools.predict", description="What networks see in pictures.")
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE", help="picture files")
    add(
        "--weights",
        default="model_1",
        help="a run's folder, an .onnx file, or one of ours by name (model_1)",
    )
    add("--model", help="1, 2, 3 or a model file (default: what the run says)")
    add("--explain", action="store_true", help="also show where the network looks (Grad-CAM)")
    add("--output-dir", default="output", help="where that picture is put (output)")
    add("--data-dir", default="data", help="where CIFAR-10 lies, for weights without a run (data)")
    return cli.run(parser, predict, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
