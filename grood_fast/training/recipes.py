"""Everything that decides how a training comes out, and the published choices by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from grood_fast.classifier import Precision
from grood_fast.errors import InputError
from grood_fast.training.objectives import (
    GradientRegularizer,
    Margins,
    OutlierTerm,
    TrainingObjective,
)
from grood_fast.training.sampler import STRATEGIES, Strategy

Method = Literal["ce", "oe", "energy", "greg", "greg+"]
METHODS: tuple[Method, ...] = ("ce", "oe", "energy", "greg", "greg+")


@dataclass(frozen=True)
class TrainingRecipe:
    """The loss, the outliers of a step, the optimiser and its schedule. All of it is JSON.

    Args:
        outliers: the outliers' term: "energy", "oe", or None for cross-entropy alone.
        outlier_weight: λ_S, or the weight of outlier exposure.
        margins: energies between which is neither in nor out; "auto" takes the median energies of
            the ID samples and of the outliers at the start, measured on a few batches.
        regularizer: GReg's gradient term, or None.
        sampling: how a step's outliers are chosen; see :class:`OutlierSampler`.
        outlier_ratio: A/B, outliers a step for each ID sample.
        pool_ratio: candidates a step for each ID sample, from which the outliers are chosen.
        clusters: of k-means; None: as many as ID samples.
        sampling_precision: "bf16" looks at the candidates in bfloat16: faster where the hardware
            multiplies it, and it only has to rank them.
        epochs: passes over the ID loader.
        steps: optimiser steps, instead of epochs.
        optimizer: "sgd" or "adam".
        learning_rate: at the start.
        momentum, nesterov: of "sgd".
        weight_decay: on every parameter.
        schedule: "cosine" falls to ``minimum_learning_rate`` at the end, "step" multiplies by
            ``decay`` at every milestone, "constant" stays.
        milestones: shares of the training, in (0, 1), for "step".
        decay: for "step".
        minimum_learning_rate: for "cosine".
        accumulate: batches of both loaders a step.
        clip: the gradient's largest L2 norm, or None.
        precision: "bf16" runs the network under autocast, the regulariser in float32 all the same.
        average: decay of an exponential moving average of the weights, which is then what is
            validated and returned; None: none.
        accuracy_slack: the best checkpoint is the one of highest AUROC on the OOD validation data
            among those whose accuracy is at most this much below the accuracy before training;
            without OOD validation data that of highest accuracy. The earlier wins a tie.
        patience: steps without a sample in the regulariser after which it warns.
        seed: of everything random.

    Raises:
        InputError: a name is unknown or a number out of range.
    """

    outliers: OutlierTerm | None = "energy"
    outlier_weight: float = 0.1
    margins: Margins | Literal["auto"] = field(default_factory=Margins)
    regularizer: GradientRegularizer | None = None
    sampling: Strategy = "random"
    outlier_ratio: float = 1.0
    pool_ratio: float = 6.0
    clusters: int | None = None
    sampling_precision: Precision = "fp32"
    epochs: int = 10
    steps: int | None = None
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = 1e-3
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-4
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    milestones: tuple[float, ...] = ()
    decay: float = 0.1
    minimum_learning_rate: float = 1e-6
    accumulate: int = 1
    clip: float | None = None
    precision: Precision = "fp32"
    average: float | None = None
    accuracy_slack: float = 0.01
    patience: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))
        self.objective(Margins())  # checks the terms
        for name, value, known in (
            ("optimizer", self.optimizer, ("sgd", "adam")),
            ("schedule", self.schedule, ("cosine", "step", "constant")),
            ("precision", self.precision, ("fp32", "bf16")),
            ("sampling_precision", self.sampling_precision, ("fp32", "bf16")),
            ("sampling", self.sampling, STRATEGIES),
        ):
            if value not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}; got {value!r}.")
        if isinstance(self.margins, str) and self.margins != "auto":
            raise InputError(f'margins are Margins(inside, outside) or "auto", not {self.margins}.')
        for name in ("outlier_ratio", "pool_ratio", "epochs", "learning_rate", "accumulate"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive, got {getattr(self, name)}.")
        for name in ("steps", "clip", "clusters"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive or None, got {getattr(self, name)}.")
        if self.average is not None and not 0 < self.average < 1:
            raise InputError(f"average must lie between 0 and 1, got {self.average}.")
        if not all(0 < milestone < 1 for milestone in self.milestones):
            raise InputError(f"milestones are shares of the training, got {self.milestones}.")
        if self.seed < 0:
            raise InputError(f"seed must not be negative, got {self.seed}.")

    def objective(self, margins: Margins) -> TrainingObjective:
        """The loss, at these margins."""
        return TrainingObjective(self.outliers, self.outlier_weight, margins, self.regularizer)

    def learning_rate_at(self, progress: float) -> float:
        """The learning rate at a share of the training, in [0, 1)."""
        if self.schedule == "cosine":
            span = self.learning_rate - self.minimum_learning_rate
            return self.minimum_learning_rate + span * (1 + math.cos(math.pi * progress)) / 2
        if self.schedule == "step":
            return self.learning_rate * self.decay ** sum(m <= progress for m in self.milestones)
        return self.learning_rate

    @property
    def score(self) -> str:
        """The detector whose AUROC is watched: the energy, or after outlier exposure MSP."""
        return "msp" if self.outliers == "oe" else "energy"

    def config(self) -> dict[str, Any]:
        """JSON-serialisable; see :meth:`of`."""
        return {**asdict(self), "milestones": list(self.milestones)}

    def changed(self, changes: Mapping[str, Any]) -> TrainingRecipe:
        """The recipe with some fields changed; margins and regulariser also as mappings.

        A mapping for the regulariser changes the one that is there; True means the published one,
        False or None none.

        Raises:
            InputError: an unknown field, or a value out of range.
        """
        known = {f.name for f in fields(self)}
        if unknown := sorted(set(changes) - known):
            raise InputError(
                f"a training recipe has no {', '.join(unknown)}; known: {', '.join(sorted(known))}."
            )
        values = dict(changes)
        try:
            if isinstance(values.get("margins"), Mapping):
                values["margins"] = Margins(**values["margins"])
            regularizer = values.get("regularizer")
            if isinstance(regularizer, Mapping):
                there = self.regularizer or GradientRegularizer()
                values["regularizer"] = replace(there, **regularizer)
            elif isinstance(regularizer, bool):
                values["regularizer"] = GradientRegularizer() if regularizer else None
            return replace(self, **values)
        except TypeError as error:
            raise InputError(f"this training recipe makes no sense: {error}.") from error

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> TrainingRecipe:
        """The recipe that :meth:`config` wrote down."""
        return cls().changed(config)


_ENERGY = TrainingRecipe(
    margins=Margins(-23.0, -5.0), outlier_ratio=2.0, weight_decay=5e-4, nesterov=True
)
_GREG = TrainingRecipe(regularizer=GradientRegularizer(), epochs=20)

RECIPES: dict[str, TrainingRecipe] = {
    "ce": TrainingRecipe(outliers=None),
    "energy": _ENERGY,
    "oe": replace(_ENERGY, outliers="oe", outlier_weight=0.5),
    "greg": _GREG,
    "greg+": replace(
        _GREG,
        sampling="two_way",
        outlier_ratio=2.0,
        epochs=60,
        learning_rate=0.1,
        schedule="step",
        milestones=(50 / 60,),
    ),
    "greg+finetune": replace(_GREG, sampling="two_way", outlier_ratio=2.0),
    "greg+imagenet": replace(
        _GREG,
        sampling="two_way",
        outlier_ratio=2.0,
        optimizer="adam",
        learning_rate=1e-4,
        schedule="step",
        milestones=(0.5,),
    ),
}
"""By name:

