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
import io
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

import cli
import plots
import utils
from fast.batched import A
from support import files
from tools import pictures
from tools.validate_transforms import ENDING, always, apply

DRAWS = 8
FRAMES, FRAME_SECONDS, SCALE = 30, 0.2, 8


def steps_alone(pipeline: A.Compose) -> dict[str, A.Compose]:
    """For each step that changes the picture, its name and a pipeline of it alone, always applied.

    What ends the pipeline (Normalize, ToTensorV2) is in each, so that all outputs are alike; for
    the same reason a step that changes the size (a pad) goes with those behind it (the crop), up to
    the one that makes it 32x32 again. A second step of one class is named "GaussianBlur 2".
    """
    ending = [step for step in pipeline.transforms if type(step).__name__ in ENDING]
    changing = [always(step) for step in pipeline.transforms if step not in ending]
    alone: dict[str, A.Compose] = {}
    steps, counts = [], Counter()
    for step in changing:
        steps.append(step)
        picture = A.Compose(steps, strict=True)(image=np.zeros((32, 32, 3), dtype=np.uint8))
        if picture["image"].shape[:2] == (32, 32) or step is changing[-1]:
            kind = type(step).__name__
            counts[kind] += 1
            name = kind if counts[kind] == 1 else f"{kind} {counts[kind]}"
            alone[name] = A.Compose([*steps, *ending], strict=True)
            steps = []
    return alone


def draws(
    pipeline: A.Compose, image: np.ndarray, count: int, mean: utils.RGB, std: utils.RGB
) -> np.ndarray:
    """That many outputs of the pipeline, uint8 (count, 32, 32, 3), the same at every call."""
    outputs, _ = apply(pipeline, [image] * count)
    return np.stack([plots.to_pixels(output, mean, std) for output in outputs])


def sheet(pipeline: A.Compose, image: np.ndarray, mean: utils.RGB, std: utils.RGB) -> bytes:
    """A row of draws for each step alone, and one for the whole pipeline, as PNG."""
    rows = {"raw": np.stack([image] * DRAWS)}
    for name, alone in (steps_alone(pipeline) | {"all together": pipeline}).items():
        rows[name] = draws(alone, image, DRAWS, mean, std)
    stats = (" ".join(f"{value:.4f}" for value in values) for values in (mean, std))
    figure = Figure(figsize=(1.2 * DRAWS + 1.6, 1.2 * len(rows) + 0.5), layout="constrained")
    figure.suptitle(
        "Each step alone (always applied), and all together\nmean {}, std {}".format(*stats)
    )
    grid = figure.subplots(len(rows), DRAWS)
    for axes_row, (name, images) in zip(grid, rows.items(), strict=True):
        axes_row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axes, drawn in zip(axes_row, images, strict=True):
            axes.imshow(drawn)
            axes.set(xticks=[], yticks=[])
    return plots.png(figure)


def film(pipeline: A.Compose, image: np.ndarray, mean: utils.RGB, std: utils.RGB) -> bytes:
    """An endless animated GIF of draws of the whole pipeline, enlarged."""
    large = draws(pipeline, image, FRAMES, mean, std).repeat(SCALE, axis=1).repeat(SCALE, axis=2)
    first, *others = map(Image.fromarray, large)
    buffer = io.BytesIO()
    options = {"duration": round(1000 * FRAME_SECONDS), "loop": 0}
    first.save(buffer, "GIF", save_all=True, append_images=others, **options)
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
    return cli.run(parser, work, arguments)


def work(args: argparse.Namespace) -> None:
    """Writes the sheet and the film."""
    own = pictures.read_picture(args.image) if args.image else None
    data = cli.load_data(args)
    image = data.train_images[0] if own is None else own
    stats = utils.channel_stats(data.train_images)
    try:
        pipeline = utils.TRANSFORMS[args.transform](*stats)
        drawn = {"png": sheet(pipeline, image, *stats), "gif": film(pipeline, image, *stats)}
    except Exception as error:  # whatever an edit may have broken
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise cli.UsageError(f"{args.transform} cannot be shown: {reason}") from None
    folder = Path(args.output_dir) / "transforms"
    folder.mkdir(parents=True, exist_ok=True)
    for ending, picture in drawn.items():
        print(files.write_file(folder / f"{args.transform}.{ending}", picture))


if __name__ == "__main__":
    sys.exit(main())
