"""--explain: Grad-CAM against autograd by hand and CAM; what is shown, where it goes, refusals."""

import contextlib
import io
import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import cifar10
import networks
import reports
import runs
import utils
from tests.conftest import PIXEL, call_main
from tools import corruptions, evaluate, explain, predict

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "output" / "reference"
CPU = utils.Device(torch.device("cpu"))
AS_IT_IS = utils.test_transform((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
REQUIREMENTS = "requirements-explain.txt"


def grad_cam(network: nn.Module) -> explain.GradCam:
    """Of a network that no model file holds."""
    source = SimpleNamespace(fitting=lambda device: device)
    trained = SimpleNamespace(source=source, network=network.eval(), name=type(network).__name__)
    return explain.GradCam(trained, CPU)


class Net(nn.Module):
    """The steps in their order, then the mean of each channel and a linear layer."""

    def __init__(self, *steps: nn.Module, channels: int = 4) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)
        self.linear = nn.Linear(channels, 10)

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return self.linear(x.flatten(2).mean(dim=2))


# ---------------------------------------------------------------- the maps


@pytest.fixture(scope="module")
def models() -> dict[int, networks.Trained]:
    return {number: networks.load_trained(REFERENCE / f"model_{number}") for number in (1, 2, 3)}


def normalised(trained: networks.Trained, images: np.ndarray) -> torch.Tensor:
    pixels = (images / 255 - trained.settings["mean"]) / trained.settings["std"]
    return torch.from_numpy(pixels).float().permute(0, 3, 1, 2)


def enlarged(small: np.ndarray) -> np.ndarray:
    """To 32x32 by OpenCV, and 1 at the most."""
    large = cv2.resize(small, (32, 32), interpolation=cv2.INTER_LINEAR)
    return large / large.max()


def last_map(network: nn.Module, image: torch.Tensor, label: int) -> tuple:
    """What the average pooling is given, and the logit's gradient in it: both (C, H, W)."""
    kept = []

    def keep(_module: nn.Module, inputs: tuple) -> torch.Tensor:
        kept.append(inputs[0].detach().requires_grad_())
        return kept[0]

    hook = network.pool.register_forward_pre_hook(keep)
    (gradient,) = torch.autograd.grad(network(image)[0, label], kept)
    hook.remove()
    return kept[0].detach()[0], gradient[0]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_maps_are_grad_cam_and_cam_by_hand(number, models, sample):
    """Selvaraju's formula an image at a time, and Zhou's, which needs no gradient at all."""
    trained, images = models[number], sample.test_images[:3]
    tensors, network = normalised(trained, images), trained.network
    with torch.no_grad():
        likeliest = network(tensors).argmax(dim=1).numpy()
    others = (likeliest + 3) % 10
    look = explain.GradCam(trained, CPU)
    for classes in (likeliest, others):
        found = look(images, classes, trained.transform)
        assert (found.dtype, found.shape) == (np.float32, (3, 32, 32))
        for image, wanted, seen in zip(tensors, classes, found, strict=True):
            values, gradients = last_map(network, image[None], wanted)
            by_hand = (gradients.mean(dim=(1, 2))[:, None, None] * values).sum(dim=0).relu()
            np.testing.assert_allclose(seen, enlarged(by_hand.numpy()), atol=1e-4)
            weighted = torch.tensordot(network.linear.weight[wanted].detach(), values, 1).relu()
            np.testing.assert_allclose(seen, enlarged(weighted.numpy()), atol=1e-4)


class Colours(nn.Module):
    """Class 0 counts red, class 1 blue, class 2 the lack of both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1, bias=False)
        self.conv.weight.data = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])[:, :, None, None]
        self.linear = nn.Linear(2, 10)
        self.linear.weight.data = torch.zeros(10, 2)
        self.linear.weight.data[:3] = torch.tensor([[1.0, 0], [0, 1.0], [-1.0, -1.0]])

    def forward(self, x):
        return self.linear(self.conv(x).mean(dim=(2, 3)))


def test_maps_of_a_network_whose_reasons_are_known():
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    image[:16, :16, 0] = 100  # red in the left upper quarter, twice as much in its corner
    image[0, 0, 0] = 200
    image[16:, 16:, 2] = 40  # blue in the right lower
    red, blue, neither = grad_cam(Colours())(np.stack([image] * 3), np.array([0, 1, 2]), AS_IT_IS)
    np.testing.assert_allclose(red, image[:, :, 0] / 200, atol=1e-6)
    np.testing.assert_allclose(blue, image[:, :, 2] / 40, atol=1e-6)
    assert (neither == 0).all()  # and no NaN


def test_each_image_has_its_own_map_whatever_lies_beside_it(models, sample):
    look = explain.GradCam(models[2], CPU)
    images, classes = sample.test_images[:5], np.arange(5)
    together = look(images, classes, models[2].transform)
    for at in range(5):
        (alone,) = look(images[at : at + 1], classes[at : at + 1], models[2].transform)
        np.testing.assert_allclose(alone, together[at], atol=1e-5)
        assert alone.max() == 1


# ---------------------------------------------------------------- the feature map


@pytest.mark.parametrize(
    ("file", "place", "size"),
    [
        ("1", "before pool", (4, 4)),
        ("2", "before pool", (4, 4)),
        ("3", "before pool", (8, 8)),
        ("baselines/c1c2c3c4.py", "before pool", (6, 6)),
        ("baselines/cifarnet.py", "before pool", (16, 16)),
        ("baselines/dilated_cnn.py", "before pool", (8, 8)),
        ("baselines/resnet.py", "after residual3", (4, 4)),
    ],
)
def test_the_feature_map_of_our_networks(file, place, size):
    look = grad_cam(networks.load_network(str(ROOT / file) if "/" in file else file).build())
    assert (look.place, look.size) == (place, size)


class Twice(nn.Module):
    """Its ReLU is called for a feature map and again for a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU()
        self.linear = nn.Linear(4, 10)

    def forward(self, x):
        return self.linear(self.act(self.act(self.norm(self.conv(x))).mean(dim=(2, 3))))


class Squeeze(nn.Module):
    """Channels weighted by convolutions of single pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.gate = nn.Conv2d(3, 4, 2, 2), nn.AdaptiveAvgPool2d(1), None
        self.gate = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.conv(x)
        return x * self.gate(self.pool(x)).sigmoid()


class OwnConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Parameter(torch.randn(4, 3, 4, 4))

    def forward(self, x):
        return F.conv2d(x, self.filters, stride=4)


@pytest.mark.parametrize(
    ("network", "place", "size"),
    [
        (lambda: Net(nn.Conv2d(3, 4, 4, 4)), "after steps.0", (8, 8)),
        (lambda: Net(nn.Conv2d(3, 4, 4, 4), nn.BatchNorm2d(4), nn.ReLU()), "after steps.2", (8, 8)),
        (lambda: Net(nn.Conv2d(3, 4, 4, 4), nn.MaxPool2d(4), nn.Conv2d(4, 4, 2)),
         "before steps.2", (2, 2)),
        (lambda: Net(nn.Sequential(nn.Conv2d(3, 4, (32, 30)), nn.AdaptiveAvgPool2d(1))),
         "before steps.0.1", (1, 3)),
        (lambda: Net(nn.AvgPool2d(2), nn.Conv2d(3, 4, 1), nn.Flatten(2)),
         "before steps.2", (16, 16)),
        (lambda: Net(Squeeze()), "after steps.0", (16, 16)),
        (lambda: Net(OwnConvolution()), "after steps.0", (8, 8)),
        (Twice, "after norm", (15, 15)),
    ],
)  # fmt: skip
def test_the_feature_map_of_networks_of_one_s_own(network, place, size):
    look = grad_cam(network())
    assert (look.place, look.size) == (place, size)


def test_operations_in_place_change_no_map(sample):
    torch.manual_seed(1)
    plain = Net(nn.Conv2d(3, 4, 4, 4), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout())
    in_place = Net(
        nn.Conv2d(3, 4, 4, 4),
        nn.ReLU(True),
        nn.BatchNorm2d(4),
        nn.ReLU(True),
        nn.Dropout(0.5, True),
    )
    in_place.load_state_dict(plain.state_dict())
    given = sample.test_images[:4], np.arange(4), AS_IT_IS
    assert np.array_equal(grad_cam(plain)(*given), grad_cam(in_place)(*given))


# ---------------------------------------------------------------- nothing is changed


def state_of(network: nn.Module) -> list[object]:
    hooks = [
        len(held)
        for module in network.modules()
        for name, held in vars(module).items()
        if name.endswith("_hooks") and hasattr(held, "__len__")
    ]
    parameters = [(p.requires_grad, p.grad) for p in network.parameters()]
    modes = [module.training for module in network.modules()]
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    return [hooks, parameters, modes, weights]


@pytest.mark.parametrize("frozen", [False, True])
def test_the_network_is_as_it_was(frozen, sample):
    trained = networks.load_trained(REFERENCE / "model_2")
    network, images = trained.network, sample.test_images[:4]
    network.conv3.requires_grad_(False)
    if frozen:
        network.requires_grad_(False)
    before = state_of(network)
    maps = explain.GradCam(trained, CPU)(images, np.arange(4), trained.transform)
    assert maps.any(axis=(1, 2)).all()
    after = state_of(network)
    assert sum(before[0]) == 0
    assert not any(before[2])
    assert after[:3] == before[:3]
    for name, value in before[3].items():
        assert torch.equal(after[3][name], value)


# ---------------------------------------------------------------- refusals


class Detached(nn.Module):
    """Its convolution is trained by nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 4, 4), nn.Linear(4, 10)

    def forward(self, x):
        return self.linear(self.conv(x).detach().mean(dim=(2, 3)))


