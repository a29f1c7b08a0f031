"""Picture files of one's own as CIFAR-10 images, for the tools that take them."""

import contextlib
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import cifar10
import cli

SUFFIXES = (".png", ".jpg", ".jpeg")


def read_picture(path: Path) -> np.ndarray:
    """A picture file as uint8 (32, 32, 3): its central square, resized.

    It is turned upright as its EXIF entry says. Grey of more than 8 bits is scaled to 8.

    Raises:
        cli.UsageError: not a picture, or a damaged one.
    """
    try:
        # What Pillow warns of in a file, it either copes with or fails at.
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            image.load()
            # A damaged EXIF entry beside pixels that were read is no reason to refuse them.
            with contextlib.suppress(Exception):
                ImageOps.exif_transpose(image, in_place=True)
            colours = _eight_bits(image).convert("RGB")
    except Exception as error:  # each format's reader fails in its own way at a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise cli.UsageError(f"{path} cannot be read as a picture: {reason}") from None
    side = min(colours.size)
    left, top = (colours.width - side) // 2, (colours.height - side) // 2
    square = colours.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((32, 32), Image.Resampling.LANCZOS))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits or of floats as 8 bits (Pillow's `convert` would cut it off at 255).

    White is 65535, of floats 1 or 255, else the largest value; black is 0, or a value below it.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinity")
    black, most = min(values.min(), 0.0), values.max()
    whites = (1, 255) if image.mode == "F" else (65535,)
    white = next((white for white in whites if most <= white), most)
    return Image.fromarray(((values - black) * 255 / (white - black)).round().astype(np.uint8))


def read_folder(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """FOLDER/class/*.png|jpg as images uint8 (N, 32, 32, 3) and labels uint8 (N,).

    Raises:
        cli.UsageError: no such folder, a subfolder that is no class, no pictures, or a broken one.
    """
    if not folder.is_dir():
        raise cli.UsageError(f"{folder} is not a folder; give one with a subfolder for each class")
    known = ", ".join(cifar10.CLASSES)
    for place in sorted(folder.iterdir()):
        if place.is_dir() and place.name not in cifar10.CLASSES:
            raise cli.UsageError(f"{place} is no class; the subfolders must be some of {known}")
    paths = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise cli.UsageError(f"there are no pictures ({', '.join(SUFFIXES)}) in {folder}/CLASS/")
    labels = [cifar10.CLASSES.index(path.parent.name) for path in paths]
    return np.stack([read_picture(path) for path in paths]), np.array(labels, dtype=np.uint8)
