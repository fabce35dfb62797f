"""Scores on the last layer's gradient, in closed form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grood_fast import ops
from grood_fast.errors import InputError
from grood_fast.representations.head_gradient import HeadGradientFactors
from grood_fast.representations.network_gradient import ParameterNorms
from grood_fast.scores.base import Score
from grood_fast.statistics import Moments, keeps_state, require_same_config

if TYPE_CHECKING:
    from grood_fast.classifier import Classifier


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

    def on_activations(self) -> GradientNorm:
        """The factor ‖h‖₁ alone: the softmax is the gradient's part."""
        return GradientNorm("l1")


class ProjectedGradientNorm(Score):
    """Norm of the last layer's gradient inside the subspace of the reference's features.

    ‖δ hᵀ B‖_F = ‖δ‖₂ ‖Bᵀh‖₂ (GradOrth, Behpour et al. 2023), with B the leading right-singular
    vectors of the reference's features, which are not centred. With the sign of
    :class:`GradientNorm`: for the uniform target, large = ID, so that it is negated.

    Args:
        kept_share: of the features' sum of squares; as many vectors as it takes.

    Raises:
        InputError: for a share out of (0, 1], or features that are not finite.
    """

    name = "projected_gradient_norm"
    representation = "head_gradient"
    needs_fit = True

    def __init__(self, kept_share: float = 0.97) -> None:
        super().__init__()
        if not 0 < kept_share <= 1:
            raise InputError(f"kept_share must lie in (0, 1], got {kept_share}.")
        self.kept_share = kept_share
        self._moments = Moments()

    def config(self) -> dict[str, Any]:
        return {"kept_share": self.kept_share}

    def begin(self, classifier: Classifier) -> None:
        self.fitted = {}
        self._moments = Moments()

    @keeps_state
    def absorb(self, z: HeadGradientFactors, labels: Tensor | None, indices: Tensor) -> None:
        """Take in one reference batch; labels are not read."""
        self._moments.absorb(z.features, indices)

    def merge(self, other: ProjectedGradientNorm) -> None:
        require_same_config(self, other)
        self._moments.merge(other._moments)

    @keeps_state
    def finish(self) -> None:
        second_moment, mean = self._moments.covariance(), self._moments.mean
        assert mean is not None
        second_moment = second_moment.addr(mean, mean)
        squares, directions = torch.linalg.eigh(second_moment)
        squares, directions = squares.flip(0).clamp(min=0), directions.flip(1)
        shares = squares.cumsum(0) / squares.sum().clamp(min=torch.finfo(squares.dtype).tiny)
        kept = min(int((shares < self.kept_share * (1 - 1e-12)).sum()) + 1, len(squares))
        self.fitted = {"basis": directions[:, :kept].T.contiguous()}
        self._moments = Moments()

    def __call__(self, z: HeadGradientFactors) -> Tensor:
        self.require_fitted()
        delta = z.objective.logit_gradient(z.statistics.logits, outputs=("l2",)).l2
        assert delta is not None
        inside = z.features.to(delta.dtype) @ self.fitted["basis"].to(delta.dtype).T
        squares = inside.square().sum(dim=1) + (1 if z.bias else 0)
        norm = delta * squares.sqrt()
        return norm if z.objective.norm_sign > 0 else -norm
