"""How well scores tell in-distribution (ID) from out-of-distribution (OOD) samples.

Conventions, everywhere: **higher score = more OOD**, and every metric is a fraction in [0, 1].

Each metric is a function of one thing only: how many ID and how many OOD samples have each
distinct score. Ties are therefore exact, infinite scores are ordered like any other, and a
bootstrap resample is nothing but other counts on the same, already sorted, distinct scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from grood_fast.errors import InputError

__all__ = [
    "Difference",
    "Metrics",
    "accuracy",
    "aupr_in",
    "aupr_out",
    "auroc",
    "average_precision_in",
    "average_precision_out",
    "evaluate_scores",
    "fpr_at_95_id_recall",
    "fpr_at_95_ood_recall",
    "fpr_at_recall",
    "paired_difference",
]

Vector = Tensor | npt.ArrayLike
Positive = Literal["id", "ood"]
Reals = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Metrics:
    """Point values of one detector on one pair of sets, and how far they may be trusted.

    Attributes:
        auroc: see :func:`auroc`; higher is better.
        aupr_out: see :func:`aupr_out`; higher is better.
        aupr_in: see :func:`aupr_in`; higher is better.
        fpr_at_95_ood_recall: see :func:`fpr_at_95_ood_recall`; lower is better.
        fpr_at_95_id_recall: see :func:`fpr_at_95_id_recall`; lower is better.
        intervals: (low, high) of each of the above, by its name.
        confidence: the probability the intervals were made for.
    """

    auroc: float
    aupr_out: float
    aupr_in: float
    fpr_at_95_ood_recall: float
    fpr_at_95_id_recall: float
    intervals: dict[str, tuple[float, float]]
    confidence: float


@dataclass(frozen=True)
class Difference:
    """Metric of detector A minus that of detector B on the same samples.

    Attributes:
        value: the difference of the point values.
        interval: (low, high); one that leaves out 0 says that the detectors differ.
        confidence: the probability the interval was made for.
    """

    value: float
    interval: tuple[float, float]
    confidence: float


def auroc(id_scores: Vector, ood_scores: Vector) -> float:
    """Area under the ROC curve: the probability that an OOD sample scores higher than an ID sample.

    Equal scores count one half, so that scores without any information give 0.5.

    Args:
        id_scores: (n,) real numbers, higher = more OOD; ±Inf is allowed.
        ood_scores: (m,) the same for the OOD samples.

    Raises:
        InputError: if a set is empty, not one-dimensional, not real or contains NaN.
    """
    return _point_value("auroc", id_scores, ood_scores)


def aupr_out(id_scores: Vector, ood_scores: Vector) -> float:
    """Area under the precision-recall curve, OOD as the positive class, by the trapezoidal rule.

    The curve has one point for each distinct score and ends at (recall 0, precision 1), as in
    OpenOOD and pytorch-ood. Unlike AUROC it depends on the ratio of the sets' sizes.
    Arguments and errors as for :func:`auroc`.
    """
    return _point_value("aupr_out", id_scores, ood_scores)


def aupr_in(id_scores: Vector, ood_scores: Vector) -> float:
    """As :func:`aupr_out`, with ID as the positive class and the scores negated."""
    return _point_value("aupr_in", id_scores, ood_scores)


def average_precision_out(id_scores: Vector, ood_scores: Vector) -> float:
    """Average precision with OOD as the positive class: precision, weighted by the gain in recall.

    What scikit-learn's ``average_precision_score`` computes; without the linear interpolation of
    :func:`aupr_out`, which is slightly optimistic (Davis & Goadrich, ICML 2006).
    Arguments and errors as for :func:`auroc`.
    """
    return _point_value("average_precision_out", id_scores, ood_scores)


def average_precision_in(id_scores: Vector, ood_scores: Vector) -> float:
    """As :func:`average_precision_out`, with ID as the positive class and the scores negated."""
    return _point_value("average_precision_in", id_scores, ood_scores)


def fpr_at_recall(
    id_scores: Vector,
    ood_scores: Vector,
    recall: float = 0.95,
    *,
    positive: Positive = "ood",
) -> float:
    """False positive rate where the recall of the positive class first reaches ``recall``.

    The threshold t is always one of the scores, and samples that tie with it are on its positive
    side; nothing is interpolated.

    - ``positive="ood"``: t is the largest score such that at least a fraction ``recall`` of the OOD
      samples has score >= t. The result is the fraction of **ID samples flagged**, score >= t.
    - ``positive="id"``: t is the smallest score such that at least a fraction ``recall`` of the ID
      samples has score <= t. The result is the fraction of **OOD samples accepted**, score <= t.

    Args:
        id_scores: (n,) real numbers, higher = more OOD; ±Inf is allowed.
        ood_scores: (m,) the same for the OOD samples.
        recall: fraction in [0, 1]; at 0 nothing need be detected and the result is 0.
        positive: the class whose recall is fixed.

    Raises:
        InputError: if a set is empty, not one-dimensional, not real or contains NaN, if ``recall``
            is outside [0, 1], or if ``positive`` is neither "ood" nor "id".
    """
    if not 0 <= recall <= 1:
        raise InputError(f"recall is {recall!r}; expected a fraction from 0 to 1, such as 0.95.")
    if positive not in ("id", "ood"):
        raise InputError(f'positive is {positive!r}; expected "ood" or "id".')
    curve = _Ranking(id_scores, ood_scores).tally().curve(positive)
    return _false_positive_rate(curve, recall)


def fpr_at_95_ood_recall(id_scores: Vector, ood_scores: Vector) -> float:
    """Fraction of ID samples flagged as OOD when 95 % of the OOD samples are detected.

    The FPR95 of OpenOOD and pytorch-ood, and the one to report by default. The older literature
    means :func:`fpr_at_95_id_recall`; the two can differ widely on the same scores.
    Exact definition, arguments and errors: :func:`fpr_at_recall`.
    """
    return _point_value("fpr_at_95_ood_recall", id_scores, ood_scores)


def fpr_at_95_id_recall(id_scores: Vector, ood_scores: Vector) -> float:
    """Fraction of OOD samples accepted as ID when 95 % of the ID samples are accepted.

    The FPR95 of the older literature; not the one of OpenOOD (:func:`fpr_at_95_ood_recall`).
    Exact definition, arguments and errors: :func:`fpr_at_recall`.
    """
    return _point_value("fpr_at_95_id_recall", id_scores, ood_scores)


def accuracy(predictions: Vector, labels: Vector) -> float:
    """Fraction of predicted classes that equal the label.

    Samples with a negative label, the usual mark of OOD samples, have no right class and are left
    out.

    Args:
        predictions: (n,) predicted classes.
        labels: (n,) true classes.

    Raises:
        InputError: if the two differ in length, are not one-dimensional, not real, contain NaN, or
            if no label is a class.
    """
    predictions = _as_vector(predictions, "predictions")
    labels = _as_vector(labels, "labels")
    if len(predictions) != len(labels):
        raise InputError(
            f"There are {len(predictions)} predictions but {len(labels)} labels; "
            "pass one prediction for each label, in the same order."
        )
    has_class = labels >= 0
    if not has_class.any():
        raise InputError(
            "Every label is negative, the mark of OOD samples; accuracy needs samples of a class."
        )
    return float(np.mean(predictions[has_class] == labels[has_class]))


def evaluate_scores(
    id_scores: Vector,
    ood_scores: Vector,
    *,
    confidence: float = 0.95,
    resamples: int = 200,
    seed: int = 0,
) -> Metrics:
    """AUROC, both AUPRs and both FPR95s, each with a bootstrap confidence interval.

    The intervals are percentiles over resamples drawn with replacement from each set on its own
    (stratified), as in Efron & Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 13.
    They tell how much the result depends on which test samples were drawn, not on the training.

    Args:
        id_scores: (n,) real numbers, higher = more OOD; ±Inf is allowed.
        ood_scores: (m,) the same for the OOD samples.
        confidence: probability that an interval should contain the value of the whole population.
        resamples: how many bootstrap resamples to draw.
        seed: fixes the draws. They depend on nothing else but n for the ID samples and m for the
            OOD samples, so two detectors that scored the same samples in the same order are
            compared on the same resamples.

    Raises:
        InputError: if a set is empty, not one-dimensional, not real or contains NaN, if
            ``confidence`` is not between 0 and 1, or if ``resamples`` is less than 1.
    """
    names = ("auroc", "aupr_out", "aupr_in", "fpr_at_95_ood_recall", "fpr_at_95_id_recall")
    ranking = _Ranking(id_scores, ood_scores)
    intervals = _percentile_intervals(_replicates(ranking, names, resamples, seed), confidence)
    return Metrics(
        **dict(zip(names, _measure(ranking.tally(), names), strict=True)),
        intervals=dict(zip(names, intervals, strict=True)),
        confidence=confidence,
    )


def paired_difference(
    id_a: Vector,
    ood_a: Vector,
    id_b: Vector,
    ood_b: Vector,
    metric: str = "auroc",
    *,
    confidence: float = 0.95,
    resamples: int = 200,
    seed: int = 0,
) -> Difference:
    """How much better or worse detector A is than detector B on the same samples.

    Both are measured on the same resamples, so what makes a resample easy or hard for both cancels:
    the interval is usually far narrower than those of the two values suggest.

    Args:
        id_a: (n,) scores of detector A on the ID samples, higher = more OOD.
        ood_a: (m,) scores of detector A on the OOD samples.
        id_b: (n,) scores of detector B on the same ID samples in the same order.
        ood_b: (m,) scores of detector B on the same OOD samples in the same order.
        metric: name of any metric of this module that takes two sets of scores, such as "auroc".
        confidence: as for :func:`evaluate_scores`.
        resamples: as for :func:`evaluate_scores`.
        seed: as for :func:`evaluate_scores`.

    Raises:
        InputError: as :func:`evaluate_scores`, or if the detectors scored sets of different sizes,
            or if there is no such metric.
    """
    if metric not in _METRICS:
        raise InputError(f"There is no metric {metric!r}; expected one of {', '.join(_METRICS)}.")
    ranking_a, ranking_b = _Ranking(id_a, ood_a, "a"), _Ranking(id_b, ood_b, "b")
    if ranking_a.sizes != ranking_b.sizes:
        raise InputError(
            f"Detector A scored (ID, OOD) sets of {ranking_a.sizes} samples, detector B of "
            f"{ranking_b.sizes}; a paired comparison needs the scores of both on the same samples."
        )
    value_a, value_b = (_measure(r.tally(), [metric])[0] for r in (ranking_a, ranking_b))
    replicates_a, replicates_b = (
        _replicates(r, [metric], resamples, seed) for r in (ranking_a, ranking_b)
    )
    [interval] = _percentile_intervals(replicates_a - replicates_b, confidence)
    return Difference(value=value_a - value_b, interval=interval, confidence=confidence)


# Indexes every sample once.
_EVERY_SAMPLE = slice(None)


class _Ranking:
    """Where each sample stands among the distinct scores of both sets: all a metric depends on.

    Attributes:
        id_levels: (n,) index of each ID sample's score among the distinct scores, ascending.
        ood_levels: (m,) the same for the OOD samples.
        level_count: how many distinct scores there are.
    """

    def __init__(self, id_scores: Vector, ood_scores: Vector, suffix: str = "scores") -> None:
        """``suffix`` completes the sets' names in error messages: ``id_scores``, ``ood_scores``."""
        id_vector = _as_vector(id_scores, f"id_{suffix}")
        ood_vector = _as_vector(ood_scores, f"ood_{suffix}")
        distinct, levels = np.unique(np.concatenate([id_vector, ood_vector]), return_inverse=True)
        self.id_levels, self.ood_levels = np.split(levels, [len(id_vector)])
        self.level_count = len(distinct)

    @property
    def sizes(self) -> tuple[int, int]:
        return len(self.id_levels), len(self.ood_levels)

    def tally(
        self,
        id_drawn: Integers | slice = _EVERY_SAMPLE,
        ood_drawn: Integers | slice = _EVERY_SAMPLE,
    ) -> _Tally:
        """Every sample counted as often as its index was drawn."""
        return _Tally(
            np.bincount(self.id_levels[id_drawn], minlength=self.level_count),
            np.bincount(self.ood_levels[ood_drawn], minlength=self.level_count),
        )


