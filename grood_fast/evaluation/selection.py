"""Choosing a detector and its settings without ever seeing the outliers it will meet."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from grood_fast.batches import Batch, parse_batch
from grood_fast.classifier import Classifier, Precision
from grood_fast.detectors import Detector, detector, fit_together, score_together
from grood_fast.errors import InputError
from grood_fast.evaluation import metrics
from grood_fast.evaluation.benchmark import orderable_scores
from grood_fast.evaluation.datasets import validation_outliers
from grood_fast.scores import Score
from grood_fast.scoring import named
from grood_fast.statistics import Reservoir

SOURCE_IMAGES = 1_000
"""How many images the validation outliers are made from, and how many of each kind are made."""

Metric = Literal["auroc", "fpr_at_95_ood_recall", "fpr_at_95_id_recall"]
LOWER_IS_BETTER = ("fpr_at_95_ood_recall", "fpr_at_95_id_recall")


def variants(name: str, **choices: Sequence[Any]) -> list[Detector]:
    """Every combination of settings of a registered detector, each named by its settings.

    ``variants("ldg", objective=["energy", "logit_sum"], n_components=[32, 128])`` are four.

    Args:
        name: as in ``grood_fast.DETECTORS``.
        **choices: option → values to try; components such as scores are made anew for each.

    Raises:
        InputError: an unknown name or option.
    """
    made = []
    for values in product(*choices.values()):
        options = dict(zip(choices, values, strict=True))
        fresh = {
            key: value.fresh() if isinstance(value, Score) else value
            for key, value in options.items()
        }
        one = detector(name, **fresh)
        one.name = f"{name}({', '.join(f'{key}={value!r}' for key, value in options.items())})"
        made.append(one)
    return made


def select(
    model: nn.Module,
    candidates: Sequence[str | Score | Detector],
    *,
    reference: Iterable[Any],
    validation: Iterable[Any],
    outliers: Mapping[str, Iterable[Any]] | None = None,
    metric: Metric = "auroc",
    head: str | None = None,
    precision: Precision | None = None,
    progress: bool = True,
) -> Detector:
    """The candidate that tells held-out training data best from outliers made of it.

    All candidates are fitted in one pass and scored in one pass a set. No test set takes part, so
    that what is measured on one afterwards is honest. How well such outliers stand for real ones
    is another matter: they resemble far outliers more than near ones.

    Args:
        model: a trained classifier, which comes back as it was.
        candidates: names, scores or detectors, such as :func:`variants` makes.
        reference: in-distribution training samples; every candidate is fitted to them.
        validation: in-distribution samples that are neither in the reference nor test data.
        outliers: name → loader. By default they are made from ``validation``'s images: shuffled
            blocks, averages of two images, and permuted pixels; see
            :func:`grood_fast.evaluation.datasets.validation_outliers`.
        metric: its mean over the kinds of outliers decides.
        head, precision, progress: see :func:`grood_fast.score`.

    Returns:
        The best one, fitted and bound; of equals the first. ``card["selection"]`` says what it was
        chosen from, on what, and how each candidate did.

    Raises:
        InputError: no candidates, an unknown metric, an empty loader, or ``validation`` has no
            images that outliers could be made from.
    """
    if metric not in ("auroc", *LOWER_IS_BETTER):
        raise InputError(f"unknown metric {metric!r}; known: auroc, {', '.join(LOWER_IS_BETTER)}.")
    found, _ = named(candidates)
    classifier = Classifier(model, head, precision)
    fit_together(classifier, list(found.values()), reference, progress=progress)
    images = Reservoir(SOURCE_IMAGES)
    loader = validation if outliers is not None else _collecting(validation, images)
    inside = score_together(classifier, found, loader, progress=progress)
    if outliers is None:
        outliers = {
            kind: DataLoader(data, 100)
            for kind, data in validation_outliers(images.finish()["images"], SOURCE_IMAGES).items()
        }
    measure = getattr(metrics, metric)
    values: dict[str, dict[str, float]] = {name: {} for name in found}
    for kind, outside in outliers.items():
        table = score_together(classifier, found, outside, progress=progress)
        for name in found:
            scores = orderable_scores(inside[name]), orderable_scores(table[name])
            values[name][kind] = float(measure(*scores))
    means = {name: statistics.fmean(of_kinds.values()) for name, of_kinds in values.items()}
    choose = min if metric in LOWER_IS_BETTER else max
    best = choose(means, key=lambda name: means[name])
    winner = found[best]
    winner.card["selection"] = {
        "chosen": best,
        "metric": metric,
        "outliers": list(outliers),
        "validation_samples": len(inside.predictions),
        "candidates": {name: {"mean": means[name], **values[name]} for name in found},
    }
    return winner


def _collecting(loader: Iterable[Any], images: Reservoir) -> Iterator[Any]:
    """The batches as they come, while a sample of their images is kept."""
    start = 0
    for item in loader:
        batch = parse_batch(item)
        rows = _images(batch)
        images.absorb({"images": rows}, torch.arange(start, start + batch.size))
        start += batch.size
        yield batch


def _images(batch: Batch) -> Tensor:
    inputs = [one for one in (*batch.args, *batch.kwargs.values()) if isinstance(one, Tensor)]
    if len(inputs) != 1 or inputs[0].ndim != 4 or not inputs[0].is_floating_point():
        raise InputError(
            "outliers can be made from batches of images (B, C, H, W) alone: for other data give "
            "outliers={name: loader}."
        )
    return inputs[0].cpu()
