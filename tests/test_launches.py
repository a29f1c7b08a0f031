"""The count of launched operations: by hand, between the CPU and the imagined GPU, and held."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import networks
import recipes
import utils
from fast import batched
from support import launches
from support.launches import Launches, imagined_gpu

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


def count(function, *arguments: object) -> int:
    with Launches() as counted:
        function(*arguments)
    return counted.total


X, Y = torch.ones(4, 6), torch.ones(4, 6)
COLUMN = torch.ones(6, 1)
ROW, NUMBER, EXACT, TURNED = torch.ones(6), torch.ones(()), Y.double(), torch.ones(6, 4).T


@pytest.mark.parametrize(
    ("function", "operations"),
    [
        (lambda: X + Y, 1),
        (lambda: X.view(6, 4).T[1:].unsqueeze(0).detach(), 0),
        (lambda: torch.empty_like(X).reshape(24), 0),
        (lambda: X.T.reshape(24), 1),  # a copy
        (lambda: torch.zeros(3), 1),
        (lambda: X.clone().mul_(2), 2),
        (lambda: X.bfloat16().to(torch.float32), 2),
        (lambda: X.float(), 0),
        (lambda: (X @ Y.T).sum().item(), 3),  # the last one waits for the sum
        (lambda: torch._foreach_add([X, Y, ROW], 1.0), 1),
        (lambda: torch._foreach_add([X, Y], [Y, X]), 1),
        (lambda: torch._foreach_add([X, ROW], [Y, NUMBER]), 2),
        (lambda: torch._foreach_add([X, Y, X], [Y, X, EXACT]), 3),
        (lambda: torch._foreach_add([X, Y], [Y, TURNED]), 2),
        (lambda: torch._foreach_mul([X[:, :3], Y[:, 3:]], 2.0), 2),  # gaps
        (lambda: torch._foreach_copy_([X, Y], [EXACT, EXACT]), 1),
        # A length of 1 has no stride that would count.
        (lambda: torch._foreach_add([X[:1].T, X[:1].T], [COLUMN, COLUMN]), 1),
    ],
)
def test_a_few_operations_counted_by_hand(function, operations):
    assert count(function) == operations


def test_a_small_step_counted_by_hand():
    """Forward: addmm, relu; backward: a first 1, two of the loss, relu, mm for the weight, sum."""
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)

    def step() -> None:
        logits = torch.relu(model(X))
        nn.functional.cross_entropy(logits, torch.zeros(4, dtype=torch.int64)).backward()
        optimizer.step()

    labels, loss, fused_optimizer = 1, 2, 1
    forward, backward = 2, 1 + 2 + 1 + 1 + 1
    assert count(step) == labels + forward + loss + backward + fused_optimizer


# Augmentation, optimizer, and all together, of a step of 256 images, at most; docs/speed.md says
# how many there were before batches were augmented and filters orthogonalised together.
MOST = {"1": (8, 160, 300), "2": (8, 135, 260), "3": (13, 120, 330)}


@pytest.mark.parametrize("choice", MOST)
def test_a_step_launches_few_operations(choice):
    network = networks.load_network(choice)
    assert network.recipe.batch_size == 256
    counts = launches.of_a_step(network)
    assert list(counts) == ["augmentation", "forward and backward", "optimizer"]
    augmentation, optimizer, together = MOST[choice]
    assert 4 < counts["augmentation"] <= augmentation
    assert 50 < counts["optimizer"] <= optimizer
    assert sum(counts.values()) <= together
    layers = sum(isinstance(module, nn.Conv2d) for module in network.build().modules())
    # At least a convolution, a BatchNorm and a ReLU, forward and backward.
    assert counts["forward and backward"] > 6 * layers


@pytest.mark.parametrize("choice", ["1", "2", "3", "baselines/dilated_cnn.py"])
def test_a_gpu_s_forward_pass_and_optimizer_are_as_many_operations_as_the_cpu_s(choice):
    """What of_a_step counts on the CPU."""
    network = networks.load_network(choice)

    def operations(model: nn.Module, device: utils.Device) -> tuple[int, int]:
        model = model.to(device.where, memory_format=device.layout)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        images = torch.zeros(2, 3, 32, 32).to(
            device.where, device.dtype, memory_format=device.layout
        )
        optimizer = recipes.make_optimizer(model, network.recipe, device.dtype)
        with Launches() as forward, device.autocast():
            model(images)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()  # makes the momenta
        return forward.total, count(optimizer.step)

    some, other = network.build(), network.build()
    with imagined_gpu() as gpu:
        there = operations(some, gpu)
    assert there == operations(other, utils.Device(CPU, gpu.dtype, gpu.layout))


def test_a_dropout_is_one_operation_to_a_gpu_and_three_to_the_cpu():
    dropout = nn.Dropout(0.5)
    assert count(dropout, X) == 3
    with imagined_gpu():
        assert count(dropout, torch.ones(4, 6, device="cuda")) == 1


def test_an_augmentation_of_worker_processes_launches_nothing(monkeypatch):
    def unknown(*_: object) -> None:
        raise batched.UnknownTransformError("of somebody's own")

    monkeypatch.setattr(batched.BatchedTransform, "from_compose", unknown)
    assert launches._of_augmentation(networks.load_network("2").recipe) == 0


# ---------------------------------------------------------------- the imagined GPU


def mix_in_a_fused_optimizer() -> None:
    weight = torch.ones(3, device="cuda")
    rates = dict(weight_decay=0.0, momentum=0.9, lr=0.1, dampening=0.0, nesterov=True)
    rates |= dict(maximize=False, is_first_step=False)
    torch._fused_sgd_([weight], [weight], [torch.ones(3)], **rates)


@pytest.mark.parametrize(
    "mix",
    [
        lambda: torch.ones(3, device="cuda") + torch.ones(3),
        lambda: torch.ones(3, device="cuda").mul_(torch.ones(3)),
        lambda: torch.ones(3, device="cuda")[torch.tensor([0, 2])],
        lambda: torch.stack([torch.ones((), device="cuda"), torch.ones(())]),
        lambda: torch._foreach_add_([torch.ones(3)], [torch.ones(3, device="cuda")]),
        lambda: torch.rand(3, generator=torch.Generator("cpu"), device="cuda"),
        mix_in_a_fused_optimizer,
    ],
)
def test_an_imagined_gpu_refuses_to_mix_devices(mix):
    with imagined_gpu(), pytest.raises(RuntimeError, match=r"cuda.* on cpu|cpu and cuda"):
        mix()


def test_an_imagined_gpu_copies():
    with imagined_gpu() as device:
        there = torch.from_numpy(np.ones(3)).to(device.where)
        there.copy_(torch.ones(3))
        assert (2.0 * there).device.type == "cuda"
        assert there.cpu().device == CPU


def test_nothing_of_an_imagined_gpu_stays():
    """A CPU's augmentation after one, and random numbers."""
    recipe = networks.load_network("3").recipe
    launches._of_augmentation(recipe)
    generator = torch.Generator().manual_seed(1)
    assert torch.rand(2, generator=generator).tolist()
    assert batched.per_channel((1.0, 2.0, 3.0), torch.float32, CPU).tolist()
    assert batched.per_channel.cache_info().currsize == 1


def test_processes_forked_after_an_imagined_gpu_train():
    """In a process of its own, whose first backward pass comes after it."""
    code = (
        "import os, torch\n"
        "from support.launches import imagined_gpu\n"
        "with imagined_gpu():\n"
        "    pass\n"
        "backward = torch.ones(3, requires_grad=True).sum().backward\n"
        "backward(retain_graph=True)\n"
        "if number := os.fork():\n"
        "    status = os.waitpid(number, 0)[1]\n"
        "    raise SystemExit(os.waitstatus_to_exitcode(status))\n"
        "backward()\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
