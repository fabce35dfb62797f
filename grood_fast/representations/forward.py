"""Representations that the forward pass leaves behind."""

from __future__ import annotations

from torch import Tensor

from grood_fast.representations.base import Representation
from grood_fast.signals import LogitStatistics, Need, Signals


class Logits(Representation):
    """The logits (B, C), with their softmax statistics computed once for all scores."""

    name = "logits"

    def __call__(self, signals: Signals) -> LogitStatistics:
        return signals.statistics


class PenultimateFeatures(Representation):
    """The input of the linear head, h (B, D): every gradient detector's activation-space twin."""

    name = "features"
    needs: frozenset[Need] = frozenset({"features"})

    def __call__(self, signals: Signals) -> Tensor:
        return signals.features


class WholeForward(Representation):
    """Logits and penultimate features together, for scores that weigh one against the other."""

    name = "signals"
    needs: frozenset[Need] = frozenset({"features"})

    def __call__(self, signals: Signals) -> Signals:
        return signals
