"""tools.evaluate against a plain computation, and what it refuses."""

import json

import numpy as np
import pytest
import torch

from model_2 import CNN_Model_2
from tools import evaluate


def call(capsys, *arguments: object) -> tuple[int, str, str]:
    try:
        status = evaluate.main([str(argument) for argument in arguments])
    except SystemExit as end:
        status = end.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def run(tmp_path, monkeypatch, sample):
    """A run's folder with untrained weights; the sample stands in for all of CIFAR-10."""
    monkeypatch.setattr(evaluate.cifar10, "load_cifar10", lambda root: sample)
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save(CNN_Model_2().state_dict(), folder / "weights.pt")
    settings = {"network": "CNN_Model_2", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


def hits(folder, sample, mean, std) -> int:
    model = CNN_Model_2().eval()
    model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    images = (sample.test_images / 255 - np.array(mean)) / np.array(std)
    with torch.inference_mode():
        logits = model(torch.from_numpy(images).float().permute(0, 3, 1, 2))
    return int((logits.argmax(dim=1).numpy() == sample.test_labels).sum())


def test_a_run_is_evaluated_with_its_own_stats(run, sample, capsys):
    status, out, error = call(capsys, run, "--device", "cpu")
    assert status == 0, error
    wanted = hits(run, sample, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    assert f"{wanted / 2:.2f} % of the test set ({wanted} of 200)" in out
    assert out.startswith("CNN_Model_2, ")


def test_bare_weights_need_the_network_and_take_the_stats_of_the_training_set(run, sample, capsys):
    (run / "settings.json").unlink()
    status, _, error = call(capsys, run / "weights.pt")
    assert status == 2
    assert "nothing beside" in error
    status, out, error = call(capsys, run / "weights.pt", "--model", "2", "--device", "cpu")
    assert status == 0, error
    pixels = sample.train_images.reshape(-1, 3) / 255
    wanted = hits(run, sample, pixels.mean(axis=0), pixels.std(axis=0))
    assert f"({wanted} of 200)" in out


def test_refusals_are_one_line(run, capsys, tmp_path):
    for arguments, status, message in (
        ((tmp_path / "nowhere",), 2, "is not there; give a run's folder"),
        ((run, "--model", "1"), 1, "does not hold the weights of CNN_Model_1: conv1.0.weight"),
        ((run, "--device", "tpu"), 2, "no device 'tpu' here"),
        ((run, "--model", "9"), 2, "'9' is neither"),
        ((), 2, "the following arguments are required: weights"),
    ):
        got, _, error = call(capsys, *arguments)
        assert got == status
        assert error.startswith("tools.evaluate: error: ")
        assert message in error
        assert error.count("\n") == 1