@dataclass(frozen=True)
class _Tally:
    """How many ID and OOD samples have each distinct score, lowest score first.

    A count is a sample's weight: drawn twice counts 2, and a score that was not drawn counts 0.
    """

    id_counts: Integers
    ood_counts: Integers

    def curve(self, positive: Positive) -> _Curve:
        if positive == "ood":
            return _Curve(_cumulated(self.ood_counts[::-1]), _cumulated(self.id_counts[::-1]))
        return _Curve(_cumulated(self.id_counts), _cumulated(self.ood_counts))


@dataclass(frozen=True)
class _Curve:
    """Positive and negative samples accepted while the threshold admits one distinct score after
    another, from none to all of them.

    A score whose counts are 0 repeats the point before it, which changes no area and no rate.
    """

    true_positives: Integers
    false_positives: Integers

    @cached_property
    def recall(self) -> Reals:
        recall: Reals = self.true_positives / self.true_positives[-1]
        return recall

    @cached_property
    def precision(self) -> Reals:
        """1 where nothing is accepted yet: the customary end of the precision-recall curve."""
        accepted = self.true_positives + self.false_positives
        precision = np.ones(len(accepted))
        np.divide(self.true_positives, accepted, out=precision, where=accepted > 0)
        return precision


def _cumulated(counts: Integers) -> Integers:
    cumulated = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=cumulated[1:])
    return cumulated


