"""A network's layers with their output, stride, dilation and receptive field, as measured.

    python -m tools.receptive_field --model 2

The receptive field is the side of the square of input pixels that one output value sees (Araujo et
al., 2019, https://distill.pub/2019/computing-receptive-fields): where the middle of a layer's
output has a gradient, in images so high that their borders cut nothing off. All weights are made
positive, so that no gradient is lost; of two images one is brightest in its first corner, the other
in its last, so that maxima find both ends of their windows. Layers other than convolutions and
pools are not listed, but count in what lies behind them.
"""

import argparse
import contextlib
import copy
import sys
from collections import namedtuple
from collections.abc import Sequence
from itertools import chain, repeat

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import cli
import networks

SIZE, HIGH = 32, 192  # pixels
WHOLE = "whole image"
# Mean and deviation of the whole image are not counted as seeing it.
NORMS = ("batch_norm", "group_norm", "instance_norm", "layer_norm")
# The functions with a window, which modules call as well, and their arguments behind the input.
WINDOWED = {
    "conv2d": ("weight", "bias", "stride", "padding", "dilation", "groups"),
    "max_pool2d": ("kernel_size", "stride", "padding", "dilation"),
    "avg_pool2d": ("kernel_size", "stride"),
}
# A row of the table, as text. A field is a number of pixels, or at least so many, or WHOLE.
Layer = namedtuple("Layer", "layer kind output kernel stride dilation field")


class _Probe(TorchFunctionMode):
    """Notes, of a network that runs on `images`, the layers with a window, and as `end` the first
    one behind them whose output is of no place in the image."""

    def __init__(self, network: nn.Module, height: int) -> None:
        super().__init__()
        self.layers, self.end, self.running = [], [], ""
        for name, module in network.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: setattr(self, "running", name))
            module.register_forward_hook(lambda *_: setattr(self, "running", ""))
        slope = torch.linspace(0.1, 0.4, height)[:, None] + torch.linspace(0.1, 0.4, SIZE)
        self.images = torch.stack([slope.flip(0, 1), slope]).double().requires_grad_()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in NORMS:
            return args[0].clone()
        value = function(*args, **(kwargs or {}))
        if isinstance(value, Tensor) and value.requires_grad:
            layer, output = self.running or name, "x".join(map(str, value.shape[1:]))
            if name in WINDOWED:
                given = dict(zip(WINDOWED[name], args[1:], strict=False)) | (kwargs or {})
                kind, *window = _window(args[0].shape[1], **given)
                self.layers.append(Layer(layer, kind, output, *window, self._field(layer, value)))
                self.end = []
            elif value.shape[2:].numel() == 1 and not self.end:
                self.end = [Layer(layer, WHOLE, output, "", "", "", WHOLE)]
        return value

    def _field(self, layer: str, value: Tensor) -> str:
        middle = value[:, :, value.shape[2] // 2, value.shape[3] // 2].sum()
        (gradient,) = torch.autograd.grad(middle, self.images, retain_graph=True)
        if not gradient.any(dim=(1, 2)).all():
            raise ValueError(f"{layer} has no gradient")
        first, last = (image.nonzero() for image in gradient)
        (top, left), (bottom, right) = first.amin(0).tolist(), last.amax(0).tolist()
        side, height = bottom - top + 1, gradient.shape[1]
        if height == SIZE and side != right - left + 1:
            raise ValueError(f"{layer} sees {side} rows, but {right - left + 1} columns")
        return (WHOLE, f"at least {side}", str(side))[(top > 0) + (bottom < height - 1)]


def _window(channels, weight=None, kernel_size=0, stride=None, dilation=1, groups=1, **_others):
    """Kind, kernel, stride and dilation of a function that is called with these arguments."""
    pool = weight is None
    kernel = kernel_size if pool else weight.shape[2:]
    kind = {channels: "depthwise", 1: "convolution"}.get(groups, f"groups {groups}")
    sizes = (kernel, stride or (kernel if pool else 1), dilation)
    return "pool" if pool else kind, *(str(int(torch.tensor(size).max())) for size in sizes)


def layers(model: nn.Module) -> list[Layer]:
    """The convolutions and pools of a model of images (N, 3, 32, 32), and the end of all places.

    Raises:
        cli.UsageError: the model cannot be run, or a layer, which is named, sees no square.
    """
    try:
        network = copy.deepcopy(model).eval().double().requires_grad_(False)
        for name, weight in network.named_parameters():
            weight.fill_(0 if name.endswith("bias") else weight.shape[:1].numel() / weight.numel())
        square, high = _Probe(network, SIZE), _Probe(network, HIGH)
        with square:
            network(square.images[:, None].repeat(1, 3, 1, 1))
    except Exception as error:  # the model's own code, too
        reason = " ".join(str(error).split())
        raise cli.UsageError(f"{type(model).__name__} cannot be measured: {reason}") from None
    with contextlib.suppress(Exception), high:  # it may take 32x32 pixels only
        network(high.images[:, None].repeat(1, 3, 1, 1))
    rows = []  # with the field in the high image, if only the output's height grew with it
    for row, far in zip(square.layers, chain(high.layers, repeat(None)), strict=False):
        near, higher = row.output.split("x"), (far or row).output.split("x")
        better = higher != near and higher[::2] == near[::2] and far.field.isdigit()
        rows.append(row._replace(field=far.field) if better else row)
    return rows + square.end


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = cli.ArgumentParser("tools.receptive_field", description="What a network's layers see.")
    parser.add_argument("--model", default="2", help="1, 2, 3 or a model file (2)")

    def work(args: argparse.Namespace) -> None:
        build = networks.load_network(args.model).build
        rows = layers(build())
        cells = [(*Layer._fields[:6], "receptive field"), *rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        form = "  ".join(f"{{:{'<' if at < 2 else '>'}{width}}}" for at, width in enumerate(widths))
        header, *lines = [form.format(*line) for line in cells]
        print(header, "-" * len(header), *lines, "", sep="\n")
        seen = ["it has no layer with a window"]
        seen += [f"{row.layer} sees {row.field} pixels" for row in rows if row.field.isdigit()]
        print(f"{build.__name__}: {seen[-1]}")

    return cli.run(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
