"""Faster forms of what PyTorch is slow at on the CPU; no other device needs them.

`networks.prepare` calls `keep_freed_memory` and `speed_up` on the CPU, tools.evaluate the former.
What they are worth: `python -m tools.bench --model N --parts`.
"""

import contextlib
import ctypes
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next step instead of giving it back to the system.

    For the whole process. Every step frees and asks for the same hundreds of megabytes; by default
    each block comes from the system anew, page by page. A no-op where there is no glibc.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too (malloc.h)
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


class FastDropout(nn.Dropout):
    """nn.Dropout with a faster mask: 16 random bits a value, four values from one 64-bit draw.

    The probability is rounded to a multiple of 2**-16, and what is kept is scaled to match, so
    that the expected output is exactly the input.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not 0 < self.p < 1:
            return super().forward(x)
        dropped = min(round(self.p * 2**16), 2**16 - 1)  # else nothing is kept to be scaled
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        bits = draws.view(torch.int16)[: x.numel()]
        mask = (bits >= dropped - 2**15).to(x.dtype).mul_(2**16 / (2**16 - dropped))
        if x.is_contiguous(memory_format=torch.channels_last):
            return x * mask.as_strided(x.shape, x.stride())
        return x * mask.view(x.shape)


class StridedDepthwise(nn.Conv2d):
    """A depthwise convolution with stride, computed at every place and then thinned out.

    oneDNN's backward pass is many times slower with stride 2 than without (bf16, PyTorch 2.14);
    `python -m tools.bench --model 3 --parts` tells what the detour is worth. In float32 it is not
    slower, and the detour gains nothing.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and torch.is_autocast_enabled("cpu")):
            return super().forward(x)
        down, right = self.stride
        settings = (self.padding, self.dilation, self.groups)
        x = F.conv2d(x, self.weight, self.bias, 1, *settings)
        # Thinned out with the channels last: the gradient of a slice is laid out as what was sliced
        # says it is, and BatchNorm is several times slower on a view with gaps.
        thinned = x.permute(0, 2, 3, 1)[:, ::down, ::right].contiguous()
        return thinned.permute(0, 3, 1, 2)


class DilatedDepthwise(nn.Conv2d):
    """A dilated depthwise convolution, computed as an ordinary one on every d-th row and column.

    With dilation d a filter sees only pixels whose rows and columns differ by multiples of d: the
    image falls into d x d smaller ones that know nothing of each other. Here they form a mosaic
    with a row and a column of zeros between them, since oneDNN's backward pass is many times slower
    with dilation, and slow on many images of few pixels (bf16, PyTorch 2.14).
    """

    def forward(self, x: Tensor) -> Tensor:
        images, channels, height, width = x.shape
        d = self.dilation[0]
        rows, columns = height // d, width // d
        if not self.training or height % d or width % d:
            return super().forward(x)
        x = x.permute(0, 2, 3, 1).reshape(images, rows, d, columns, d, channels)
        x = F.pad(x.permute(0, 2, 1, 4, 3, 5), (0, 0, 0, 1, 0, 0, 0, 1))
        x = x.reshape(images, d * (rows + 1), d * (columns + 1), channels).permute(0, 3, 1, 2)
        x = F.conv2d(x, self.weight, self.bias, 1, 1, 1, self.groups).permute(0, 2, 3, 1)
        x = x.reshape(images, d, rows + 1, d, columns + 1, channels)[:, :, :rows, :, :columns]
        x = x.permute(0, 2, 1, 4, 3, 5).reshape(images, height, width, channels)
        return x.permute(0, 3, 1, 2)


class PairedConv2d(nn.Conv2d):
    """A convolution with groups of two channels, computed as two depthwise ones and added up.

    One takes every channel's own filter, the other that of its neighbour in the group. oneDNN has
    no fast code for such small groups (bf16, PyTorch 2.14).
    """

    def forward(self, x: Tensor) -> Tensor:
        # Evaluation, in float32, keeps PyTorch's own form; under autocast a teacher is asked.
        if not (self.training or torch.is_autocast_enabled("cpu")):
            return super().forward(x)
        images, channels, height, width = x.shape
        weight = self.weight.view(self.groups, 2, 2, *self.kernel_size)  # (group, out, in, h, w)
        own = weight[:, (0, 1), (0, 1)].reshape(channels, 1, *self.kernel_size)
        other = weight[:, (0, 1), (1, 0)].reshape(channels, 1, *self.kernel_size)
        swapped = x.permute(0, 2, 3, 1).reshape(images, height, width, self.groups, 2).flip(-1)
        swapped = swapped.reshape(images, height, width, channels).permute(0, 3, 1, 2)
        settings = (self.stride, self.padding, self.dilation, channels)
        return F.conv2d(x, own, self.bias, *settings) + F.conv2d(swapped, other, None, *settings)


