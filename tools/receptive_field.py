"""A network's layers with their output, stride, dilation and receptive field, from its graph.

    python -m tools.receptive_field --model 2
    python -m tools.receptive_field --model baselines/c1c2c3c4.py

The receptive field is the side of the square of input pixels that one output value sees. A layer
with a window adds (kernel - 1) * dilation * jump to it and multiplies the jump, the distance in
input pixels between two neighbouring values, by its stride (Araujo et al., 2019,
https://distill.pub/2019/computing-receptive-fields). Where branches meet, the larger one counts.

All other layers must leave every value at its place. That is not taken from a list but tried: one
place of the input becomes NaN, and nothing but this place of the output may. What fails this
(attention, LSTM, a transposed convolution, a change of size) is refused by name.
"""

import argparse
import math
import operator
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

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
# Names of the arguments, by their order.
POOL_FUNCTIONS = {
    **dict.fromkeys(
        (F.max_pool2d, torch.max_pool2d), ("input", "kernel_size", "stride", "padding", "dilation")
    ),
    F.avg_pool2d: ("input", "kernel_size", "stride"),
}
# Of the whole image they use mean and deviation alone, which is not counted as seeing it.
NORMS = (nn.GroupNorm, nn.LayerNorm, nn.modules.batchnorm._NormBase)
NORM_FUNCTIONS = (F.group_norm, F.layer_norm, F.instance_norm, F.batch_norm)
PADS = (
    nn.modules.padding._ConstantPadNd,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
)
MEANS = ("mean", "sum", "amax")


def layers(model: nn.Module, size: int = 32) -> list[Layer]:
    """The windowed layers of a model in the order of its forward pass, and where all is pooled.

    Args:
        model: of float32 images (N, 3, size, size); it is set to evaluation.

    Raises:
        cli.UsageError: the model's graph cannot be traced; a layer has oblong windows, or none and
            yet does not leave every value at its place. The message names the layer.
    """
    try:
        graph = fx.symbolic_trace(model.eval())
        interpreter = fx.Interpreter(graph, garbage_collect_values=False)
        interpreter.extra_traceback = False
        with torch.no_grad():
            # Two images: a `squeeze` would take the dimension of one for another's.
            interpreter.run(torch.zeros(2, 3, size, size))
    except Exception as error:  # tracing runs the model's own code
        reason = " ".join(str(error).split())
        raise cli.UsageError(
            f"{type(model).__name__} cannot be traced: {type(error).__name__}: {reason}"
        ) from None
    with torch.no_grad():
        return _Walk(interpreter).rows


