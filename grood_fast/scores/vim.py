"""Virtual-logit matching: the residual off the principal subspace, against the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from grood_fast.errors import FitWarning, InputError, warn
from grood_fast.scores.base import Score
from grood_fast.statistics import (
    Moments,
    Reservoir,
    keeps_state,
    require_rows,
    require_same_config,
)

if TYPE_CHECKING:
    from grood_fast.classifier import Classifier


class ViM(Score):
    """Virtual logit less log-sum-exp of the logits; higher = more OOD.

    Wang et al., "ViM: Out-Of-Distribution with Virtual-logit Matching", CVPR 2022:
    alpha ‖Rᵀ(h - o)‖ - logsumexp(f). The origin o = -W⁺b is where the head's logits vanish (in the
    least-squares sense); R spans the directions beyond the ``dim`` leading eigenvectors of
    E[(h - o)(h - o)ᵀ]; alpha = mean of the largest logit over mean of ‖Rᵀ(h - o)‖, both over the
    reference, puts the two terms on one scale.

    Reads each batch's ``.logits`` (B, C) and ``.features`` (B, D). Fitted in float64 in one pass,
    scored in float32. NaN among them gives a NaN score.

    Args:
        dim: size of the principal subspace, between 0 and D. None takes the paper's choice: 1000
            for D ≥ 2048, 512 for D ≥ 768, else D // 2.
        max_samples: alpha is taken over at most this many reference samples, chosen by their index
            (D + 1 numbers each while fitting); it is exact when they are all.

    Raises:
        InputError: for a dimension out of range, or reference features that are not finite or
            leave no residual.
    """

    name: ClassVar[str] = "vim"
    representation: ClassVar[str] = "signals"
    needs_fit: ClassVar[bool] = True

    def __init__(self, dim: int | None = None, max_samples: int = 50_000) -> None:
        super().__init__()
        if dim is not None and dim < 0:
            raise InputError(f"dim must not be negative, got {dim}.")
        self.dim = dim
        self.max_samples = max_samples
        self._origin: Tensor | None = None
        self._moments = Moments()
        self._reservoir = Reservoir(max_samples)

    def config(self) -> dict[str, Any]:
        return {"dim": self.dim, "max_samples": self.max_samples}

    @keeps_state
    def begin(self, classifier: Classifier) -> None:
        """Start a pass; the origin comes from the head's ``weight`` (C, D) and ``bias`` (C,)."""
        weight, bias = classifier.weight.double(), classifier.bias
        self.fitted = {}
        self._origin = (
            weight.new_zeros(weight.shape[1])
            if bias is None
            else -torch.linalg.pinv(weight) @ bias.double()
        )
        self._moments = Moments(weight.shape[1])
        self._reservoir = Reservoir(self.max_samples)

    @keeps_state
    def absorb(self, z: Any, labels: Tensor | None, indices: Tensor) -> None:
        """Take in one reference batch with ``z.logits`` and ``z.features``; labels are not read."""
        require_rows(z.logits, what="logits")
        self._moments.absorb(z.features, indices)
        largest = z.logits.float().amax(dim=1)
        self._reservoir.absorb({"features": z.features.float(), "largest_logit": largest}, indices)

    def merge(self, other: ViM) -> None:
        require_same_config(self, other)
        self._moments.merge(other._moments)
        self._reservoir.merge(other._reservoir)

    @keeps_state
    def finish(self) -> None:
        second_moment = self._moments.covariance()
        mean, origin = self._moments.mean, self._origin
        assert mean is not None
        if origin is None:
            raise InputError("ViM needs the classifier's head: call begin(classifier) first.")
        origin = origin.to(mean.device)
        shift = mean - origin
        _, directions = torch.linalg.eigh(second_moment.addr(shift, shift))
        residual = directions[:, : len(mean) - self._principal_dim(len(mean))]
        sample = self._reservoir.finish()
        self.fitted = {"origin": origin.float(), "residual": residual.float().contiguous()}
        norms = torch.cat(
            [self._residual_norm(part) for part in torch.split(sample["features"], 4096)]
        )
        mean_norm, mean_logit = norms.double().mean(), sample["largest_logit"].double().mean()
        rounding = torch.finfo(torch.float32).eps * float(shift.norm())
        if float(mean_norm) <= rounding:
            self.fitted = {}
            raise InputError(
                "the reference features lie within the principal subspace of dimension "
                f"{len(mean) - residual.shape[1]}, so no residual is left: give a smaller dim."
            )
        if float(mean_logit) <= 0:
            warn(
                f"the mean largest logit of the reference is {float(mean_logit):.3g}, so alpha is "
                "not positive and larger residuals lower the score: ViM does not suit this head.",
                FitWarning,
            )
        self.fitted["alpha"] = (mean_logit / mean_norm).float()
        self._moments, self._reservoir = Moments(), Reservoir(self.max_samples)

    def _principal_dim(self, features: int) -> int:
        if self.dim is None:
            return 1000 if features >= 2048 else 512 if features >= 768 else features // 2
        if self.dim >= features:
            raise InputError(
                f"dim={self.dim} leaves no residual of {features} features: give less than that."
            )
        return self.dim

    def _residual_norm(self, features: Tensor) -> Tensor:
        shifted = features.float() - self.fitted["origin"]
        norm: Tensor = torch.linalg.vector_norm(shifted @ self.fitted["residual"], dim=1)
        return norm

    def __call__(self, z: Any) -> Tensor:
        """Scores of one batch's logits (B, C) and features (B, D): (B,) float32."""
        self.require_fitted()
        require_rows(z.features, len(self.fitted["origin"]))
        require_rows(z.logits, what="logits")
        virtual_logit = self.fitted["alpha"] * self._residual_norm(z.features)
        return virtual_logit - torch.logsumexp(z.logits.float(), dim=1)
