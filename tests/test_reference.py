"""The committed reference run: its files agree with each other and with its weights."""

import csv
import json
from pathlib import Path

import torch

from model_2 import CNN_Model_2

FOLDER = Path(__file__).parents[1] / "output" / "reference" / "model_2_20_epochs"


def test_log_results_and_readme_tell_the_same():
    results = json.loads((FOLDER / "results.json").read_text())
    with open(FOLDER / "log.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert int(last["epoch"]) == results["epochs_done"] == results["epochs_asked"] == 20
    assert float(last["test_acc"]) == results["final_accuracy"] > 85.0
    readme = (FOLDER.parents[2] / "README.md").read_text()
    assert f"{results['final_accuracy']:.2f} %" in readme
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
