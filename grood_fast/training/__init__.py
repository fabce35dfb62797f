"""Training with auxiliary outliers: GReg, GReg+, and the baselines they are held against."""

from __future__ import annotations

from grood_fast.training.checkpoints import load_weights
from grood_fast.training.objectives import GradientRegularizer, Margins, TrainingObjective
from grood_fast.training.recipes import METHODS, RECIPES, TrainingRecipe
from grood_fast.training.sampler import OutlierSampler
from grood_fast.training.trainer import Trainer, TrainingResult, train

__all__ = [
    "METHODS",
    "RECIPES",
    "GradientRegularizer",
    "Margins",
    "OutlierSampler",
    "Trainer",
    "TrainingObjective",
    "TrainingRecipe",
    "TrainingResult",
    "load_weights",
    "train",
]