class NoNumber(nn.Module):
    """The gradient of a root at zero is infinite, times zero it is NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 4, 4), nn.Linear(4, 10)

    def forward(self, x):
        x = self.conv(x)
        return self.linear((x + (0 * x).sqrt()).mean(dim=(2, 3)))


class Reconstruction(nn.Module):
    """A side branch draws the image again, behind what the answer comes from."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 4, 4), nn.Linear(4, 10)
        self.again = nn.ConvTranspose2d(4, 3, 4, 4)

    def forward(self, x):
        x = self.conv(x)
        self.again(x)
        return self.linear(x.mean(dim=(2, 3)).squeeze())  # and one image loses its first dimension


def test_a_side_branch_is_not_what_the_answer_comes_from(sample):
    look = grad_cam(Reconstruction())
    assert (look.place, look.size) == ("before again", (8, 8))
    one = look(sample.test_images[:1], np.array([3]), AS_IT_IS)
    two = look(sample.test_images[:2], np.array([3, 3]), AS_IT_IS)
    assert one.shape == (1, 32, 32)
    assert np.allclose(one[0], two[0], atol=1e-6)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            Net(nn.Flatten(2), channels=3),
            "no convolution with a feature map of more than one pixel",
        ),
        (Net(nn.Conv2d(3, 4, 32)), "no convolution with a feature map of more than one pixel"),
        (Detached(), "--explain needs gradients, which Detached does not give ("),
        (NoNumber(), "which NoNumber does not give (they are NaN or infinite)"),
    ],
)
def test_networks_with_nothing_to_show(network, message):
    before = state_of(network.eval())
    with pytest.raises(explain.UsageError, match=re.escape(message)) as caught:
        grad_cam(network)
    assert "\n" not in str(caught.value)
    assert state_of(network)[:3] == before[:3]


