"""What a network loses when its pictures are damaged; for tools.evaluate --corruptions.

Each damage is Albumentations' own transform with fixed parameters and one seed, so that every
network sees the very same pictures (after Hendrycks and Dietterich, 2019,
https://arxiv.org/abs/1903.12261, whose CIFAR-10-C has more kinds, as files).
"""

import textwrap
from collections.abc import Callable

import cv2
import numpy as np
from matplotlib.figure import Figure

import plots
from fast.batched import A

FILE, TITLE = "corruptions.png", "How it takes damage"
SEED = 0


def _jpeg(quality: int) -> A.BasicTransform:
    return A.ImageCompression(quality_range=(quality, quality), p=1)


def _noise(levels: float) -> A.BasicTransform:
    return A.GaussNoise(std_range=(levels / 255, levels / 255), p=1)


def _light(brightness: float = 1, contrast: float = 1) -> A.BasicTransform:
    one = (1, 1)
    return A.ColorJitter((brightness, brightness), (contrast, contrast), one, (0, 0), p=1)


def _moved(degrees: float = 0, pixels: int = 0) -> A.BasicTransform:
    ends = {"translate_px": (pixels, pixels), "rotate": (degrees, degrees)}
    return A.Affine(**ends, border_mode=cv2.BORDER_REFLECT_101, p=1)


CORRUPTIONS: dict[str, A.BasicTransform] = {
    **{f"JPEG, quality {quality}": _jpeg(quality) for quality in (90, 75, 50)},
    **{f"noise of {levels} grey levels": _noise(levels) for levels in (4, 8, 16)},
    "blur, sigma 1 pixel": A.GaussianBlur(blur_limit=0, sigma_limit=(1, 1), p=1),
    "brightness times 0.6": _light(brightness=0.6),
    "brightness times 1.4": _light(brightness=1.4),
    "contrast times 0.5": _light(contrast=0.5),
    "contrast times 1.5": _light(contrast=1.5),
    "turned by 10 degrees": _moved(degrees=10),
    "shifted by 3 pixels": _moved(pixels=3),  # right and down
}


def damaged(images: np.ndarray, name: str) -> np.ndarray:
    """The images, uint8 (N, H, W, 3), with the corruption of that name; alike at each call."""
    compose = A.Compose([CORRUPTIONS[name]], seed=SEED, strict=True)
    return np.stack([compose(image=image)["image"] for image in images])


def measure(
    answer: Callable[[np.ndarray, str], np.ndarray],
    images: np.ndarray,
    labels: np.ndarray,
    clean: float,
) -> dict[str, dict[str, float]]:
    """Accuracy and what is lost of it, in percent and points, by the corruption's name.

    Args:
        answer: of damaged images and a title: a number for each class, (N, 10).
        images, labels: uint8 (N, H, W, 3) and int (N,).
        clean: accuracy on the images as they are, in percent.
    """
    found = {}
    for name in CORRUPTIONS:
        right = answer(damaged(images, name), name).argmax(axis=1) == labels
        accuracy = 100 * float(right.mean())
        found[name] = {"accuracy": accuracy, "lost": clean - accuracy}
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """The lines of `measure`'s figures."""
    width = max(map(len, found))
    lines = [f"{'':<{width}}  accuracy    lost"]
    for name, row in found.items():
        lines.append(f"{name:<{width}}  {row['accuracy']:6.2f} %  {row['lost']:6.2f}")
    return "\n".join(lines)


def picture(
    found: dict[str, dict[str, float]], image: np.ndarray, clean: float, title: str
) -> bytes:
    """A bar for the points that each corruption costs, and what it makes of an image.

    Args:
        found: as `measure` returns it.
        image: uint8 (H, W, 3).
        clean: accuracy without damage, in percent.
    """
    worst = max(found, key=lambda name: found[name]["lost"])
    figure = Figure(figsize=(10, 8.2), layout="constrained")
    lost = {name: round(row["lost"], 1) + 0.0 for name, row in found.items()}  # no -0.0
    told = f"{title}: {clean:.2f} % of the pictures as they are. What damage costs, in points: "
    told += ", ".join(f"{name} {points}" for name, points in lost.items())
    told += f". The worst is {worst}, with {found[worst]['accuracy']:.2f} % left."
    figure.set_label(" ".join(told.split()))
    heading = f"{TITLE}: {clean:.2f} % of the pictures are right as they are"
    figure.suptitle(f"{heading}\n{textwrap.fill(title, 90)}", parse_math=False)
    shown, axes = figure.subplots(1, 2, sharey=True, width_ratios=(1, 13))
    column = np.concatenate([damaged(image[None], name)[0] for name in found])
    shown.imshow(column, extent=(0, 1, len(found) - 0.5, -0.5), aspect="auto")
    shown.set(xticks=[], yticks=range(len(found)), yticklabels=found)
    shown.hlines(np.arange(len(found) + 1) - 0.5, 0, 1, "white", linewidth=3)
    shown.spines[:].set_visible(False)
    axes.barh(range(len(found)), lost.values(), color=plots.TEST)
    most, least = max(1, *lost.values()), min(0, *lost.values())
    for place, (name, points) in enumerate(lost.items()):
        text = f"{points}  ({found[name]['accuracy']:.1f} %)"
        axes.text(max(points, 0) + 0.01 * (most - least), place, text, va="center")
    axes.tick_params(labelleft=False, left=False)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlim(1.05 * least, most + 0.2 * (most - least))
    axes.set(xlabel="accuracy lost (points); in brackets what is left")
    axes.grid(axis="x", alpha=0.3)
    return plots.png(figure, TITLE)
