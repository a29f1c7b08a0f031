"""tools.find_lr on a problem whose answer is known, and as a command."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import recipes
import utils
from tests import torture
from tests.conftest import call_main
from tools import find_lr

CPU = torch.device("cpu")
FULL = utils.Precision(torch.float32, torch.contiguous_format)


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
        4, shuffle=True, device=CPU, precision=FULL,
    )  # fmt: skip


def points_of(sample, curvature: float, values: np.ndarray) -> list[find_lr.Point]:
    return find_lr.range_test(
        Slope(), loader(sample), bowl(curvature),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1), values, CPU, FULL,
    )  # fmt: skip


@pytest.mark.parametrize("curvature", [0.5, 1.0, 40.0])
def test_a_bowl_diverges_at_two_over_its_curvature(curvature, sample):
    """w <- (1 - lr k) w: it shrinks below lr = 2/k, fastest at 1/k, and grows above."""
    values = find_lr.rates(0.013 / curvature, 37 / curvature, 120, "exponential")
    points = points_of(sample, curvature, values)
    lowest = min(points, key=lambda point: point.loss)
    assert 1 / curvature < lowest.lr
    assert points[-1].lr < values[-1]  # it noticed the divergence and stopped
    assert 2 / curvature < points[-1].lr
    assert 0.013 / curvature < find_lr.suggestion(points) < 1 / curvature


def test_the_suggestion_scales_with_the_curvature(sample):
    """Gradient descent on k/2 w^2 with the rate lr/k takes the same path for every k."""
    first, other = (
        find_lr.suggestion(
            points_of(sample, k, find_lr.rates(1e-4 / k, 10 / k, 300, "exponential"))
        )
        for k in (1.0, 64.0)
    )
    assert other * 64 == pytest.approx(first)


def test_the_running_mean_is_numpys(sample):
    values = find_lr.rates(1e-3, 1e-2, 30, "linear")
    np.testing.assert_allclose(np.diff(values), 9e-3 / 29)
    points = points_of(sample, 2.0, values)
    raw = np.concatenate([[1.0], np.cumprod(1 - 2.0 * values)[:-1]]) ** 2
    for step, point in enumerate(points, 1):
        weights = 0.95 ** np.arange(step)[::-1]
        assert point.loss == pytest.approx(np.average(raw[:step], weights=weights), rel=1e-4)


def test_the_model_and_its_groups_rates(sample):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(3600, 10))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = recipes.Recipe("muon", 0.04, 0.0, "onecycle", 4, 85.0, 60, other_lr=0.08)
    made = []

    def optimizer_of(copied: nn.Module) -> torch.optim.Optimizer:
        made.append(recipes.make_optimizer(copied, recipe))
        return made[0]

    values = find_lr.rates(0.01, 0.02, 20, "linear")
    find_lr.range_test(
        model, loader(sample), nn.CrossEntropyLoss(), optimizer_of, values, CPU, FULL
    )
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value)
    assert [group["lr"] for group in made[0].param_groups] == pytest.approx([0.02, 0.04, 0.04])


def test_a_loss_that_never_falls_has_no_suggestion():
    points = [find_lr.Point(0.1 * step, 1.0 + step, 10.0) for step in range(1, 40)]
    with pytest.raises(find_lr.cli.UsageError, match="the loss never fell"):
        find_lr.suggestion(points)


def call(capsys, *arguments: object) -> tuple[int, str, str]:
    return call_main(find_lr.main, capsys, arguments)


def test_the_command_writes_picture_and_table(capsys, tmp_path):
    (tmp_path / "small.py").write_text(torture.NETWORK)
    output = tmp_path / "out"
    status, out, error = call(
        capsys, "--dry-run", "--model", tmp_path / "small.py", "--steps", 40, "--output-dir", output
    )
    assert status == 0, error
    assert "The loss falls fastest at " in out
    (folder,) = output.iterdir()
    assert Image.open(folder / "find_lr.png").size[0] > 600
    with open(folder / "find_lr.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert 20 <= len(rows) <= 40
    assert float(rows[0]["lr"]) == pytest.approx(1e-4)


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
