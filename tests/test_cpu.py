"""The CPU's faster layers against PyTorch's own."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fast import cpu
from model_3 import CNN_Model_3
from tests.conftest import rate_is


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_is_dropout(p, layout):
    dropout = cpu.speed_up(nn.Sequential(nn.Dropout(p)))
    assert type(dropout[0]) is cpu.FastDropout
    x = torch.ones(7, 5, 31, 33).to(memory_format=layout).requires_grad_()
    output = dropout(x)
    output.sum().backward()
    dropped = output == 0
    assert rate_is(int(dropped.sum()), x.numel(), p)
    np.testing.assert_allclose(output[~dropped].detach(), 1 / (1 - p), rtol=1e-4)
    assert torch.equal(x.grad, output.detach())
    assert output.is_contiguous(memory_format=layout)
    # No channel, row or neighbour is favoured: each mean is near that of all.
    for dims in ((1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):
        means = dropped.float().mean(dim=dims)
        assert (means - p).abs().max() < 5 * math.sqrt(p * (1 - p) * len(means) / x.numel())
    pairs = (dropped[:, :, :, :-1] & dropped[:, :, :, 1:]).float().mean().item()
    assert pairs == pytest.approx(p * p, abs=0.01)
    assert torch.equal(dropout.eval()(x), x)


def test_dropout_of_almost_all_still_divides():
    dropout = cpu.speed_up(nn.Sequential(nn.Dropout(0.999995)))
    output = dropout(torch.ones(1000))
    assert torch.isfinite(output).all()
    assert (output == 0).sum() > 990


def check_same_convolution(convolution: nn.Conv2d, faster: nn.Module, size: int) -> None:
    """Outputs, and gradients of the input and of all parameters, in training."""
    x = torch.randn(4, 8, size, size, dtype=torch.float64, requires_grad=True)
    gradients = []
    for model in (convolution, faster):
        model(x).square().sum().backward()
        gradients.append(x.grad)
        x.grad = None
    torch.testing.assert_close(faster(x), convolution(x))
    torch.testing.assert_close(*gradients)
    for ours, reference in zip(faster.parameters(), convolution.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, reference.grad)


@pytest.mark.parametrize(("size", "stride", "dilation"), [(32, 2, 1), (17, 2, 1), (16, (1, 2), 2)])
def test_strided_depthwise_is_the_same_convolution(size, stride, dilation, monkeypatch):
    convolution = nn.Conv2d(8, 8, 3, stride, dilation, dilation, groups=8, bias=False).double()
    faster = cpu.speed_up(nn.Sequential(copy.deepcopy(convolution)))
    assert type(faster[0]) is cpu.StridedDepthwise
    strides = []
    conv2d = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *a: strides.append(a[3]) or conv2d(*a))
    with torch.autocast("cpu", torch.bfloat16):  # leaves float64 as it is
        check_same_convolution(convolution, faster, size)
    assert 1 in strides
    strides.clear()
    check_same_convolution(convolution, faster, size)
    assert 1 not in strides


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("size", "dilation", "moves"), [(32, 4, True), (16, 2, True), (8, 2, True), (33, 4, False)]
)
def test_dilated_depthwise_is_the_same_convolution(size, dilation, moves, bias, monkeypatch):
    convolution = nn.Conv2d(8, 8, 3, 1, dilation, dilation, groups=8, bias=bias).double()
    faster = cpu.speed_up(nn.Sequential(copy.deepcopy(convolution)))
    assert type(faster[0]) is cpu.DilatedDepthwise
    check_same_convolution(convolution, faster, size)
    dilations = []
    conv2d = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *a: dilations.append(a[5]) or conv2d(*a))
    faster(torch.randn(4, 8, size, size, dtype=torch.float64))
    assert dilations == ([1] if moves else [(dilation, dilation)])


@pytest.mark.parametrize(("bias", "stride"), [(False, 1), (True, 2)])
def test_paired_convolution_is_the_same_convolution(bias, stride):
    convolution = nn.Conv2d(8, 8, 3, stride, 1, groups=4, bias=bias).double()
    faster = cpu.speed_up(nn.Sequential(copy.deepcopy(convolution)))
    assert type(faster[0]) is cpu.PairedConv2d
    check_same_convolution(convolution, faster, size=10)


def test_paired_convolution_evaluates_in_its_fast_form_where_precision_is_reduced(monkeypatch):
    convolution = nn.Conv2d(8, 8, 3, 1, 1, groups=4)
    faster = cpu.speed_up(nn.Sequential(copy.deepcopy(convolution))).eval()
    groups = []
    conv2d = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *a: groups.append(a[6]) or conv2d(*a))
    x = torch.randn(4, 8, 10, 10)
    exact = faster(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(faster(x).float(), exact, rtol=0.02, atol=0.02)
    assert groups == [4, 8, 8]


@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "padding"),
    [((4, 4), 3, 1, 1), ((5, 6), (3, 2), (2, 1), (1, 0)), ((7, 7), (1, 3), 2, (0, 1))],
)
def test_gradients_of_a_convolution_to_few_pixels(shape, kernel, stride, padding):
    convolution = nn.Conv2d(3, 5, kernel, stride, padding, bias=False).double()
    x = torch.randn(2, 3, *shape, dtype=torch.float64, requires_grad=True)
    settings = convolution.stride, convolution.padding
    assert torch.autograd.gradcheck(
        lambda x, weight: cpu._WeightGradientByMatrix.apply(x, weight, *settings),
        (x, convolution.weight),
    )


def with_amx(monkeypatch, present: bool) -> None:
    """speed_up as on a CPU with AMX or without."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": present})


