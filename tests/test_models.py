"""The three networks against the published tables and against themselves."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import recipes
from support import model_files
from tests import forked

ROOT = Path(__file__).parents[1]
PARAMETERS = {1: 2_114_282, 2: 222_058, 3: 73_994}
TARGET_EPOCHS = {1: 60, 2: 70, 3: 75}
numbers = pytest.mark.parametrize("number", [1, 2, 3])


def build(number: int) -> nn.Module:
    return getattr(importlib.import_module(f"model_{number}"), f"CNN_Model_{number}")()


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


@numbers
def test_parameter_count(number: int) -> None:
    assert sum(parameter.numel() for parameter in build(number).parameters()) == PARAMETERS[number]


@numbers
def test_running_the_file_prints_the_table_of_the_specification(number: int) -> None:
    ended = forked.run(forked.command(f"model_{number}.py"))
    assert ended.status == 0, ended.err
    printed = ended.out.rstrip("\n").splitlines()
    wanted = (ROOT / f"tests/spec/model_{number}_summary.txt").read_text().splitlines()
    assert printed[: len(wanted)] == wanted
    assert set("".join(printed[len(wanted) :])) <= {"-"}  # torchsummary's closing rule


@numbers
def test_our_summary_is_the_same_and_leaves_the_model_alone(number: int) -> None:
    model = build(number)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table = model_files.summary_table(model).rstrip("\n").splitlines()
    wanted = (ROOT / f"tests/spec/model_{number}_summary.txt").read_text().splitlines()
    assert table[: len(wanted)] == wanted
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@numbers
@pytest.mark.parametrize("batch", [1, 7])
def test_output_shape_and_independence_of_the_images_in_a_batch(number: int, batch: int) -> None:
    model = build(number).eval()
    images = torch.randn(batch, 3, 32, 32)
    with torch.inference_mode():
        logits = model(images)
        alone = torch.cat([model(image[None]) for image in images])
    assert logits.shape == (batch, 10)
    torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)


@numbers
def test_every_parameter_gets_a_gradient(number: int) -> None:
    model = build(number)
    model(torch.randn(8, 3, 32, 32)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@numbers
def test_layers_are_of_the_kind_that_was_asked_for(number: int) -> None:
    model = build(number)
    assert not [m for m in model.modules() if isinstance(m, nn.MaxPool2d | nn.AvgPool2d)]
    for convolution in convolutions(model):
        assert convolution.bias is None
        assert convolution.kernel_size in ((1, 1), (3, 3))


def test_model_1_groups_and_strides() -> None:
    layers = convolutions(build(1))
    assert [layer.groups for layer in layers] == [1, 1, 1, 32, 1, 1, 1, 1, 1]
    assert layers[5].kernel_size == (1, 1)
    assert layers[5].stride == (2, 2)


def test_model_2_depthwise_and_dilated_layers() -> None:
    layers = convolutions(build(2))
    assert layers[4].groups == layers[4].in_channels == 48
    assert (layers[5].kernel_size, layers[5].stride) == ((1, 1), (2, 2))
    assert any(layer.dilation == (2, 2) for layer in layers)


def test_model_3_dilations_and_dropout() -> None:
    model = build(3)
    depthwise = [layer for layer in convolutions(model) if layer.groups > 1]
    assert all(layer.groups == layer.in_channels for layer in depthwise)
    assert [layer.dilation[0] for layer in depthwise][-3:] == [1, 2, 4]
    rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert rates == sorted(rates)
    assert set(rates) == {0.1, 0.15, 0.2}


def documented_layers(number: int) -> list[tuple[str, str, int, int]]:
    """(name, output, parameters, receptive field) of each convolution in the file's docstring."""
    document = importlib.import_module(f"model_{number}").__doc__
    row = re.compile(r"^    (\w+)  .*?(\d+x\d+x\d+)\s+([\d,]+)\s+(\d+)$", re.MULTILINE)
    return [
        (name, output, int(count.replace(",", "")), int(field))
        for name, output, count, field in row.findall(document)
    ]


def measured_receptive_fields(model: nn.Module, names: list[str]) -> dict[str, int]:
    """Side of the input area that has a gradient from one value in the middle of each layer.

    All weights are made positive and BatchNorm, fresh and in eval mode, passes values through, so
    that no two paths cancel; the image is so large that no edge is in sight.
    """
    model.double().eval()
    for convolution in convolutions(model):
        nn.init.constant_(convolution.weight, 1.0 / convolution.weight[0].numel())
    outputs: dict[str, torch.Tensor] = {}
    for name in names:
        getattr(model, name).register_forward_hook(
            lambda _module, _input, output, name=name: outputs.update({name: output})
        )
    image = torch.ones(1, 3, 96, 96, dtype=torch.float64, requires_grad=True)
    model(image)
    fields = {}
    for name, output in outputs.items():
        middle = output.shape[2] // 2
        (gradient,) = torch.autograd.grad(output[0, 0, middle, middle], image, retain_graph=True)
        rows = gradient.abs().sum(dim=(0, 1, 3)).nonzero()
        fields[name] = int(rows.max() - rows.min()) + 1
    return fields


@numbers
def test_the_docstring_table_is_true(number: int) -> None:
    documented = documented_layers(number)
    model = build(number)
    assert len(documented) == len(convolutions(model))
    shapes: dict[str, str] = {}
    for name, *_ in documented:
        getattr(model, name).register_forward_hook(
            lambda _module, _input, output, name=name: shapes.update(
                {name: "x".join(map(str, output.shape[1:]))}
            )
        )
    model.eval()(torch.zeros(1, 3, 32, 32))
    fields = measured_receptive_fields(build(number), [name for name, *_ in documented])
    for name, output, count, field in documented:
        weights = getattr(model, name)[0].weight.numel()
        assert (shapes[name], weights, fields[name]) == (output, count, field), name


@numbers
def test_recipe_is_complete_and_names_the_target(number: int) -> None:
    recipe = recipes.Recipe.read(importlib.import_module(f"model_{number}").RECIPE)
    assert recipe.target_accuracy == 85.0
    assert recipe.target_epochs == TARGET_EPOCHS[number]
