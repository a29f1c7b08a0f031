"""What JPEG leaves of images, for a whole batch at once on whichever device it lies.

    damaged = jpeg(images, quality)          # uint8 (N, 3, H, W), int64 (N,) -> uint8 (N, 3, H, W)

Libjpeg's arithmetic without its file: colours to luma and chroma, chroma halved, blocks of 8x8
transformed, rounded to multiples of the quality's table, and all of it back. Numbers are rounded
where libjpeg rounds them (jccolor.c, jcsample.c, jfdctint.c, jidctint.c, jdsample.c, jdcolor.c of
libjpeg-turbo 3.1, https://github.com/libjpeg-turbo/libjpeg-turbo), so that of the grey levels that
cv2.imencode and cv2.imdecode, the slow form, give for pictures, 95 % or more are the same
(tests/test_damage.py). What remains is libjpeg's 13-bit constants of the transform; here they are
cosines.
"""

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

Rows = tuple[tuple[float, ...], ...]

# Tables K.1 (luma) and K.2 (chroma) of ITU-T T.81, https://www.w3.org/Graphics/JPEG/itu-t81.pdf,
# which libjpeg scales by the quality.
LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)


def jpeg(images: Tensor, quality: Tensor) -> Tensor:
    """The images as they come back from JPEG files, chroma halved both ways (4:2:0).

    Args:
        images: uint8 (N, 3, H, W), red, green, blue.
        quality: int64 (N,), 1 to 100.
    """
    height, width = images.shape[2:]
    # Whole blocks, of the last column before chroma is halved, of the last row after it.
    whole = F.pad(images.float(), (0, -width % 16, 0, height % 2), mode="replicate")
    # The weights are libjpeg's, in whole 65,536ths: red's in luma is 0.299.
    red, green, blue = (whole / 65536).unbind(1)
    luma = _round(19595 * red + 38470 * green + 7471 * blue)
    chroma = torch.stack(
        [
            _round(128 - 11059 * red - 21709 * green + 32768 * blue, below=True),
            _round(128 + 32768 * red - 27439 * green - 5329 * blue, below=True),
        ],
        dim=1,
    )
    # The mean of four; what lies between two levels goes down and up by turns.
    turns = 1 + torch.arange(chroma.shape[3] // 2, device=images.device) % 2
    chroma = ((4 * F.avg_pool2d(chroma, 2) + turns) / 4).floor_()
    luma = _rounded_blocks(luma[:, None], _table(LUMA, quality))[:, 0, :height, :width]
    chroma = _rounded_blocks(chroma, _table(CHROMA, quality))
    chroma = _twice(chroma[:, :, : (height + 1) // 2, : (width + 1) // 2])[:, :, :height, :width]
    blue, red = ((chroma - 128) / 65536).unbind(1)
    colours = [luma + 91881 * red, luma - 22554 * blue - 46802 * red, luma + 116130 * blue]
    return _round(torch.stack(colours, dim=1)).clamp_(0, 255).byte()


def _round(values: Tensor, below: bool = False) -> Tensor:
    """To the nearest whole number, of two the greater (or the one below); the values are lost."""
    return values.sub_(0.5).ceil_() if below else values.add_(0.5).floor_()


def _table(base: Rows, quality: Tensor) -> Tensor:
    """The steps to whose multiples an image of that quality is rounded, float32 (N, 1, 8, 8)."""
    percent = torch.where(quality < 50, 5000 // quality, 200 - 2 * quality)[:, None, None, None]
    steps = (constant(base, quality.device, torch.int64) * percent + 50) // 100
    return steps.clamp(1, 255).float()


@functools.cache
def constant(values: Rows, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The rows as a tensor, brought to the device once."""
    with torch.inference_mode(False):  # else the first use in a test would mark it for good
        return torch.tensor(values, dtype=dtype).to(device)


@functools.cache
def cosines(size: int) -> Rows:
    """The transform of a row's blocks of 8, (size, size), times the root of 8 as in libjpeg."""

    def wave(number: int, place: int) -> float:
        return math.sqrt(2) * math.cos((2 * place + 1) * number * math.pi / 16) if number else 1.0

    places = range(size)
    return tuple(
        tuple(wave(row % 8, at % 8) if row // 8 == at // 8 else 0.0 for at in places)
        for row in places
    )


def _rounded_blocks(planes: Tensor, table: Tensor) -> Tensor:
    """Planes (N, C, H, W) of levels 0 to 255, their blocks' coefficients rounded by the table.

    Between its two passes libjpeg keeps two bits behind the point, each way.
    """
    planes = F.pad(planes, (0, 0, 0, -planes.shape[2] % 8), mode="replicate")
    height, width = planes.shape[2:]
    # Not float32 where there is more: autocast and settings of matmul's precision cut that short.
    exact = torch.float32 if planes.device.type == "mps" else torch.float64
    down, across = (constant(cosines(size), planes.device, exact) for size in (height, width))
    planes, table = planes.to(exact), table.to(exact)
    steps = table.repeat(1, 1, height // 8, width // 8)
    found = _round(4 * ((planes - 128) @ across.T))
    found = _round(down @ found / 4)  # 8 times the coefficients
    kept = found.sign() * ((found.abs() + 4 * steps) / (8 * steps)).floor_() * steps
    found = _round(4 * (down.T @ kept))
    return _round(found @ across / 32).add_(128).clamp_(0, 255).float()


def _twice(planes: Tensor) -> Tensor:
    """Planes (N, C, H, W) at twice the size: three parts of the nearest value, one of the next."""
    if planes.shape[3] <= 2:  # too narrow for it, says libjpeg
        return planes.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    for dimension in (2, 3):
        last = planes.shape[dimension] - 1
        places = torch.arange(last + 1, device=planes.device)
        before = planes.index_select(dimension, (places - 1).clamp(min=0))
        after = planes.index_select(dimension, (places + 1).clamp(max=last))
        pair = [3 * planes + before, 3 * planes + after]
        planes = torch.stack(pair, dim=dimension + 1).flatten(dimension, dimension + 1)
    # Sixteenths; halves go up and down by turns.
    turns = 8 - torch.arange(planes.shape[3], device=planes.device) % 2
    return ((planes + turns) / 16).floor_()