MODEL_FILE = """
from torch import nn

RECIPE = dict(
    optimizer="sgd", lr=0.05, weight_decay=5e-4, schedule="onecycle", batch_size=100,
    target_accuracy=85.0, target_epochs=60,
)


class Linear(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(3072, 10))
"""


@pytest.fixture
def linear(tmp_path) -> list[object]:
    """A model file and its weights: the flags."""
    (tmp_path / "linear.py").write_text(MODEL_FILE)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    torch.save(network.state_dict(), tmp_path / "linear.pt")
    return [tmp_path / "linear.pt", "--model", tmp_path / "linear.py"]


@pytest.fixture
def cat(tmp_path, sample) -> Path:
    path = tmp_path / "cat.png"
    Image.fromarray(sample.test_images[0]).save(path)
    return path


def refused(capsys, tool, *arguments: object) -> str:
    status, out, error = call_main(tool.main, capsys, arguments)
    assert (status, out, error.count("\n")) == (2, "", 1)
    return error


def test_refusals_are_one_line_before_any_work(linear, cat, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "load_cifar10", lambda *_: pytest.fail("too late"))
    out_dir = ["--explain", "--output-dir", tmp_path / "out"]
    onnx = REFERENCE / "export" / "model_3_int8.onnx"
    why = "tools.{}: error: Linear has no convolution with a feature map of more than one pixel"
    assert refused(capsys, evaluate, *linear, *out_dir).startswith(why.format("evaluate"))
    found = refused(capsys, predict, cat, "--weights", *linear, *out_dir)
    assert found.startswith(why.format("predict"))
    why = f"{onnx} gives no gradients, which --explain needs; give the folder of the run"
    assert why in refused(capsys, evaluate, onnx, *out_dir)
    assert why in refused(capsys, predict, cat, "--weights", onnx, *out_dir)
    assert not (tmp_path / "out").exists()


