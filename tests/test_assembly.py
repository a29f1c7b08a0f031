"""What a run really trains and evaluates with: its parts, caught where train.py hands them over."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import cifar10
import networks
import train
import utils
from support import files
from tests.conftest import SMALL_NETWORK, call_main, run_in


@dataclass
class Epoch:
    """What utils.train was given, and what it saw and did."""

    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    device: utils.Device
    clip_norm: float
    teacher: object
    dropout: list[float]
    loader: object
    batches: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    rates: list[tuple[float, ...]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)  # before the epoch


@dataclass
class Caught:
    epochs: list[Epoch] = field(default_factory=list)
    evaluations: list[tuple] = field(default_factory=list)  # title, loader, device, model's weights


@pytest.fixture
def caught(monkeypatch, no_pictures) -> Caught:
    """Spies on utils.train and utils.evaluate; drawing is left out."""
    found, real_train, real_evaluate = Caught(), utils.train, utils.evaluate

    def spied(
        model, loader, criterion, optimizer, scheduler, scaler, device, clip_norm=0.0, teacher=None
    ) -> utils.Metrics:
        dropout = [part.p for part in model.modules() if isinstance(part, nn.Dropout)]
        epoch = Epoch(criterion, optimizer, device, clip_norm, teacher, dropout, loader)
        epoch.weights = {name: value.clone() for name, value in model.state_dict().items()}
        found.epochs.append(epoch)

        class Watched:
            dataset, sampler = loader.dataset, loader.sampler

            def __iter__(self):
                for batch in loader:
                    epoch.batches.append(batch)
                    epoch.rates.append(tuple(group["lr"] for group in optimizer.param_groups))
                    yield batch

        rest = (criterion, optimizer, scheduler, scaler, device, clip_norm, teacher)
        return real_train(model, Watched(), *rest)

    def watched(model, loader, device, title="test", *team) -> utils.Evaluation:
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        found.evaluations.append((title, loader, device, weights))
        return real_evaluate(model, loader, device, title)

    monkeypatch.setattr(utils, "train", spied)
    monkeypatch.setattr(utils, "evaluate", watched)
    return found


@pytest.fixture
def run(capsys, tmp_path):
    """A dry run of SMALL_NETWORK with these flags; returns its folder."""
    path = tmp_path / "small.py"
    path.write_text(SMALL_NETWORK)

    def dry_run(*flags: object) -> Path:
        output = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        arguments = ["--dry-run", "--model", path, "--output-dir", output, *flags]
        status, _, error = call_main(train.main, capsys, arguments)
        assert status == 0, error
        folder = run_in(output)
        return folder

    return dry_run


def sets(**values: object) -> list[str]:
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def split_of(sample: cifar10.CIFAR10, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices kept and held out, as docs/recipes.md promises: the same for every run and seed."""
    order = np.random.default_rng(0).permutation(len(sample.train_images))
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def images_of(loader) -> np.ndarray:
    """The uint8 images (N, 32, 32, 3) of a batched loader."""
    return loader.dataset.tensors[0].permute(0, 2, 3, 1).numpy()


def test_what_was_asked_for_trains(caught, run):
    options = sets(label_smoothing=0.2, clip_norm=0.7, dropout=0.5, augment=0.4, augment_epochs=75)
    run("--epochs", 3, "--batch-size", 100, *options, *sets(robust=0.36))
    assert len(caught.epochs) == 3
    for epoch in caught.epochs:
        assert epoch.criterion.label_smoothing == 0.2
        assert epoch.clip_norm == 0.7
        assert epoch.dropout == [0.1]  # 0.2 in the network
        assert epoch.teacher is None
        assert [len(labels) for _, labels in epoch.batches] == [100] * 10
        hole = next(step for step in epoch.loader.transform.steps if hasattr(step, "count"))
        assert hole.p == pytest.approx(0.4 * (3 / 75) ** 0.5)
        damage = epoch.loader.transform.steps[-2:]
        assert [type(step).__name__ for step in damage] == ["ImageCompression", "GaussNoise"]
        assert [step.p for step in damage] == pytest.approx([0.284457, 0.105573], rel=1e-5)


