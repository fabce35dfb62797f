"""Several scores as one: brought to one scale on held-out samples, then combined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from grood_fast.errors import InputError
from grood_fast.scores.base import Score
from grood_fast.statistics import Reservoir, keeps_state, require_rows, require_same_config

if TYPE_CHECKING:
    from grood_fast.classifier import Classifier

Combination = Literal["mean", "max", "fisher", "stouffer"]
COMBINATIONS: tuple[Combination, ...] = ("mean", "max", "fisher", "stouffer")

TAIL = 0.05
"""Share of the held-out scores, on either side, that the tails are fitted to."""

MOST_LOG_P = 650.0
"""Where the normal quantile of a p-value is taken from its asymptotic form."""


class Fusion(Score):
    """One score of several, (B, M): each on the scale of held-out in-distribution samples.

    A plain conformal p-value cannot be less than 1/(n + 1), so that everything beyond the n samples
    ties. Here p-values follow the samples' distribution function, interpolated, and fall
    exponentially beyond its outer 5 % on either side: they order whatever comes.

    Args:
        combine: ``"mean"`` or ``"max"`` of the scores on the scale; ``"fisher"``: −2 Σ log p;
            ``"stouffer"``: Σ Φ⁻¹(1 − p)/√M.
        scale: ``"moments"``: less the mean, over the standard deviation; ``"ranks"``: −log p.
            Fisher's and Stouffer's combinations are of p-values anyway.
        max_samples: at most this many samples are kept, chosen by their index.
        weights: of the scores, for ``"mean"`` and ``"stouffer"``: Σ w s/Σ w and
            Σ w Φ⁻¹(1 − p)/√Σ w²; 0 leaves a score out. Default: equal.

    Raises:
        InputError: for an unknown setting, or held-out scores that are not finite.
    """

    name: ClassVar[str] = "fusion"
    representation: ClassVar[str] = "detector_scores"
    needs_fit: ClassVar[bool] = True

    def __init__(
        self,
        combine: Combination = "mean",
        scale: Literal["moments", "ranks"] = "moments",
        max_samples: int = 10_000,
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if combine not in COMBINATIONS:
            raise InputError(f"combine must be one of {', '.join(COMBINATIONS)}, got {combine!r}.")
        if scale not in ("moments", "ranks"):
            raise InputError(f"scale must be 'moments' or 'ranks', got {scale!r}.")
        if weights is not None:
            if combine not in ("mean", "stouffer"):
                raise InputError(f"combine={combine!r} takes no weights.")
            if not any(weights) or not all(0 <= weight < math.inf for weight in weights):
                raise InputError(f"weights must be finite, not negative and not all 0: {weights}.")
            weights = [float(weight) for weight in weights]
        self.combine, self.scale, self.max_samples = combine, scale, max_samples
        self.weights: Sequence[float] | None = weights
        self._reservoir = Reservoir(max_samples)

    def config(self) -> dict[str, Any]:
        return {
            "combine": self.combine,
            "scale": self.scale,
            "max_samples": self.max_samples,
            "weights": self.weights,
        }

    def begin(self, classifier: Classifier) -> None:
        self.fitted = {}
        self._reservoir = Reservoir(self.max_samples)

    @keeps_state
    def absorb(self, z: Tensor, labels: Tensor | None, indices: Tensor) -> None:
        """Take in (B, M) scores of held-out in-distribution samples; labels are not read."""
        require_rows(z, None if self.weights is None else len(self.weights), what="scores")
        self._reservoir.absorb({"scores": z.double()}, indices)

    def merge(self, other: Fusion) -> None:
        require_same_config(self, other)
        self._reservoir.merge(other._reservoir)

    @keeps_state
    def finish(self) -> None:
        scores = self._reservoir.finish()["scores"]
        if len(scores) < 2:
            raise InputError("a scale needs at least two held-out samples: give more reference.")
        self._reservoir = Reservoir(self.max_samples)
        deviation = scores.std(dim=0, correction=0)
        self.fitted = {
            "sorted": scores.sort(dim=0).values,
            "mean": scores.mean(dim=0),
            "deviation": deviation.where(deviation > 0, torch.ones_like(deviation)),
        }

    def __call__(self, z: Tensor) -> Tensor:
        """Fused scores (B,) float64 of (B, M) scores; higher = more OOD."""
        self.require_fitted()
        require_rows(z, len(self.fitted["mean"]), what="scores")
        z = z.double()
        if self.combine in ("mean", "max") and self.scale == "moments":
            on_scale = (z - self.fitted["mean"]) / self.fitted["deviation"]
        else:
            columns = zip(z.unbind(dim=1), self.fitted["sorted"].unbind(dim=1), strict=True)
            log_p = torch.stack([log_p_value(some, held_out) for some, held_out in columns], dim=1)
            on_scale = normal_quantile(log_p) if self.combine == "stouffer" else -log_p
        if self.combine == "max":
            return on_scale.amax(dim=1)
        if self.combine == "fisher":
            return 2 * on_scale.sum(dim=1)
        weights = z.new_tensor([1.0] * z.shape[1] if self.weights is None else self.weights)
        parts = on_scale[:, weights > 0] * weights[weights > 0]
        size = weights.sum() if self.combine == "mean" else weights.norm()
        return parts.sum(dim=1) / size


def log_p_value(scores: Tensor, held_out: Tensor) -> Tensor:
    """log of the share of in-distribution samples that score higher, strictly decreasing.

    Between the outer ``TAIL`` shares of the held-out scores the p-value follows their distribution
    function, linearly between distinct scores; beyond it falls, or approaches one, exponentially,
    at the rate of the mean excess there.

    Args:
        scores: (B,) float64.
        held_out: (n,) float64, ascending, n ≥ 2.
    """
    values, counts = torch.unique_consecutive(held_out, return_counts=True)
    above = len(held_out) - counts.cumsum(0)
    p = (above + 0.5 * counts) / len(held_out)  # of a tie, half counts as higher
    size = float((held_out[-1] - held_out[0]).abs()) or 1.0
    low = int((p >= 1 - TAIL).sum().clamp(1, len(values))) - 1
    high = len(values) - int((p <= TAIL).sum().clamp(1, len(values)))
    low, high = min(low, high), max(low, high)
    floor = 1e-6 * size
    excess = (held_out[held_out >= values[high]] - values[high]).mean().clamp(min=floor)
    shortfall = (values[low] - held_out[held_out <= values[low]]).mean().clamp(min=floor)

    above_tail = p[high].log() - (scores - values[high]).clamp(min=0) / excess
    below_tail = torch.log1p(
        -(1 - p[low]) * (-(values[low] - scores).clamp(min=0) / shortfall).exp()
    )
    right = torch.searchsorted(values, scores.contiguous()).clamp(1, max(1, len(values) - 1))
    left = right - 1
    right = right.clamp(max=len(values) - 1)
    width = (values[right] - values[left]).clamp(min=torch.finfo(values.dtype).tiny)
    share = ((scores - values[left]) / width).clamp(0, 1)
    inside = (p[left] + share * (p[right] - p[left])).log()
    result = torch.where(scores > values[high], above_tail, inside)
    result = torch.where(scores < values[low], below_tail, result)
    return torch.where(scores.isnan(), scores, result)


def normal_quantile(log_p: Tensor) -> Tensor:
    """Φ⁻¹(1 − p), of logarithms of p-values far below what float64 holds."""
    usual = -torch.special.ndtri(log_p.clamp(min=-MOST_LOG_P).exp())
    # p = φ(x)/x (1 − 1/x² + …): x² = −2 log p − log 2π − 2 log x, iterated to rounding.
    x = (-2 * log_p).clamp(min=1).sqrt()
    for _ in range(20):
        x = (-2 * log_p - math.log(2 * math.pi) - 2 * x.log() - 2 / x.square()).clamp(min=1).sqrt()
    return torch.where(log_p < -MOST_LOG_P, x, usual)
