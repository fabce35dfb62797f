"""Detectors: a representation and a score for one classifier, fitted, calibrated and saved."""

from __future__ import annotations

from grood_fast.detectors.base import Detector
from grood_fast.detectors.calibration import Calibration
from grood_fast.detectors.fusion import DetectorScores, ensemble
from grood_fast.detectors.named import (
    DETECTORS,
    GROOD,
    GSC,
    ConfoundingLabel,
    ExGrad,
    Fused,
    GradNorm,
    GradOrth,
    GradPCA,
    JointDensity,
    LowDimensionalGradient,
    by_unique_name,
    detector,
    with_twins,
)
from grood_fast.detectors.passes import Fitting, fit_together, score_together

__all__ = [
    "DETECTORS",
    "GROOD",
    "GSC",
    "Calibration",
    "ConfoundingLabel",
    "Detector",
    "DetectorScores",
    "ExGrad",
    "Fitting",
    "Fused",
    "GradNorm",
    "GradOrth",
    "GradPCA",
    "JointDensity",
    "LowDimensionalGradient",
    "by_unique_name",
    "detector",
    "ensemble",
    "fit_together",
    "score_together",
    "with_twins",
]
