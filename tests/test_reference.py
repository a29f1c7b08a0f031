"""The committed reference runs: their files agree with each other, the README and the weights."""

import csv
import json
from pathlib import Path

import pytest
import torch

from model_2 import CNN_Model_2

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "output" / "reference"
FOLDER = RUNS / "model_2_20_epochs"


@pytest.mark.parametrize("name", ["model_1_20_epochs", "model_2_20_epochs"])
def test_log_results_and_readme_tell_the_same(name):
    results = json.loads((RUNS / name / "results.json").read_text())
    with open(RUNS / name / "log.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert int(last["epoch"]) == results["epochs_done"] == results["epochs_asked"] == 20
    assert float(last["test_acc"]) == results["final_accuracy"] > 85.0
    assert f"{results['final_accuracy']:.2f} %" in (ROOT / "README.md").read_text()


def test_the_log_in_the_readme_is_the_run_s():
    readme = (ROOT / "README.md").read_text()
    for line in (FOLDER / "train.log").read_text().splitlines():
        if line.startswith("Epoch"):
            assert line in readme


def test_weights_recognise_the_sample(sample):
    """200 test images: at 85.75 % of all 10,000, fewer than 158 would be four deviations off."""
    checkpoint = torch.load(FOLDER / "last.pt", weights_only=True)
    model = CNN_Model_2().eval()
    model.load_state_dict(checkpoint["model"])
    images = torch.from_numpy(sample.test_images).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(checkpoint[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        predictions = model((images - mean) / std).argmax(dim=1)
    hits = int((predictions == torch.from_numpy(sample.test_labels).long()).sum())
    assert 158 <= hits <= 190