* "energy", "oe": Liu et al. (2020): 10 epochs of fine-tuning, ID batches of 128 with 256 outliers,
  margins −23 and −5 as for CIFAR-10 (their CIFAR-100 has −27); outlier exposure at weight 0.5.
* "greg": fine-tuning for 20 epochs with as many outliers as ID samples, λ_S 0.1, λ_grad 1 on the
  authors' scale, margins −25 and −7. The learning rate, which the paper's sources leave open, is
  energy fine-tuning's.
* "greg+": from scratch, 60 epochs in ID batches of 64 at learning rate 0.1, a tenth of it for the
  last ten; 384 candidates a step in 64 clusters, of which 128 outliers.
* "greg+finetune": GReg's fine-tuning with GReg+'s outliers. Our own combination.
* "greg+imagenet": Adam at 1e-4, then 1e-5, ID batches of 32. The number of epochs is ours.
* "ce": cross-entropy alone, to compare with: what the epochs do without outliers.
"""


def recipe_for(
    method: str = "greg",
    recipe: TrainingRecipe | str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> TrainingRecipe:
    """A method's recipe with changes.

    Args:
        method: decides the loss and the sampling where ``recipe`` is None.
        recipe: a recipe, or a name in :data:`RECIPES`; overrides ``method``.
        changes: fields to change.

    Raises:
        InputError: an unknown name or field.
    """
    chosen = recipe if recipe is not None else method
    if isinstance(chosen, str):
        if chosen not in RECIPES:
            raise InputError(f"unknown recipe {chosen!r}; known: {', '.join(RECIPES)}.")
        chosen = RECIPES[chosen]
    return chosen.changed(changes or {})