class _Walk:
    """Goes through the graph of a model that has run; `rows` are its layers.

    `sights` says what a node's values see, `places` where in their feature map they are: an int64
    tensor of the node's shape, row * width + column, for as long as that is known. A node that
    yields several tensors has a tuple of these.
    """

    def __init__(self, interpreter: fx.Interpreter) -> None:
        self.interpreter = interpreter
        self.values = interpreter.env
        self.modules = dict(interpreter.module.named_modules())
        self.sights: dict[fx.Node, Sight] = {}
        self.places: dict[fx.Node, Tensor | tuple[Tensor, ...] | None] = {}
        self.rows: list[Layer] = []
        for node in interpreter.graph.nodes:
            if node.op == "placeholder" and isinstance(self.values[node], Tensor):
                self.sights[node] = Sight(1, 1)
                self.places[node] = _grid(self.values[node])
            elif node.op not in ("placeholder", "output"):
                self._visit(node)

    def _visit(self, node: fx.Node) -> None:
        value = self.values[node]
        inputs = [each for each in node.all_input_nodes if each in self.sights]
        if not inputs or not _tensors(value):  # a parameter; a size, a type
            return
        before = max(self.sights[each] for each in inputs)
        if any(self.sights[each] == WHOLE for each in inputs):
            before = WHOLE
        module = self.modules[node.target] if node.op == "call_module" else None
        if module is not None and not isinstance(value, Tensor):
            raise self._refusal(node)  # attention, LSTM: a result and more
        if before == WHOLE:
            self._set(node, WHOLE)
            return
        window = self._window(node, module)
        if window:
            kind, *squares = window
            self._need_maps(node, inputs)
            kernel, stride, dilation = (self._square(node, square) for square in squares)
            sight = Sight(
                before.field + (kernel - 1) * dilation * before.jump, before.jump * stride
            )
            shape = tuple(value.shape[1:])
            self.rows.append(
                Layer(self._name(node), kind, shape, kernel, stride, dilation, sight.field)
            )
            self._set(node, sight, _grid(value))
        elif isinstance(module, PADS) or node.target is F.pad:
            self._need_maps(node, inputs)
            if value.dim() != 4:
                raise self._refusal(node)
            self._set(node, before, _grid(value))
        elif self._pools_all(node, module, value):
            shape = tuple(value.shape[1:])
            self.rows.append(Layer(self._name(node), "whole image", shape, None, None, None, 0))
            self._set(node, WHOLE)
        else:
            try:
                places = self._kept_places(node, module, inputs)
            except Exception:  # a layer's own code, that does not bear being tried
                places = None
            if places is None:
                raise self._refusal(node)
            self._set(node, before, places)

    def _set(self, node: fx.Node, sight: Sight, places: Tensor | tuple | None = None) -> None:
        self.sights[node], self.places[node] = sight, places

    def _window(self, node: fx.Node, module: nn.Module | None) -> tuple | None:
        """(kind, kernel, stride, dilation) of a windowed layer; None for all others."""
        if isinstance(module, nn.Conv2d):
            depthwise = module.groups == module.in_channels > 1
            kind = "depthwise" if depthwise else "convolution"
            if module.groups > 1 and not depthwise:
                kind = f"groups {module.groups}"
            return kind, module.kernel_size, module.stride, module.dilation
        if isinstance(module, POOLS):
            return "pool", module.kernel_size, module.stride, getattr(module, "dilation", 1)
        if names := POOL_FUNCTIONS.get(node.target):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.values.get)
            given = dict(zip(names, args, strict=False)) | kwargs
            kernel = given["kernel_size"]
            return "pool", kernel, given.get("stride") or kernel, given.get("dilation", 1)
        return None

    def _square(self, node: fx.Node, value: int | tuple[int, ...]) -> int:
        values = {value} if isinstance(value, int) else set(value)
        if len(values) != 1:
            raise cli.UsageError(
                f"{self._title(node)} has a window of {value}: only square ones are understood"
            )
        return values.pop()

    def _pools_all(self, node: fx.Node, module: nn.Module | None, value: object) -> bool:
        """Whether no place is left in the output: a flattening, a mean over the image."""
        if not isinstance(value, Tensor):
            return False
        if value.dim() < 3 or tuple(value.shape[2:]) == (1, 1):
            return True
        if module is not None or getattr(node.target, "__name__", node.target) not in MEANS:
            return False
        # Of x.mean(3).mean(2) the first, too; but not a mean over the channels.
        over = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return value.dim() == 3 and over in (2, 3, -1, -2)

    def _kept_places(
        self, node: fx.Node, module: nn.Module | None, inputs: list[fx.Node]
    ) -> Tensor | tuple[Tensor, ...] | None:
        """The places of a node's values, if each stays at its place or is only moved about."""
        value, places = self.values[node], self.places[inputs[0]]
        if node.target is operator.getitem and isinstance(places, tuple):  # out of x.chunk(2)
            return places[node.args[1]]
        if isinstance(module, NORMS) or node.target in NORM_FUNCTIONS:
            return places
        if isinstance(module, nn.Linear) or node.target is F.linear:  # a 1x1 convolution, if
            first = places[..., :1]  # the values that it mixes are of one place
            return first.expand(value.shape) if (places == first).all() else None
        if kept := self._unmoved(node, inputs):
            return kept if isinstance(value, tuple | list) else kept[0]
        return self._moved(node, inputs)

    def _unmoved(self, node: fx.Node, inputs: list[fx.Node]) -> tuple[Tensor, ...] | None:
        """The places of a node's values if it leaves them where they are in the inputs."""
        known = [places for each in inputs for places in _tensors(self.places[each])]
        kept = [_kept(result, known) for result in _tensors(self.values[node])]
        if any(places is None for places in kept):
            return None
        # One place near the beginning and off the diagonal, so that a transposition and what goes
        # one way (a sum so far) are noticed, and the last one.
        for probe in {min(1, int(known[0].max())), int(known[0].max())}:

            def poison(value: Tensor, places: Tensor, probe: int = probe) -> Tensor:
                if not value.is_floating_point():
                    return value
                return value.masked_fill(places == probe, math.nan)

            results = _tensors(self._again(node, poison))
            for result, places in zip(results, kept, strict=True):
                if (result.isnan() & (places != probe)).any():
                    return None
        return tuple(kept)

    def _moved(self, node: fx.Node, inputs: list[fx.Node]) -> Tensor | None:
        """The places of a node's values if it does nothing but move them: a reshape, a permute.

        It is run on numbers from 1 up, and on their negatives: they must all come out again.
        """
        value, places = self.values[node], self.places[inputs[0]]
        if len(inputs) > 1 or not isinstance(value, Tensor) or not isinstance(places, Tensor):
            return None
        if value.numel() != places.numel():
            return None
        if (
            node.op == "call_module"
            and value.dim() == places.dim() == 4
            and value.shape[2:] != places.shape[2:]
        ):
            return None  # PixelShuffle: what comes behind it sees less than its window says
        numbers = torch.arange(1.0, places.numel() + 1, dtype=torch.float64).view(places.shape)
        order, negative = (
            self._again(node, lambda _value, _places, sign=sign: numbers * sign) for sign in (1, -1)
        )
        if not torch.equal(order.flatten().sort().values, numbers.flatten()) or not torch.equal(
            order, -negative
        ):
            return None
        return places.flatten()[order.long() - 1]

    def _again(self, node: fx.Node, change: Callable[[Tensor, Tensor], Tensor]) -> object:
        """The node's result when change(value, places) stands for its inputs."""

        def given(each: fx.Node) -> object:
            value, places = self.values[each], self.places.get(each)
            if isinstance(value, Tensor):  # a copy, as the node may work in place
                return value.clone() if places is None else change(value.clone(), places)
            if places is None:
                return value
            pairs = zip(value, places, strict=True)
            return type(value)([change(one.clone(), its) for one, its in pairs])

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), given)
        return getattr(self.interpreter, node.op)(node.target, args, kwargs)

    def _need_maps(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        for each in inputs:
            places = self.places[each]
            if not isinstance(places, Tensor) or places.dim() != 4 or not _is_map(places):
                raise self._refusal(node)

    def _refusal(self, node: fx.Node) -> cli.UsageError:
        return cli.UsageError(
            f"{self._title(node)} sees no square window; receptive fields of such layers are not "
            "understood"
        )

    def _name(self, node: fx.Node) -> str:
        return str(node.target) if node.op == "call_module" else node.name

    def _title(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return f"{node.target} ({type(self.modules[node.target]).__name__})"
        # Functions have no name in the model: say in which of its modules it is called.
        calls = [call for call in (node.meta.get("nn_module_stack") or {}).values() if call[0]]
        where = f" in {calls[-1][0]} ({calls[-1][1].__name__})" if calls else ""
        return f"{node.name}{where}"


def _tensors(value: object) -> list[Tensor]:
    """The tensors of a node's result, which may be none or several."""
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, tuple | list):
        return []
    return [each for each in value if isinstance(each, Tensor)]


def _grid(value: Tensor) -> Tensor:
    """The place of every value of a feature map (N, C, H, W): row * W + column, int64."""
    height, width = value.shape[2:]
    return torch.arange(height * width).view(height, width).expand(value.shape)


def _is_map(places: Tensor) -> bool:
    return torch.equal(places, _grid(places))


def _kept(result: Tensor, known: list[Tensor]) -> Tensor | None:
    """The places of a result that stays at those of its inputs; None if it cannot, by its shape."""
    if result.dim() == 4 and all(
        places.dim() == 4 and places.shape[2:] == result.shape[2:] and _is_map(places)
        for places in known
    ):
        return _grid(result)
    same = all(places.shape == result.shape and torch.equal(places, known[0]) for places in known)
    return known[0] if same else None


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

    def work(args: argparse.Namespace) -> None:
        network = networks.load_network(args.model)
        rows = layers(network.build())
        seen = max((row.field for row in rows), default=0)  # 0: the whole image, or no layer at all
        if rows:
            print(f"{table(rows)}\n")
        name = network.build.__name__
        if seen:
            print(f"{name}: a value of the last feature map sees {seen} pixels")
        else:
            print(f"{name}: it has no layer with a window")

    return cli.run(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
