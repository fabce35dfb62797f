"""GradNorm on the last layer: ours against what is in use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peers import import_pytorch_ood
from procedures import loop_gradnorm
from torch import nn

from grood_fast import ops

TABLE = "GradNorm of the head, features given, against what is in use"


@pytest.mark.parametrize("shape", [(256, 10, 512), (64, 1000, 1280)], ids=str)
def test_gradnorm(benchmark: Any, comparisons: Any, shape: tuple[int, int, int]) -> None:
    batch, classes, dim = shape
    torch.manual_seed(0)
    head, features = nn.Linear(dim, classes), torch.randn(batch, dim).relu()

    def ours() -> torch.Tensor:
        with torch.no_grad():
            return -ops.head_gradient_norm(head(features), features, "uniform")

    baselines = {"one backward a sample (OpenOOD's loop)": lambda: loop_gradnorm(head, features)}
    torch.testing.assert_close(-ours(), loop_gradnorm(head, features), rtol=1e-3, atol=1e-2)
    try:
        package = import_pytorch_ood()
    except ImportError:
        package = None
    if package is not None:
        peer = package.detector.GradNorm(head, param_filter=lambda name: name == "weight")
        # Averaged instead of summed over the classes: the same up to the factor C.
        torch.testing.assert_close(peer.predict(features) * classes, ours(), rtol=1e-3, atol=1e-2)
        baselines["vmap(grad) (pytorch-ood's GradNorm)"] = lambda: peer.predict(features)
    comparisons.timed(benchmark, TABLE, f"(B, C, D) = {shape}", ours, baselines, seconds=6)
