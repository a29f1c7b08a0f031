"""An Albumentations pipeline, run for a whole batch at once on whichever device the batch lies.

    transform = BatchedTransform.from_compose(utils.train_transform(mean, std))
    batch = transform(images, generator)     # uint8 (N, 3, H, W) -> float32 (N, 3, H, W)

Per-image augmentation starves a network; here every step is a few tensor operations for all
images. The pipeline is read from the very Compose that Albumentations would run: probabilities
and ranges are taken from its transforms, never repeated. Given the same drawn parameters a step
computes what Albumentations does, on the same rounded grey levels (tests/test_batched.py).
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

# Albumentations asks a server for a newer version while it is imported, unless told not to; so
# every other file of ours takes it from here: from fast.batched import A.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from torch import Generator, Tensor
from torch.nn import functional as F

from fast.jpeg import jpeg

Range = tuple[float, float]
Triple = tuple[float, float, float]


class UnknownTransformError(ValueError):
    """A transform, or an option of one, that has no batched form; the message names it."""


class Random:
    """Draws of shape (N, ...) on the generator's device."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator

    def uniform(self, bounds: Range, *size: int) -> Tensor:
        """float32, evenly from low to high."""
        low, high = bounds
        drawn = torch.rand(size, generator=self.generator, device=self.generator.device)
        return drawn.mul_(high - low).add_(low)

    def normal(self, *size: int) -> Tensor:
        """float32, of mean 0 and standard deviation 1."""
        return torch.randn(size, generator=self.generator, device=self.generator.device)

    def integers(self, low: Tensor | int, high: Tensor | int, *size: int) -> Tensor:
        """int64, evenly from low to high, both included; they may differ from draw to draw."""
        drawn = torch.rand(size, generator=self.generator, device=self.generator.device)
        choices = torch.as_tensor(high - low + 1, device=drawn.device)
        # A draw just below 1 may round up to the number of choices.
        return torch.minimum((drawn * choices).long(), choices - 1) + low


# ---------------------------------------------------------------- the steps


class Step:
    """The batched form of one transform: `draw` its parameters for N images, `apply` them.

    Parameters are tensors whose first dimension is N. Images are uint8 (N, 3, H, W).
    """

    def __init__(self, transform: A.BasicTransform) -> None:
        """Reads the options; UnknownTransformError where one has no batched form."""
        self.p: float = transform.p

    def draw(self, count: int, shape: tuple[int, int], random: Random) -> tuple[Tensor, ...]:
        return ()

    def apply(self, images: Tensor, *parameters: Tensor) -> Tensor:
        raise NotImplementedError  # every step has its own


class HorizontalFlip(Step):
    """A.HorizontalFlip."""

    def apply(self, images: Tensor) -> Tensor:
        return images.flip(3)


