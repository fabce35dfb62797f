"""The last layer's gradient, kept as the factors of a rank-one matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grood_fast.objectives import Objective
from grood_fast.representations.base import Representation
from grood_fast.signals import LogitStatistics, Need, Signals


@dataclass(frozen=True)
class HeadGradientFactors:
    """dL/dW = δ hᵀ of one batch, not formed: δ follows from the logits where it is needed.

    Attributes:
        objective: whose gradient.
        statistics: the batch's logits (B, C) and their softmax statistics.
        features: (B, D) h, float64 exactly if the logits are.
        bias: whether the bias' gradient δ belongs to it: then h stands for [h; 1].
    """

    objective: Objective
    statistics: LogitStatistics
    features: Tensor
    bias: bool


class HeadGradient(Representation):
    """Gradient of an objective with respect to the linear head, one sample at a time.

    Args:
        objective: an :class:`~grood_fast.objectives.Objective`, its name or its ``config()``;
            default: GradNorm's.
        bias: whether the bias' gradient counts too (the published detectors take the weight alone).
    """

    name = "head_gradient"
    needs: frozenset[Need] = frozenset({"features"})

    def __init__(
        self, objective: Objective | str | dict[str, Any] = "uniform", bias: bool = False
    ) -> None:
        super().__init__()
        self.objective = Objective.of(objective)
        self.bias = bias

    def config(self) -> dict[str, Any]:
        return {"objective": self.objective.config(), "bias": self.bias}

    def activations(self) -> HeadGradient | None:
        """The gradient of the summed logits, 1hᵀ, which carries the features and nothing else."""
        if self.objective.name == "logit_sum":
            return None
        return HeadGradient("logit_sum", self.bias)

    def __call__(self, signals: Signals) -> HeadGradientFactors:
        features, dtype = signals.features, signals.logits.dtype
        if torch.float64 in (features.dtype, dtype):  # a model may cast its output
            features = features.to(dtype)
        return HeadGradientFactors(self.objective, signals.statistics, features, self.bias)
