"""Exported networks: all of it in the file, the same answers, figures that are true."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from PIL import Image

import cifar10
import networks
import utils
from support import provenance
from tests.conftest import PIXEL, call_main
from tools import evaluate, export, first_convolution, predict, to_onnx
from tools.exported import Exported

ROOT = Path(__file__).parents[1]
OURS = ("model_1", "model_2", "model_2_distilled", "model_3", "model_3_distilled")
STATS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}  # not the sample's

# Narrow groups, a depthwise and a dilated convolution, a pool, an addition, dropout.
NETWORK = """
import torch
import torch.nn.functional as F
from torch import nn

RECIPE = dict(
    optimizer="sgd", lr=0.05, weight_decay=5e-4, schedule="onecycle", batch_size=100,
    target_accuracy=85.0, target_epochs=60,
)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.groups = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(8 * 4, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        x = F.relu(self.groups(x) + x)
        x = F.adaptive_avg_pool2d(self.depthwise(x), 2)
        return self.linear(self.dropout(x.flatten(1)))
"""


def make_run(folder: Path, code: str = NETWORK, **settings: object) -> Path:
    """A run's folder with weights that nobody trained, spread so that answers differ."""
    folder.mkdir(parents=True)
    (folder / "small.py").write_text(code)
    torch.manual_seed(1)
    network = networks.load_network(str(folder / "small.py"))
    model = network.build()
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.is_floating_point():
            value.mul_(3).add_(0.05 * torch.randn_like(value))
    torch.save(model.state_dict(), folder / "weights.pt")
    settings = STATS | {"network": "Small", "git_commit": "0123abc"} | settings
    settings |= {"model_file": str(folder / "small.py"), "model_sha256": network.digest}
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch) -> None:
    monkeypatch.setattr(export, "ROUNDS", 1)
    monkeypatch.setattr(export, "SECONDS", 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("export") / "run")


def call(tool, capsys, *arguments: object) -> tuple[int, str, str]:
    return call_main(tool.main, capsys, arguments)


def do_export(run: Path, output: Path, capsys, *arguments: object) -> tuple[int, str, str]:
    line = (run, "--model", run / "small.py", "--dry-run", "--output-dir", output, *arguments)
    return call(export, capsys, *line)


def only(output: Path) -> Path:
    (folder,) = output.iterdir()
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    """The folder that tools.export wrote for the run."""
    output = tmp_path_factory.mktemp("output")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "ROUNDS", 1)
        patch.setattr(export, "SECONDS", 0)
        line = [run, "--model", run / "small.py", "--dry-run", "--output-dir", output]
        assert export.main([str(each) for each in line]) == 0
    return only(output)


def answers(run: Path, images: np.ndarray) -> np.ndarray:
    """PyTorch's probabilities, normalised by hand with the run's own stats."""
    model = networks.load_network(str(run / "small.py")).build().eval()
    model.load_state_dict(torch.load(run / "weights.pt", weights_only=True))
    pixels = (images / 255 - np.array(STATS["mean"])) / np.array(STATS["std"])
    with torch.inference_mode():
        logits = model(torch.from_numpy(pixels).float().permute(0, 3, 1, 2))
    return logits.softmax(dim=1).numpy()


def run_file(file: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})[0]


# ---------------------------------------------------------------- the files


def test_any_number_of_pictures_gives_pytorch_s_probabilities(run, exported, sample):
    wanted = answers(run, sample.test_images)
    assert wanted.max(axis=1).std() > 0.02  # they tell images apart
    for count in (1, 3, 200):
        found = run_file(exported / "small.onnx", sample.test_images[:count])
        np.testing.assert_allclose(found, wanted[:count], atol=1e-5)
        assert (found.dtype, found.shape) == (np.float32, (count, 10))
        coarse = run_file(exported / "small_int8.onnx", sample.test_images[:count])
        assert np.abs(coarse - wanted[:count]).mean() < 0.02
        np.testing.assert_allclose(coarse.sum(axis=1), 1, atol=1e-5)  # not in 8 bits


