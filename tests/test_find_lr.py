"""tools.find_lr on a problem whose answer is known, and as a command."""

import csv
import math

import numpy as np
import pytest
import torch
from torch import nn

import recipes
import utils
from tests import torture
from tests.conftest import PIXEL, call_main
from tools import find_lr

FULL = utils.Device(torch.device("cpu"))


class Slope(nn.Module):
    """One weight, whatever the images: with `bowl` as criterion, gradient descent on k/2 w^2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.weight.expand(len(images), 1)


def bowl(curvature: float):
    return lambda logits, labels: 0.5 * curvature * logits.mean() ** 2


def loader(sample) -> utils.Loader:
    return utils.make_loader(
        sample.train_images[:8], sample.train_labels[:8],
        utils.test_transform((0.5,) * 3, (0.2,) * 3),
        4, FULL, shuffle=True,
    )  # fmt: skip


def rows_of(sample, curvature: float, rates: np.ndarray) -> np.ndarray:
    model = Slope()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return find_lr.range_test(
        model, optimizer, loader(sample), bowl(curvature), rates, FULL
    )  # fmt: skip


@pytest.mark.parametrize("curvature", [0.5, 1.0, 40.0])
def test_a_bowl_diverges_at_two_over_its_curvature(curvature, sample):
    """w <- (1 - lr k) w: it shrinks below lr = 2/k, fastest at 1/k, and grows above."""
    rates = np.geomspace(0.013 / curvature, 37 / curvature, 120)
    rows = rows_of(sample, curvature, rates)
    lowest = rows[rows[:, 1].argmin(), 0]
    assert 1 / curvature < lowest
    assert 2 / curvature < rows[-1, 0] < rates[-1]  # it noticed the divergence and stopped
    assert 0.013 / curvature < find_lr.suggestion(rows) < 1 / curvature


def test_the_suggestion_scales_with_the_curvature(sample):
    """Gradient descent on k/2 w^2 with the rate lr/k takes the same path for every k."""
    first, other = (
        find_lr.suggestion(rows_of(sample, k, np.geomspace(1e-4 / k, 10 / k, 300)))
        for k in (1.0, 64.0)
    )
    assert other * 64 == pytest.approx(first)


def test_the_running_mean_is_numpys(sample):
    rates = np.linspace(1e-3, 1e-2, 30)
    rows = rows_of(sample, 2.0, rates)
    np.testing.assert_array_equal(rows[:, 0], rates)
    raw = np.concatenate([[1.0], np.cumprod(1 - 2.0 * rates)[:-1]]) ** 2
    for step, loss in enumerate(rows[:, 1], 1):
        weights = 0.95 ** np.arange(step)[::-1]
        assert loss == pytest.approx(np.average(raw[:step], weights=weights), rel=1e-4)


def test_a_loss_that_is_no_number_ends_the_test(sample):
    rows = rows_of(sample, 1.0, np.array([0.1, 0.1, 1e30, 1e30, 0.1, 0.1]))
    assert len(rows) == 3
    assert np.isfinite(rows).all()
    assert rows_of(sample, math.nan, np.full(20, 0.1)).shape == (0, 3)
    with pytest.raises(find_lr.cli.UsageError, match="the loss never fell"):
        find_lr.suggestion(np.empty((0, 3)))


def test_all_groups_rates_rise_in_proportion(sample):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(3600, 10))
    recipe = recipes.Recipe("muon", 0.04, 0.0, "onecycle", 4, 85.0, 60, other_lr=0.08)
    optimizer = recipes.make_optimizer(model, recipe)
    rates = np.linspace(0.01, 0.02, 20)
    rows = find_lr.range_test(model, optimizer, loader(sample), nn.CrossEntropyLoss(), rates, FULL)
    np.testing.assert_array_equal(rows[:, 0], rates)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.02, 0.04, 0.04])


def test_gradients_are_clipped_as_in_training(sample):
    """Plain gradient descent on a steep bowl: no step is longer than the rate times the limit."""
    rates = np.full(20, 0.001)
    ends = []
    for limit in (0.0, 0.5):
        model = Slope()
        start = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        find_lr.range_test(model, optimizer, loader(sample), bowl(40.0), rates, FULL, limit)
        moved = zip(model.parameters(), start, strict=True)
        ends.append(sum((now - then).square().sum().item() for now, then in moved) ** 0.5)
    assert ends[1] == pytest.approx(20 * 0.001 * 0.5, rel=1e-4)
    assert ends[0] > 2 * ends[1]


def test_a_loss_that_never_falls_has_no_suggestion():
    rows = np.array([(0.1 * step, 1.0 + step, 10.0) for step in range(1, 40)])
    with pytest.raises(find_lr.cli.UsageError, match="the loss never fell"):
        find_lr.suggestion(rows)


def test_the_suggestion_is_the_steepest_fall_over_the_logarithm():
    """By hand: thirty steps, each half an order of magnitude; drops of the loss between them.

    Over the logarithm the loss falls fastest around step 12; over the rate itself at the start;
    a steeper fall among the first tenth, and one behind the minimum, do not count.
    """
    drops = np.full(29, 0.01)
    drops[1] = 5.0  # among the first tenth
    drops[11:13] = 0.4, 0.5  # on both sides of step 12
    drops[15] = 0.6  # the largest drop of one step, but with its neighbours less of a fall
    drops[20:] = -1.0, -1.0, -1.0, 0.9, 0.9, 0.0, 0.0, 0.0, 0.0
    losses = 10 - np.concatenate([[0.0], np.cumsum(drops)])
    rates = np.geomspace(1e-6, 10 ** (-6 + 29 / 2), 30)
    rows = np.stack([rates, losses, np.zeros(30)], axis=1)
    assert find_lr.suggestion(rows) == pytest.approx(rates[12])


def test_the_suggestion_of_a_linear_rise_is_over_the_logarithm_too():
    """0.3 a step at the rate 21 is steeper than 0.5 a step at the rate 6."""
    drops = np.full(29, 0.01)
    drops[4:6], drops[19:21] = 0.5, 0.3
    losses = 10 - np.concatenate([[0.0], np.cumsum(drops)])
    rows = np.stack([np.arange(1.0, 31.0), losses, np.zeros(30)], axis=1)
    assert find_lr.suggestion(rows) == 21


def call(capsys, *arguments: object) -> tuple[int, str, str]:
    return call_main(find_lr.main, capsys, arguments)


@pytest.mark.parametrize("shape", ["exponential", "linear"])
def test_the_command_writes_picture_and_table(shape, capsys, tmp_path, monkeypatch):
    drawn = []  # test_tool_pictures.py looks at the figure
    monkeypatch.setattr(find_lr, "picture", lambda *each: drawn.append(each) or PIXEL)
    (tmp_path / "small.py").write_text(torture.NETWORK)
    output = tmp_path / "out"
    status, out, error = call(
        capsys, "--dry-run", "--model", tmp_path / "small.py", "--steps", 40, "--shape", shape,
        "--output-dir", output,
    )  # fmt: skip
    assert status == 0, error
    ((shown, suggested, peak, _),) = drawn
    assert f"The loss falls fastest at {suggested:.4g}; the recipe's peak is {peak:g}" in out
    assert suggested == find_lr.suggestion(shown)
    (folder,) = output.iterdir()
    assert (folder / "find_lr.png").read_bytes() == PIXEL
    with open(folder / "find_lr.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert 20 <= len(rows) <= 40
    assert list(rows[0]) == ["lr", "loss", "accuracy"]
    rates = np.array([float(row["lr"]) for row in rows])
    wanted = {"exponential": np.geomspace, "linear": np.linspace}[shape](1e-4, 10, 40)
    np.testing.assert_allclose(rates, wanted[: len(rates)])
    columns = [[float(row[name]) for row in rows] for name in ("lr", "loss", "accuracy")]
    np.testing.assert_array_equal(columns, shown.T)
    assert all(0 < loss < 10 for loss in columns[1])
    assert 1 < max(columns[2]) <= 100  # percent


def test_refusals(capsys):
    for arguments, message in (
        (("--low", 1, "--high", 0.1), "--low 1 must be below --high 0.1"),
        (("--low", 0), "'0' is not a number above 0"),
        (("--steps", 3), "'3' is not a whole number from 20"),
        (("--model", 7), "'7' is neither"),
        (("--shape", "round"), "invalid choice: 'round'"),
    ):
        status, _, error = call(capsys, "--dry-run", *arguments)
        assert status == 2
        assert message in error
        assert error.count("\n") == 1
