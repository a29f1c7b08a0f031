"""Damage that pictures take on their way to a network, built into its training."""

import math

from errors import UsageError
from fast.batched import A

# What cameras and websites do; more of it costs a small network its accuracy without damage
# (docs/recipes.md).
QUALITIES = (50, 95)  # of JPEG
NOISE = (0.0, 12 / 255)  # standard deviation, of the full range 255


def hardened(transform: A.Compose, share: float) -> A.Compose:
    """The same pipeline, but so large a share of the images is damaged before it is normalised.

    By JPEG, by Gaussian noise, or by both, each as often as the other.

    Args:
        transform: ends as `utils.train_transform` does, in Normalize.
        share: from 0, which leaves the pipeline as it is, to 1, where both are applied always.

    Raises:
        UsageError: nothing in the pipeline says where images are still uint8.
    """
    if not share:
        return transform
    steps = list(transform.transforms)
    at = next((at for at, step in enumerate(steps) if isinstance(step, A.Normalize)), None)
    if at is None:
        raise UsageError(
            "robust damages images before Normalize, and this transform has none; add it, or leave "
            "robust at 0"
        )
    each = 1 - math.sqrt(1 - share)  # of two that choose apart, one or both choose `share`
    steps[at:at] = [
        A.ImageCompression(quality_range=QUALITIES, p=each),
        A.GaussNoise(std_range=NOISE, p=each),
    ]
    return A.Compose(steps, p=transform.p, strict=True)
