"""An 8-bit network's first convolution takes the image's pixels as they are, and normalises them.

    frame = take_pixels(model, mean, std)      # before the quantiser, which calibrates it with
    frame.around(images)                       # these
    model = from_integers(model, frame)        # after it

A part of tools.export. What it is worth: docs/export.md.
"""

from typing import NamedTuple

import numpy as np

from tools.exported import needed
from utils import RGB

with needed():
    import onnx
    from onnx import compose, numpy_helper, parser

COLUMNS = 4  # of pixels that the convolution takes at once
TAKES = "pixels_taken"  # the network's input; no network has such a name, it brings its own


class Frame(NamedTuple):
    """Pixels of the mean colour around an image, for a convolution that takes pixels as they are.

    Its zero padding, of normalised pixels, is that colour.
    """

    above: int
    left: int
    below: int
    right: int
    columns: int  # of pixels that become one, with as many times the channels
    colour: tuple[int, int, int]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of what the convolution takes."""
        width = (self.left + 32 + self.right) // self.columns
        return self.above + 32 + self.below, width, 3 * self.columns

    def around(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, 32, 32, 3) to (N, channels, height, width)."""
        rows, columns = self.above + 32 + self.below, self.left + 32 + self.right
        framed = np.empty((len(images), rows, columns, 3), np.uint8)
        framed[:] = self.colour
        framed[:, self.above : self.above + 32, self.left : self.left + 32] = images
        return framed.reshape(-1, *self.shape).transpose(0, 3, 1, 2)

    def graph(self, versions: str) -> onnx.ModelProto:
        """The same as `around`, in ONNX."""
        height, width, channels = self.shape
        across = self.left + 32 + self.right
        sides = {"left": (32, self.left, 3), "right": (32, self.right, 3)}
        sides |= {"above": (self.above, across, 3), "below": (self.below, across, 3)}
        lines, values = [], {}
        for side, size in sides.items():
            if 0 not in size:
                values[f"pixels_{side}_size"] = np.array(size)
                lines += [
                    f"pixels_{side}_shape = Concat<axis=0>(pixels_count, pixels_{side}_size)",
                    f"pixels_{side} = Expand(pixels_colour, pixels_{side}_shape)",
                ]

        def joined(*pieces: str) -> str:
            return ", ".join(each for each in pieces if 0 not in sides.get(each[7:], [1]))

        text = f"""{versions}
            pixels (uint8[N,32,32,3] images) => (uint8[N,{channels},{height},{width}] {TAKES})
            {{
                pixels_count = Shape<start=0, end=1>(images)
                {chr(10).join(lines)}
                pixels_wide = Concat<axis=2>({joined("pixels_left", "images", "pixels_right")})
                pixels_framed = Concat<axis=1>(
                    {joined("pixels_above", "pixels_wide", "pixels_below")}
                )
                pixels_grouped = Reshape(pixels_framed, pixels_shape)
                {TAKES} = Transpose<perm=[0, 3, 1, 2]>(pixels_grouped)
            }}"""
        model = parser.parse_model(text)
        values["pixels_shape"] = np.array([0, *self.shape])
        values["pixels_colour"] = np.array(self.colour, np.uint8).reshape(1, 1, 1, 3)
        for name, value in values.items():
            model.graph.initializer.append(numpy_helper.from_array(value, name))
        return model


