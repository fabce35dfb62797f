"""Detectors: a representation and a score for one classifier, fitted, calibrated and saved."""

from __future__ import annotations

from grood_fast.detectors.base import Detector
from grood_fast.detectors.calibration import Calibration
from grood_fast.detectors.named import (
    DETECTORS,
    GROOD,
    GSC,
    ExGrad,
    GradNorm,
    GradOrth,
    GradPCA,
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
    "Detector",
    "ExGrad",
    "Fitting",
    "GradNorm",
    "GradOrth",
    "GradPCA",
    "LowDimensionalGradient",
    "by_unique_name",
    "detector",
    "fit_together",
    "score_together",
    "with_twins",
]
