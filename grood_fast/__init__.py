"""Out-of-distribution scores for PyTorch classifiers, from their gradients.

``score(model, loader)`` gives one number a sample; higher = more out of distribution, always.
Everything here is imported when it is first used, so that ``grood_fast._kernels``, the kernels on
NumPy arrays, works without torch.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grood_fast.detectors import DETECTORS as DETECTORS
    from grood_fast.detectors import GROOD as GROOD
    from grood_fast.detectors import GSC as GSC
    from grood_fast.detectors import Calibration as Calibration
    from grood_fast.detectors import ConfoundingLabel as ConfoundingLabel
    from grood_fast.detectors import Detector as Detector
    from grood_fast.detectors import ExGrad as ExGrad
    from grood_fast.detectors import Fused as Fused
    from grood_fast.detectors import GradNorm as GradNorm
    from grood_fast.detectors import GradOrth as GradOrth
    from grood_fast.detectors import GradPCA as GradPCA
    from grood_fast.detectors import JointDensity as JointDensity
    from grood_fast.detectors import LowDimensionalGradient as LowDimensionalGradient
    from grood_fast.detectors import detector as detector
    from grood_fast.detectors import ensemble as ensemble
    from grood_fast.errors import GroodFastError as GroodFastError
    from grood_fast.evaluation import Report as Report
    from grood_fast.evaluation import evaluate as evaluate
    from grood_fast.evaluation import select as select
    from grood_fast.evaluation import variants as variants
    from grood_fast.objectives import Objective as Objective
    from grood_fast.representations import HeadGradient as HeadGradient
    from grood_fast.representations import HeadGradientLogNorms as HeadGradientLogNorms
    from grood_fast.representations import Joint as Joint
    from grood_fast.representations import Logits as Logits
    from grood_fast.representations import NetworkGradientNorms as NetworkGradientNorms
    from grood_fast.representations import PenultimateFeatures as PenultimateFeatures
    from grood_fast.representations import ProjectedHeadGradient as ProjectedHeadGradient
    from grood_fast.representations import ProjectedNetworkGradient as ProjectedNetworkGradient
    from grood_fast.representations import PrototypeGradient as PrototypeGradient
    from grood_fast.representations import ShortCircuitedLogits as ShortCircuitedLogits
    from grood_fast.representations import StageActivations as StageActivations
    from grood_fast.results import Scores as Scores
    from grood_fast.results import ScoreTable as ScoreTable
    from grood_fast.scores import GEN as GEN
    from grood_fast.scores import KNN as KNN
    from grood_fast.scores import MSP as MSP
    from grood_fast.scores import ClassGMM as ClassGMM
    from grood_fast.scores import Energy as Energy
    from grood_fast.scores import EnergyDrop as EnergyDrop
    from grood_fast.scores import ExpectedGradientNorm as ExpectedGradientNorm
    from grood_fast.scores import Fusion as Fusion
    from grood_fast.scores import GradientNorm as GradientNorm
    from grood_fast.scores import LinearProbe as LinearProbe
    from grood_fast.scores import Mahalanobis as Mahalanobis
    from grood_fast.scores import MaxLogit as MaxLogit
    from grood_fast.scores import Norm as Norm
    from grood_fast.scores import ProjectedGradientNorm as ProjectedGradientNorm
    from grood_fast.scores import RelativeMahalanobis as RelativeMahalanobis
    from grood_fast.scores import Score as Score
    from grood_fast.scores import SubspaceResidual as SubspaceResidual
    from grood_fast.scores import SubspaceShare as SubspaceShare
    from grood_fast.scores import ViM as ViM
    from grood_fast.scoring import fit as fit
    from grood_fast.scoring import load as load
    from grood_fast.scoring import score as score
    from grood_fast.training import GradientRegularizer as GradientRegularizer
    from grood_fast.training import Margins as Margins
    from grood_fast.training import OutlierSampler as OutlierSampler
    from grood_fast.training import Trainer as Trainer
    from grood_fast.training import TrainingRecipe as TrainingRecipe
    from grood_fast.training import train as train

_PUBLIC = {
    "detectors": (
        "Calibration",
        "DETECTORS",
        "ConfoundingLabel",
        "Detector",
        "ExGrad",
        "Fused",
        "GROOD",
        "GSC",
        "GradNorm",
        "GradOrth",
        "GradPCA",
        "JointDensity",
        "LowDimensionalGradient",
        "detector",
        "ensemble",
    ),
    "errors": ("GroodFastError",),
    "evaluation": ("Report", "evaluate", "select", "variants"),
    "objectives": ("Objective",),
    "representations": (
        "HeadGradient",
        "HeadGradientLogNorms",
        "Joint",
        "Logits",
        "PenultimateFeatures",
        "ProjectedHeadGradient",
        "PrototypeGradient",
        "ShortCircuitedLogits",
        "StageActivations",
        "Logits",
        "NetworkGradientNorms",
        "PenultimateFeatures",
        "ProjectedHeadGradient",
        "ProjectedNetworkGradient",
    ),
    "results": ("ScoreTable", "Scores"),
    "scores": (
        "ClassGMM",
        "Energy",
        "EnergyDrop",
        "ExpectedGradientNorm",
        "Fusion",
        "GEN",
        "GradientNorm",
        "KNN",
        "LinearProbe",
        "MSP",
        "Mahalanobis",
        "MaxLogit",
        "Norm",
        "ProjectedGradientNorm",
        "RelativeMahalanobis",
        "Score",
        "SubspaceResidual",
        "SubspaceShare",
        "ViM",
    ),
    "scoring": ("fit", "load", "score"),
    "training": (
        "GradientRegularizer",
        "Margins",
        "OutlierSampler",
        "Trainer",
        "TrainingRecipe",
        "train",
    ),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [*_HOME]

try:
    __version__ = version("grood-fast")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "unknown"


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