def test_the_file_holds_integers_by_channel_and_float_around_them(run, exported):
    graph = onnx.load(exported / "small_int8.onnx").graph
    values = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    weights = torch.load(run / "weights.pt", weights_only=True)
    scale = weights["norm.weight"] / (weights["norm.running_var"] + 1e-5).sqrt()
    groups = torch.zeros(8, 8, 3, 3)
    for channel in range(8):
        start = channel // 2 * 2
        groups[channel, start : start + 2] = weights["groups.weight"][channel]
    by_pixels = torch.tensor(STATS["std"])[:, None, None] * 255
    wanted = {
        "first": weights["first.weight"] * scale[:, None, None, None] / by_pixels,
        "groups": groups,  # all at once: ONNX Runtime is slow at narrow groups
        "depthwise": weights["depthwise.weight"],
        "linear": weights["linear.weight"],
    }
    for name, weight in wanted.items():
        integers = values[f"{name}.weight_quantized"]
        scales = values[f"{name}.weight_scale"]
        assert integers.dtype == np.int8
        assert scales.shape == (len(weight),)
        steps = scales.reshape(-1, *[1] * (weight.ndim - 1))
        off = np.abs(integers * steps - weight.numpy())
        assert (off <= 0.51 * steps + 1e-7).all(), name
    biases = [node for node in graph.node if node.input[0].endswith("bias_quantized")]
    assert [len(node.input) for node in biases] == [2, 2, 2]  # zero points would be zeros
    assert set(values) == {name for node in graph.node for name in node.input} & set(values)
    kinds = [node.op_type for node in graph.node]
    assert kinds[-1] == "Softmax"
    before = kinds[: kinds.index("Conv")]  # pixels are never anything but integers
    steps = {"Shape", "Concat", "Expand", "Reshape", "Transpose", "DequantizeLinear"}
    assert set(before) == steps
    assert values["pixels_taken_scale"] == 1
    assert values["pixels_taken_zero_point"] == 0
    colour = values["pixels_colour"].ravel().tolist()
    assert colour == [round(255 * value) for value in STATS["mean"]]


class Layers(torch.nn.Module):
    """A convolution, perhaps a ReLU, and the mean of each channel, which is a linear layer's."""

    def __init__(self, *layers: torch.nn.Module, mean: tuple[int, int] = (2, 3)) -> None:
        super().__init__()
        self.layers, self.mean = torch.nn.Sequential(*layers), mean
        self.linear = torch.nn.Linear(5, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.layers(x).mean(dim=self.mean, keepdim=True).flatten(1))


GREY = [0.2, 0.4, 0.6], [0.2, 0.25, 0.4]  # mean: 51, 102 and 153 of 255


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        ({"kernel_size": 3, "padding": 1}, 4),
        ({"kernel_size": 3, "padding": 1, "bias": False}, 4),
        ({"kernel_size": 5, "padding": 2}, 4),
        ({"kernel_size": 1}, 4),
        ({"kernel_size": 7, "padding": 3}, 4),
        ({"kernel_size": (2, 3), "padding": (0, 1)}, 4),
        ({"kernel_size": 3, "padding": (2, 1)}, 4),
        ({"kernel_size": 3}, 1),
        ({"kernel_size": 3, "padding": 1, "stride": 2}, 1),
        ({"kernel_size": 3, "padding": 2, "dilation": 2}, 1),
        ({"kernel_size": 2, "padding": 1}, 1),
    ],
)
@pytest.mark.parametrize("relu", [True, False])
def test_the_first_convolution_takes_pixels_and_normalises_them(options, columns, relu, sample):
    after = [torch.nn.ReLU()] if relu else []
    network = Layers(torch.nn.Conv2d(3, 5, **options), *after).eval()
    images = sample.test_images[:7]
    pixels = (images / 255 - np.array(GREY[0])) / np.array(GREY[1])
    with torch.inference_mode():
        wanted = network(torch.from_numpy(pixels).float().permute(0, 3, 1, 2))
    model = to_onnx.export(network)
    frame = first_convolution.take_pixels(model, *GREY)
    assert frame.columns == columns
    session = onnxruntime.InferenceSession(model.SerializeToString())
    taken = frame.around(images)
    (found,) = session.run(None, {first_convolution.TAKES: taken.astype(np.float32)})
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)

    graph = frame.graph(first_convolution.head(model))
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    for count in (1, 7):
        (framed,) = session.run(None, {"images": images[:count]})
        assert np.array_equal(framed, taken[:count])