def test_captum_is_asked_for_where_it_is_missing_and_needed(cat, capsys, tmp_path, monkeypatch):
    class Missing:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "captum":
                raise ModuleNotFoundError(name=name)

    for name in [name for name in sys.modules if name.partition(".")[0] == "captum"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    run, out_dir = REFERENCE / "model_2", ["--output-dir", tmp_path / "out"]
    wanted = f"error: --explain needs captum; pip install -r {REQUIREMENTS}\n"
    assert refused(capsys, evaluate, run, "--explain", *out_dir) == f"tools.evaluate: {wanted}"
    found = refused(capsys, predict, cat, "--weights", run, "--explain", *out_dir)
    assert found == f"tools.predict: {wanted}"
    assert call_main(predict.main, capsys, [cat, "--weights", run])[0] == 0
    runpy.run_path(explain.__file__)  # as if imported for the first time


def test_the_file_to_install_holds_captum_and_development_takes_it():
    lines = (ROOT / REQUIREMENTS).read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        "-r requirements.txt", "captum==0.9.0",
    ]  # fmt: skip
    assert f"-r {REQUIREMENTS}" in (ROOT / "requirements-dev.txt").read_text().splitlines()


# ---------------------------------------------------------------- the picture


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The figures."""
    kept = []

    class Kept(explain.Figure):
        def __init__(self, *given: object, **named: object) -> None:
            super().__init__(*given, **named)
            kept.append(self)

    monkeypatch.setattr(explain, "Figure", Kept)
    return kept


class Look:
    """In the place of GradCam: maps that tell which image and class they were asked for."""

    name, place, size = "Net", "before pool", (4, 4)

    def __call__(self, images, classes, transform) -> np.ndarray:
        assert transform == "the transform"
        return np.stack([self.map(*each) for each in zip(images, classes, strict=True)])

    @staticmethod
    def map(image: np.ndarray, label: int) -> np.ndarray:
        return np.float32(image.mean(axis=2) / 255 * (label + 1) / 10)


def shown(figure) -> list[list[tuple[str, bytes, bytes, bytes]]]:
    """Text, image, image below the map and map of each cell, panel after panel."""
    found = []
    for panel in figure.subfigs:
        found.append([])
        for axes in panel.axes:
            if len(axes.images) == 3:
                pictures = (np.asarray(image.get_array()).tobytes() for image in axes.images)
                found[-1].append((axes.get_title(), *pictures))
    return found


def cell(text: str, image: np.ndarray, label: int) -> tuple[str, bytes, bytes, bytes]:
    return text, image.tobytes(), image.tobytes(), Look.map(image, label).tobytes()


def answers_for(found: np.ndarray, sure: np.ndarray) -> np.ndarray:
    answers = np.repeat((1 - sure[:, None]) / 9, 10, axis=1)
    answers[range(len(found)), found] = sure
    return np.log(answers).astype(np.float32)


def test_the_surest_mistakes_and_each_class_s_surest_right_answer(drawn, sample):
    """Of 60 answers, 15 of them wrong and none of class 4 right."""
    draw = np.random.default_rng(3)
    images, labels = sample.test_images[:60], np.arange(60) % 10
    found, sure = labels.copy(), draw.permutation(np.linspace(0.3, 0.99, 60))
    found[4::10] = 7
    found[[0, 1, 2, 12, 13, 25, 36, 38, 49]] = (labels[[0, 1, 2, 12, 13, 25, 36, 38, 49]] + 1) % 10
    content = explain.of_answers(
        Look(), "Net, test set", images, labels, answers_for(found, sure), "the transform"
    )
    names = cifar10.CLASSES
    ranked = sorted(range(60), key=lambda at: -sure[at])
    mistakes = [at for at in ranked if found[at] != labels[at]][:10]
    right = [
        next(at for at in ranked if found[at] == labels[at] == label)
        for label in range(10)
        if label != 4
    ]
    (figure,) = drawn
    assert shown(figure) == [
        [
            cell(
                f"true {names[labels[at]]},\npredicted {names[found[at]]}, {100 * sure[at]:.1f} %",
                images[at], found[at],
            )
            for at in mistakes
        ],
        [
            cell(f"{names[labels[at]]}, {100 * sure[at]:.1f} %", images[at], found[at])
            for at in right
        ],
    ]  # fmt: skip
    headings = [panel.get_suptitle() for panel in figure.subfigs]
    assert headings == [
        "The 10 most confident of 15 mistakes",
        "The most confident right answer of each class",
    ]
    title = "Net, test set\nWhere it looks: Grad-CAM, 4x4 values before pool"
    assert figure.get_suptitle() == title
    said = Image.open(io.BytesIO(content)).info
    assert said["Title"] == "Where it looks"
    for text in (*headings, *(row[0].replace("\n", " ") for part in shown(figure) for row in part)):
        assert text in said["Description"]
    assert "\n" not in said["Description"]


@pytest.mark.parametrize(
    ("wrong", "heading"),
    [(0, "The most"), (1, "The only mistake"), (3, "The 3 most confident of 3")],
)
def test_a_part_without_images_is_left_out(wrong, heading, drawn, sample):
    labels = np.array([5, 5, 8])
    found = labels + (np.arange(3) < wrong)
    answers = answers_for(found, np.array([0.5, 0.6, 0.7]))
    explain.of_answers(Look(), "x", sample.test_images[:3], labels, answers, "the transform")
    panels = drawn[0].subfigs
    assert len(panels) == 1 + (wrong == 1)
    assert panels[0].get_suptitle().startswith(heading)
    assert len(shown(drawn[0])[0]) == (wrong or 2)


def extents(figure) -> list[tuple[float, float, float, float]]:
    """Left, bottom, right and top of each text that is drawn, in pixels."""
    figure.draw_without_rendering()  # as large as the figure is, which its PNG was not
    texts = [figure._suptitle, *(panel._suptitle for panel in figure.subfigs)]
    for axes in (axes for panel in figure.subfigs for axes in panel.axes):
        texts += [axes.yaxis.label, *axes.get_yticklabels()] if axes.axison else [axes.title]
    return [text.get_window_extent().extents for text in texts if text.get_text()]


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.filterwarnings("ignore:Glyph")
def test_no_text_is_cut_off_or_lies_on_another(count, drawn, sample):
    paths = [Path(f"{sign * 40}.png") for sign in "W\n猫w$\\_"[:count]]
    answers = np.full((count, 10), 0.1, dtype=np.float32)
    answers[:, 1] = 1
    explain.of_pictures(Look(), paths, sample.test_images[:count], answers, "the transform")
    labels, found = np.full(2 * count, 1), np.array([1] * count + [0] * count)
    images, sure = sample.test_images[: 2 * count], np.full(2 * count, 0.99999)
    answers = answers_for(found, sure)
    title = f"CNN_Model_3, pictures of /somewhere/{'deep/' * 30}"
    explain.of_answers(Look(), title, images, labels, answers, "the transform")
    for figure in drawn:
        boxes, (width, height) = extents(figure), figure.bbox.size
        assert len(boxes) > count + 4
        for at, (left, bottom, right, top) in enumerate(boxes):
            assert min(left, bottom, width - right, height - top) >= 0
            for other in boxes[:at]:
                apart = max(other[0] - right, left - other[2], other[1] - top, bottom - other[3])
                assert apart >= -0.5, (boxes[at], other)


# ---------------------------------------------------------------- tools.evaluate


@pytest.fixture
def picture(monkeypatch) -> bytes:
    """A small picture with words, in the place of what takes long to draw."""
    buffer = io.BytesIO()
    said = explain_info("Where it looks", "A frog & a cat.")
    Image.new("RGB", (3, 2)).save(buffer, "PNG", pnginfo=said)
    monkeypatch.setattr(explain, "draw", lambda *_: buffer.getvalue())
    monkeypatch.setattr(evaluate, "draw", lambda *_: {})
    return buffer.getvalue()


def explain_info(title: str, text: str):
    from PIL.PngImagePlugin import PngInfo

    said = PngInfo()
    said.add_text("Title", title)
    said.add_text("Description", text)
    return said


@pytest.fixture
def run(tmp_path, monkeypatch, sample) -> Path:
    """A trained run with its page; the sample stands in for CIFAR-10."""
    monkeypatch.setattr(cifar10, "load_cifar10", lambda root, *_: sample)
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("weights.pt", "settings.json", "log.csv", "results.json"):
        shutil.copy(REFERENCE / "model_2" / name, folder)
    (folder / "report.html").write_bytes(reports.page(folder))
    return folder


def call(capsys, tool, *arguments: object) -> str:
    status, out, error = call_main(tool.main, capsys, arguments)
    assert status == 0, error
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_picture_goes_into_the_results_and_into_the_run_s_page(run, picture, capsys, tmp_path):
    before = contents(run)
    out = call(
        capsys, evaluate, run, "--explain", "--device", "cpu", "--output-dir", tmp_path / "o"
    )
    (results,) = (tmp_path / "o").iterdir()
    assert (results / "grad_cam.png").read_bytes() == picture
    after = contents(run)
    after.pop(".lock")
    page = after.pop("report.html").decode()
    assert after.pop("grad_cam.png") == picture
    assert after == {name: content for name, content in before.items() if name != "report.html"}
    assert page.encode() == reports.page(run)
    assert re.findall("<h2.*?>(.*?)</h2>", page)[0] == "Where it looks"
    assert "A frog &amp; a cat." in page
    lines = out.splitlines()[-2:]
    assert lines == [f"Page with grad_cam.png: {run / 'report.html'}", f"Results: {results}"]
    assert (results / "train.log").read_text().splitlines()[-2:] == lines


def test_what_damage_costs_goes_into_the_page_as_well(run, picture, capsys, tmp_path, monkeypatch):
    two = {name: corruptions.CORRUPTIONS[name] for name in ("JPEG, quality 50", "JPEG, quality 90")}
    monkeypatch.setattr(corruptions, "CORRUPTIONS", two)
    flags = ["--explain", "--corruptions", "--device", "cpu", "--output-dir", tmp_path / "o"]
    out = call(capsys, evaluate, run, *flags)
    (results,) = (tmp_path / "o").iterdir()
    assert (run / "corruptions.png").read_bytes() == (results / "corruptions.png").read_bytes()
    page = (run / "report.html").read_text()
    assert re.findall("<h2.*?>(.*?)</h2>", page)[:2] == ["How it takes damage", "Where it looks"]
    assert "What damage costs, in points: JPEG, quality 50 " in page
    assert f"Page with corruptions.png, grad_cam.png: {run / 'report.html'}\n" in out


def test_answers_are_explained_as_they_were_given(run, sample, capsys, tmp_path, monkeypatch):
    """Predicted classes and the run's own normalisation arrive at the maps."""
    asked = []
    monkeypatch.setattr(evaluate, "draw", lambda *_: {})
    monkeypatch.setattr(explain, "draw", lambda *given: asked.append(given) or PIXEL)
    settings = json.loads((run / "settings.json").read_text()) | {"mean": [0.5] * 3}
    (run / "settings.json").write_text(json.dumps(settings))
    call(capsys, evaluate, run, "--explain", "--device", "cpu", "--output-dir", tmp_path / "o")
    ((look, title, parts, transform),) = asked
    trained = networks.load_trained(run)
    assert title == "CNN_Model_2, test set"
    for image in (sample.test_images[0], parts[0].images[0]):
        pixels = (image / 255 - 0.5) / settings["std"]
        np.testing.assert_allclose(
            transform(image=image)["image"].permute(1, 2, 0), pixels, atol=1e-5
        )
    for part in parts:
        with torch.no_grad():
            found = trained.network(normalised(trained, part.images)).argmax(dim=1)
        assert found.tolist() == part.classes.tolist()
    assert look.device.dtype == torch.float32


