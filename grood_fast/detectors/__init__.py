"""Detectors: a representation and a score for one classifier, fitted, calibrated and saved."""

from __future__ import annotations

from grood_fast.detectors.base import Detector, Fitting, fit_together, score_together
from grood_fast.detectors.calibration import Calibration
from grood_fast.detectors.named import (
    DETECTORS,
    ConfoundingLabel,
    ExGrad,
    GradNorm,
    GradPCA,
    LowDimensionalGradient,
    by_unique_name,
    detector,
)

__all__ = [
    "DETECTORS",
    "Calibration",
    "ConfoundingLabel",
    "Detector",
    "ExGrad",
    "Fitting",
    "GradNorm",
    "GradPCA",
    "LowDimensionalGradient",
    "by_unique_name",
    "detector",
    "fit_together",
    "score_together",
]
