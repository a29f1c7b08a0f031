"""Trained networks as ONNX graphs: in float32, and in 8-bit integers with calibrated ranges.

The network itself, from normalised pixels to logits, is exported by PyTorch and quantised by ONNX
Runtime; `complete` then puts what surrounds it into the same file: normalisation, which in integers
the first convolution does (`tools/first_convolution.py`), and softmax, float32 in both.
"""

import collections
import contextlib
import io
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from errors import Error
from tools.exported import needed
from tools.first_convolution import TAKES, attribute, from_integers, head, take_pixels
from utils import RGB

with needed():
    import onnx
    import onnxruntime
    import onnxscript  # noqa: F401  (torch.onnx.export asks for it)
    from onnx import compose, numpy_helper, parser
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

BATCH = 100  # images, while calibrating
# Channels a group, and in all, of convolutions that are faster as full ones: 1.3 to 15 times at
# 16x16 and 8x8 pixels (ONNX Runtime 1.31, one thread of a Xeon with VNNI); with more it was slower.
NARROW, WIDE = 8, 128
FIXED = "its code fixes the number of images in a batch; take it from the tensor's shape"

BEFORE = """
pixels (uint8[N,32,32,3] images) => (float[N,3,32,32] pixels_taken)
{
    pixels_raw = Cast<to=1>(images)
    pixels_side = Constant<value_ints=[32, 32, 3]>()
    pixels_shifts = Expand(pixels_shift, pixels_side)
    pixels_scaled = MatMul(pixels_raw, pixels_scale)
    pixels_shifted = Add(pixels_scaled, pixels_shifts)
    pixels_taken = Transpose<perm=[0, 3, 1, 2]>(pixels_shifted)
}"""
AFTER = """
answer (float[N,10] answer_logits) => (float[N,10] probabilities)
{
    probabilities = Softmax<axis=1>(answer_logits)
}"""
GIVES = "answer_logits"  # as TAKES, a name that no network has


class ExportError(Error, RuntimeError):
    """A network that cannot be written as ONNX; the message names what stands in the way."""