@pytest.mark.parametrize("how", ["no page", "weights alone", "own pictures", "sample", "not asked"])
def test_a_run_is_left_alone(how, run, cat, picture, capsys, tmp_path):
    arguments = [run, "--explain"]
    if how == "no page":
        (run / "report.html").unlink()
    elif how == "weights alone":
        arguments[0] = run / "weights.pt"
    elif how == "own pictures":
        (tmp_path / "mine" / "cat").mkdir(parents=True)
        cat.rename(tmp_path / "mine" / "cat" / "1.png")
        arguments += ["--images", tmp_path / "mine"]
    elif how == "sample":
        arguments += ["--dry-run"]
    else:
        arguments = [run]
    before = contents(run)
    out = call(capsys, evaluate, *arguments, "--device", "cpu", "--output-dir", tmp_path / "o")
    assert contents(run) == before
    (results,) = (tmp_path / "o").iterdir()
    assert (results / "grad_cam.png").exists() == ("--explain" in arguments)
    assert "report.html" not in out


def test_a_dry_run_s_page_takes_the_sample(run, picture, capsys, tmp_path):
    settings = json.loads((run / "settings.json").read_text()) | {"dry_run": True}
    (run / "settings.json").write_text(json.dumps(settings))
    out_dir = ["--device", "cpu", "--output-dir", tmp_path / "o"]
    call(capsys, evaluate, run, "--explain", "--dry-run", *out_dir)
    assert (run / "grad_cam.png").read_bytes() == picture
    (run / "grad_cam.png").unlink()
    call(capsys, evaluate, run, "--explain", *out_dir)  # all images, as the run had none
    assert not (run / "grad_cam.png").exists()


