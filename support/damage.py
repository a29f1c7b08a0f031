"""Damage that pictures take on their way to a network, built into its training."""

from errors import UsageError
from fast.batched import A

# What websites and cameras do. Stronger or more noise costs a small network more of its accuracy on
# pictures without damage than it is worth (docs/recipes.md).
QUALITIES = (50, 95)  # of JPEG
NOISE = (0.0, 12 / 255)  # standard deviation, of the full range 255
OF_JPEG = 0.75  # of the logarithm of what is spared; small shares: three JPEGs to one noise


def hardened(transform: A.Compose, share: float) -> A.Compose:
    """The same pipeline, but so large a share of the images is damaged before it is normalised.

    By JPEG, by Gaussian noise, or by both.

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
    # They choose apart; the product of those that each leaves is what both leave: 1 - share.
    by_jpeg, by_noise = (1 - (1 - share) ** part for part in (OF_JPEG, 1 - OF_JPEG))
    steps[at:at] = [
        A.ImageCompression(quality_range=QUALITIES, p=by_jpeg),
        A.GaussNoise(std_range=NOISE, p=by_noise),
    ]
    return A.Compose(steps, p=transform.p, strict=True)
