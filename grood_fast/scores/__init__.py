"""Scores: how unusual a representation is. Higher = more out of distribution, always."""

from __future__ import annotations

from grood_fast.scores.base import Score
from grood_fast.scores.gaussian import ClassGMM, Mahalanobis, RelativeMahalanobis
from grood_fast.scores.gradient import ExpectedGradientNorm, GradientNorm, NetworkGradientNorm
from grood_fast.scores.knn import KNN
from grood_fast.scores.logits import GEN, MSP, Energy, MaxLogit
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
        KNN,
        Mahalanobis,
        RelativeMahalanobis,
        ClassGMM,
        ViM,
        SubspaceShare,
        SubspaceResidual,
    )
}

__all__ = [
    "GEN",
    "KNN",
    "MSP",
    "SCORES",
    "ClassGMM",
    "Energy",
    "ExpectedGradientNorm",
    "GradientNorm",
    "Mahalanobis",
    "MaxLogit",
    "NetworkGradientNorm",
    "RelativeMahalanobis",
    "Score",
    "SubspaceResidual",
    "SubspaceShare",
    "ViM",
]