@pytest.mark.parametrize(
    ("optimizer", "wanted"),
    [
        ("muon", [(0.05, 0.5, 0.0), (0.3, 0.7, 0.01), (0.3, 0.7, 0.0)]),
        ("sgd", [(0.05, 0.7, 0.01), (0.05, 0.7, 0.0)]),
    ],
)
def test_rates_momenta_and_decay_are_the_recipe_s(optimizer, wanted, caught, run):
    """A group: peak, momentum, weight decay. The rates of all steps: up, then down to zero."""
    options = sets(optimizer=optimizer, other_lr=0.3, momentum=0.7, muon_momentum=0.5, warmup=0.4)
    flags = ("--epochs", 2, "--batch-size", 50, "--lr", 0.05, "--weight-decay", 0.01)
    run(*flags, *options, *sets(div_factor=20.0, schedule="onecycle"))
    groups = caught.epochs[0].optimizer.param_groups
    found = [(group["max_lr"], group["momentum"], group["weight_decay"]) for group in groups]
    assert found == wanted
    rates = np.array([rates for epoch in caught.epochs for rates in epoch.rates])
    steps, top = 40, 0.4 * 41 - 1  # OneCycleLR's own count: a step more, the top a step before
    way = np.interp(np.arange(steps), [0, top, steps], [1 / 20, 1, 0])
    peaks = [peak for peak, _, _ in wanted]
    np.testing.assert_allclose(rates, way[:, None] * peaks, rtol=2e-3, atol=1e-5)


def test_held_out_images_are_never_trained_on(caught, run, sample):
    run("--epochs", 2, "--val-split", 200, "--batch-size", 100)
    kept, out = split_of(sample, 200)
    for epoch in caught.epochs:
        assert np.array_equal(images_of(epoch.loader), sample.train_images[kept])
        labels = torch.cat([labels for _, labels in epoch.batches])
        assert len(labels) == 800
        assert torch.bincount(labels).tolist() == np.bincount(sample.train_labels[kept]).tolist()
    titles = [title for title, *_ in caught.evaluations]
    assert titles == ["val", "val", "test"]
    wanted = [sample.train_images[out]] * 2 + [sample.test_images]
    for (_, loader, _, _), images in zip(caught.evaluations, wanted, strict=True):
        assert np.array_equal(images_of(loader), images)


def test_images_are_normalised_by_what_is_trained_on(caught, run, sample):
    folder = run("--epochs", 1, "--val-split", 300)
    kept, _ = split_of(sample, 300)
    pixels = sample.train_images[kept].reshape(-1, 3) / 255
    settings = json.loads((folder / "settings.json").read_text())
    np.testing.assert_allclose(settings["mean"], pixels.mean(axis=0))
    np.testing.assert_allclose(settings["std"], pixels.std(axis=0))
    for _, loader, _, _ in caught.evaluations:
        images, _ = next(iter(loader))
        raw = images_of(loader)[: len(images)] / 255
        wanted = (raw - pixels.mean(axis=0)) / pixels.std(axis=0)
        np.testing.assert_allclose(images.permute(0, 2, 3, 1), wanted, atol=1e-4)


def test_evaluation_is_in_float32_and_of_the_weights_that_are_saved(
    caught, run, monkeypatch, tmp_path
):
    reduced = utils.Device(torch.device("cpu"), torch.bfloat16, torch.channels_last)
    monkeypatch.setattr(utils.Device, "pick", lambda _=None: reduced)
    folder = run("--epochs", 2)
    assert {epoch.device.dtype for epoch in caught.epochs} == {torch.bfloat16}
    for _, loader, _, _ in caught.evaluations:
        assert next(iter(loader))[0].dtype == torch.float32
    *_, (_, loader, _, weights) = caught.evaluations
    model = networks.load_network(str(tmp_path / "small.py")).build().eval()
    model.load_state_dict(files.read_checkpoint(folder / "weights.pt"))
    for name, value in model.state_dict().items():
        assert torch.equal(weights[name], value)
    with torch.inference_mode():
        logits = torch.cat([model(images.contiguous()) for images, _ in loader])
    loss = nn.functional.cross_entropy(logits, loader.dataset.tensors[1]).item()
    # bf16 would be off in the third digit.
    results = json.loads((folder / "results.json").read_text())
    assert results["final_loss"] == pytest.approx(loss, rel=1e-6)