class Affine(Step):
    """A.Affine with bilinear interpolation and a constant border.

    A point is moved to the centre, scaled, rotated, sheared, translated and moved back, in this
    order (albumentations.augmentations.geometric.functional.create_affine_transformation_matrix).
    """

    def __init__(self, transform: A.Affine) -> None:
        _require(transform, interpolation=cv2.INTER_LINEAR, border_mode=cv2.BORDER_CONSTANT)
        _require(transform, fit_output=False)
        super().__init__(transform)
        self.scale = [_values(transform.scale[axis]) for axis in "xy"]
        self.keep_ratio, self.balanced_scale = transform.keep_ratio, transform.balanced_scale
        self.rotate = _values(transform.rotate)  # degrees, as is the shear
        self.shear = [_values(transform.shear[axis]) for axis in "xy"]
        self.in_pixels = transform.translate_px is not None  # or in shares of the image's size
        translate = transform.translate_px if self.in_pixels else transform.translate_percent
        self.translate = [_values(translate[axis] if translate else 0.0) for axis in "xy"]
        self.fill = _colour(transform)

    def draw(self, count: int, shape: tuple[int, int], random: Random) -> tuple[Tensor, ...]:
        """The forward matrices (N, 2, 3), input pixels (x, y, 1) to output pixels."""
        height, width = shape
        scale_x = self._draw_scale(self.scale[0], count, random)
        scale_y = scale_x if self.keep_ratio else self._draw_scale(self.scale[1], count, random)
        angle = random.uniform(self.rotate, count).deg2rad_()
        # Albumentations negates what it draws.
        shear_x, shear_y = (-random.uniform(each, count).deg2rad_().tan_() for each in self.shear)
        shifts = []
        for (low, high), size in zip(self.translate, (width, height), strict=True):
            if self.in_pixels:
                shifts.append(random.integers(int(low), int(high), count))
            else:  # cut, not rounded, to whole pixels
                shifts.append((random.uniform((low, high), count) * size).trunc_())
        cos, sin = angle.cos(), angle.sin()
        matrix = torch.empty(count, 2, 3, device=angle.device)
        matrix[:, 0, 0] = (cos - shear_x * sin) * scale_x
        matrix[:, 0, 1] = (sin + shear_x * cos) * scale_y
        matrix[:, 1, 0] = (shear_y * cos - sin) * scale_x
        matrix[:, 1, 1] = (shear_y * sin + cos) * scale_y
        middle = (width / 2 - 0.5, height / 2 - 0.5)
        for row in range(2):
            moved = matrix[:, row, 0] * middle[0] + matrix[:, row, 1] * middle[1]
            matrix[:, row, 2] = middle[row] + shifts[row] - moved
        return (matrix,)

    def _draw_scale(self, bounds: Range, count: int, random: Random) -> Tensor:
        """Evenly; balanced, from the part below 1 or the part above with the same chance."""
        low, high = bounds
        if not (self.balanced_scale and low < 1 < high):
            return random.uniform(bounds, count)
        below, above = random.uniform((low, 1.0), count), random.uniform((1.0, high), count)
        return torch.where(random.uniform((0.0, 1.0), count) < 0.5, below, above)

    def apply(self, images: Tensor, matrix: Tensor) -> Tensor:
        count, _, height, width = images.shape
        # The other way round: where in the input does an output pixel come from?
        a, b, c = matrix[:, 0].unbind(1)
        d, e, f = matrix[:, 1].unbind(1)
        determinant = a * e - b * d
        to_x = torch.stack([e, -b, b * f - c * e]) / determinant
        to_y = torch.stack([-d, a, c * d - a * f]) / determinant
        # grid_sample counts from -1, the left edge of the first pixel, to 1.
        columns = torch.arange(width, dtype=matrix.dtype, device=matrix.device)
        rows = torch.arange(height, dtype=matrix.dtype, device=matrix.device)
        grid = torch.empty(count, height, width, 2, device=images.device)
        for axis, (by_x, by_y, constant), size in ((0, to_x, width), (1, to_y, height)):
            by_x, by_y = (2 / size) * by_x, (2 / size) * by_y
            constant = (2 * constant + 1) / size - 1
            along_rows = torch.addcmul(constant[:, None], by_y[:, None], rows)[:, :, None]
            torch.add(along_rows, (by_x[:, None] * columns)[:, None, :], out=grid[..., axis])
        # Outside the image grid_sample sees zeros: shift the colours so that zero is the fill.
        fill = per_channel(self.fill, torch.float32, images.device)
        moved = F.grid_sample(images.float().sub_(fill), grid, align_corners=False)
        # A mean of grey levels needs no clamp. Through int32, because PyTorch has vector code for
        # either half of the way, none for the whole.
        return moved.add_(fill).round_().to(torch.int32).to(torch.uint8)


class CoarseDropout(Step):
    """A.CoarseDropout with a constant fill."""

    def __init__(self, transform: A.CoarseDropout) -> None:
        super().__init__(transform)
        self.count = transform.num_holes_range
        self.height = _values(transform.hole_height_range)
        self.width = _values(transform.hole_width_range)
        self.fill = _colour(transform)

    def draw(self, count: int, shape: tuple[int, int], random: Random) -> tuple[Tensor, ...]:
        """Holes (N, K, 4) as x_min, y_min, x_max, y_max; those beyond an image's number are empty.

        Whether sizes are pixels or shares is decided by the height's upper bound, for both.
        """
        most = self.count[1]
        in_pixels = self.height[1] >= 1
        sides = []
        for bounds, size in ((self.width, shape[1]), (self.height, shape[0])):
            if in_pixels:
                length = random.integers(int(bounds[0]), int(min(bounds[1], size)), count, most)
            else:
                length = (random.uniform(bounds, count, most) * size).long()
            start = random.integers(0, size - length, count, most)
            sides.append((start, length))
        number = random.integers(*self.count, count, 1)
        exists = torch.arange(most, device=number.device) < number
        (x, width), (y, height) = sides
        return (torch.stack([x, y, x + width * exists, y + height * exists], dim=2),)

    def apply(self, images: Tensor, holes: Tensor) -> Tensor:
        x_min, y_min, x_max, y_max = holes[..., None].unbind(2)
        columns = torch.arange(images.shape[3], device=images.device)
        rows = torch.arange(images.shape[2], device=images.device)
        across = (columns >= x_min) & (columns < x_max)  # (N, K, W)
        down = (rows >= y_min) & (rows < y_max)  # (N, K, H)
        inside = (down[:, :, :, None] & across[:, :, None, :]).any(dim=1, keepdim=True)
        inside = inside.to(torch.uint8)
        # Arithmetic, because torch.where is slow for uint8 on the CPU.
        return images * (1 - inside) + per_channel(self.fill, torch.uint8, images.device) * inside


