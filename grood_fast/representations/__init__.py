"""Representations: what a sample becomes before a score says how unusual it is."""

from __future__ import annotations

from grood_fast.representations.activations import StageActivations
from grood_fast.representations.base import Representation
from grood_fast.representations.forward import Logits, PenultimateFeatures, WholeForward
from grood_fast.representations.head_gradient import HeadGradient, HeadGradientFactors
from grood_fast.representations.joint import HeadGradientLogNorms, Joint
from grood_fast.representations.network_gradient import (
    NetworkGradientNorms,
    ParameterNorms,
    ProjectedNetworkGradient,
)
from grood_fast.representations.projected_gradient import ProjectedHeadGradient
from grood_fast.representations.prototype_gradient import PrototypeGradient
from grood_fast.representations.short_circuit import ShortCircuitedLogits

REPRESENTATIONS: dict[str, type[Representation]] = {
    kind.name: kind
    for kind in (
        Logits,
        PenultimateFeatures,
        WholeForward,
        StageActivations,
        HeadGradient,
        HeadGradientLogNorms,
        Joint,
        ProjectedHeadGradient,
        PrototypeGradient,
        ShortCircuitedLogits,
        HeadGradient,
        ProjectedHeadGradient,
        NetworkGradientNorms,
        ProjectedNetworkGradient,
    )
}

__all__ = [
    "REPRESENTATIONS",
    "HeadGradient",
    "HeadGradientFactors",
    "HeadGradientLogNorms",
    "Joint",
    "Logits",
    "NetworkGradientNorms",
    "ParameterNorms",
    "PenultimateFeatures",
    "ProjectedHeadGradient",
    "ProjectedNetworkGradient",
    "PrototypeGradient",
    "Representation",
    "ShortCircuitedLogits",
    "StageActivations",
    "WholeForward",
]