def test_seed_and_shuffle_without_augmentation(caught, run, monkeypatch, sample):
    """Plain images: what differs between batches is their order alone."""
    plain = utils.test_transform
    for name in utils.TRANSFORMS:
        monkeypatch.setitem(utils.TRANSFORMS, name, lambda mean, std, _: plain(mean, std))
    run("--epochs", 2, "--seed", 3)
    run("--epochs", 1, "--seed", 3)
    run("--epochs", 1, "--seed", 4)
    first, second, again, other = (
        torch.cat([labels for _, labels in epoch.batches]) for epoch in caught.epochs
    )
    assert torch.equal(first, again)
    unshuffled = torch.from_numpy(sample.train_labels).long()
    for order in (second, other, unshuffled):
        assert not torch.equal(first, order)
        assert torch.equal(first.sort()[0], order.sort()[0])
    start, _, same, others = (epoch.weights["linear.weight"] for epoch in caught.epochs)
    assert torch.equal(start, same)
    assert not torch.equal(start, others)


def test_a_teacher_teaches_with_its_share_and_temperature(caught, run):
    taught_by = run("--epochs", 1)
    plain, settings = caught.epochs[-1].criterion, {"teacher_weight": 0.6, "teacher_temperature": 2}
    run("--epochs", 1, *sets(teacher=taught_by, label_smoothing=0.1, **settings))
    mixture, teacher = caught.epochs[-1].criterion, caught.epochs[-1].teacher
    assert isinstance(plain, nn.CrossEntropyLoss)
    assert (mixture.weight, mixture.temperature) == (0.6, 2)
    assert mixture.criterion.label_smoothing == 0.1
    assert not teacher.network.training
    for name, value in files.read_checkpoint(taught_by / "weights.pt").items():
        assert torch.equal(teacher.network.state_dict()[name], value)


# ---------------------------------------------------------------- which epoch is which


@pytest.fixture
def scripted(monkeypatch):
    """Evaluations find these accuracies, one after the other."""
    real, script = utils.evaluate, []

    def found(model, loader, device, title="test", *team) -> utils.Evaluation:
        result = real(model, loader, device, title)
        return result._replace(accuracy=script.pop(0))

    monkeypatch.setattr(utils, "evaluate", found)
    return script


@pytest.mark.parametrize("held_out", [(), ("--val-split", 100)])
def test_an_early_best_and_the_final_weights_are_told_apart(held_out, caught, scripted, run):
    scripted[:] = [30.0, 50.0, 40.0] + ([70.0] if held_out else [])
    folder = run("--epochs", 3, *held_out)
    assert scripted == []
    results = json.loads((folder / "results.json").read_text())
    assert (results["best_accuracy"], results["best_epoch"]) == (50.0, 2)
    assert results["last_accuracy"] == 40.0
    assert results["final_accuracy"] == (70.0 if held_out else 40.0)
    assert results["evaluated"] == "test"
    best, last = (files.read_checkpoint(folder / f"{name}.pt") for name in ("best", "last"))
    assert (best["epoch"], last["epoch"]) == (2, 3)
    for name, value in caught.epochs[2].weights.items():  # as the third epoch found them
        assert torch.equal(best["model"][name], value)
        if value.is_floating_point() and "running" not in name:
            assert not torch.equal(last["model"][name], value)


@pytest.mark.parametrize("held_out", [(), ("--val-split", 100)])
def test_a_run_stopped_in_mid_epoch_reports_the_last_whole_one(
    held_out, caught, run, monkeypatch, capsys, tmp_path, sample
):
    spied, calls = utils.train, []

    def stopped(model, loader, *rest):
        calls.append(1)
        metrics = spied(model, loader, *rest)
        if len(calls) == 3:  # all of its steps were done, and it does not count
            raise KeyboardInterrupt
        return metrics

    monkeypatch.setattr(utils, "train", stopped)
    path = tmp_path / "small.py"
    arguments = ["--dry-run", "--model", path, "--epochs", 4, "--output-dir", tmp_path / "cut"]
    status, _, _ = call_main(train.main, capsys, [*arguments, *held_out])
    assert status == 130
    folder = run_in(tmp_path / "cut")
    results = json.loads((folder / "results.json").read_text())
    title, loader, _, weights = caught.evaluations[-1]
    assert title == results["evaluated"] == ("val" if held_out else "test")
    images = sample.train_images[split_of(sample, 100)[1]] if held_out else sample.test_images
    assert np.array_equal(images_of(loader), images)
    for name, value in caught.epochs[2].weights.items():
        assert torch.equal(weights[name], value)
    assert results["final_accuracy"] == results["last_accuracy"]
