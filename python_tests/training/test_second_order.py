"""The derivatives of input gradients against PyTorch's own, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from training.helpers import convolutional, images, parameter_gradients

from grood_fast.training.second_order import SecondOrder


def penalty(model: nn.Module, x: Tensor, rules: SecondOrder | None) -> Tensor:
    """A loss of the outputs and of the input gradient, both with other derivatives a sample."""
    x = x.detach().requires_grad_()
    if rules is None:
        out = model(x)
        (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    else:
        with rules:
            out = model(x)
        (gradient,) = rules.gradients(out.square().sum(), [x])
    weights = torch.linspace(-1, 2, gradient.numel(), dtype=x.dtype).view_as(gradient)
    return (gradient * weights).sin().sum() + out.tanh().sum()


def assert_as_pytorch(model: nn.Module, x: Tensor) -> None:
    plain, own = copy.deepcopy(model), copy.deepcopy(model)
    expected = parameter_gradients(plain, lambda: penalty(plain, x, None))
    actual = parameter_gradients(own, lambda: penalty(own, x, SecondOrder()))
    assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    assert_close(dict(own.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_network(norm: str, layout: torch.memory_format) -> None:
    model = convolutional(norm).to(memory_format=layout)
    assert_as_pytorch(model, images(5).to(memory_format=layout))


def test_evaluation_mode_and_frozen_parameters() -> None:
    model = convolutional()
    for parameter in list(model.parameters())[::3]:
        parameter.requires_grad_(False)
    assert_as_pytorch(model, images(5))
    model(images(32))
    assert_as_pytorch(model.eval(), images(5))


def test_batch_norm_without_affine_and_with_zero_weight() -> None:
    model = convolutional()
    model[1] = nn.BatchNorm2d(6, affine=False, momentum=None).double()
    nn.init.zeros_(model[4].weight)
    assert_as_pytorch(model, images(5))


def test_batch_norm_without_running_statistics() -> None:
    model = convolutional()
    model[1] = nn.BatchNorm2d(6, track_running_stats=False).double()
    assert_as_pytorch(model, images(5))


@pytest.mark.parametrize("inplace", [False, True])
def test_relus_of_every_kind(inplace: bool) -> None:
    class Relu(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            F.relu(x, inplace=True)  # used for what it does to x
            return torch.relu(x - 0.1)

    model = convolutional()
    model[2] = nn.ReLU(inplace=inplace)
    model[5] = nn.Sequential(Relu(), nn.BatchNorm2d(8).double())
    assert_as_pytorch(model, images(5))


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_dimensions(dimensions: int) -> None:
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    batch_norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
    torch.manual_seed(0)
    model = nn.Sequential(convolution(2, 3, 3), batch_norm(3), nn.Tanh(), nn.Flatten()).double()
    assert_as_pytorch(model, torch.randn(3, 2, *[4] * dimensions, dtype=torch.float64))


def test_features_of_two_dimensions_and_string_padding() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 2, 3, padding="same"), nn.Flatten(), nn.Linear(128, 7), nn.BatchNorm1d(7)
    ).double()
    assert_as_pytorch(model, images(6))


def test_no_gradient_is_sent_to_the_inputs_by_the_loss() -> None:
    model, x = convolutional(), images(4).requires_grad_()
    rules = SecondOrder()
    with rules:
        out = model(x)
    (gradient,) = rules.gradients(out.sum(), [x])
    assert gradient.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())
    out.sum().backward()
    assert x.grad is None
    assert model[0].weight.grad is not None


def test_first_derivatives_alone() -> None:
    model, x = convolutional(), images(4)

    def loss(rules: SecondOrder | None) -> Tensor:
        if rules is None:
            return model(x).square().sum()
        with rules:
            out = model(x)
        return out.square().sum()

    expected = parameter_gradients(model, lambda: loss(None))
    actual = parameter_gradients(model, lambda: loss(SecondOrder()))
    assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_a_batch_of_one_is_refused_as_ever() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with SecondOrder(), pytest.raises(ValueError, match="more than 1 value"):
        model(torch.randn(1, 3))