@pytest.mark.parametrize(("size", "stride", "moves"), [(4, 1, True), (8, 2, True), (5, 1, False)])
def test_few_pixels_convolution_is_the_same_convolution(size, stride, moves, monkeypatch):
    with_amx(monkeypatch, True)
    convolution = nn.Conv2d(8, 16, 3, stride, 1, bias=False).to(memory_format=torch.channels_last)
    faster = cpu.speed_up(nn.Sequential(copy.deepcopy(convolution)))
    assert type(faster[0]) is cpu.FewPixelsConv2d
    taken = []
    apply = cpu._WeightGradientByMatrix.apply
    monkeypatch.setattr(
        cpu._WeightGradientByMatrix, "apply", lambda *a: taken.append(1) or apply(*a)
    )
    x = torch.randn(4, 8, size, size).to(memory_format=torch.channels_last).requires_grad_()
    outputs, gradients = [], []
    for model in (convolution, faster):
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(model(x))
        outputs[-1].float().square().sum().backward()
        gradients += [x.grad, next(model.parameters()).grad]
        x.grad = None
    assert taken == [1] * moves
    assert torch.equal(*outputs)
    assert outputs[1].is_contiguous(memory_format=torch.channels_last)
    for reference, ours in zip(gradients[:2], gradients[2:], strict=True):
        assert ours.dtype == torch.float32
        assert (ours - reference).norm() < 0.01 * reference.norm()  # bf16 has 8 bits
    # In float32 and in evaluation it is PyTorch's own.
    torch.testing.assert_close(faster(x), convolution(x), rtol=0, atol=0)
    # In float64, whatever the autocast, and for an image without a batch, too.
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(faster(x[0]), convolution(x[0]), rtol=0, atol=0)
        exact = copy.deepcopy(faster).double()(x.double())
        torch.testing.assert_close(exact, convolution.double()(x.double()))
        faster.eval()(x)
    assert taken == [1] * moves


def test_only_with_amx_and_plain_convolutions_are_done_by_matrix(monkeypatch):
    with_amx(monkeypatch, False)
    assert type(cpu.speed_up(nn.Sequential(nn.Conv2d(8, 16, 3, bias=False)))[0]) is nn.Conv2d
    with_amx(monkeypatch, True)
    for options in ({"bias": True}, {"dilation": 2}, {"groups": 2}, {"padding": "same"}):
        other = nn.Conv2d(8, 16, 3, **{"bias": False, **options})
        assert type(cpu.speed_up(nn.Sequential(other))[0]) is nn.Conv2d


@pytest.mark.parametrize("size", [1, (1, 1)])
def test_global_pool_is_the_same_pool_with_a_gradient_of_the_same_layout(size):
    pool = nn.AdaptiveAvgPool2d(size)
    faster = cpu.speed_up(nn.Sequential(copy.deepcopy(pool)))
    assert type(faster[0]) is cpu.GlobalPool
    x = torch.randn(3, 8, 5, 7, dtype=torch.float64).to(memory_format=torch.channels_last)
    x.requires_grad_()
    weights = torch.randn(3, 8, 1, 1, dtype=torch.float64)
    assert faster(x).shape == pool(x).shape
    torch.testing.assert_close(faster(x), pool(x))
    ours, reference = (
        torch.autograd.grad((model(x) * weights).sum(), x)[0] for model in (faster, pool)
    )
    torch.testing.assert_close(ours, reference)
    # What an elementwise layer before the pool makes of it: strides of channels_last.
    assert (ours * 1).is_contiguous(memory_format=torch.channels_last)
    assert not (reference * 1).is_contiguous(memory_format=torch.channels_last)
    contiguous = x.detach().contiguous()
    torch.testing.assert_close(faster(contiguous), pool(contiguous))
    assert type(cpu.speed_up(nn.Sequential(nn.AdaptiveAvgPool2d(2)))[0]) is nn.AdaptiveAvgPool2d


def test_speeding_up_keeps_names_weights_and_other_layers():
    model = CNN_Model_3()
    before = model.state_dict()
    after = cpu.speed_up(copy.deepcopy(model)).state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    x = torch.randn(3, 3, 32, 32)
    faster = cpu.speed_up(copy.deepcopy(model)).eval()
    torch.testing.assert_close(faster(x), model.eval()(x))