def take_pixels(model: onnx.ModelProto, mean: RGB, std: RGB) -> Frame | None:
    """Lets the first convolution take pixels from 0 to 255, if it can: its weights normalise.

    Without stride it takes four pixels of a row at once, and gives as many: one with four times the
    channels, whose memory is the same. ONNX Runtime copies what lies under a filter before it
    multiplies, and few large pieces are copied faster than many small ones.

    Returns:
        What has to surround the pixels; None: the first layer is no convolution of its own.
    """
    graph = model.graph
    values = {each.name: each for each in graph.initializer}
    users = [node for node in graph.node if TAKES in node.input]
    if [node.op_type for node in users] != ["Conv"]:
        return None
    (first,) = users
    if attribute(first, "group", 1) != 1 or attribute(first, "auto_pad", b"NOTSET") != b"NOTSET":
        return None
    own = {name for name in first.input[1:] if sum(name in node.input for node in graph.node) == 1}
    if not own == {*first.input[1:]} <= {*values}:
        return None
    weight = numpy_helper.to_array(values[first.input[1]]).astype(np.float64)
    above, left, below, right = attribute(first, "pads", [0, 0, 0, 0])
    outputs, _, height, width = weight.shape
    one = attribute(first, "strides", [1, 1]) == attribute(first, "dilations", [1, 1]) == [1, 1]
    columns = COLUMNS if one and left + right == width - 1 else 1
    wide = -(-(width + columns - 1) // columns)  # columns, or groups of them, that a filter sees
    if columns > 1:
        right = (32 // columns + wide - 1) * columns - 32 - left

    bias = -(weight * np.divide(mean, std)[:, None, None]).sum(axis=(1, 2, 3))
    if len(first.input) == 3:
        bias += numpy_helper.to_array(values[first.input[2]])
    scaled = weight / (255 * np.array(std))[:, None, None]
    name = first.input[1]
    own = {name: beside_each_other(scaled, columns), f"{name}_bias": np.tile(bias, columns)}
    for each in [values[name] for name in first.input[1:]]:
        graph.initializer.remove(each)
    for key, value in own.items():
        graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), key))
    first.input[1:] = own
    for key, value in (("pads", [0, 0, 0, 0]), ("kernel_shape", [height, wide])):
        for old in [each for each in first.attribute if each.name == key]:
            first.attribute.remove(old)
        first.attribute.append(onnx.helper.make_attribute(key, value))
    colour = tuple(round(255 * value) for value in mean)
    frame = Frame(above, left, below, right, columns, colour)
    rows, across, channels = frame.shape
    for dimension, size in zip(
        graph.input[0].type.tensor_type.shape.dim[1:], (channels, rows, across), strict=True
    ):
        dimension.dim_value = size
    if columns > 1:
        tall = above + 32 + below - height + 1
        _take_apart(model, first, [0, tall, 32, outputs])
    return frame


def beside_each_other(weight: np.ndarray, columns: int) -> np.ndarray:
    """A filter's weights for so many pixels of a row at once, (outputs, inputs, height, width).

    Returns:
        (columns * outputs, columns * inputs, height, groups of columns that they see), zeros where
        one does not see a pixel; the channels of a pixel lie together.
    """
    outputs, inputs, height, width = weight.shape
    wide = -(-(width + columns - 1) // columns)
    many = np.zeros((columns, outputs, wide * columns, inputs, height))
    for column in range(columns):
        many[column, :, column : column + width] = weight.transpose(0, 3, 1, 2)
    many = many.reshape(columns * outputs, wide, columns * inputs, height)
    return many.transpose(0, 2, 3, 1)


def _take_apart(model: onnx.ModelProto, layer: onnx.NodeProto, shape: list[int]) -> None:
    """Gives what the layer, and a ReLU behind it, computes the shape (N, height, width, channels).

    Between two transpositions, as ONNX lays images out; ONNX Runtime has its integers the other way
    round, leaves both away and copies nothing.
    """
    name, nodes = layer.output[0], []
    users = [node for node in model.graph.node if name in node.input]
    if [node.op_type for node in users] == ["Relu"]:
        name = users[0].output[0]
    for node in model.graph.node:
        for place, each in enumerate(node.input):
            if each == name:
                node.input[place] = "columns_apart"
        nodes.append(node)
        if name in node.output:
            make = onnx.helper.make_node
            nodes += [
                make("Transpose", [name], ["columns_last"], perm=[0, 2, 3, 1]),
                make("Reshape", ["columns_last", "columns_shape"], ["columns_single"]),
                make("Transpose", ["columns_single"], ["columns_apart"], perm=[0, 3, 1, 2]),
            ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(numpy_helper.from_array(np.array(shape), "columns_shape"))


def from_integers(model: onnx.ModelProto, frame: Frame) -> onnx.ModelProto:
    """The quantised graph without the step that makes integers of pixels: they are; framed."""
    (rounds,) = (node for node in model.graph.node if TAKES in node.input)
    model.graph.node.remove(rounds)
    for node in model.graph.node:
        node.input[:] = [TAKES if name == rounds.output[0] else name for name in node.input]
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    return compose.merge_models(frame.graph(head(model)), model, io_map=[(TAKES, TAKES)])


def head(model: onnx.ModelProto) -> str:
    """The versions of the model, as onnx.parser takes them."""
    versions = ", ".join(f'"{each.domain}": {each.version}' for each in model.opset_import)
    return f"<ir_version: {model.ir_version}, opset_import: [{versions}]>"


def attribute(node: onnx.NodeProto, name: str, default: object) -> object:
    found = [each for each in node.attribute if each.name == name]
    return onnx.helper.get_attribute_value(found[0]) if found else default