def export(network: nn.Module) -> onnx.ModelProto:
    """The network in float32, from normalised pixels (N, 3, 32, 32) to logits, for any N.

    Args:
        network: in eval mode, on the CPU.

    Raises:
        ExportError: it uses an operator that ONNX does not have, or ties itself to one size of
            batch, or chooses its way by the values it computes.
    """
    batch = ({0: torch.export.Dim("N")},)
    names = {"input_names": [TAKES], "output_names": [GIVES]}
    try:
        with _quietly():
            program = torch.onnx.export(
                network, (torch.zeros(2, 3, 32, 32),), dynamo=True, dynamic_shapes=batch,
                verbose=False, **names,
            )  # fmt: skip
            model = program.model_proto
        taken, given = model.graph.input[0].type.tensor_type, model.graph.output[0].type.tensor_type
        if not taken.shape.dim[0].dim_param:
            raise ValueError(FIXED)
        if given.elem_type != onnx.TensorProto.FLOAT:
            raise ValueError("it answers in another format than float32; end with .float()")
    except Exception as error:  # the exporter's own kinds, and whatever a network raises in it
        raise ExportError(f"it cannot be exported: {_why(error)}") from None
    # Where each node came from in Python: three times the size of a small network.
    for each in (*model.graph.node, *model.graph.input, *model.graph.output):
        each.ClearField("metadata_props")
        each.doc_string = ""
    for each in (model, model.graph, *model.graph.initializer):
        each.ClearField("metadata_props")
    model.graph.ClearField("value_info")
    return model


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporter and the quantiser tell their developers."""
    logging.disable(logging.WARNING)
    onnxruntime.set_default_logger_severity(4)  # its C++ writes past Python's streams
    try:
        nowhere = io.StringIO()
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _why(error: BaseException) -> str:
    """One line out of many: the operator, or the innermost reason. A KeyboardInterrupt goes on."""
    reasons = [error]
    while inner := reasons[-1].__cause__ or reasons[-1].__context__:
        reasons.append(inner)
        if isinstance(inner, KeyboardInterrupt):
            raise inner
    text = "\n".join(map(str, reasons))
    if operator := re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", text):
        return f"ONNX has no operator for {operator[1]}; write that layer in other terms"
    if "specialized" in text or "ConstraintViolation" in text:
        return FIXED
    if "data-dependent" in text.lower():
        return "its code decides by computed values, which a graph cannot; use torch.where"
    reason = " ".join(str(reasons[-1]).split())[:200]
    return reason if " " in reason else f"{type(reasons[-1]).__name__} {reason}".strip()


def quantise(
    model: onnx.ModelProto,
    images: np.ndarray,
    mean: RGB,
    std: RGB,
    method: str = "Percentile",
    reduce_range: bool = False,
) -> onnx.ModelProto:
    """The exported network in 8-bit integers: weights by channel, activations by calibrated range.

    Static quantisation after training, as Krishnamoorthi describes it (2018,
    https://arxiv.org/abs/1806.08342), written as pairs of QuantizeLinear and DequantizeLinear. It
    takes uint8 `images` (N, 32, 32, 3) where its first layer is a convolution, which then does the
    normalisation, too; else what the exported network takes.

    Args:
        model: from `export`.
        images: training images that set the activations' ranges, uint8 (N, 32, 32, 3).
        mean, std: as for `complete`.
        method: Percentile (without the one value in 100,000 that lies farthest out), Entropy, or
            MinMax (all values).
        reduce_range: weights in 7 bits, for x86 processors without VNNI, whose 16-bit sums of two
            products overflow.

    Raises:
        ExportError: ONNX Runtime's quantiser cannot cope with it, or finds nothing to quantise.
    """

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict | None:
            return next(batches, None)

    try:
        with tempfile.TemporaryDirectory() as folder, _quietly():
            prepared, done = (Path(folder, f"{name}.onnx") for name in ("prepared", "quantised"))
            quant_pre_process(model, prepared)
            full = onnx.load(prepared)
            if not {node.op_type for node in full.graph.node} & {"Conv", "Gemm", "MatMul"}:
                raise ValueError("it has no convolution and no linear layer")
            _write_out_narrow_groups(full)
            _pool_in_integers(full)
            frame = take_pixels(full, mean, std)
            if frame is None:
                taken = ((images / 255 - mean) / std).transpose(0, 3, 1, 2)
            else:
                taken = frame.around(images)
            starts = range(0, len(images), BATCH)
            batches = ({TAKES: taken[i : i + BATCH].astype(np.float32)} for i in starts)
            full.graph.ClearField("value_info")
            onnx.save(full, prepared)
            as_they_are = {"scale": np.array(1, np.float32), "zero_point": np.array(0, np.uint8)}
            quantization.quantize_static(
                prepared,
                done,
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                reduce_range=reduce_range,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                calibrate_method=quantization.CalibrationMethod[method],
                extra_options={"TensorQuantOverrides": {TAKES: [as_they_are]} if frame else {}},
            )
            model = onnx.load(done)
            _leave_out_zeros(model)
            if frame is not None:
                model = from_integers(model, frame)
    except Exception as error:  # the quantiser fails at many graphs, each in its own way
        raise ExportError(f"it cannot be quantised: {_why(error)}") from None
    return model


def _write_out_narrow_groups(model: onnx.ModelProto) -> None:
    """Convolutions with a few channels a group become full ones, with zeros between the groups.

    ONNX Runtime computes group after group, in integers several times slower than all at once:
    model 1's conv4 (32 groups of 2 channels) took half of the whole network's time. Depthwise
    convolutions have code of their own there.
    """
    weights = {each.name: each for each in model.graph.initializer}
    users = collections.defaultdict(list)
    for node in model.graph.node:
        for name in node.input[1:]:
            users[name].append(node)
    for name, nodes in users.items():
        kinds = {(node.op_type, node.input[1], _groups(node)) for node in nodes}
        if kinds != {("Conv", name, groups := _groups(nodes[0]))} or name not in weights:
            continue
        narrow = numpy_helper.to_array(weights[name])
        outputs, channels = len(narrow) // groups, narrow.shape[1]
        if groups == 1 or not 1 < channels <= NARROW or groups * channels > WIDE:
            continue
        full = np.zeros((len(narrow), channels * groups, *narrow.shape[2:]), narrow.dtype)
        for group in range(groups):
            rows = slice(group * outputs, (group + 1) * outputs)
            full[rows, group * channels : (group + 1) * channels] = narrow[rows]
        weights[name].CopyFrom(numpy_helper.from_array(full, name))
        for node in nodes:
            next(each for each in node.attribute if each.name == "group").i = 1


def _pool_in_integers(model: onnx.ModelProto) -> None:
    """A mean over height and width becomes a global average pool, which can be quantised."""
    values = {each.name: each for each in model.graph.initializer}
    ranks = {each.name: len(each.type.tensor_type.shape.dim) for each in model.graph.value_info}
    for node in model.graph.node:
        if node.op_type == "ReduceMean" and len(node.input) == 2 and ranks.get(node.input[0]) == 4:
            axes = numpy_helper.to_array(values[node.input[1]]) if node.input[1] in values else ()
            if {int(axis) % 4 for axis in axes} == {2, 3} and attribute(node, "keepdims", 1):
                node.op_type = "GlobalAveragePool"
                del node.input[1:], node.attribute[:]


def _leave_out_zeros(model: onnx.ModelProto) -> None:
    """The biases' zero points, zeros of four bytes a channel, are what ONNX takes without them."""
    values = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and len(node.input) == 3:
            integers, _, zeros = (values.get(name) for name in node.input)
            if integers is not None and integers.dtype == np.int32 and not zeros.any():
                del node.input[2]
    used = {name for node in model.graph.node for name in node.input}
    kept = [each for each in model.graph.initializer if each.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _groups(node: onnx.NodeProto) -> int:
    return attribute(node, "group", 1)


def complete(model: onnx.ModelProto, mean: RGB, std: RGB) -> onnx.ModelProto:
    """The graph with all that surrounds the network: uint8 (N, 32, 32, 3) RGB to probabilities.

    Args:
        model: from `export` or `quantise`.
        mean, std: of the training images, as `utils.channel_stats` gives them.

    Raises:
        ExportError: ONNX's own checks find a fault in it.
    """
    try:
        whole, after = model, parser.parse_model(head(model) + AFTER)
        if model.graph.input[0].name == TAKES:
            before = parser.parse_model(head(model) + BEFORE)
            scale, shift = np.diag(1 / (255 * np.array(std))), -np.divide(mean, std)
            for name, values in (("pixels_scale", scale), ("pixels_shift", shift)):
                values = numpy_helper.from_array(values.astype(np.float32), name)
                before.graph.initializer.append(values)
            whole = compose.merge_models(before, model, io_map=[(TAKES, TAKES)])
        whole = compose.merge_models(whole, after, io_map=[(GIVES, GIVES)])
        whole.graph.doc_string = ""
        whole.graph.ClearField("value_info")
        onnx.checker.check_model(whole, full_check=True)
    except Exception as error:
        raise ExportError(f"its graph is no good: {_why(error)}") from None
    return whole


def with_metadata(model: onnx.ModelProto, about: dict) -> bytes:
    """The file's content, with what `Exported.settings` gives back: names and JSON values."""
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in about.items()})
    model.producer_name = "tools.export"
    return model.SerializeToString()
