"""The compiled ops against the chain of torch ops that computes the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grood_fast import ops
from grood_fast.ops import reference

NORM = "head_gradient_norm: GradNorm's L1 norm, against the one-line closed form in PyTorch"
GRADIENT = "logit_gradient: energy, argmax, δ and its L1 and L2 norms, against the chain of ops"
SWEEP = "head_gradient_norm over a grid, against the one-line closed form in PyTorch"


def one_line_gradnorm(logits: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    classes = logits.shape[1]
    return (classes * logits.softmax(dim=1) - 1).abs().sum(dim=1) * features.abs().sum(dim=1)


def chain(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    energy = -logits.logsumexp(dim=1)
    predicted = logits.argmax(dim=1, keepdim=True)
    delta = logits.softmax(dim=1)
    delta.scatter_add_(1, predicted, torch.full_like(energy, -1.0).unsqueeze(1))
    return energy, predicted, delta, delta.abs().sum(dim=1), delta.norm(dim=1)


def inputs(batch: int, classes: int, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        3 * torch.randn(batch, classes, generator=generator),
        torch.randn(batch, features, generator=generator).relu(),
    )


@pytest.mark.parametrize("shape", [(256, 10, 512), (256, 1000, 2048)], ids=str)
def test_head_gradient_norm(
    benchmark: Any, comparisons: Any, threads: int, shape: tuple[int, int, int]
) -> None:
    logits, features = inputs(*shape)
    torch.testing.assert_close(
        ops.head_gradient_norm(logits, features, "uniform"), one_line_gradnorm(logits, features)
    )
    comparisons.timed(
        benchmark,
        NORM,
        f"(B, C, D) = {shape}, {threads} thread(s)",
        lambda: ops.head_gradient_norm(logits, features, "uniform"),
        {"one line of PyTorch": lambda: one_line_gradnorm(logits, features)},
        bar=2.0,
    )


@pytest.mark.parametrize("classes", [2, 10, 100, 1000, 20000])
@pytest.mark.parametrize("features", [128, 2048])
def test_head_gradient_norm_sweep(
    benchmark: Any, comparisons: Any, threads: int, classes: int, features: int
) -> None:
    for batch in (1, 32, 1024) if classes < 20000 else (1, 32, 128):
        logits, h = inputs(batch, classes, features)
        comparisons.timed(
            benchmark if batch == 32 else _Unrecorded(),
            SWEEP,
            f"({batch}, {classes}, {features}), {threads} thread(s)",
            lambda logits=logits, h=h: ops.head_gradient_norm(logits, h, "uniform"),
            {"one line of PyTorch": lambda logits=logits, h=h: one_line_gradnorm(logits, h)},
            bar=1.0,
            seconds=0.4,
        )


@pytest.mark.parametrize("classes", [10, 1000, 20000])
def test_logit_gradient(benchmark: Any, comparisons: Any, threads: int, classes: int) -> None:
    logits, _ = inputs(256, classes, 1)
    outputs = ("energy", "argmax", "delta", "l1", "l2")
    ours = ops.logit_gradient(logits, "predicted", outputs=outputs)
    torch.testing.assert_close(
        ours.delta, reference.logit_gradient(logits, "predicted"), atol=1e-6, rtol=1e-4
    )
    comparisons.timed(
        benchmark,
        GRADIENT,
        f"(B, C) = (256, {classes}), {threads} thread(s)",
        lambda: ops.logit_gradient(logits, "predicted", outputs=outputs),
        {"chain of torch ops": lambda: chain(logits)},
        bar=2.0 if classes == 1000 else None,
    )


class _Unrecorded:
    """Stands in for the benchmark fixture, which takes one record a test."""

    def __init__(self) -> None:
        self.extra_info: dict[str, float] = {}

    def pedantic(self, *_: Any, **__: Any) -> None:
        pass
