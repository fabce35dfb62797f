"""Scores: how unusual a representation is. Higher = more out of distribution, always."""

from __future__ import annotations

from grood_fast.scores.base import Score
from grood_fast.scores.fusion import Fusion
from grood_fast.scores.gaussian import ClassGMM, Mahalanobis, RelativeMahalanobis
from grood_fast.scores.gradient import (
    ExpectedGradientNorm,
    GradientNorm,
    NetworkGradientNorm,
    ProjectedGradientNorm,
)
from grood_fast.scores.knn import KNN
from grood_fast.scores.logits import GEN, MSP, Energy, EnergyDrop, MaxLogit
from grood_fast.scores.norm import Norm
from grood_fast.scores.probe import LinearProbe
from grood_fast.scores.subspace import SubspaceResidual, SubspaceShare
from grood_fast.scores.vim import ViM

SCORES: dict[str, type[Score]] = {
    kind.name: kind
    for kind in (
        MSP,
        MaxLogit,
        Energy,
        GEN,
        GradientNorm,
        NetworkGradientNorm,
        ExpectedGradientNorm,
        ProjectedGradientNorm,
        EnergyDrop,
        Fusion,
        KNN,
        Mahalanobis,
        RelativeMahalanobis,
        ClassGMM,
        ViM,
        SubspaceShare,
        SubspaceResidual,
        Norm,
        LinearProbe,
    )
}

__all__ = [
    "GEN",
    "KNN",
    "MSP",
    "SCORES",
    "ClassGMM",
    "Energy",
    "EnergyDrop",
    "ExpectedGradientNorm",
    "Fusion",
    "GradientNorm",
    "LinearProbe",
    "Mahalanobis",
    "MaxLogit",
    "NetworkGradientNorm",
    "Norm",
    "ProjectedGradientNorm",
    "RelativeMahalanobis",
    "Score",
    "SubspaceResidual",
    "SubspaceShare",
    "ViM",
]
