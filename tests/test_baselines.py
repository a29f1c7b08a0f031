"""The other published networks: their counts and tables; and tools.receptive_field."""

import copy
import random
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import cli
import networks
import utils
from tests import forked
from tests.conftest import call_main
from tests.test_models import documented_layers
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
    ended = forked.run(forked.command("baselines/c1c2c3c4.py"))
    wanted = (ROOT / "tests/spec/baseline_c1c2c3c4_summary.txt").read_text()
    assert (ended.status, ended.out.rstrip()) == (0, wanted.rstrip()), ended.err


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
            utils.Device(torch.device("cpu")),
            shuffle=True,
            workers=None if batched else 0,
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


def fields(model: nn.Module) -> list[str]:
    return [row.field for row in receptive_field.layers(model)]


@cache
def layers(name: str) -> list[receptive_field.Layer]:
    return receptive_field.layers(build(name))


@pytest.mark.parametrize("name", ["c1c2c3c4", "cifarnet", "dilated_cnn"])
def test_receptive_field_against_the_gradient(name):
    *_, last, end = (row.field for row in layers(name))
    assert (int(last), end) == (measured(build(name)), "whole image")
    assert int(last) == FIELDS[name]


def test_receptive_field_of_max_pools_and_residuals_by_hand(capsys):
    """The last pool's output is 1x1 of a 32x32 image, and the network takes no other size."""
    assert receptive_field.main(["--model", str(ROOT / "baselines" / "resnet.py")]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "layer kind output kernel stride dilation receptive field"
    assert "max_pool2d pool 512x1x1 4 4 1 88" in lines
    *numbers, pool = [line for line in lines[2:] if line][: 12 + 1]
    found = [int(line.split()[-1]) for line in numbers]
    assert found == [3, 5, 6, 10, 14, 18, 20, 28, 32, 48, 64, 88]
    assert pool.endswith("whole image")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_receptive_field_table_is_the_docstrings(number, capsys):
    assert receptive_field.main(["--model", str(number)]) == 0
    *table, _, summary = capsys.readouterr().out.splitlines()
    printed = {line.split()[0].removesuffix(".0"): line for line in table[2:]}
    documented = documented_layers(number)
    for name, output, _, field in documented:
        assert output in printed[name].split(), name
        assert printed[name].split()[-1] == str(field), name
    assert len(printed) == len(documented) + 1  # and the global pool
    assert printed["pool"].endswith("whole image")
    assert f"sees {field} pixels" in summary


def test_a_row_of_a_depthwise_layer_and_a_wrong_model(capsys):
    wanted = ("block2.depthwise", "depthwise", "128x32x32", "3", "1", "4", "13")
    assert layers("cifarnet")[4] == wanted
    assert receptive_field.main(["--model", "9"]) == 2
    assert "'9' is neither" in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(6))
