"""What others do for the same result, written as they do it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def loop_gradnorm(head: nn.Linear, features: Tensor) -> Tensor:
    """GradNorm by one backward pass of the head a sample: OpenOOD's procedure.

    Its loss is the sum of −log softmax over the classes; the score the L1 norm of the weight's
    gradient.
    """
    norms = []
    for row in features:
        head.zero_grad()
        loss = -functional.log_softmax(head(row.unsqueeze(0)), dim=1).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        assert head.weight.grad is not None
        norms.append(head.weight.grad.abs().sum())
    return torch.stack(norms)
