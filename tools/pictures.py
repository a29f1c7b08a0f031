"""Picture files of one's own as CIFAR-10 images, for the tools that take them."""

from pathlib import Path

import numpy as np
from PIL import Image

import cifar10
import cli

SUFFIXES = (".png", ".jpg", ".jpeg")


def read_picture(path: Path) -> np.ndarray:
    """A picture file as uint8 (32, 32, 3): its central square, resized.

    Raises:
        cli.UsageError: not a picture.
    """
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise cli.UsageError(f"{path} cannot be read as a picture: {error}") from None
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((32, 32), Image.Resampling.LANCZOS))


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