class Twice(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x.mean(dim=(1, 2, 3))[:, None]


CONVOLUTION = torch.nn.Conv2d(3, 3, 3, padding=1)


@pytest.mark.parametrize(
    "network",
    [
        Layers(torch.nn.AvgPool2d(2), torch.nn.Conv2d(3, 5, 3)),
        Layers(torch.nn.Conv2d(3, 3, 3, groups=3), torch.nn.Conv2d(3, 5, 1)),
        Layers(CONVOLUTION, CONVOLUTION, torch.nn.Conv2d(3, 5, 1)),
        Twice(torch.nn.Conv2d(3, 5, 3)),
    ],
    ids=["a pool first", "groups", "a weight used twice", "pixels used twice"],
)
def test_what_cannot_take_pixels_as_they_are_is_normalised_before(network, sample):
    model = to_onnx.export(network.eval())
    before = model.SerializeToString()
    assert first_convolution.take_pixels(model, *GREY) is None
    assert model.SerializeToString() == before
    images = sample.test_images
    quantised = to_onnx.quantise(model, images, *GREY)
    whole = to_onnx.complete(quantised, *GREY).SerializeToString()
    pixels = (images / 255 - np.array(GREY[0])) / np.array(GREY[1])
    with torch.inference_mode():
        logits = network(torch.from_numpy(pixels).float().permute(0, 3, 1, 2))
    (found,) = onnxruntime.InferenceSession(whole).run(None, {"images": images})
    assert np.abs(found - logits.softmax(dim=1).numpy()).mean() < 0.01


def test_a_relu_behind_the_first_convolution_costs_nothing(sample):
    """Its integers are those from zero up: no step of its own, and no range below zero."""
    network = Layers(torch.nn.Conv2d(3, 5, 3, padding=1), torch.nn.ReLU()).eval()
    quantised = to_onnx.quantise(to_onnx.export(network), sample.test_images, *GREY)
    kinds = [node.op_type for node in quantised.graph.node]
    assert "Relu" not in kinds
    place = kinds.index("Conv")
    assert kinds[place + 1] == "QuantizeLinear"
    values = {each.name: numpy_helper.to_array(each) for each in quantised.graph.initializer}
    assert values[quantised.graph.node[place + 1].input[2]] == 0


@pytest.mark.parametrize("mean", [(2, 3), (-1, -2)])
def test_a_mean_over_the_image_is_taken_of_integers(mean, sample):
    network = Layers(torch.nn.Conv2d(3, 5, 3, stride=4), torch.nn.ReLU(), mean=mean).eval()
    quantised = to_onnx.quantise(to_onnx.export(network), sample.test_images, *GREY)
    kinds = [node.op_type for node in quantised.graph.node]
    assert "ReduceMean" not in kinds
    place = kinds.index("GlobalAveragePool")
    around = ["DequantizeLinear", "GlobalAveragePool", "QuantizeLinear"]
    assert kinds[place - 1 : place + 2] == around


def test_a_mean_over_anything_else_stays_one(sample):
    class Rows(Layers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layers(x)
            columns = x.mean(dim=3, keepdim=True).mean(dim=2).flatten(1)
            five = x[..., None].mean(dim=(2, 3), keepdim=True).flatten(1)
            return self.linear(columns + five + x.mean(dim=(2, 3)))

    network = Rows(torch.nn.Conv2d(3, 5, 3, stride=4)).eval()
    quantised = to_onnx.quantise(to_onnx.export(network), sample.test_images, *GREY)
    kinds = [node.op_type for node in quantised.graph.node]
    assert kinds.count("ReduceMean") == 4
    assert "GlobalAveragePool" not in kinds


def test_metadata_and_figures_are_true(run, exported, sample):
    found = json.loads((exported / "export.json").read_text())
    network = found["networks"]["small"]
    parameters = networks.load_network(str(run / "small.py")).parameters
    right = (answers(run, sample.test_images).argmax(axis=1) == sample.test_labels).mean() * 100
    assert network["results"]["PyTorch"]["accuracy"] == pytest.approx(right)
    for kind, name in (("float32", "small.onnx"), ("int8", "small_int8.onnx")):
        row, file = network["results"][kind], exported / name
        probabilities = run_file(file, sample.test_images)
        accuracy = 100 * (probabilities.argmax(axis=1) == sample.test_labels).mean()
        apart = np.abs(probabilities - answers(run, sample.test_images)).max()
        assert row["accuracy"] == pytest.approx(accuracy)
        assert row["bytes"] == file.stat().st_size
        assert row["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert row["largest_difference"] == pytest.approx(apart, rel=1e-3, abs=1e-6)
        assert row["milliseconds_for_one"] > 0
        assert row["images_a_second"] > 0
        props = onnx.load(file).metadata_props
        stored = {each.key: json.loads(each.value) for each in props}
        assert stored["classes"] == list(cifar10.CLASSES)
        assert (stored["mean"], stored["std"]) == (STATS["mean"], STATS["std"])
        assert (stored["network"], stored["parameters"]) == ("Small", parameters)
        assert (stored["accuracy"], stored["evaluated"]) == (row["accuracy"], "200 sample images")
        assert stored["commit_of_the_run"] == "0123abc"
    assert found["git_commit"] == provenance.environment()["git_commit"]
    table = (exported / "train.log").read_text()
    for kind in ("PyTorch", "float32", "int8"):
        assert f"{network['results'][kind]['accuracy']:.2f} %" in table
    assert (exported / "export.png").stat().st_size > 5000


def test_the_picture_leads_each_network_from_float32_to_int8(monkeypatch):
    results = {
        name: {"results": {
            "float32": {"bytes": 1024 * size, "accuracy": accuracy},
            "int8": {"bytes": 256 * size, "accuracy": accuracy - 0.25},
        }}
        for name, size, accuracy in (("a", 400, 90.5), ("b", 4000, 92.5))
    }  # fmt: skip
    drawn = []
    monkeypatch.setattr(export.plots, "png", lambda figure: drawn.append(figure) or PIXEL)
    export.picture(results, "title")
    (axes,) = drawn[0].axes
    lines = [line.get_xydata().tolist() for line in axes.lines if len(line.get_xydata()) == 2]
    assert lines == [[[400, 90.5], [100, 90.25]], [[4000, 92.5], [1000, 92.25]]]
    assert [each.get_text() for each in axes.texts] == ["a: 90.50, 90.25 %", "b: 92.50, 92.25 %"]
    assert axes.get_ylim()[0] <= 90.25
    assert axes.get_xlim()[1] > 4 * 4000  # there is room for the text


def test_speeds_are_taken_in_turns_and_once_more_for_warming_up(monkeypatch):
    monkeypatch.setattr(export, "ROUNDS", 3)
    clock, calls = [0.0], []

    def way(name: str, seconds: float):
        def work() -> None:
            calls.append(name)
            clock[0] += seconds

        return work

    monkeypatch.setattr(export.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(export, "SECONDS", 0.5)
    assert export.milliseconds([way("slow", 0.25), way("fast", 0.125)]) == [250, 125]
    assert calls == (["slow"] * 3 + ["fast"] * 4) * 4


# ---------------------------------------------------------------- calibration


def test_ranges_come_from_images_that_the_network_was_trained_on(run, sample):
    trained = networks.load_trained(run, named=run / "small.py")
    kept, _ = utils.validation_split(1000, 300)
    trained.settings.update(val_split=300, data_sha256=cifar10.digests(sample))
    drawn = export.calibration_images(trained, sample, 600)
    places = {image.tobytes(): number for number, image in enumerate(sample.train_images)}
    numbers = [places[image.tobytes()] for image in drawn]
    assert len(set(numbers)) == 600
    assert set(numbers) <= set(kept)
    trained.settings.update(val_split=45_000, data_sha256={})  # it held out other images
    assert len(export.calibration_images(trained, sample, 5000)) == 1000  # all there are


def test_methods_and_reduced_range_reach_the_file(run, exported, sample, capsys, tmp_path):
    def scales(folder: Path) -> dict[str, np.ndarray]:
        graph = onnx.load(folder / "small_int8.onnx").graph
        return {each.name: numpy_helper.to_array(each) for each in graph.initializer}

    plain = scales(exported)
    status, _, error = do_export(run, tmp_path, capsys, "--calibration", "MinMax", "--reduce-range")
    assert status == 0, error
    other, name = scales(only(tmp_path)), "answer_logits_scale"
    assert plain[name] < other[name]  # without the rarest values the steps are finer
    assert np.abs(plain["first.weight_quantized"]).max() == 127
    assert np.abs(other["first.weight_quantized"]).max() <= 64
    found = json.loads((only(tmp_path) / "export.json").read_text())
    quantised = found["networks"]["small"]["results"]["int8"]["quantised"]
    assert quantised == {"method": "MinMax", "training_images": 1000, "reduce_range": True}


def test_what_a_run_held_out_is_evaluated(sample, capsys, tmp_path):
    held = {"val_split": 300, "data_sha256": cifar10.digests(sample)}
    run = make_run(tmp_path / "run", **held)
    status, out, error = do_export(run, tmp_path / "out", capsys, "--split", "val")
    assert status == 0, error
    _, out_of = utils.validation_split(1000, 300)
    images, labels = sample.train_images[out_of], sample.train_labels[out_of]
    right = 100 * (answers(run, images).argmax(axis=1) == labels).mean()
    assert re.search(rf"float32 .* {right:.2f} %", out)
    assert "300 sample images" in out
    found = json.loads((only(tmp_path / "out") / "export.json").read_text())
    quantised = found["networks"]["small"]["results"]["int8"]["quantised"]
    assert quantised["training_images"] == 700
    # The file knows it too.
    file = only(tmp_path / "out") / "small.onnx"
    line = (file, "--split", "val", "--dry-run", "--output-dir", tmp_path / "more")
    status, out, error = call(evaluate, capsys, *line)
    assert status == 0, error
    assert f"{right:.2f} % of the 300 held-out images" in out


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        ("x = x + torch.special.i1(x)", "ONNX has no operator for"),
        ("x = torch.cat([x[:1], x[1:]]) if len(x) > 2 else x", "fixes the number of images"),
        ("x = x * (2 if x.mean() > 1e9 else 1)", "decides by computed values"),
        ("return self.forward_(x).double()", "another format than float32; end with .float()"),
    ],
)
def test_what_cannot_be_exported_is_named_in_a_line(forward, said, capsys, tmp_path):
    code = NETWORK.replace(
        "    def forward(self, x):\n", f"    def forward(self, x):\n        {forward}\n"
    )
    code += "\n    def forward_(self, x):\n" + NETWORK.partition("def forward(self, x):\n")[2]
    run = make_run(tmp_path / "run", code)
    status, _, error = do_export(run, tmp_path / "out", capsys)
    assert status == 1
    assert error.startswith("tools.export: error: Small: it cannot be exported: ")
    assert said in error
    assert error.count("\n") == 1
    assert len(error) < 300
    assert not list((tmp_path / "out").rglob("*.onnx"))


def test_a_file_that_answers_otherwise_is_not_written(run, capsys, tmp_path, monkeypatch):
    complete = to_onnx.complete
    monkeypatch.setattr(to_onnx, "complete", lambda model, mean, std: complete(model, std, mean))
    status, _, error = do_export(run, tmp_path, capsys)
    assert status == 1
    assert "Small answers otherwise as an .onnx file, by up to " in error
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob("*.onnx"))


def test_two_networks_of_one_name_are_refused(run, capsys, tmp_path):
    line = (run, run, "--model", run / "small.py", "--dry-run", "--output-dir", tmp_path)
    status, _, error = call(export, capsys, *line)
    assert (status, error.count("\n")) == (2, 1)
    assert "two networks would be written as small.onnx" in error
    status, _, error = call(export, capsys, "a/B.ONNX", "--output-dir", tmp_path)
    assert (status, error.count("\n")) == (2, 1)
    assert "a/B.ONNX is an .onnx file already" in error
    assert not list(tmp_path.iterdir())


def test_ctrl_c_in_the_exporter_is_no_fault_of_the_network(run, capsys, tmp_path, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as stop:
            raise RuntimeError("a step of the exporter failed") from stop

    monkeypatch.setattr(torch.onnx, "export", interrupted)
    status, _, error = do_export(run, tmp_path, capsys)
    assert (status, error.strip()) == (130, "tools.export: interrupted")


def test_networks_that_are_odd_but_right(sample, capfd, tmp_path):
    """Convolutions and pixels used twice, names that the graph might want for itself."""
    code = NETWORK.replace("self.groups(x) + x", "self.groups(self.groups(x)) + self.scale * x")
    code = code.replace("self.norm(self.first(x))", "self.norm(self.first(x)) + x[:, :1, ::2, ::2]")
    code = code.replace(
        "        self.dropout =",
        "        self.scale = self.shift = self.raw = nn.Parameter(torch.ones(8, 1, 1))\n"
        "        self.dropout =",
    )
    run = make_run(tmp_path / "run", code)
    status, out, error = do_export(run, tmp_path / "out", capfd)
    assert (status, error) == (0, "")
    assert "int8" in out
    for name, far in (("small", 1e-4), ("small_int8", 0.05)):
        found = run_file(only(tmp_path / "out") / f"{name}.onnx", sample.test_images)
        assert np.abs(found - answers(run, sample.test_images)).mean() < far


def test_what_cannot_be_quantised_is_exported_in_float_alone(sample, capfd, tmp_path):
    code = NETWORK.partition("    def __init__")[0] + (
        "    def __init__(self):\n        super().__init__()\n"
        "        self.weight = nn.Parameter(torch.randn(3, 10))\n\n"
        "    def forward(self, x):\n"
        "        return torch.einsum('nchw,ck->nk', x / 1024, self.weight)\n"
    )
    run = make_run(tmp_path / "run", code)
    status, out, error = do_export(run, tmp_path / "out", capfd)
    assert (status, error) == (0, "")
    assert (
        "small: no int8 file: it cannot be quantised: it has no convolution and no linear layer"
        in out
    )
    folder = only(tmp_path / "out")
    assert [path.name for path in folder.glob("*.onnx")] == ["small.onnx"]
    assert (folder / "export.png").is_file()
    found = run_file(folder / "small.onnx", sample.test_images)
    np.testing.assert_allclose(found, answers(run, sample.test_images), atol=1e-4)


def test_nan_and_a_bad_int8_are_told(run, capsys, tmp_path):
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    weights = torch.load(broken / "weights.pt", weights_only=True)
    weights["linear.bias"][3] = torch.nan
    torch.save(weights, broken / "weights.pt")
    line = (broken, "--model", run / "small.py", "--dry-run", "--output-dir", tmp_path / "out")
    status, _, error = call(export, capsys, *line)
    assert status == 1
    assert error.endswith("weights.pt answers with NaN; nothing was exported\n")
    rows = {"float32": {"accuracy": 92.0}, "int8": {"accuracy": 60.0}}
    assert "int8 loses 32.0 points; try" in export.warning({"results": rows, "no_int8": ""})
    rows["int8"]["accuracy"] = 91.5
    assert export.warning({"results": rows, "no_int8": ""}) == ""


GOOD = {"network": "Small", "classes": list(cifar10.CLASSES)}


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"network": "../../elsewhere"}, "network is '../../elsewhere'"),
        ({"network": "a\nb\x1b[31m"}, "network is 'a"),
        ({"network": 5}, "network is 5"),
        ({"val_split": -5}, "val_split is -5"),
        ({"val_split": True}, "val_split is True"),
        ({"val_split": 10**9}, "val_split is 1000000000"),
        ({"data_sha256": 7}, "data_sha256 is 7"),
        ({"classes": "cat"}, "classes is 'cat'"),
        ("[" * 100_000, "its metadata is no JSON"),
        ("{", "its metadata is no JSON"),
    ],
)
def test_metadata_of_somebody_else_is_not_believed(about, said, exported, capsys, tmp_path):
    model = onnx.load(exported / "small.onnx")
    stored = {"network": json.dumps("Small"), "classes": json.dumps(cifar10.CLASSES)}
    if isinstance(about, str):
        stored["network"] = about
    else:
        stored |= {name: json.dumps(value) for name, value in about.items()}
    onnx.helper.set_model_props(model, stored)
    onnx.save(model, tmp_path / "small.onnx")
    line = (tmp_path / "small.onnx", "--dry-run", "--output-dir", tmp_path / "out")
    status, _, error = call(evaluate, capsys, *line)
    assert (status, error.count("\n")) == (2, 1)
    assert f"small.onnx is damaged: {said}" in error.replace("\\n", "\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("r = Cast<to=1>(s) \n probabilities = Expand(r, t)", "answers with no probabilities"),
        ("r = Cast<to=1>(s) \n probabilities = Reshape(r, t)", "fails at pictures"),
    ],
)
def test_a_graph_that_lies_is_damaged(body, said, capsys, tmp_path):
    """The right names and shapes, but the answers are none."""
    head = '<ir_version: 10, opset_import: ["": 20]>'
    graph = f"""g (uint8[N,32,32,3] images) => (float[N,10] probabilities) {{
        s = ReduceMax<keepdims=0>(images, axes)
        {body}
    }}"""
    graph = graph.replace("ReduceMax<keepdims=0>(images, axes)", "Shape(images)")
    model = onnx.parser.parse_model(head + graph)
    model.graph.initializer.append(numpy_helper.from_array(np.array([7, 10]), "t"))
    if "Expand" in body:
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.array([1, 10]), "t"))
        model.graph.node[0].CopyFrom(
            onnx.helper.make_node("Constant", [], ["s"], value_floats=[3.0])
        )
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in GOOD.items()})
    onnx.save(model, tmp_path / "lie.onnx")
    Image.new("RGB", (40, 50)).save(tmp_path / "x.png")
    status, _, error = call(predict, capsys, tmp_path / "x.png", "--weights", tmp_path / "lie.onnx")
    assert (status, error.count("\n")) == (2, 1)
    assert f"lie.onnx {said}" in error


