"""Logit scores for representations that have no logits: a linear classifier is trained on them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from grood_fast.errors import InputError
from grood_fast.progress import bar
from grood_fast.scores.base import Score
from grood_fast.scores.logits import GEN, MSP, Energy, MaxLogit
from grood_fast.statistics import (
    Reservoir,
    checked_labels,
    keeps_state,
    require_rows,
    require_same_config,
)

if TYPE_CHECKING:
    from grood_fast.classifier import Classifier

LOGIT_SCORES: dict[str, type[Score]] = {kind.name: kind for kind in (MSP, MaxLogit, Energy, GEN)}

MOMENTUM = 0.9


class LinearProbe(Score):
    """A score of the logits of a linear classifier that is trained on the representation.

    Wu et al. (arXiv 2310.17163) classify the low-dimensional gradient by batch normalisation and
    a linear layer, trained with the reference's labels, and score its logits. By the settings:

    - MSP, MaxLogit, Energy, GEN: ``score``.
    - ODIN (Liang et al. 2018): ``score=MSP(temperature=1000), perturbation=ε``; every coordinate
      moves by ε in the direction that raises the largest probability, as ODIN's pixels do.
    - ReAct (Sun et al. 2021): ``shaping="react"``; coordinates above the ``quantile`` of the
      reference's, all coordinates together, are set to it.
    - BATS (Zhu et al. 2022), our reading: ``shaping="bats"``; coordinates are confined to
      ``deviations`` standard deviations about their mean over the reference.

    Whatever the paper's code takes from test samples (its ReAct threshold) is taken from the
    reference here. The classifier is trained by stochastic gradient descent with Nesterov momentum
    and a cosine schedule; started at zero and with a seeded order, it comes out the same each time.

    Args:
        score: one of the logit scores above, its name, or ``{"name": ..., "config": ...}``.
        shaping: ``"react"``, ``"bats"`` or None.
        quantile: ReAct's, in (0, 1).
        deviations: BATS', positive.
        unshaped: the first so many coordinates are left as they are (the paper: about C).
        perturbation: ODIN's ε, in units of the representation.
        epochs: passes over the kept samples; the paper's 10.
        batch_size: samples a step; the paper's are 16 and 6.
        learning_rate: the first; the authors have used 0.1 and 0.01.
        weight_decay: the paper's.
        max_samples: reference samples to train on, class-balanced.
        seed: of the samples' order.

    Raises:
        InputError: for settings out of range; when finishing, fewer than two classes or samples.
    """

    name: ClassVar[str] = "linear_probe"
    representation: ClassVar[str] = "features"
    needs_fit: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True

    def __init__(
        self,
        score: Score | str | dict[str, Any] = "energy",
        shaping: Literal["react", "bats"] | None = None,
        quantile: float = 0.9,
        deviations: float = 1.0,
        unshaped: int = 0,
        perturbation: float = 0.0,
        epochs: int = 10,
        batch_size: int = 64,
        learning_rate: float = 0.01,
        weight_decay: float = 5e-4,
        max_samples: int = 50_000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.score = _logit_score(score)
        if shaping not in (None, "react", "bats"):
            raise InputError(f"shaping must be 'react', 'bats' or None, got {shaping!r}.")
        if not 0 < quantile < 1:
            raise InputError(f"quantile must lie in (0, 1), got {quantile}.")
        for what, value in (
            ("deviations", deviations),
            ("epochs", epochs),
            ("learning_rate", learning_rate),
        ):
            if not 0 < value < math.inf:
                raise InputError(f"{what} must be positive, got {value}.")
        if not (0 <= perturbation < math.inf and 0 <= weight_decay < math.inf and unshaped >= 0):
            raise InputError(
                "perturbation, weight_decay and unshaped must not be negative, got "
                f"{perturbation}, {weight_decay} and {unshaped}."
            )
        if batch_size < 2 or max_samples < 2:
            raise InputError(
                f"batch_size and max_samples must be at least 2, got {batch_size} and "
                f"{max_samples}."
            )
        self.shaping = shaping
        self.quantile, self.deviations, self.unshaped = quantile, deviations, unshaped
        self.perturbation = perturbation
        self.epochs, self.batch_size = epochs, batch_size
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.max_samples, self.seed = max_samples, seed
        self._reservoir = Reservoir(max_samples, balanced=True)

    def config(self) -> dict[str, Any]:
        names = (
            "shaping", "quantile", "deviations", "unshaped", "perturbation", "epochs",
            "batch_size", "learning_rate", "weight_decay", "max_samples", "seed",
        )  # fmt: skip
        return {
            "score": {"name": self.score.name, "config": self.score.config()},
            **{name: getattr(self, name) for name in names},
        }

    def begin(self, classifier: Classifier) -> None:
        self.fitted = {}
        self._reservoir = Reservoir(self.max_samples, balanced=True)

    @keeps_state
    def absorb(self, z: Tensor, labels: Tensor | None, indices: Tensor) -> None:
        """Take in one reference batch: ``z`` (B, K) floating point, ``labels`` (B,) integers."""
        require_rows(z)
        columns = {"features": z.float(), "labels": checked_labels(labels, z)}
        self._reservoir.absorb(columns, indices)

    def merge(self, other: LinearProbe) -> None:
        require_same_config(self, other)
        self._reservoir.merge(other._reservoir)

    @keeps_state
    def finish(self) -> None:
        kept = self._reservoir.finish()
        self._reservoir = Reservoir(self.max_samples, balanced=True)
        features = kept["features"]
        classes, labels = torch.unique(kept["labels"], return_inverse=True)
        if len(classes) < 2:
            raise InputError(
                f"a linear probe needs samples of at least two classes, got {len(features)} of "
                f"{len(classes)}."
            )
        weight, bias = self._trained(features, labels, len(classes))
        self.fitted = {"weight": weight, "bias": bias}
        if self.shaping is not None:
            self.fitted |= self._limits(features)

    def _trained(self, features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Weight (C, K) and bias (C,), the normalisation folded in."""
        normalise = nn.BatchNorm1d(features.shape[1], device=features.device)
        # Made without drawing random numbers; from zero the descent is the same every time.
        weight = torch.zeros(classes, features.shape[1], device=features.device)
        bias = torch.zeros(classes, device=features.device)
        parameters = [*normalise.parameters(), weight.requires_grad_(), bias.requires_grad_()]
        optimiser = torch.optim.SGD(
            parameters,
            lr=self.learning_rate,
            momentum=MOMENTUM,
            nesterov=True,
            weight_decay=self.weight_decay,
        )
        size = min(self.batch_size, len(features))
        steps = len(features) // size
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.epochs * steps)
        random = torch.Generator().manual_seed(self.seed)
        with torch.enable_grad():
            for _ in bar(range(self.epochs), "training the linear probe", "epoch"):
                order = torch.randperm(len(features), generator=random).to(features.device)
                for rows in torch.split(order[: steps * size], size):
                    logits = nn.functional.linear(normalise(features[rows]), weight, bias)
                    loss = nn.functional.cross_entropy(logits, labels[rows])
                    optimiser.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimiser.step()
                    schedule.step()
        # Batches only lead the way: the statistics to score with are those of all samples.
        mean, variance = features.double().mean(dim=0), features.double().var(0, correction=0)
        scale = normalise.weight.double() / (variance + normalise.eps).sqrt()
        shift = normalise.bias.double() - mean * scale
        folded = weight.double() * scale
        return (
            folded.detach().float(),
            (bias.double() + weight.double() @ shift).detach().float(),
        )

    def _limits(self, features: Tensor) -> dict[str, Tensor]:
        """What coordinates are confined to, (K,) each."""
        shaped = features[:, self.unshaped :]
        if self.shaping == "react":
            upper = torch.full_like(features[0], math.inf)
            if shaped.numel():
                values = shaped.flatten().sort().values
                upper[self.unshaped :] = values[math.ceil(self.quantile * len(values)) - 1]
            lower = torch.full_like(upper, -math.inf)
        else:
            deviation, mean = torch.std_mean(features.double(), dim=0, correction=0)
            lower = (mean - self.deviations * deviation).float()
            upper = (mean + self.deviations * deviation).float()
            lower[: self.unshaped], upper[: self.unshaped] = -math.inf, math.inf
        return {"lower": lower, "upper": upper}

    def __call__(self, z: Tensor) -> Tensor:
        """Scores (B,) float32 of a representation (B, K); higher = more OOD."""
        return self.score(self.logits(z))

    @torch.no_grad()
    def logits(self, z: Tensor) -> Tensor:
        """The trained classifier's logits (B, C') of a representation (B, K), C' classes seen."""
        self.require_fitted()
        weight, bias = self.fitted["weight"], self.fitted["bias"]
        require_rows(z, weight.shape[1])
        z = z.float()
        if self.shaping is not None:
            z = z.clamp(self.fitted["lower"], self.fitted["upper"])
        logits = nn.functional.linear(z, weight, bias)
        if not self.perturbation:
            return logits
        # d log p_ŷ / dz up to the temperature, which does not change its sign.
        p = torch.softmax(logits / getattr(self.score, "temperature", 1.0), dim=1)
        rising = weight[logits.argmax(dim=1)] - p @ weight
        return nn.functional.linear(z + self.perturbation * rising.sign(), weight, bias)


def _logit_score(score: Score | str | dict[str, Any]) -> Score:
    if isinstance(score, Score):
        if type(score) not in LOGIT_SCORES.values():
            raise InputError(
                f"a probe's score is one of {', '.join(LOGIT_SCORES)}, got {type(score).__name__}."
            )
        return score
    name, config = (score, {}) if isinstance(score, str) else (score["name"], score["config"])
    if name not in LOGIT_SCORES:
        raise InputError(f"unknown logit score {name!r}; known: {', '.join(LOGIT_SCORES)}.")
    return LOGIT_SCORES[name](**config)
