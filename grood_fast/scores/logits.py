"""Scores on logits: what the softmax alone can tell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grood_fast.errors import InputError
from grood_fast.representations.short_circuit import ShortCircuitedStatistics
from grood_fast.scores.base import Score
from grood_fast.signals import LogitStatistics


class _LogitScore(Score):
    representation = "logits"

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if not 1e-30 < temperature < 1e30:
            raise InputError(f"temperature must be positive and finite, got {temperature}")
        self.temperature = temperature

    def config(self) -> dict[str, Any]:
        return {"temperature": self.temperature}


class MSP(_LogitScore):
    """Maximum softmax probability (Hendrycks & Gimpel 2017): 1 − max_c p_c, in [0, 1 − 1/C].

    Computed as the sum of the other probabilities, so that very confident samples stay apart where
    1 − p would round to 0.

    Args:
        temperature: T of the softmax.
    """

    name = "msp"

    def __call__(self, z: LogitStatistics | Tensor) -> Tensor:
        # ‖p − e_ŷ‖₁ / T = 2 (1 − p_ŷ) / T
        return LogitStatistics.of(z)(self.temperature).l1 * (self.temperature / 2)


class MaxLogit(Score):
    """Maximum logit (Hendrycks et al. 2022): −max_c f_c."""

    name = "maxlogit"
    representation = "logits"

    def __call__(self, z: LogitStatistics | Tensor) -> Tensor:
        return -LogitStatistics.of(z)().maximum


class Energy(_LogitScore):
    """Free energy (Liu et al. 2020): −T·logsumexp(f/T).

    Args:
        temperature: T.
    """

    name = "energy"

    def __call__(self, z: LogitStatistics | Tensor) -> Tensor:
        return LogitStatistics.of(z)(self.temperature).energy


class GEN(Score):
    """Generalised entropy (Liu et al. 2023): Σ over the M largest p of p^γ (1 − p)^γ.

    Args:
        gamma: γ in (0, 1); the paper's 0.1.
        top: M; the paper's 100.
    """

    name = "gen"
    representation = "logits"

    def __init__(self, gamma: float = 0.1, top: int = 100) -> None:
        super().__init__()
        if not 0 < gamma < 1 or top < 1:
            raise InputError(f"gamma must lie in (0, 1) and top be positive, got {gamma} and {top}")
        self.gamma, self.top = gamma, top

    def config(self) -> dict[str, Any]:
        return {"gamma": self.gamma, "top": self.top}

    def __call__(self, z: LogitStatistics | Tensor) -> Tensor:
        statistics = LogitStatistics.of(z)
        summary = statistics()
        largest = statistics.logits
        if largest.shape[1] > self.top:
            largest = largest.topk(self.top, dim=1).values
        else:
            largest = largest.sort(dim=1, descending=True).values
        log_p = largest.to(summary.log_sum_exp.dtype) - summary.log_sum_exp.unsqueeze(1)
        # In logarithms nothing underflows, and the first 1 − p is known better than by subtraction.
        one_minus_p = -torch.expm1(log_p)
        one_minus_p[:, 0] = summary.l1 / 2
        return ((self.gamma * log_p).exp() * one_minus_p.pow(self.gamma)).sum(dim=1)


class EnergyDrop(_LogitScore):
    """How little logsumexp falls when features are short-circuited: E(before) − E(after).

    Reads :class:`~grood_fast.representations.ShortCircuitedLogits`. In-distribution logits rest on
    the few features that are removed, so that they fall far; higher = more OOD.

    Args:
        temperature: T.
    """

    name = "energy_drop"
    representation = "short_circuited_logits"

    def __call__(self, z: ShortCircuitedStatistics) -> Tensor:
        if not isinstance(z, ShortCircuitedStatistics):
            raise InputError(
                "energy_drop compares logits before and after a short-circuit: give it "
                "ShortCircuitedLogits() for a representation."
            )
        before, after = z.before(self.temperature).energy, z(self.temperature).energy
        return before.to(after.dtype) - after

    def on_activations(self) -> Energy:
        """The energy of the logits as they were."""
        return Energy(self.temperature)
