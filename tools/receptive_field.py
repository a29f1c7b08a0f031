"""A network's layers with their output, stride, dilation and receptive field, from its graph.

    python -m tools.receptive_field --model 2
    python -m tools.receptive_field --model baselines/c1c2c3c4.py

The receptive field is the side of the square of input pixels that one output value sees. A layer
with a window adds (kernel - 1) * dilation * jump to it and multiplies the jump, the distance in
input pixels between two neighbouring values, by its stride (Araujo et al., 2019,
https://distill.pub/2019/computing-receptive-fields). Where branches meet, the larger one counts.
"""

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

import cli
import networks


class Sight(NamedTuple):
    """What a value sees of the input."""

    field: int  # side in input pixels; 0: all of it
    jump: int  # to its neighbour, in input pixels


class Layer(NamedTuple):
    """A row of the table."""

    name: str
    kind: str
    output: tuple[int, ...]  # without the batch
    kernel: int | None
    stride: int | None
    dilation: int | None
    field: int  # 0: the whole image


WHOLE = Sight(0, 0)
POOLS = (nn.MaxPool2d, nn.AvgPool2d)
POOL_FUNCTIONS = (F.max_pool2d, F.avg_pool2d, torch.max_pool2d)
WHOLE_IMAGE = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Linear)


def layers(model: nn.Module, size: int = 32) -> list[Layer]:
    """The windowed layers of a model in the order of its forward pass, and where all is pooled.

    Raises:
        cli.UsageError: the model's graph cannot be traced, or a layer has oblong windows.
    """
    try:
        graph = fx.symbolic_trace(model.eval())
        ShapeProp(graph).propagate(torch.zeros(1, 3, size, size))
    except Exception as error:  # tracing runs the model's own code
        raise cli.UsageError(
            f"{type(model).__name__} cannot be traced: {type(error).__name__}: {error}"
        ) from None
    modules = dict(graph.named_modules())
    sights: dict[fx.Node, Sight] = {}
    rows = []
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            sights[node] = Sight(1, 1)
            continue
        seen = [sights[each] for each in node.all_input_nodes if each in sights]
        if not seen or node.op == "output":
            continue
        before = WHOLE if WHOLE in seen else max(seen)
        window = _window(node, modules)
        if window == "whole":
            if before != WHOLE:
                rows.append(Layer(_name(node), "whole image", _shape(node), None, None, None, 0))
            sights[node] = WHOLE
        elif window is None or before == WHOLE:
            sights[node] = before
        else:
            kind, kernel, stride, dilation = window
            sights[node] = Sight(
                before.field + (kernel - 1) * dilation * before.jump, before.jump * stride
            )
            rows.append(
                Layer(_name(node), kind, _shape(node), kernel, stride, dilation, sights[node].field)
            )
    return rows


def _window(node: fx.Node, modules: dict[str, nn.Module]) -> tuple | str | None:
    """(kind, kernel, stride, dilation) of a windowed layer; "whole"; None for all others."""
    if node.op == "call_module":
        module = modules[node.target]
        if isinstance(module, WHOLE_IMAGE):
            return "whole"
        if isinstance(module, nn.Conv2d):
            depthwise = module.groups == module.in_channels > 1
            kind = "depthwise" if depthwise else "convolution"
            if module.groups > 1 and not depthwise:
                kind = f"groups {module.groups}"
            return kind, *map(_square, (module.kernel_size, module.stride, module.dilation))
        if isinstance(module, POOLS):
            return "pool", _square(module.kernel_size), _square(module.stride), 1
    elif node.op == "call_function":
        if node.target in POOL_FUNCTIONS:
            given = dict(zip(("input", "kernel_size", "stride"), node.args, strict=False))
            given |= node.kwargs
            kernel = _square(given["kernel_size"])
            return "pool", kernel, _square(given.get("stride") or kernel), 1
        if node.target in (F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.linear):
            return "whole"
    shape = _shape(node)  # a mean over the image, a flattening: no place is left in the output
    return "whole" if len(shape) < 3 or shape[1:] == (1, 1) else None


def _square(value: int | tuple[int, ...]) -> int:
    values = {value} if isinstance(value, int) else set(value)
    if len(values) != 1:
        raise cli.UsageError(f"a window of {value}: only square ones are understood")
    return values.pop()


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["tensor_meta"].shape[1:])


def table(rows: Sequence[Layer]) -> str:
    """The layers as aligned columns."""
    cells = [("layer", "kind", "output", "kernel", "stride", "dilation", "receptive field")]
    cells += [
        (
            row.name,
            row.kind,
            "x".join(map(str, row.output)),
            *("" if value is None else str(value) for value in row[3:6]),
            str(row.field) if row.field else "whole image",
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(7)]
    lines = [
        "  ".join(
            f"{cell:{'<' if column < 2 else '>'}{width}}"
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = cli.ArgumentParser(
        prog="tools.receptive_field", description="The layers of a network and what they see."
    )
    parser.add_argument("--model", default="2", help="1, 2, 3 or a model file (2)")
    args = parser.parse_args(arguments)

    def work() -> None:
        network = networks.load_network(args.model)
        rows = layers(network.build())
        seen = max(row.field for row in rows)
        print(table(rows))
        print(f"\n{network.build.__name__}: a value of the last feature map sees {seen} pixels")

    return cli.run("tools.receptive_field", work)


if __name__ == "__main__":
    sys.exit(main())
