"""All that train.py trains and evaluates with, on the GPU it is given: on an imagined one.

Fake tensors know their device and refuse to meet others. Nothing but the backward pass is left out:
in its place every parameter gets a gradient where the parameter lies.
"""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import networks
import recipes
import utils
from fast import batched
from fast.muon import Muon
from support import teachers
from support.launches import imagined_gpu

NETWORKS = (
    *("1", "2", "3"),
    *(f"baselines/{name}.py" for name in ("c1c2c3c4", "cifarnet", "dilated_cnn", "resnet")),
)
IMAGES, BATCH = 13, 8  # two batches; the second finds momenta, and is of another size


class Backward:
    """A GradScaler that passes over the backward pass: it wants a driver."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def scale(self, loss: Tensor) -> "Backward":
        assert loss.is_cuda
        return self

    def backward(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.empty_like(parameter)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()

    def update(self) -> None:
        pass


class FromTheCPU(list):
    """A loader whose batches lie on the CPU, as those of worker processes do."""

    dataset = range(IMAGES)
    sampler = utils.BatchSampler(IMAGES, BATCH, shuffle=False)


@pytest.fixture(autouse=True)
def sums(monkeypatch) -> list[Tensor]:
    """A meter's sums, which cannot be read here, each time that they would be."""
    seen = []

    def read(meter: utils.Meter) -> utils.Metrics:
        if meter.title == "train":  # an evaluation adds up on the CPU what it has gathered
            seen.append(meter.sums)
        return utils.Metrics(0.0, 0.0)

    monkeypatch.setattr(utils.Meter, "read", read)
    return seen


def epoch(
    network: networks.Network,
    recipe: recipes.Recipe,
    sample,
    sums: list[Tensor],
    teacher: networks.Network | None = None,
    from_the_cpu: bool = False,
) -> None:
    """Trains and evaluates as train.py does."""
    images, labels = sample.train_images[:IMAGES], sample.train_labels[:IMAGES]
    mean, std = utils.channel_stats(images)
    augment, plain = recipe.train_transform(mean, std, 10), utils.test_transform(mean, std)
    model, taught_by = network.build(), teacher and teacher.build().eval()
    with imagined_gpu() as device:
        device = network.fitting(device)
        loader = utils.make_loader(images, labels, augment, BATCH, device, shuffle=True)
        tests = utils.make_loader(images, labels, plain, BATCH, device.exact)
        if from_the_cpu:
            batch = torch.zeros(BATCH, 3, 32, 32), torch.zeros(BATCH, dtype=torch.int64)
            tests = FromTheCPU([batch] * 2)
            loader = FromTheCPU([(batch[0].to(device.dtype), batch[1])] * 2)
        model = networks.prepare(model, device, recipe)
        if teacher is not None:
            taught_by = networks.Teacher(networks.prepare(taught_by, device), device, 0)
        criterion = teachers.make_criterion(recipe)
        optimizer = recipes.make_optimizer(model, recipe, device.dtype)
        scheduler = recipes.make_scheduler(optimizer, recipe, len(loader))
        rest = (criterion, optimizer, scheduler, Backward(model), device, recipe.clip_norm)
        utils.train(model, loader, *rest, taught_by)
        evaluation = utils.evaluate(model, tests, device)
    states = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    assert len(states) >= len(list(model.parameters()))
    for tensor in (*model.parameters(), *model.buffers(), *states, *sums):
        assert tensor.is_cuda
    assert sums
    # The pictures are drawn from these.
    assert evaluation.logits.device == evaluation.labels.device == torch.device("cpu")


@pytest.mark.parametrize("choice", NETWORKS)
def test_a_training_stays_on_its_device(choice, sample, sums):
    network = networks.load_network(choice)
    epoch(network, network.recipe, sample, sums)


def test_all_three_optimizers_are_among_them():
    found = {networks.load_network(choice).recipe.optimizer for choice in NETWORKS}
    assert found | {networks.load_network("2").published.optimizer} == {"muon", "sgd", "adamw"}


def test_so_does_one_by_adamw(sample, sums):
    network = networks.load_network("2")
    epoch(network, network.published, sample, sums)


def test_so_does_one_with_a_teacher(sample, sums):
    network = networks.load_network("3")
    recipe = dataclasses.replace(network.recipe, teacher="a run's folder")
    epoch(network, recipe, sample, sums, networks.load_network("2"))


def test_batches_of_worker_processes_are_brought_there(sample, sums):
    network = networks.load_network("2")
    epoch(network, network.recipe, sample, sums, from_the_cpu=True)


def test_the_batched_loader_s_batches_are_there_in_its_format_and_layout(sample):
    transform = utils.TRANSFORMS["crop_affine_jitter"](*utils.channel_stats(sample.train_images))
    with imagined_gpu() as device:
        loader = utils.make_loader(
            sample.train_images[:9], sample.train_labels[:9], transform, 4, device, shuffle=True
        )
        batches = list(loader)
    assert [len(labels) for _, labels in batches] == [4, 5]
    for images, labels in batches:
        assert images.is_cuda
        assert labels.is_cuda
        assert images.dtype == torch.bfloat16
        assert images.is_contiguous(memory_format=torch.channels_last)


def forgets_the_labels(monkeypatch) -> None:
    take = utils.Device.take
    monkeypatch.setattr(utils.Device, "take", lambda *all: (take(*all)[0], all[2]))


def forgets_the_images(monkeypatch) -> None:
    take = utils.Device.take
    monkeypatch.setattr(utils.Device, "take", lambda *all: (all[1], take(*all)[1]))


def forgets_the_sums(monkeypatch) -> None:
    update = utils.Meter.update

    def forgetful(meter: utils.Meter, *batch: Tensor) -> None:
        meter.sums = torch.zeros(2, dtype=torch.float64)
        update(meter, *batch)

    monkeypatch.setattr(utils.Meter, "update", forgetful)


def forgets_the_weights(monkeypatch) -> None:
    monkeypatch.setattr(networks, "prepare", lambda model, *_: model)


def forgets_the_momenta(monkeypatch) -> None:
    def buffers(optimizer: Muon, parameters: list[Tensor]) -> list[Tensor]:
        made = [torch.zeros(parameter.shape) for parameter in parameters]
        for parameter, buffer in zip(parameters, made, strict=True):
            optimizer.state[parameter]["momentum_buffer"] = buffer
        return made

    monkeypatch.setattr(Muon, "_buffers", buffers)


def forgets_the_mean_and_std(monkeypatch) -> None:
    real = batched.per_channel

    def per_channel(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
        return real(values, dtype, torch.device("cpu"))

    per_channel.cache_clear = real.cache_clear
    monkeypatch.setattr(batched, "per_channel", per_channel)


@pytest.mark.parametrize(
    "forgets",
    [
        *(forgets_the_labels, forgets_the_images, forgets_the_sums, forgets_the_weights),
        *(forgets_the_momenta, forgets_the_mean_and_std),
    ],
)
def test_what_is_left_behind_is_noticed(forgets, sample, sums, monkeypatch):
    network = networks.load_network("2")
    from_the_cpu = forgets in (forgets_the_labels, forgets_the_images)
    forgets(monkeypatch)
    with pytest.raises(RuntimeError, match="cpu"):
        epoch(network, network.recipe, sample, sums, from_the_cpu=from_the_cpu)