def foreign(path: Path) -> None:
    """A file that somebody else's program made."""
    shape = "float[N,3,224,224]"
    graph = f"g ({shape} x) => ({shape} y) {{ y = Relu(x) }}"
    onnx.save(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> {graph}'), path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "is no file; python -m tools.export"),
        (lambda path: path.write_bytes(path.read_bytes()[:3000]), "is no whole .onnx file"),
        (lambda path: path.write_bytes(b""), "is no whole .onnx file"),
        (lambda path: path.write_text("weights"), "is no whole .onnx file"),
        (foreign, "was not made by tools.export: wanted images, uint8 (N, 32, 32, 3)"),
    ],
)
def test_a_file_of_no_use_is_told_in_a_line(damage, said, exported, capsys, tmp_path):
    file = tmp_path / "small.onnx"
    file.write_bytes((exported / "small_int8.onnx").read_bytes())
    damage(file)
    png = tmp_path / "x.png"
    Image.new("RGB", (40, 50)).save(png)
    for status, _, error in (
        call(predict, capsys, png, "--weights", file),
        call(evaluate, capsys, file, "--dry-run", "--output-dir", tmp_path),
    ):
        assert (status, error.count("\n")) == (2, 1)
        assert f"{file} {said}" in error


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime", "onnxscript"])
def test_what_to_install_is_told_in_a_line(missing, run, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    for name in ("tools.to_onnx",):
        monkeypatch.delitem(sys.modules, name, raising=False)
    status, _, error = do_export(run, tmp_path, capsys)
    assert status == 2
    assert error == (
        f"tools.export: error: ONNX needs {missing}; pip install -r requirements-export.txt\n"
    )
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the tools that take a file


def test_tools_take_a_file_as_they_take_weights(run, exported, sample, capsys, tmp_path):
    file = exported / "small.onnx"
    line = ("--dry-run", "--images", tmp_path / "set", "--output-dir", tmp_path / "out")
    for number, (image, label) in enumerate(
        zip(sample.test_images[:20], sample.test_labels, strict=False)
    ):
        folder = tmp_path / "set" / cifar10.CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    found = []
    for weights in ((run, "--model", run / "small.py"), (file,)):
        status, out, error = call(evaluate, capsys, *weights, *line, "--tta")
        assert status == 0, error
        found.append(re.findall(r"[\d.]+ %", out))
    assert found[0] == found[1]
    assert "float32, ONNX Runtime on" in out
    pngs = sorted((tmp_path / "set").rglob("*.png"))[:3]
    said = [
        call(predict, capsys, *pngs, "--weights", *weights)
        for weights in ((run, "--model", run / "small.py"), (file,))
    ]
    assert said[0] == said[1]
    assert said[0][0] == 0
    for tool, flag in ((evaluate, "--model 2"), (evaluate, "--device cpu"), (predict, "--model 2")):
        line = (*flag.split(), *((file,) if tool is evaluate else ("--weights", file, pngs[0])))
        status, _, error = call(tool, capsys, *line)
        assert (status, error.count("\n")) == (2, 1)
        assert f"leave out {flag.split()[0]}" in error


# ---------------------------------------------------------------- what is committed


@pytest.mark.parametrize("name", OURS)
def test_the_committed_files_keep_what_they_promise(name, sample):
    folder = ROOT / "output/reference/export"
    file = folder / f"{name}_int8.onnx"
    network = json.loads((folder / "export.json").read_text())["networks"][name]
    settings = json.loads((ROOT / "output/reference" / name / "settings.json").read_text())
    results = network["results"]
    weights = ROOT / "output/reference" / name / "weights.pt"
    assert network["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert network["commit_of_the_run"] == settings["git_commit"]
    assert results["int8"]["bytes"] == file.stat().st_size
    assert results["int8"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert file.stat().st_size <= 1.3 * settings["parameters"] + 40 * 1024
    assert results["int8"]["accuracy"] >= results["PyTorch"]["accuracy"] - 0.2
    assert results["float32"]["accuracy"] == pytest.approx(results["PyTorch"]["accuracy"], abs=0.02)
    exported, trained = Exported(file), networks.load_trained(name)
    assert exported.settings["accuracy"] == results["int8"]["accuracy"]
    tensors = torch.stack([trained.transform(image=each)["image"] for each in sample.test_images])
    with torch.inference_mode():
        wanted = trained.network(tensors).softmax(dim=1).numpy()
    found = exported(sample.test_images)
    assert (found.argmax(axis=1) == wanted.argmax(axis=1)).mean() > 0.95
    assert np.abs(found - wanted).mean() < 0.01


def test_docs_tell_the_committed_figures():
    found = json.loads((ROOT / "output/reference/export/export.json").read_text())
    page, ratios = (ROOT / "docs/export.md").read_text(), []
    for name in OURS:
        results = found["networks"][name]["results"]
        for kind, row in results.items():
            size = f"{row['bytes'] / 1024:,.0f}" if "bytes" in row else ""
            assert (
                f"| {name}, {kind} | {size} | {row['accuracy']:.2f} % "
                f"| {row['milliseconds_for_one']:.2f} ms | {row['images_a_second']:,.0f} |"
            ) in page
        eager, float32, int8 = results.values()
        one = eager["milliseconds_for_one"] / int8["milliseconds_for_one"]
        ratios.append((one, int8["images_a_second"] / float32["images_a_second"]))
    for each in zip(*ratios, strict=True):
        least, most = min(each), max(each)
        assert re.search(rf"{least:.1f}\s(\(model 3\)\s)?to {most:.1f} times", page)
    assert found["command"].split()[1:4] == ["-m", "tools.export", "model_1"]
    small = found["networks"]["model_3"]["results"]["int8"]
    size = f"{small['bytes'] / 1024:.0f} KiB, {small['accuracy']:.2f} %"
    assert f"(model 3: {size})" in (ROOT / "README.md").read_text()


def test_the_committed_files_are_small():
    sizes = [each.stat().st_size for each in (ROOT / "output/reference/export").iterdir()]
    assert sum(sizes) < 3_000_000


@pytest.mark.parametrize("name", [*OURS, "model_1_distilled", "model_3_robust"])
def test_torch_hub_loads_our_networks_from_anywhere(name, sample, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for theirs in ("utils", "networks", "model_1", "errors"):  # modules of the caller's own
        monkeypatch.setitem(sys.modules, theirs, object())
    network = torch.hub.load(str(ROOT), name, source="local", trust_repo=True)
    normalize = torch.hub.load(str(ROOT), "normalize", source="local", trust_repo=True)
    monkeypatch.undo()
    assert not network.training
    for wrong in (torch.zeros(1, 32, 32, 3), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"wanted uint8 images \(N, 32, 32, 3\)"):
            normalize(wrong)
    trained = networks.load_trained(name)
    images = sample.test_images[:20]
    wanted = torch.stack([trained.transform(image=image)["image"] for image in images])
    found = normalize(torch.from_numpy(images))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    with torch.inference_mode():
        torch.testing.assert_close(network(wanted), trained.network(wanted))
    monkeypatch.chdir(tmp_path)
    untrained = torch.hub.load(str(ROOT), name, source="local", pretrained=False)
    assert untrained.training
    first = next(iter(untrained.state_dict().values()))
    assert not torch.equal(first, next(iter(network.state_dict().values())))


def test_the_documented_script_needs_neither_torch_nor_us(sample, tmp_path):
    """In a virtual environment that holds onnxruntime, pillow, and what these ask for."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    (place,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    wanted, linked = ["onnxruntime", "pillow"], set()
    while wanted:
        distribution = metadata.distribution(wanted.pop())
        if distribution.name in linked:
            continue
        linked.add(distribution.name)
        for top in {Path(file).parts[0] for file in distribution.files}:
            if top not in ("..", "__pycache__") and not (place / top).exists():
                (place / top).symlink_to(distribution.locate_file(top))
        for need in distribution.requires or []:
            if "extra" not in need:
                wanted.append(re.match(r"[\w.-]+", need)[0])
    assert "torch" not in linked
    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.DOTALL)
    lines = [line for line in script.splitlines() if line]
    assert len(lines) <= 10
    (tmp_path / "name.py").write_text(script + "\nimport sys\nassert 'torch' not in sys.modules\n")
    (tmp_path / "model_3_int8.onnx").symlink_to(ROOT / "output/reference/export/model_3_int8.onnx")
    trained = networks.load_trained("model_3")
    tensors = torch.stack([trained.transform(image=each)["image"] for each in sample.test_images])
    with torch.inference_mode():
        sure = trained.network(tensors).softmax(dim=1).max(dim=1).values
    surest = int(sure.argmax())
    large = Image.fromarray(sample.test_images[surest]).resize((320, 320))
    large.save(tmp_path / "picture.jpg", quality=95)
    result = subprocess.run(
        [tmp_path / "venv/bin/python", "name.py"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": ""},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(cifar10.CLASSES[sample.test_labels[surest]])
