"""Muon against its plain form, the singular value decomposition, torch's SGD and torch's Muon."""

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


class Plain(muon.Muon):
    """The same, a parameter after the other and an operation after the other."""

    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    with torch.no_grad():
                        self.move(parameter, group)

    def move(self, parameter: torch.Tensor, group: dict) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        if not group["channel_groups"]:
            gradient = gradient + group["weight_decay"] * parameter
        before = state.get("momentum_buffer", torch.zeros_like(parameter))
        state["momentum_buffer"] = group["momentum"] * before + gradient
        update = gradient + group["momentum"] * state["momentum_buffer"]
        if not group["channel_groups"]:
            parameter -= group["lr"] * update
            return
        for matrix, change in zip(
            parameter.chunk(group["channel_groups"]),
            update.chunk(group["channel_groups"]),
            strict=True,
        ):
            step = self.orthogonal(change.reshape(len(change), -1)).view(change.shape)
            matrix -= group["lr"] * step
            matrix *= len(matrix) ** 0.5 / (matrix.norm() + 1e-7)

    def orthogonal(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) == 1:
            return x / (x.norm() + 1e-7)
        x = x.to(self.dtype)
        x = x / (x.norm() + 1e-7)
        for _ in range(3):
            square = x @ x.T
            x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
        return x.float()


class Mixed(nn.Module):
    """Filters of one shape and of several, in groups, single rows; biases; what is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Sequential(*(nn.Conv2d(8, 8, 3, bias=number == 1) for number in range(3)))
        self.others = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 6, 1), nn.Conv2d(8, 8, (3, 1))
        )
        self.grouped = nn.Sequential(*(nn.Conv2d(8, 8, 3, groups=4) for _ in range(2)))
        self.depthwise = nn.Sequential(*(nn.Conv2d(8, 8, 3, groups=8) for _ in range(2)))
        self.wide = nn.Conv2d(8, 16, 3, groups=8)  # as many groups, two rows each
        self.norm, self.linear = nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.frozen, self.unused = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.frozen.requires_grad_(False)


def pair(build, layout=torch.contiguous_format, dtype=torch.float32) -> list[tuple]:
    """[model and its optimizer, ...], ours and the plain one, from the same weights."""
    torch.manual_seed(1)
    model = build().to(memory_format=layout)
    rest = (0.1, 0.2, 0.6, 0.8, 0.3, dtype)
    return [
        (each, kind(each, *rest))
        for each, kind in ((model, muon.Muon), (copy.deepcopy(model), Plain))
    ]


def give_gradients(model: nn.Module, seed: int) -> None:
    """Random ones in the weights' layout; none for what is frozen or unused."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.requires_grad and "unused" not in name:
            parameter.grad = torch.empty_like(parameter).copy_(drawn)


@pytest.mark.parametrize(
    ("build", "layout"),
    [(Mixed, torch.contiguous_format)]
    + [(each, torch.channels_last) for each in (Mixed, CNN_Model_1, CNN_Model_2, CNN_Model_3)],
)
def test_weights_and_momenta_are_those_of_the_plain_form(build, layout):
    """Over three steps, in which a schedule moves the rates of every group in its own way."""
    (ours, fast), (theirs, plain) = pair(build, layout)
    before = copy.deepcopy(theirs.state_dict())
    for number in range(3):
        for place, groups in enumerate(zip(fast.param_groups, plain.param_groups, strict=True)):
            for group in groups:
                group["lr"] *= 1 - 0.1 * place
        for model, optimizer in ((ours, fast), (theirs, plain)):
            give_gradients(model, number)
            optimizer.step()
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=2e-6)
    momenta, wanted = fast.state_dict()["state"], plain.state_dict()["state"]
    torch.testing.assert_close(momenta, wanted, rtol=1e-5, atol=1e-6)
    moved = {name for name, value in ours.state_dict().items() if not value.equal(before[name])}
    assert moved == {
        name for name, _ in ours.named_parameters() if not name.startswith(("frozen", "unused"))
    }


@pytest.mark.parametrize("network", [CNN_Model_2, CNN_Model_3])
def test_in_bf16_it_is_as_near_to_float32_as_the_plain_form(network):
    _, (exact, plain) = pair(network)
    give_gradients(exact, 0)
    plain.step()
    distances = []
    for model, optimizer in pair(network, dtype=torch.bfloat16):
        give_gradients(model, 0)
        optimizer.step()
        couples = zip(model.parameters(), exact.parameters(), strict=True)
        distances.append([(mine - right).norm() / right.norm() for mine, right in couples])
    for ours, theirs in zip(*distances, strict=True):
        assert ours <= 1.1 * theirs + 1e-6
    assert max(distances[0]) > 1e-4  # it does compute in bf16


def test_gradients_and_momenta_in_another_layout_are_taken_by_their_meaning():
    """A resumed run may have another layout than the one that saved the momenta."""
    (ours, fast), (theirs, plain) = pair(Mixed, torch.channels_last)
    for number in range(2):
        for model, optimizer in ((ours, fast), (theirs, plain)):
            give_gradients(model, number)
            optimizer.step()
        for parameter in ours.parameters():
            if parameter.grad is not None:
                state = fast.state[parameter]
                state["momentum_buffer"] = state["momentum_buffer"].contiguous()
    give_gradients(theirs, 5)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        mine.grad = None if other.grad is None else other.grad.contiguous()
    fast.step()
    plain.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=2e-6)


def test_a_state_that_the_plain_form_saved_goes_on(tmp_path):
    (ours, fast), (theirs, plain) = pair(Mixed, torch.channels_last)
    give_gradients(theirs, 0)
    plain.step()
    torch.save(plain.state_dict(), tmp_path / "state.pt")
    ours.load_state_dict(theirs.state_dict())
    fast.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for model, optimizer in ((ours, fast), (theirs, plain)):
        give_gradients(model, 1)
        optimizer.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=2e-6)


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