BORDERS = {  # by OpenCV's number, numpy's name
    cv2.BORDER_CONSTANT: "constant",
    cv2.BORDER_REPLICATE: "edge",
    cv2.BORDER_REFLECT: "symmetric",  # cba|abc|cba
    cv2.BORDER_REFLECT_101: "reflect",  # dcb|abcd|cba
    cv2.BORDER_WRAP: "wrap",
}


class PadIfNeeded(Step):
    """A.PadIfNeeded at a fixed position."""

    def __init__(self, transform: A.PadIfNeeded) -> None:
        _require(transform, p=1, pad_height_divisor=None, pad_width_divisor=None)
        if transform.position == "random" or transform.border_mode not in BORDERS:
            raise _unknown(transform, "this position or border_mode")
        super().__init__(transform)
        self.height, self.width = transform.min_height, transform.min_width
        self.position, self.border_mode = transform.position, transform.border_mode
        self.fill = _colour(transform)

    def apply(self, images: Tensor) -> Tensor:
        rows = self._source(images, 2, self.height, "bottom")
        columns = self._source(images, 3, self.width, "right")
        padded = images.index_select(2, rows.clamp(min=0)).index_select(3, columns.clamp(min=0))
        if self.border_mode != cv2.BORDER_CONSTANT:
            return padded
        inside = (rows >= 0)[:, None] & (columns >= 0)
        return torch.where(inside, padded, per_channel(self.fill, torch.uint8, images.device))

    def _source(self, images: Tensor, dimension: int, wanted: int, far_side: str) -> Tensor:
        """Which of the input's rows (or columns) each of the output's shows; -1: the fill."""
        size = images.shape[dimension]
        pad = max(0, wanted - size)
        # "bottom_left" puts the image at the bottom: all padding goes before it.
        before = pad // 2 if self.position == "center" else pad * (far_side in self.position)
        numbers = np.arange(1, size + 1)  # from 1, for a constant border is 0
        source = np.pad(numbers, (before, pad - before), BORDERS[self.border_mode]) - 1
        return torch.from_numpy(source).to(images.device, non_blocking=True)