def test_a_run_in_use_is_left_alone(run, picture, capsys, tmp_path):
    with contextlib.closing(runs.Run(run)):
        before = contents(run)
        flags = "--explain", "--device", "cpu", "--output-dir", tmp_path / "o"
        out = call(capsys, evaluate, run, *flags)
        assert contents(run) == before
    assert f"Not in {run / 'report.html'}: {run} is in use" in out


def test_runs_of_this_repository_stay_as_they_are(run, picture, capsys, tmp_path):
    def state() -> dict:
        return {path: path.stat().st_mtime_ns for path in REFERENCE.rglob("*")}

    before = state()
    out_dir = ["--device", "cpu", "--output-dir", tmp_path / "o"]
    call(capsys, evaluate, REFERENCE / "model_2", "--explain", *out_dir)
    assert state() == before


@pytest.mark.parametrize("fails", ["writing", "page"])
def test_a_page_that_cannot_be_made_is_a_line(fails, run, picture, capsys, tmp_path, monkeypatch):
    before = (run / "report.html").read_bytes()

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission\ndenied")

    def write(self: runs.Run, *what: object) -> Path:
        return refuse() if self.folder == run else real(self, *what)

    real = runs.Run.write
    monkeypatch.setattr(
        *((runs.Run, "write", write) if fails == "writing" else (reports, "page", refuse))
    )
    out_dir = ["--device", "cpu", "--output-dir", tmp_path / "o"]
    out = call(capsys, evaluate, run, "--explain", *out_dir)
    line, results = out.splitlines()[-2:]
    assert line == f"Not in {run / 'report.html'}: [Errno 13] Permission"
    assert Path(results.removeprefix("Results: "), "grad_cam.png").read_bytes() == picture
    assert (run / "report.html").read_bytes() == before


