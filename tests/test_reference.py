"""The committed reference runs: their files agree with each other, the README and the weights."""

import csv
import json
import statistics
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import networks
import recipes
import utils
from tools import compare

ROOT = Path(__file__).parents[1]
RUNS = compare.find_runs([compare.REFERENCE])
# The ways of tools.bench, as the tables call them.
WAYS = {
    "usual": "the usual way, Albumentations image by image",
    "torchvision": "torchvision's crop and flip, two workers",
    "whole_batch": "whole batches on the device, bf16, plain SGD",
    "ours": "**ours**",
}
every = pytest.mark.parametrize("folder", RUNS, ids=lambda folder: folder.name)


def network_of(settings: dict) -> networks.Network:
    choice = compare.NETWORKS[settings["network"]]
    return networks.load_network(str(ROOT / choice) if choice.endswith(".py") else choice)


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def test_every_network_has_its_run_and_its_20_epoch_default():
    names = {folder.name for folder in RUNS}
    for number in (1, 2, 3):
        assert f"model_{number}" in names
        assert {f"model_{number}", f"model_{number}_20_epochs"} & {
            folder.name for folder in RUNS if read(folder, "settings.json")["epochs"] == 20
        }


def test_weights_lie_beside_every_run_but_the_large_network_s():
    for folder in RUNS:
        small = read(folder, "settings.json")["parameters"] < 3_000_000
        assert (folder / "weights.pt").is_file() == small


@every
def test_log_results_and_readme_tell_the_same(folder):
    results, settings = read(folder, "results.json"), read(folder, "settings.json")
    with open(folder / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert results["completed"] is True
    assert len(rows) == results["epochs_done"] == results["epochs_asked"] == settings["epochs"]
    assert float(rows[-1]["test_acc"]) == results["final_accuracy"]
    for name in ("curves", "confusion_matrix", "class_accuracy", "misclassified", "augmentations"):
        assert (folder / f"{name}.png").is_file()


@every
def test_the_readme_and_the_network_s_file_tell_the_runs_accuracy(folder):
    """That of one run, or mean and deviation of those that differ in their seed alone."""
    settings = read(folder, "settings.json")
    same = ("network", "epochs", "recipe_name", "recipe")
    alike = [
        run for run in RUNS if all(read(run, "settings.json")[key] == settings[key] for key in same)
    ]
    first, *seeds = sorted(read(run, "settings.json")["seed"] for run in alike)
    finals = [read(run, "results.json")["final_accuracy"] for run in alike]
    accuracy = f"{statistics.mean(finals):.2f}"
    if seeds:
        accuracy += f" ± {statistics.stdev(finals):.2f}"
    choice, epochs = compare.NETWORKS[settings["network"]], settings["epochs"]
    published = " --recipe published" if settings["recipe_name"] == "published" else ""
    flags = published + "".join(
        f" --set {key}={value}" for key, value in settings["arguments"]["set"]
    )
    command = f"`python train.py --model {choice} --epochs {epochs} --seed {first}{flags}`"
    if seeds:
        command += f", seeds {', '.join(map(str, [first, *seeds]))}"
    readme = (ROOT / "README.md").read_text()
    line = next(line for line in readme.splitlines() if command in line and line.startswith("|"))
    assert f"{accuracy} %" in line
    file = choice if choice.endswith(".py") else f"model_{choice}.py"
    code = " ".join((ROOT / file).read_text().split())  # wherever its lines break
    assert f"{accuracy} % after {epochs} epochs{compare.changes(settings)}" in code


@every
def test_the_recipe_is_the_committed_one(folder):
    settings = read(folder, "settings.json")
    network = network_of(settings)
    recipe = recipes.Recipe.from_dict(settings["recipe"])
    committed = network.published if settings["recipe_name"] == "published" else network.recipe
    assert recipe == replace(committed, **dict(settings["arguments"]["set"]))
    assert settings["parameters"] == network.parameters
    assert settings["augmentation"] == recipe.augmentation(settings["epochs"])


def test_the_log_in_the_readme_is_the_run_s():
    readme = (ROOT / "README.md").read_text()
    log = (ROOT / "output" / "reference" / "model_2_20_epochs" / "train.log").read_text()
    for line in log.splitlines():
        if line.startswith("Epoch"):
            assert line in readme


def test_speeds_in_readme_and_docs_are_the_bench_s():
    """Every figure of their tables, as tools.bench saved it, to the last digit shown."""
    benches = [
        read(compare.REFERENCE / f"bench_model_{number}_cpu", "bench.json") for number in "123"
    ]
    texts = {
        name: (ROOT / name).read_text().splitlines() for name in ("README.md", "docs/speed.md")
    }

    def row(beginning: str, name: str) -> list[str]:
        line = next(line for line in texts[name] if line.startswith(f"| {beginning} |"))
        return [cell.strip() for cell in line.split("|")[2:-1]]

    for name in texts:
        for way, title in WAYS.items():
            cells = row(title, name)
            for cell, bench in zip(cells, benches, strict=True):
                speed = bench["images_per_second"][way]
                assert f"{speed['median']:,.0f}" in cell
                if way != "ours":
                    assert f"{bench['times_faster'][way]['median']:.1f}x" in cell
        cells = row("share of the matrix product's rate", name)
        for cell, bench in zip(cells, benches, strict=True):
            assert f"{bench['share_percent']['median']:.1f} %" in cell
    for way, title in WAYS.items():
        for cell, bench in zip(row(title, "docs/speed.md"), benches, strict=True):
            speed = bench["images_per_second"][way]
            assert f"{speed['min']:,.0f} to {speed['max']:,.0f}" in cell


def hits(network: torch.nn.Module, images: np.ndarray, labels: np.ndarray, settings: dict) -> int:
    mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("mean", "std"))
    planar = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        predictions = network((planar - mean) / std).argmax(dim=1)
    return int((predictions == torch.from_numpy(labels).long()).sum())


