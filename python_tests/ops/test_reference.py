"""The twins' closed forms against autograd, sample by sample, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ops.helpers import random_logits
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from grood_fast import ops
from grood_fast.ops import reference

BATCH, CLASSES, DIM = 5, 7, 11
TEMPERATURES = (0.3, 1.0, 25.0)
TARGET = torch.tensor([1, 0, 0.25, 1, 0.5, 0, 1], dtype=torch.float64)


def _scalar(objective: str, temperature: float) -> Callable[[Tensor], Tensor]:
    """The objective itself, of one sample's logits (C,)."""
    return {
        "energy": lambda f: -temperature * torch.logsumexp(f / temperature, dim=0),
        "uniform": lambda f: -functional.log_softmax(f / temperature, dim=0).sum(),
        "predicted": lambda f: functional.cross_entropy(f / temperature, f.argmax()),
        "confounding": lambda f: functional.binary_cross_entropy_with_logits(
            f, TARGET, reduction="sum"
        ),
        "max_logit": lambda f: f.max(),
        "logit_sum": lambda f: f.sum(),
    }[objective]


def _target(objective: str) -> Tensor | None:
    return TARGET if objective == "confounding" else None


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("objective", ops.OBJECTIVES)
class TestAgainstAutograd:
    def test_delta_is_the_scalars_gradient(self, objective: str, temperature: float) -> None:
        logits = random_logits(BATCH, CLASSES, torch.float64)
        delta = reference.logit_gradient(logits, objective, temperature, _target(objective))
        for row, expected_of in zip(delta, logits, strict=True):
            f = expected_of.clone().requires_grad_()
            (expected,) = torch.autograd.grad(_scalar(objective, temperature)(f), f)
            assert_close(row, expected, rtol=1e-12, atol=1e-14)

    def test_head_gradient_norm_is_the_norm_of_the_layers_gradient(
        self, objective: str, temperature: float
    ) -> None:
        torch.manual_seed(3)
        head = nn.Linear(DIM, CLASSES, dtype=torch.float64)
        features = torch.randn(BATCH, DIM, dtype=torch.float64)
        logits = head(features).detach()
        gradients = []
        for h in features:
            head.zero_grad()
            _scalar(objective, temperature)(head(h)).backward()
            gradients.append((head.weight.grad.flatten(), head.bias.grad))
        for bias in (False, True):
            for norm, order in (("l1", 1), ("l2", 2), ("linf", torch.inf)):
                expected = torch.stack(
                    [
                        torch.linalg.vector_norm(torch.cat(pair) if bias else pair[0], ord=order)
                        for pair in gradients
                    ]
                )
                actual = reference.head_gradient_norm(
                    logits, features, objective, temperature, _target(objective), norm, bias
                )
                assert_close(actual, expected, rtol=1e-12, atol=1e-14)

    def test_vjp_is_what_autograd_sends_through_delta(
        self, objective: str, temperature: float
    ) -> None:
        logits = random_logits(BATCH, CLASSES, torch.float64)
        grad = random_logits(BATCH, CLASSES, torch.float64, seed=1)
        for row, weight in zip(logits, grad, strict=True):
            f = row.clone().requires_grad_()
            (delta,) = torch.autograd.grad(
                _scalar(objective, temperature)(f), f, create_graph=True, materialize_grads=True
            )
            expected = torch.zeros_like(f)
            if delta.requires_grad:
                (expected,) = torch.autograd.grad(
                    delta, f, weight, allow_unused=True, materialize_grads=True
                )
            actual = reference.logit_gradient_vjp(
                row.unsqueeze(0), weight.unsqueeze(0), objective, temperature
            )
            assert_close(actual[0], expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_energy_is_minus_t_log_sum_exp(temperature: float) -> None:
    logits = random_logits(BATCH, CLASSES, torch.float64)
    expected = -temperature * (logits / temperature).exp().sum(dim=1).log()
    assert_close(reference.energy(logits, temperature), expected, rtol=1e-13, atol=0)


def test_confounding_label_is_all_ones_unless_given() -> None:
    logits = random_logits(BATCH, CLASSES, torch.float64)
    ones = torch.ones(CLASSES, dtype=torch.float64)
    assert_close(
        reference.logit_gradient(logits, "confounding"),
        reference.logit_gradient(logits, "confounding", target=ones),
        rtol=0,
        atol=0,
    )


def test_unknown_objective() -> None:
    with pytest.raises(ValueError, match="unknown objective 'entropy'"):
        reference.logit_gradient(torch.zeros(1, 2), "entropy")


@pytest.mark.parametrize("norm", ops.NORMS)
class TestRowNorm:
    def test_vjp_is_autograds(self, norm: str) -> None:
        rows = random_logits(BATCH, CLASSES, torch.float64).requires_grad_()
        grad = random_logits(BATCH, 1, torch.float64, seed=1)[:, 0]
        (expected,) = torch.autograd.grad(reference.row_norm(rows, norm), rows, grad)
        actual = reference.row_norm_vjp(rows.detach(), grad, norm)
        assert_close(actual, expected, rtol=1e-13, atol=1e-14)

    def test_a_row_of_zeros_sends_back_zeros(self, norm: str) -> None:
        rows = torch.zeros(2, 3)
        assert not reference.row_norm(rows, norm).any()
        assert not reference.row_norm_vjp(rows, torch.ones(2), norm).any()

    @pytest.mark.parametrize("shape", [(3, 0), (0, 4), (0, 0)])
    def test_empty(self, norm: str, shape: tuple[int, int]) -> None:
        rows = torch.zeros(shape)
        assert_close(reference.row_norm(rows, norm), torch.zeros(shape[0]))
        assert reference.row_norm_vjp(rows, torch.ones(shape[0]), norm).shape == shape