# ---------------------------------------------------------------- tools.predict


@pytest.fixture
def pictures(tmp_path, sample) -> list[Path]:
    """Five of the sample's images, some with names that are hard to write."""
    names = ["b.png", "a.png", "$x_{$ \\frac.png", "a\tbell\a.png", "w" * 40 + ".png"]
    for name, image in zip(names, sample.test_images, strict=False):
        Image.fromarray(image).save(tmp_path / name)
    return [tmp_path / name for name in names]


def test_predict_shows_each_picture_with_its_likeliest_class(
    pictures, drawn, sample, capsys, tmp_path
):
    arguments = [*pictures, "--weights", REFERENCE / "model_2"]
    plain = call(capsys, predict, *arguments)
    assert not (tmp_path / "out").exists()
    out = call(capsys, predict, *arguments, "--explain", "--output-dir", tmp_path / "out")
    assert out.startswith(plain)
    (file,) = (tmp_path / "out").glob("*-predict-CNN_Model_2/*.png")
    assert out.removeprefix(plain) == f"Where it looks: {file}\n"
    trained = networks.load_trained(REFERENCE / "model_2")
    images = sample.test_images[:5]
    with torch.no_grad():
        sure, found = trained.network(normalised(trained, images)).softmax(dim=1).max(dim=1)
    maps = explain.GradCam(trained, CPU)(images, found.numpy(), trained.transform)
    names = ["b.png", "a.png", "$x_{$ \\frac.png", "a?bell?.png", "w" * 18 + "…"]
    (cells,) = shown(drawn[0])
    for at, (text, image, below, seen) in enumerate(cells):
        label = cifar10.CLASSES[found[at]]
        assert text == f"{names[at]}\n{label}, {100 * sure[at]:.1f} %"
        assert image == below == images[at].tobytes()
        np.testing.assert_allclose(
            np.frombuffer(seen, np.float32).reshape(32, 32), maps[at], atol=1e-5
        )
    assert len(cells) == 5
    said = Image.open(file).info
    assert said["Title"] == "Where it looks"
    assert "5 pictures: b.png" in said["Description"]


def test_of_many_pictures_the_first_are_shown(pictures, drawn, capsys, tmp_path, monkeypatch):
    assert explain.MOST == 100
    monkeypatch.setattr(explain, "MOST", 3)
    arguments = [*pictures, "--weights", REFERENCE / "model_2", "--explain"]
    out = call(capsys, predict, *arguments, "--output-dir", tmp_path / "out")
    assert out.count("\n") == 6
    (panel,) = drawn[0].subfigs
    assert panel.get_suptitle() == "The first 3 of 5 pictures"
    texts = [text for text, *_ in shown(drawn[0])[0]]
    assert [text.split("\n")[0] for text in texts] == ["b.png", "a.png", "$x_{$ \\frac.png"]
