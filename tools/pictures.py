"""Picture files of one's own as CIFAR-10 images, for the tools that take them."""

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
        with warnings.catch_warnings(action="ignore"), Image.open(path) as file:
            file.load()
            image = _eight_bits(_upright(file)).convert("RGB")
    except Exception as error:  # each format's reader fails in its own way at a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise cli.UsageError(f"{path} cannot be read as a picture: {reason}") from None
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((32, 32), Image.Resampling.LANCZOS))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged entry beside pixels that were read is no reason to refuse them
        return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits or of floats as 8 bits (Pillow's `convert` would cut it off at 255).

    Full white is 65535, or of floats 1. Values beyond that have no known white: the largest is
    taken for white, and the smallest, if negative, for black.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinity")
    white = 1.0 if image.mode == "F" else 65535.0
    if image.mode == "F" and 1 < values.max() <= 255:
        white = 255.0  # 8 bits that were stored as floats
    low, high = min(values.min(), 0.0), values.max()
    high = high if high > white else white
    return Image.fromarray(((values - low) * (255 / (high - low))).round().astype(np.uint8))


def read_folder(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """FOLDER/class/*.png|jpg as images uint8 (N, 32, 32, 3) and labels uint8 (N,).

    Raises:
        cli.UsageError: no such folder, a subfolder that is no class, no pictures, or a broken one.
    """
    if not folder.is_dir():
        raise cli.UsageError(f"{folder} is not a folder; give one with a subfolder for each class")
    images, labels = [], []
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        if place.name not in cifar10.CLASSES:
            raise cli.UsageError(
                f"{place} is no class; the subfolders must be some of {', '.join(cifar10.CLASSES)}"
            )
        for path in sorted(place.iterdir()):
            if path.suffix.lower() in SUFFIXES:
                images.append(read_picture(path))
                labels.append(cifar10.CLASSES.index(place.name))
    if not images:
        raise cli.UsageError(f"there are no pictures ({', '.join(SUFFIXES)}) in {folder}/CLASS/")
    return np.stack(images), np.array(labels, dtype=np.uint8)
