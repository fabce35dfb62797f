"""Gradients of all of a network's parameters, for each sample of a batch, without forming them."""

from __future__ import annotations

from grood_fast.network.gradients import LayerGradient
from grood_fast.network.recording import (
    MEMORY_BUDGET,
    NetworkGradients,
    NetworkNeed,
    NetworkPass,
)
from grood_fast.network.selection import DEPTHS, Parameters

__all__ = [
    "DEPTHS",
    "MEMORY_BUDGET",
    "LayerGradient",
    "NetworkGradients",
    "NetworkNeed",
    "NetworkPass",
    "Parameters",
]
