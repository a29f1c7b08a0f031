"""The other published networks: their counts and tables; and tools.receptive_field."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import networks
import utils
from tools import receptive_field

ROOT = Path(__file__).parents[1]
# Known beforehand: from the published table, the documents, and the layers counted by hand.
PARAMETERS = {"c1c2c3c4": 92_394, "cifarnet": 174_762, "dilated_cnn": 86_954, "resnet": 6_573_130}
FIELDS = {"c1c2c3c4": 61, "cifarnet": 15, "dilated_cnn": 67, "resnet": 88}
names = pytest.mark.parametrize("name", PARAMETERS)


def build(name: str) -> nn.Module:
    return networks.load_network(str(ROOT / "baselines" / f"{name}.py")).build()


@names
def test_parameters_shapes_and_gradients(name):
    model = build(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    for batch in (1, 7):
        assert model.eval()(torch.randn(batch, 3, 32, 32)).shape == (batch, 10)
    model.train()(torch.randn(4, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["cifarnet", "dilated_cnn", "resnet"])
def test_the_docstring_s_counts_add_up(name):
    document = (ROOT / "baselines" / f"{name}.py").read_text().split('"""')[1]
    last_words = [line.split()[-1] for line in document.partition("-----")[2].splitlines() if line]
    *parts, total = (int(word.replace(",", "")) for word in last_words if word[0].isdigit())
    assert sum(parts) == total == PARAMETERS[name]


def test_running_c1c2c3c4_prints_the_published_table():
    result = subprocess.run(
        [sys.executable, "baselines/c1c2c3c4.py"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    wanted = (ROOT / "tests/spec/baseline_c1c2c3c4_summary.txt").read_text()
    assert result.stdout.rstrip() == wanted.rstrip()


@names
def test_recipes_are_read_and_their_transforms_run_batched(name, sample):
    recipe = networks.load_network(str(ROOT / "baselines" / f"{name}.py")).recipe
    transform = recipe.train_transform((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 20)
    for batched in (True, False):
        loader = utils.make_loader(
            sample.train_images[:64],
            sample.train_labels[:64],
            transform,
            32,
            shuffle=True,
            device=torch.device("cpu"),
            precision=utils.Precision(torch.float32, torch.contiguous_format),
            batched=batched,
        )
        assert all(images.shape == (32, 3, 32, 32) for images, _ in loader)


def measured(model: nn.Module) -> int:
    """Side of the area of the image that one value in the middle of the last map depends on.

    Every weight is positive and every path open, so that nothing cancels.
    """
    model = model.double().eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1.0 / module.weight[0].numel())
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    maps = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _module, _input, output: maps.append(output))
    image = torch.ones(1, 3, 160, 160, dtype=torch.float64, requires_grad=True)
    model(image)
    middle = maps[-1].shape[2] // 2
    (gradient,) = torch.autograd.grad(maps[-1][0, 0, middle, middle], image)
    rows = gradient.abs().sum(dim=(0, 1, 3)).nonzero()
    return int(rows.max() - rows.min()) + 1


@pytest.mark.parametrize("name", ["c1c2c3c4", "cifarnet", "dilated_cnn"])
def test_receptive_field_against_the_gradient(name):
    fields = [row.field for row in receptive_field.layers(build(name))]
    assert max(fields) == measured(build(name)) == FIELDS[name]


def test_receptive_field_of_max_pools_and_residuals_by_hand():
    """ResNet: 3, 5, pool 6, 10, 14, 18, pool 20, 28, pool 32, 48, 64, pool 88."""
    fields = [row.field for row in receptive_field.layers(build("resnet"))]
    assert fields == [3, 5, 6, 10, 14, 18, 20, 28, 32, 48, 64, 88, 0]


@pytest.mark.parametrize(("model", "field"), [("1", 43), ("2", 35), ("3", 67)])
def test_receptive_field_command(model, field, capsys):
    assert receptive_field.main(["--model", model]) == 0
    assert f"sees {field} pixels" in capsys.readouterr().out
    assert receptive_field.main(["--model", "9"]) == 2
    assert "'9' is neither" in capsys.readouterr().err