def _trapezoid(x: Integers | Reals, y: Integers | Reals) -> float:
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1])) / 2)


def _roc_area(curve: _Curve) -> float:
    # Counts stay whole numbers until the last division: exact, whatever the order of summation.
    pairs = curve.true_positives[-1] * curve.false_positives[-1]
    return float(_trapezoid(curve.false_positives, curve.true_positives) / pairs)


def _precision_recall_area(curve: _Curve) -> float:
    return _trapezoid(curve.recall, curve.precision)


def _average_precision(curve: _Curve) -> float:
    return float(np.sum(np.diff(curve.recall) * curve.precision[1:]))


def _false_positive_rate(curve: _Curve, recall: float) -> float:
    threshold = np.searchsorted(curve.recall, recall)
    return float(curve.false_positives[threshold] / curve.false_positives[-1])


# Each metric: the positive class, and what to read off its curve.
_METRICS: dict[str, tuple[Positive, Callable[[_Curve], float]]] = {
    "auroc": ("ood", _roc_area),
    "aupr_out": ("ood", _precision_recall_area),
    "aupr_in": ("id", _precision_recall_area),
    "average_precision_out": ("ood", _average_precision),
    "average_precision_in": ("id", _average_precision),
    "fpr_at_95_ood_recall": ("ood", partial(_false_positive_rate, recall=0.95)),
    "fpr_at_95_id_recall": ("id", partial(_false_positive_rate, recall=0.95)),
}