class _WeightGradientByMatrix(torch.autograd.Function):
    """A convolution whose weight's gradient is one matrix product, of patches and gradients."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, stride: tuple, padding: tuple) -> Tensor:
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        x, weight, ctx.stride, ctx.padding = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        for_x = for_weight = None
        if ctx.needs_input_grad[0]:
            options = (ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1, (True, False, False))
            for_x = torch.ops.aten.convolution_backward(gradient, x, weight, None, *options)[0]
        if ctx.needs_input_grad[1]:
            channels, (rows, columns) = x.shape[1], weight.shape[2:]
            (up, left), (down, right) = ctx.padding, ctx.stride
            padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, left, left, up, up))
            patches = padded.unfold(1, rows, down).unfold(2, columns, right)  # (N, H, W, C, r, c)
            patches = patches.permute(0, 1, 2, 4, 5, 3).reshape(-1, rows * columns * channels)
            by_pixel = gradient.permute(0, 2, 3, 1).flatten(0, 2)
            for_weight = (by_pixel.T @ patches).view(-1, rows, columns, channels)
            for_weight = for_weight.permute(0, 3, 1, 2)
        return for_x, for_weight, None, None


class FewPixelsConv2d(nn.Conv2d):
    """A convolution to an image of few pixels, with a faster gradient of its weight.

    With AMX, oneDNN does a matrix product several times faster than this gradient (bf16, PyTorch
    2.14). From 8x8 pixels on, gathering the patches costs most of what that gains; without AMX some
    layers gain at 4x4 and others lose. What it is worth: docs/speed.md.
    """

    def forward(self, x: Tensor) -> Tensor:
        # Autocast leaves float64 as it is; a single image has no dimension of batches.
        reduced = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64 and x.ndim == 4
        if not (self.training and reduced):
            return super().forward(x)
        places = zip(x.shape[2:], self.padding, self.kernel_size, self.stride, strict=True)
        height, width = (
            (side + 2 * pad - kernel) // step + 1 for side, pad, kernel, step in places
        )
        if height * width > 16:
            return super().forward(x)
        dtype = torch.get_autocast_dtype("cpu")
        weight = self.weight.to(dtype)
        return _WeightGradientByMatrix.apply(x.to(dtype), weight, self.stride, self.padding)


class GlobalPool(nn.AdaptiveAvgPool2d):
    """A global average pool, computed as the mean of a list of pixels.

    The pool's own gradient is one value for all of an image's pixels, whose layout PyTorch takes
    for contiguous; every layer behind it that has kept its values channels_last then reads the one
    across the other, up to seven times slower (PyTorch 2.14).
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        return x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)[:, :, None, None]


def speed_up(model: nn.Module) -> nn.Module:
    """Gives layers that are slow on the CPU the faster forms above; returns the same model.

    A layer's class is exchanged in place, so its parameters and name stay, and what it computes
    (dropout: in distribution).
    """
    amx = torch.cpu.get_capabilities().get("amx_bf16", False)
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = FastDropout
        if type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1)):
            module.__class__ = GlobalPool
        if type(module) is not nn.Conv2d or module.padding_mode != "zeros":
            continue
        if 2 * module.groups == module.in_channels == module.out_channels > 2:
            module.__class__ = PairedConv2d
        elif module.groups == module.in_channels == module.out_channels > 1:
            if max(module.stride) > 1:
                module.__class__ = StridedDepthwise
            elif (
                module.kernel_size == (3, 3)
                and module.padding == module.dilation
                and module.dilation[0] == module.dilation[1] > 1
            ):
                module.__class__ = DilatedDepthwise
        elif (
            amx
            and module.groups == 1
            and module.bias is None
            and module.dilation == (1, 1)
            and not isinstance(module.padding, str)
        ):
            module.__class__ = FewPixelsConv2d
    return model
