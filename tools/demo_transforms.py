"""Pictures of what the training transform does: each step alone, all together, and as a film.

    python -m tools.demo_transforms                           # on the first training image
    python -m tools.demo_transforms --image cat.jpg           # a picture of your own, at 32x32
    python -m tools.demo_transforms --transform crop_cutout   # what models 1 and 2 train with

It shows the steps of whatever that training transform returns (`utils.train_transform` unless
another is named), with the mean and std of the training images: the colour that fills corners and
holes is their mean. Alone, each step is applied always; all together, as often as the pipeline
says.
"""

import argparse
import copy
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import cli
import plots
import runs
import utils
from fast.batched import A
from tools import pictures

DRAWS = 8
FRAMES, FRAME_SECONDS, SCALE = 30, 0.2, 8


def steps_alone(pipeline: A.Compose) -> dict[str, A.Compose]:
    """For each step that changes the picture, its name and a pipeline of it alone, always applied.

    What ends the pipeline (Normalize, ToTensorV2) is in each, so that all outputs are alike; for
    the same reason a step that changes the size (a pad) goes with those behind it (the crop), up to
    the one that makes it 32x32 again. A second step of one class is named "GaussianBlur 2".
    """
    ending = [step for step in pipeline.transforms if _ends(step)]
    changing = [step for step in pipeline.transforms if not _ends(step)]
    alone: dict[str, A.Compose] = {}
    steps: list[A.BasicTransform] = []
    for step in changing:
        always = copy.deepcopy(step)
        always.p = 1.0
        steps.append(always)
        picture = A.Compose(steps, strict=True)(image=np.zeros((32, 32, 3), dtype=np.uint8))
        if picture["image"].shape[:2] == (32, 32) or step is changing[-1]:
            name = kind = type(step).__name__
            number = 1
            while name in alone:
                number += 1
                name = f"{kind} {number}"
            alone[name] = A.Compose([*steps, *ending], strict=True)
            steps = []
    return alone


def _ends(step: A.BasicTransform) -> bool:
    return type(step).__name__ in ("Normalize", "ToTensorV2")


def draws(
    pipeline: A.Compose, image: np.ndarray, count: int, mean: utils.RGB, std: utils.RGB
) -> np.ndarray:
    """That many outputs of the pipeline, uint8 (count, 32, 32, 3), the same at every call."""
    pipeline.set_random_seed(0)
    outputs = [pipeline(image=image)["image"] for _ in range(count)]
    return np.stack([utils.to_pixels(output, mean, std) for output in outputs])


def sheet(pipeline: A.Compose, image: np.ndarray, mean: utils.RGB, std: utils.RGB) -> bytes:
    """A row of draws for each step alone, and one for the whole pipeline, as PNG."""
    rows = {"raw": np.stack([image] * DRAWS)}
    for name, alone in steps_alone(pipeline).items():
        rows[name] = draws(alone, image, DRAWS, mean, std)
    rows["all together"] = draws(pipeline, image, DRAWS, mean, std)
    stats = ", ".join(
        f"{name} {' '.join(f'{value:.4f}' for value in values)}"
        for name, values in (("mean", mean), ("std", std))
    )
    return plots.image_rows(rows, f"Each step alone (always applied), and all together\n{stats}")


def film(pipeline: A.Compose, image: np.ndarray, mean: utils.RGB, std: utils.RGB) -> bytes:
    """An endless animated GIF of draws of the whole pipeline, enlarged."""
    frames = [
        Image.fromarray(frame).resize((32 * SCALE,) * 2, Image.Resampling.NEAREST)
        for frame in draws(pipeline, image, FRAMES, mean, std)
    ]
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        "GIF",
        save_all=True,
        append_images=frames[1:],
        duration=round(1000 * FRAME_SECONDS),
        loop=0,
    )
    return buffer.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = cli.ArgumentParser(
        prog="tools.demo_transforms", description="Pictures of what the training transform does."
    )
    parser.add_argument("--image", type=Path, help="a picture (default: the first training image)")
    parser.add_argument(
        "--transform",
        choices=list(utils.TRANSFORMS),
        default="standard",
        help="a training transform, by the name that recipes know it by (default: %(default)s)",
    )
    cli.add_data_flags(parser)

    def work(args: argparse.Namespace) -> None:
        own = pictures.read_picture(args.image) if args.image else None
        data = cli.load_data(args)
        image = data.train_images[0] if own is None else own
        mean, std = utils.channel_stats(data.train_images)
        try:
            pipeline = utils.TRANSFORMS[args.transform](mean, std)
            drawn = {
                "png": sheet(pipeline, image, mean, std),
                "gif": film(pipeline, image, mean, std),
            }
        except Exception as error:  # whatever an edit may have broken
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise cli.UsageError(f"{args.transform} cannot be shown: {reason}") from None
        folder = Path(args.output_dir) / "transforms"
        folder.mkdir(parents=True, exist_ok=True)
        for ending, picture in drawn.items():
            print(runs.write_file(folder / f"{args.transform}.{ending}", picture))

    return cli.run(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