@pytest.mark.parametrize(
    "folder", [run for run in RUNS if (run / "weights.pt").is_file()], ids=lambda run: run.name
)
def test_weights_recognise_the_sample(folder, sample):
    """200 test images, of which the network is right on as many as its accuracy says, +-4 sigma."""
    settings = read(folder, "settings.json")
    share = read(folder, "results.json")["final_accuracy"] / 100
    network = network_of(settings).build().eval()
    network.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    found = hits(network, sample.test_images, sample.test_labels, settings)
    assert abs(found - 200 * share) <= 4 * (200 * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("name", utils.PRETRAINED)
def test_pretrained_networks_are_ready_for_inference(name, sample):
    network, transform = utils.load_pretrained(name)
    assert not network.training
    tensors = torch.stack([transform(image=image)["image"] for image in sample.test_images])
    with torch.inference_mode():
        predictions = network(tensors).argmax(dim=1)
    found = int((predictions == torch.from_numpy(sample.test_labels).long()).sum())
    settings = read(ROOT / "output" / "reference" / name, "settings.json")
    assert found == hits(network, sample.test_images, sample.test_labels, settings)


def test_no_tracked_file_holds_a_path_of_somebody_s_machine():
    """Paths in settings are relative to the repository; a log's are where they were."""
    found = subprocess.run(
        ["git", "grep", "-nIE", r"(^|[\"' =:(])/(tmp|work|root|home|Users|mnt)/", "--", ".",
         ":!tests", ":!.ci"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode in (0, 1), found.stderr
    assert found.stdout == ""


@every
def test_runs_name_their_model_file_in_the_repository(folder):
    settings = read(folder, "settings.json")
    for name in (settings["model_file"], settings["arguments"]["model"]):
        assert (ROOT / name).is_file()
    for name in ("data_dir", "output_dir"):
        assert not Path(settings["arguments"][name]).is_absolute()
    assert settings["model_sha256"] == networks.code_digest(ROOT / settings["model_file"])