class RandomCrop(Step):
    """A.RandomCrop of images that are large enough."""

    def __init__(self, transform: A.RandomCrop) -> None:
        _require(transform, p=1, pad_if_needed=False)
        super().__init__(transform)
        self.height, self.width = transform.height, transform.width

    def draw(self, count: int, shape: tuple[int, int], random: Random) -> tuple[Tensor, ...]:
        """The corner of each crop: x (N,), y (N,)."""
        if shape[0] < self.height or shape[1] < self.width:
            raise ValueError(f"RandomCrop {self.height}x{self.width} of images of {shape}")
        return (
            random.integers(0, shape[1] - self.width, count),
            random.integers(0, shape[0] - self.height, count),
        )

    def apply(self, images: Tensor, x: Tensor, y: Tensor) -> Tensor:
        rows = y[:, None] + torch.arange(self.height, device=images.device)
        columns = x[:, None] + torch.arange(self.width, device=images.device)
        image = torch.arange(len(images), device=images.device)
        picked = images[image[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return picked.permute(0, 3, 1, 2).contiguous()  # (N, H, W, 3) as indexing gives it


class ColorJitter(Step):
    """A.ColorJitter: brightness, contrast, saturation and hue, in an order drawn for each image."""

    def __init__(self, transform: A.ColorJitter) -> None:
        super().__init__(transform)
        names = ("brightness", "contrast", "saturation", "hue")
        self.ranges = [_values(getattr(transform, name)) for name in names]

    def draw(self, count: int, shape: tuple[int, int], random: Random) -> tuple[Tensor, ...]:
        """Factors (N, 4), and the order (N, 4) in which the four are applied."""
        factors = torch.stack([random.uniform(each, count) for each in self.ranges], dim=1)
        return factors, random.uniform((0.0, 1.0), count, 4).argsort(dim=1)

    def apply(self, images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
        for place in range(4):
            before = images
            for kind, adjust in enumerate((_brightness, _contrast, _saturation, _hue)):
                factor = factors[:, kind, None, None, None]
                images = _where(order[:, place] == kind, adjust, before, images, factor)
        return images


def _grey(images: Tensor) -> Tensor:
    """cv2.COLOR_RGB2GRAY of uint8, in its fixed-point weights; int32 (N, 1, H, W)."""
    red, green, blue = images.int().unbind(1)
    return ((red * 9798 + green * 19235 + blue * 3735 + (1 << 14)) >> 15)[:, None]


def _cut(values: Tensor) -> Tensor:
    return values.clamp_(0, 255).to(torch.uint8)


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return _cut(images * factor)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = _grey(images).float().mean(dim=(1, 2, 3), keepdim=True)
    return _cut(images * factor + mean * (1 - factor))


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return _cut((images * factor + _grey(images) * (1 - factor)).round_())


def _hue(images: Tensor, factor: Tensor) -> Tensor:
    """Turns the hue by factor * 180 of OpenCV's half-degrees, through its uint8 HSV.

    On the way back OpenCV's vector code cuts fractions off (its scalar code, for what is left of
    a row after blocks of 32 pixels, rounds; CIFAR-10's rows are whole blocks).
    """
    red, green, blue = images.int().unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    spread = value - torch.minimum(torch.minimum(red, green), blue)
    # The 12-bit reciprocals of OpenCV's RGB2HSV_b.
    numbers = torch.arange(1, 256, device=images.device)
    zero = torch.zeros(1, device=images.device)
    by_value = torch.cat([zero, (255 << 12) / numbers]).round().int()
    by_spread = torch.cat([zero, (180 << 12) / (6 * numbers)]).round().int()
    saturation = (spread * by_value[value] + (1 << 11)) >> 12
    sector = torch.where(value == green, blue - red + 2 * spread, red - green + 4 * spread)
    sector = torch.where(value == red, green - blue, sector)
    hue = (sector * by_spread[spread] + (1 << 11)) >> 12
    hue = torch.where(hue < 0, hue + 180, hue)
    # The table in which Albumentations looks up the new hue cuts fractions off.
    hue = (hue + 180 * factor[:, 0]).remainder(180).int()

    sixth = hue * (6 / 180)
    number = sixth.floor()
    fraction = sixth - number
    whole = value * (1 / 255)
    part = saturation * (1 / 255)
    lower = [1 - part * fraction, 1 - part, 1 - part * (1 - fraction)]
    choices = torch.stack([whole, *(whole * share for share in lower)], dim=1)
    # Which of the four is red, green and blue in each sixth of the circle.
    pick = torch.tensor([[0, 3, 2], [1, 0, 2], [2, 0, 3], [2, 1, 0], [3, 2, 0], [0, 2, 1]])
    pick = pick.to(images.device)[number.long() % 6].permute(0, 3, 1, 2)
    turned = _cut(choices.gather(1, pick) * 255)
    return torch.where(factor == 0, images, turned)


class ImageCompression(Step):
    """A.ImageCompression to JPEG."""

    def __init__(self, transform: A.ImageCompression) -> None:
        _require(transform, compression_type="jpeg")
        super().__init__(transform)
        self.quality = transform.quality_range

    def draw(self, count: int, shape: tuple[int, int], random: Random) -> tuple[Tensor, ...]:
        """The qualities (N,)."""
        return (random.integers(*self.quality, count),)

    def apply(self, images: Tensor, quality: Tensor) -> Tensor:
        # OpenCV takes the channels for blue, green, red; Albumentations gives it red first.
        return jpeg(images.flip(1), quality).flip(1)


class GaussNoise(Step):
    """A.GaussNoise, drawn for each pixel."""

    def __init__(self, transform: A.GaussNoise) -> None:
        _require(transform, noise_scale_factor=1)
        super().__init__(transform)
        self.std, self.mean = transform.std_range, transform.mean_range
        self.channels = 3 if transform.per_channel else 1

    def draw(self, count: int, shape: tuple[int, int], random: Random) -> tuple[Tensor, ...]:
        """Grey levels to add, float32 (N, 3, H, W), or (N, 1, H, W) for all channels the same."""
        std, mean = (255 * random.uniform(ends, count, 1, 1, 1) for ends in (self.std, self.mean))
        return (random.normal(count, self.channels, *shape) * std + mean,)

    def apply(self, images: Tensor, noise: Tensor) -> Tensor:
        return _cut(images + noise.trunc())  # Albumentations adds whole levels


# ---------------------------------------------------------------- the pipeline

STEPS: dict[type, type[Step]] = {
    A.HorizontalFlip: HorizontalFlip,
    A.Affine: Affine,
    A.CoarseDropout: CoarseDropout,
    A.PadIfNeeded: PadIfNeeded,
    A.RandomCrop: RandomCrop,
    A.ColorJitter: ColorJitter,
    A.ImageCompression: ImageCompression,
    A.GaussNoise: GaussNoise,
}


def read(transform: A.BasicTransform) -> Step:
    """The transform's batched form; UnknownTransformError where there is none."""
    if type(transform) not in STEPS:
        raise _unknown(transform)
    return STEPS[type(transform)](transform)


@dataclass(frozen=True)
class BatchedTransform:
    """A pipeline of steps that ends in Normalize."""

    steps: list[Step]
    mean: Triple  # normalised is (grey level - mean) * scale
    scale: Triple

    @classmethod
    def from_compose(cls, compose: A.Compose) -> "BatchedTransform":
        """Reads a Compose that ends in Normalize and ToTensorV2.

        Raises:
            UnknownTransformError: a transform or option without a batched form.
        """
        *augmentations, normalize, to_tensor = [None, None, *compose.transforms]
        if type(normalize) is not A.Normalize or type(to_tensor) is not ToTensorV2:
            raise UnknownTransformError("a pipeline that does not end in Normalize and ToTensorV2")
        _require(normalize, p=1, normalization="standard")
        if compose.p != 1:
            raise UnknownTransformError("a Compose that is skipped now and then (p below 1)")
        most = normalize.max_pixel_value
        return cls(
            steps=[read(transform) for transform in augmentations[2:]],
            mean=tuple(most * value for value in _values(normalize.mean, 3)),
            scale=tuple(1 / (most * value) for value in _values(normalize.std, 3)),
        )

    def __call__(
        self,
        images: Tensor,
        generator: Generator,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
        part: tuple[int, Tensor] | None = None,
    ) -> Tensor:
        """Augments and normalises a batch.

        Args:
            images: uint8 (N, 3, H, W), contiguous, on any device.
            generator: of the draws, on the same device.
            dtype, memory_format: of the result.
            part: (N, numbers): these images are only those numbers, int64, of a batch of N, and
                get what they would get among all of them.
        """
        random = Random(generator)
        count, rows = part or (len(images), slice(None))
        for step in self.steps:
            drawn = [each[rows] for each in step.draw(count, tuple(images.shape[2:]), random)]
            if step.p == 1:
                images = step.apply(images, *drawn)
            else:
                applied = (random.uniform((0.0, 1.0), count) < step.p)[rows]
                images = _where(applied, step.apply, images, images, *drawn)
        mean = per_channel(self.mean, torch.float32, images.device)
        scale = per_channel(self.scale, torch.float32, images.device)
        # Number format first, layout after: both at once is slower on the CPU.
        normalised = images.float().sub_(mean).mul_(scale).to(dtype)
        return normalised.contiguous(memory_format=memory_format)


@functools.cache
def per_channel(values: Triple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A value a channel, (1, 3, 1, 1), brought to the device once; uint8 cuts fractions off."""
    with torch.inference_mode(False):  # else the first use in a test would mark it for good
        kept = [int(value) if dtype == torch.uint8 else value for value in values]
        return torch.tensor(kept, dtype=dtype).view(1, 3, 1, 1).to(device)


def _where(
    chosen: Tensor, function: Callable, images: Tensor, others: Tensor, *parameters: Tensor
) -> Tensor:
    """function(images, parameters) for the chosen images, `others` for the rest.

    A GPU computes it for all: to pick images out it would have to wait for their number.
    """
    if images.is_cuda:
        return torch.where(chosen.view(-1, 1, 1, 1), function(images, *parameters), others)
    index = chosen.nonzero().squeeze(1)
    if len(index) == 0:
        return others
    result = others.clone()
    result[index] = function(images[index], *(parameter[index] for parameter in parameters))
    return result


# ---------------------------------------------------------------- reading options


def _unknown(transform: A.BasicTransform, option: str = "") -> UnknownTransformError:
    name = type(transform).__name__
    return UnknownTransformError(f"{name} with {option}" if option else name)


def _require(transform: A.BasicTransform, **options: object) -> None:
    for name, value in options.items():
        if getattr(transform, name) != value:
            raise _unknown(transform, f"{name}={getattr(transform, name)!r}")


def _values(value: float | tuple, length: int = 2) -> tuple[float, ...]:
    """As many values as the tuple has or, of a single one, as are wanted."""
    return (float(value),) * length if isinstance(value, int | float) else tuple(value)


def _colour(transform: A.BasicTransform) -> Triple:
    fill = transform.fill
    if isinstance(fill, str) or (not isinstance(fill, int | float) and len(fill) != 3):
        raise _unknown(transform, f"fill={fill!r}")
    return _values(fill, 3)
