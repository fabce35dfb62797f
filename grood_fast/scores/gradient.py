"""Scores on the last layer's gradient, in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grood_fast import ops
from grood_fast.errors import InputError
from grood_fast.representations.head_gradient import HeadGradientFactors
from grood_fast.representations.network_gradient import ParameterNorms
from grood_fast.scores.base import Score


class GradientNorm(Score):
    """Norm of the last layer's gradient, with the sign its objective calls for.

    For the objectives whose gradient is large on ID samples (energy, uniform, max logit, sum of
    logits) the score is −‖dL/dW‖, for the others +‖dL/dW‖.

    Args:
        norm: ``"l1"``, ``"l2"`` or ``"linf"``, over the entries of the gradient.
    """

    name = "gradient_norm"
    representation = "head_gradient"

    def __init__(self, norm: str = "l1") -> None:
        super().__init__()
        if norm not in ops.NORMS:
            raise InputError(f"unknown norm {norm!r}; known: {', '.join(ops.NORMS)}")
        self.norm = norm

    def config(self) -> dict[str, Any]:
        return {"norm": self.norm}

    def __call__(self, z: HeadGradientFactors) -> Tensor:
        norm = z.objective.head_gradient_norm(z.statistics.logits, z.features, self.norm, z.bias)
        return norm if z.objective.norm_sign > 0 else -norm


class NetworkGradientNorm(Score):
    """Norm of the gradient of many parameters together, with the sign its objective calls for.

    Reads the norms of the single parameters: their sum where those are L1 norms, the root of the
    sum of their squares where they are L2 norms. Higher = more OOD, as for :class:`GradientNorm`.
    """

    name = "network_gradient_norm"
    representation = "network_gradient_norms"

    def __call__(self, z: ParameterNorms) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(z.values, ord=1 if z.norm == "l1" else 2, dim=1)
        return norm if z.objective.norm_sign > 0 else -norm


class ExpectedGradientNorm(Score):
    """Expected L1 norm of the cross-entropy gradient under the model's own labels (ExGrad).

    E_{y∼p} ‖(p − e_y) hᵀ‖₁ / T = 2 ‖h‖₁ (1 − Σ_c p_c²) / T, after Igoe et al. (2022). Large =
    uncertain = OOD: that the norm is not normalised and not negated is our reading. Of the
    objective whose factors it is given only the temperature counts.
    """

    name = "expected_gradient_norm"
    representation = "head_gradient"

    def __call__(self, z: HeadGradientFactors) -> Tensor:
        temperature = z.objective.temperature
        summary = z.statistics(temperature)
        # With s = 1 − p_ŷ: ‖p − e_ŷ‖₁ = 2s and ‖p − e_ŷ‖₂² = s² + Σ_{c≠ŷ} p_c², hence
        # 1 − Σ p² = 2s − ‖p − e_ŷ‖₂², which loses no digits where the model is sure.
        uncertainty = summary.l1 - temperature * summary.l2.square()
        features = z.features.to(uncertainty.dtype)  # half precision cannot hold the sum
        return 2 * (ops.reference.row_norm(features, "l1") + z.bias) * uncertainty