def _measure(tally: _Tally, names: Sequence[str]) -> list[float]:
    curves = {positive: tally.curve(positive) for positive in {_METRICS[name][0] for name in names}}
    return [read(curves[positive]) for positive, read in (_METRICS[name] for name in names)]


def _point_value(name: str, id_scores: Vector, ood_scores: Vector) -> float:
    return _measure(_Ranking(id_scores, ood_scores).tally(), [name])[0]


def _replicates(ranking: _Ranking, names: Sequence[str], resamples: int, seed: int) -> Reals:
    """The metrics on each bootstrap resample, shape (resamples, len(names))."""
    if resamples < 1:
        raise InputError(f"resamples is {resamples}; expected at least 1, and 200 for an interval.")
    # Two streams, so that the ID draws do not depend on how many OOD samples there are.
    id_draws, ood_draws = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(2))
    id_size, ood_size = ranking.sizes
    replicates = np.empty((resamples, len(names)))
    for row in replicates:
        tally = ranking.tally(
            id_draws.integers(id_size, size=id_size), ood_draws.integers(ood_size, size=ood_size)
        )
        row[:] = _measure(tally, names)
    return replicates


def _percentile_intervals(replicates: Reals, confidence: float) -> list[tuple[float, float]]:
    if not 0 < confidence < 1:
        raise InputError(
            f"confidence is {confidence!r}; expected a probability between 0 and 1, such as 0.95."
        )
    low, high = np.quantile(replicates, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def _as_vector(values: Vector, name: str) -> Reals:
    """The values as a non-empty float64 vector without NaN."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        if values.is_floating_point():
            values = values.double()  # NumPy knows no bfloat16
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} cannot be read as an array ({error}); pass a one-dimensional tensor or array "
            "of numbers."
        ) from error
    if array.dtype.kind not in "biuf":
        raise InputError(f"{name} has dtype {array.dtype}; expected real numbers.")
    if array.ndim != 1:
        raise InputError(
            f"{name} has shape {array.shape}; expected one dimension, one number for each sample."
        )
    if array.size == 0:
        raise InputError(f"{name} is empty; expected at least one sample.")
    array = array.astype(np.float64)
    nan_count = int(np.isnan(array).sum())
    if nan_count:
        raise InputError(
            f"{name} has {nan_count} NaN among its {array.size} values, and NaN has no rank; find "
            "out which inputs cause them (overflow in the network, often) or leave those out."
        )
    return array
