"""The other published networks: their counts and tables; and tools.receptive_field."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import cli
import networks
import utils
from tests.conftest import call_main
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


class Tokens(nn.Module):
    """The places of a feature map as a sequence (N, places, channels), through a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, stride=4)
        self.layer = layer

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.stem(images).flatten(2).transpose(1, 2)
        if isinstance(self.layer, nn.MultiheadAttention):
            seen, _ = self.layer(tokens, tokens, tokens)
        elif isinstance(self.layer, nn.LSTM):
            seen, _ = self.layer(tokens)
        else:
            seen = self.layer(tokens)
        return seen.mean(1)


class Scores(nn.Module):
    """Attention by hand; its functions have no name of their own."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return (tokens @ tokens.transpose(1, 2)).softmax(dim=-1) @ tokens


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


@pytest.mark.parametrize(
    ("model", "layer"),
    [
        (Tokens(nn.MultiheadAttention(16, 2, batch_first=True)), "layer (MultiheadAttention)"),
        (Tokens(nn.LSTM(16, 16, batch_first=True)), "layer (LSTM)"),
        (
            Tokens(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)),
            "layer (TransformerEncoderLayer)",
        ),
        (Tokens(Scores()), "matmul in layer (Scores)"),
        (Tokens(nn.Conv1d(64, 64, 3, padding=1)), "layer (Conv1d)"),
        (Tokens(nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv3d(1, 1, 3))), "layer.1 (Conv3d)"),
        (nn.Sequential(nn.ConvTranspose2d(3, 8, 2, stride=2)), "0 (ConvTranspose2d)"),
        (nn.Sequential(nn.ConvTranspose2d(3, 3, 3, padding=1)), "0 (ConvTranspose2d)"),
        (nn.Sequential(nn.Upsample(scale_factor=2)), "0 (Upsample)"),
        (nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 8, 3)), "0 (PixelUnshuffle)"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(4)), "0 (AdaptiveAvgPool2d)"),
        (nn.Sequential(nn.LPPool2d(2, 3, stride=1)), "0 (LPPool2d)"),
        (nn.Sequential(nn.Linear(32, 32)), "0 (Linear)"),
        (Through(lambda _, maps: nn.functional.interpolate(maps, scale_factor=2)), "interpolate"),
        (Through(lambda net, maps: torch.conv2d(maps, net.weight, padding=1)), "conv2d"),
        (Through(lambda _, maps: maps.transpose(2, 3)), "last (Conv2d)"),
        (Through(lambda _, maps: maps.cumsum(3)), "cumsum"),
        (Through(lambda _, maps: maps[:, :, ::2, ::2]), "getitem"),
    ],
)
def test_layers_without_a_square_window_are_refused_by_name(model, layer):
    with pytest.raises(cli.UsageError) as caught:
        receptive_field.layers(model)
    message = str(caught.value)
    assert message.startswith(f"{layer} sees no square window"), message
    assert "\n" not in message


def shuffled(_, maps: torch.Tensor) -> torch.Tensor:
    groups = maps.view(maps.size(0), 4, 4, maps.size(2), maps.size(3))
    return groups.transpose(1, 2).reshape(maps.shape)


@pytest.mark.parametrize(
    "function",
    [
        shuffled,
        lambda net, maps: torch.cat(maps.chunk(2, dim=1)[::-1], dim=1),
        lambda net, maps: maps * maps.max(1, keepdim=True).values.sigmoid(),
        lambda net, maps: nn.functional.pad(maps, (1, 1, 1, 1)),
        lambda net, maps: nn.functional.group_norm(maps, 4),
        lambda net, maps: maps.permute(0, 2, 3, 1).relu_().permute(0, 3, 1, 2),
        lambda net, maps: nn.functional.linear(
            maps.permute(0, 2, 3, 1), net.weight[:, :, 0, 0]
        ).permute(0, 3, 1, 2),
    ],
)
def test_what_leaves_values_at_their_places_adds_nothing(function):
    rows = receptive_field.layers(Through(function))
    assert [(row.name, row.field) for row in rows] == [("stem", 3), ("last", 5), ("mean", 0)]


def test_a_pool_whose_window_is_the_map_s_size():
    def pooled(_, maps: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(nn.functional.avg_pool2d(maps, maps.shape[2] // 4), (1,) * 4)

    fields = [row.field for row in receptive_field.layers(Through(pooled))]
    assert fields == [3, 10, 10 + 2 * 8, 0]


def test_a_dilated_max_pool_s_field():
    pool = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2, stride=1, dilation=3))
    assert [row.field for row in receptive_field.layers(pool)] == [3, 6]


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