def test_receptive_fields_are_those_of_the_formula(seed):
    """Araujo et al.: a layer adds (kernel - 1) * dilation * jump; a stride multiplies the jump."""
    draw, stack, wanted, field, jump = random.Random(seed), [], [], 1, 1
    for _ in range(7):
        kernel, dilation = draw.choice([1, 2, 3, 5]), draw.choice([1, 1, 2, 3])
        stride = draw.choice([1, 1, 2]) if jump < 8 else 1
        kind = draw.choice(["convolution", "depthwise", "groups 2", "max", "average"])
        if kind == "max":
            stack.append(nn.MaxPool2d(kernel, stride, kernel // 2, dilation))
        elif kind == "average":
            stack.append(nn.AvgPool2d(kernel, stride, kernel // 2))
        else:
            groups = {"convolution": 1, "depthwise": 4, "groups 2": 2}[kind]
            padding = dilation * (kernel // 2)
            stack.append(nn.Conv2d(4, 4, kernel, stride, padding, dilation, groups))
        dilation = 1 if kind == "average" else dilation
        field += (kernel - 1) * dilation * jump
        jump *= stride
        wanted.append(str(field))
        stack += draw.choice([[], [nn.BatchNorm2d(4), nn.ReLU(inplace=True)], [nn.Tanh()]])
    assert fields(nn.Sequential(nn.Conv2d(3, 4, 1), *stack)) == ["1", *wanted]


class Tokens(nn.Module):
    """The places of a feature map as a sequence (N, places, channels), which attention mixes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, stride=4)
        self.layer = nn.MultiheadAttention(16, 2, batch_first=True)
        self.last = nn.Conv2d(16, 10, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.stem(images)
        tokens = maps.flatten(2).transpose(1, 2)
        tokens, _ = self.layer(tokens, tokens, tokens)
        return self.last(tokens.transpose(1, 2).reshape(maps.shape)).mean((2, 3))


class Through(nn.Module):
    """A feature map through a function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.weight = nn.Parameter(torch.zeros(16, 16, 3, 3))
        self.last = nn.Conv2d(16, 10, 3)
        self.function = function

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.function(self, self.stem(images))).mean((2, 3))


def shuffled(_, maps: torch.Tensor) -> torch.Tensor:
    groups = maps.view(maps.size(0), 4, 4, maps.size(2), maps.size(3))
    return groups.transpose(1, 2).reshape(maps.shape)


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        # What leaves values at their places adds nothing.
        (shuffled, "3 5"),
        (lambda net, maps: torch.cat(maps.chunk(2, dim=1)[::-1], dim=1), "3 5"),
        (lambda net, maps: maps * maps.max(1, keepdim=True).values.sigmoid(), "3 5"),
        (lambda net, maps: nn.functional.pad(maps, (1, 1, 1, 1)), "3 5"),
        (lambda net, maps: nn.functional.group_norm(maps, 4), "3 5"),
        (lambda net, maps: maps.permute(0, 2, 3, 1).relu_().permute(0, 3, 1, 2), "3 5"),
        (
            lambda net, maps: nn.functional.linear(
                maps.permute(0, 2, 3, 1), net.weight[:, :, 0, 0]
            ).permute(0, 3, 1, 2),
            "3 5",
        ),
        (lambda net, maps: maps.transpose(2, 3), "3 5"),
        # What does not counts in what lies behind it.
        (lambda net, maps: torch.conv2d(maps, net.weight, padding=1), "3 5 7"),
        (lambda net, maps: maps[:, :, ::2, ::2], "3 7"),
        (lambda net, maps: nn.functional.interpolate(maps, scale_factor=2), "3 4"),
        (lambda net, maps: nn.functional.adaptive_max_pool2d(maps, 16), "3 8"),
        (lambda net, maps: nn.functional.max_pool2d(maps, 3, 2, ceil_mode=True), "3 5 9"),
        (lambda net, maps: maps * nn.functional.adaptive_avg_pool2d(maps, 1), "3 whole"),
        # Only images of 32x32 pixels.
        (lambda net, maps: maps + torch.zeros(1, 16, 32, 32), "3 5"),
        (lambda net, maps: nn.functional.avg_pool2d(maps, maps.shape[2] // 8), "3 6 14"),
    ],
)
def test_receptive_fields_behind_functions(function, wanted):
    found = fields(Through(function))
    assert [field.removesuffix(" image") for field in found] == [*wanted.split(), "whole"]


def test_receptive_field_of_a_network_for_small_images_that_attention_mixes():
    assert fields(Tokens()) == ["4", "whole image", "whole image"]


class Only32(nn.Sequential):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images + torch.zeros(32, 32)).mean((2, 3))


def test_receptive_fields_that_the_border_of_a_fixed_size_cuts_off():
    """By the formula 2, 4, 20, 28, 36."""
    layers = [nn.Conv2d(3, 3, 2, 2), nn.Conv2d(3, 3, 2, 2), nn.Conv2d(3, 3, 5, padding=2)]
    layers += [nn.Conv2d(3, 3, 3, padding=1) for _ in range(2)]
    wanted = ["2", "4", "20", "at least 28", "whole image", "whole image"]
    assert fields(Only32(*layers)) == wanted


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Through(lambda _, maps: maps.cumsum(3)), "last sees 5 rows, but 19 columns"),
        (nn.Sequential(nn.Linear(32, 32), nn.Conv2d(3, 3, 3)), "1 sees 3 rows, but 32 columns"),
        (nn.Sequential(nn.Conv2d(3, 8, (1, 5))), "0 sees 1 rows, but 5 columns"),
        (nn.Sequential(nn.Hardshrink(9), nn.Conv2d(3, 8, 1)), "1 has no gradient"),
        (nn.Sequential(nn.Conv2d(4, 8, 1)), "to have 4 channels, but got 3 channels instead"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(model, reason):
    with pytest.raises(cli.UsageError) as caught:
        receptive_field.layers(model)
    message = str(caught.value)
    assert message.startswith(f"{type(model).__name__} cannot be measured: ")
    assert reason in message
    assert "\n" not in message


def test_measuring_leaves_the_model_alone():
    model = build("c1c2c3c4").train()
    before = copy.deepcopy(model.state_dict())
    receptive_field.layers(model)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "layers",
    [
        "nn.Flatten(), nn.Linear(3072, 10)",
        "nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10)",
    ],
)
def test_networks_without_a_window_are_no_error(layers, tmp_path, capsys):
    (tmp_path / "net.py").write_text(
        f"""
from torch import nn
class Net(nn.Sequential):
    def __init__(self):
        super().__init__({layers})
RECIPE = dict(optimizer="sgd", lr=0.1, weight_decay=0.0, schedule="onecycle", batch_size=32,
              target_accuracy=85.0, target_epochs=20)
"""
    )
    status, out, error = call_main(receptive_field.main, capsys, ["--model", tmp_path / "net.py"])
    assert (status, error) == (0, "")
    assert "Net: it has no layer with a window" in out
    assert receptive_field.layers(nn.Sequential()) == []
