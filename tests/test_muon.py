"""Muon against the singular value decomposition, torch's SGD, and torch's own Muon."""

import copy

import pytest
import torch
from torch import nn

import recipes
from fast import muon
from model_1 import CNN_Model_1
from model_2 import CNN_Model_2
from model_3 import CNN_Model_3


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 16, 27), (3, 128, 864), (2, 96, 48), (4, 2, 18)])
def test_orthogonalize_keeps_the_directions_and_evens_out_the_singular_values(shape):
    matrices = random(*shape)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    u2, after, v2 = torch.linalg.svd(muon.orthogonalize(matrices, steps=5), full_matrices=False)
    assert after.max() < 1.3
    assert after.min() > 0.5
    # U V' is the nearest orthogonal matrix; the result lies close to it.
    torch.testing.assert_close(u2 @ v2, u @ v, atol=2e-4, rtol=0)


def test_orthogonalize_against_torchs_own_muon():
    """One step of torch.optim.Muon on a matrix is -lr times the same five-step quintic."""
    weight = nn.Parameter(torch.zeros(24, 60))
    weight.grad = random(24, 60)
    torch.optim.Muon(
        [weight], lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0, ns_steps=5
    ).step()  # computes in bfloat16
    wanted = muon.orthogonalize(weight.grad[None], steps=5)[0]
    torch.testing.assert_close(-weight.detach(), wanted, atol=0.03, rtol=0)


def test_a_gradient_of_zeros_moves_nothing():
    assert torch.equal(muon.orthogonalize(torch.zeros(1, 4, 9)), torch.zeros(1, 4, 9))


@pytest.mark.parametrize("network", [CNN_Model_1, CNN_Model_2, CNN_Model_3])
def test_every_parameter_is_trained_once_and_every_filter_by_muon(network):
    model = network()
    optimizer = muon.Muon(model, 0.04, 0.06)
    trained = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in model.parameters())
    for group in optimizer.param_groups:
        assert all((p.ndim == 4) == (group["channel_groups"] > 0) for p in group["params"])
        assert all((group["lr"] == 0.04) == (p.ndim == 4) for p in group["params"])


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_filters_step_as_a_plain_computation_does(groups):
    """Three steps on random gradients, each group of channels as a matrix through the SVD."""
    layer = nn.Conv2d(8, 8, 3, groups=groups, bias=False)
    optimizer = muon.Muon(layer, lr=0.1, other_lr=1.0, momentum=0.6)
    weight, buffer = layer.weight.detach().clone(), torch.zeros_like(layer.weight)
    for number in range(3):
        gradient = random(*layer.weight.shape, seed=number)
        layer.weight.grad = gradient.clone()
        optimizer.step()
        buffer = 0.6 * buffer + gradient
        update = gradient + 0.6 * buffer
        parts = []
        for part, matrix in zip(weight.chunk(groups), update.chunk(groups), strict=True):
            matrix = matrix.flatten(1)
            if groups == 8:
                step = matrix / matrix.norm()
            else:  # the polynomial acts on the singular values alone
                u, s, v = torch.linalg.svd(matrix, full_matrices=False)
                s = s / matrix.norm()
                for _ in range(3):
                    s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
                step = u @ torch.diag(s) @ v
            moved = part - 0.1 * step.view(part.shape)
            parts.append(moved * len(part) ** 0.5 / moved.norm())
        weight = torch.cat(parts)
        torch.testing.assert_close(layer.weight.detach(), weight, atol=1e-5, rtol=1e-4)


def test_the_rest_steps_as_torchs_sgd_does():
    ours = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4))
    theirs = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4))
    theirs.load_state_dict(ours.state_dict())
    optimizer = muon.Muon(ours, lr=1.0, other_lr=0.06, other_momentum=0.9, weight_decay=0.01)
    sgd = torch.optim.SGD(
        [
            {"params": [theirs[1].weight], "weight_decay": 0.01},
            {"params": [*theirs[0].parameters(), theirs[1].bias]},
        ],
        lr=0.06,
        momentum=0.9,
        nesterov=True,
    )
    for seed in range(4):
        for model, stepper in ((ours, optimizer), (theirs, sgd)):
            stepper.zero_grad()
            model(random(5, 6, seed=seed)).square().sum().backward()
            stepper.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_the_state_continues_where_it_was_saved(sample):
    recipe = recipes.Recipe("muon", 0.04, 5e-4, "onecycle", 8, 85.0, 70)

    def steps(model, optimizer, count):
        for seed in range(count):
            optimizer.zero_grad()
            model(random(4, 3, 32, 32, seed=seed)).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    model = CNN_Model_2()
    optimizer = recipes.make_optimizer(model, recipe)
    steps(model, optimizer, 1)
    twin = CNN_Model_2()
    twin.load_state_dict(model.state_dict())
    resumed = recipes.make_optimizer(twin, recipe)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, 2)
    steps(twin, resumed, 2)
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, other)
