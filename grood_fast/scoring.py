"""The main job: one call, one pass, one score a sample and detector."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, overload

from torch import nn

from grood_fast.batches import order_warning
from grood_fast.classifier import Classifier, Precision
from grood_fast.detectors import DETECTORS, Detector, by_unique_name, fit_together, score_together
from grood_fast.errors import InputError
from grood_fast.results import Scores, ScoreTable
from grood_fast.scores import Score

Spec = str | Score | Detector

ALL = "all"
"""In place of a detector: every registered one."""


@overload
def score(  # type: ignore[overload-overlap]  # a str is a sequence of str
    model: nn.Module,
    loader: Iterable[Any],
    detector: Spec = ...,
    *,
    reference: Iterable[Any] | None = ...,
    head: str | None = ...,
    precision: Precision | None = ...,
    progress: bool = ...,
) -> Scores: ...


@overload
def score(
    model: nn.Module,
    loader: Iterable[Any],
    detector: Sequence[Spec],
    *,
    reference: Iterable[Any] | None = ...,
    head: str | None = ...,
    precision: Precision | None = ...,
    progress: bool = ...,
) -> ScoreTable: ...


def score(
    model: nn.Module,
    loader: Iterable[Any],
    detector: Spec | Sequence[Spec] = "energy",
    *,
    reference: Iterable[Any] | None = None,
    head: str | None = None,
    precision: Precision | None = None,
    progress: bool = True,
) -> Scores | ScoreTable:
    """How far out of distribution each sample is, for any number of detectors in one pass.

    Args:
        model: a trained classifier, which comes back as it was. Its output may be the logits
            (B, C), a tuple (its first matrix counts), a mapping or an object with ``.logits``.
            Ambient autocast is off during the pass. Threads that score one model take turns.
        loader: yields batches ``x``, ``(x, y)``, ``(x, y, ...)``, ``{"data": x, "label": y}`` or
            the model's keyword arguments, in the order the scores shall have.
        detector: a registry name (``grood_fast.DETECTORS``), a score such as ``KNN(k=10)``, a
            :class:`Detector`, or a list of these; ``"all"`` for every registered one.
        reference: in-distribution samples for the detectors that are not fitted yet; one more
            pass for all of them together.
        head: name of the last linear layer, found by itself if None.
        precision: ``"bf16"`` runs a bfloat16 copy of the backbone, the head and the layer that is
            given the inputs staying in float32. Default: what fitted detectors were fitted in, else
            the model's own.
        progress: show a progress bar if it takes more than a few seconds.

    Returns:
        For one detector :class:`Scores`, a float32 tensor (N,) on the CPU in loader order, for a
        list a :class:`ScoreTable` by name. Higher = more OOD.

    Raises:
        NotFittedError: a detector needs ``reference``.
        InputError: an empty loader, a batch that does not fit, an unknown detector, or one that
            was fitted for another model.
        HeadNotFoundError: a detector needs features and the model has no linear head.
    """
    order_warning(loader)
    detectors, several = named(detector)
    classifier = Classifier(model, head, precision or fitted_precision(detectors.values()))
    missing = unfitted(classifier, detectors.values())
    if reference is not None:
        fit_together(classifier, missing, reference, progress=progress)
    table = score_together(classifier, detectors, loader, progress=progress)
    return table if several else next(iter(table.values()))


@overload
def fit(  # type: ignore[overload-overlap]
    model: nn.Module,
    reference: Iterable[Any],
    detector: Spec,
    *,
    head: str | None = ...,
    precision: Precision | None = ...,
    progress: bool = ...,
) -> Detector: ...


@overload
def fit(
    model: nn.Module,
    reference: Iterable[Any],
    detector: Sequence[Spec],
    *,
    head: str | None = ...,
    precision: Precision | None = ...,
    progress: bool = ...,
) -> dict[str, Detector]: ...


def fit(
    model: nn.Module,
    reference: Iterable[Any],
    detector: Spec | Sequence[Spec],
    *,
    head: str | None = None,
    precision: Precision | None = None,
    progress: bool = True,
) -> Detector | dict[str, Detector]:
    """Fit one detector or several in one pass over the reference, and bind them to the model.

    Args:
        model, head, precision, progress: as for :func:`score`.
        reference: a loader of in-distribution samples, in any order, with labels where there are.
        detector: as for :func:`score`. Detectors are fitted in place, also a second time.

    Returns:
        For one detector that :class:`Detector`, for a list a mapping by unique name.

    Raises:
        InputError: an empty loader, a batch that does not fit, NaN or Inf among the features.
        HeadNotFoundError: a detector needs features and the model has no linear head.
    """
    detectors, several = named(detector)
    classifier = Classifier(model, head, precision)
    fit_together(classifier, list(detectors.values()), reference, progress=progress)
    return detectors if several else next(iter(detectors.values()))


def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    head: str | None = None,
    precision: Precision | None = None,
) -> Detector:
    """Read a detector that :meth:`Detector.save` has written, and bind it to its model.

    Nothing in the file is executed. See :meth:`Detector.load`.

    Args:
        path: the file.
        model: the classifier it was fitted for; None leaves it unbound.
        head: the head's name, where it is another than when it was fitted.
        precision: as when it was fitted, unless told.

    Raises:
        PersistenceError: the file is missing, damaged, foreign, of another version, or was fitted
            for another model.
    """
    return Detector.load(path, model, head=head, precision=precision)


def fitted_precision(detectors: Iterable[Detector]) -> Precision | None:
    """The precision that fitted or calibrated detectors ask for; None where none does.

    Raises:
        InputError: they ask for different ones.
    """
    wanted: dict[Precision, str] = {}
    for known in detectors:
        if "precision" in known.card:
            wanted.setdefault(known.card["precision"], known.name)
    if len(wanted) > 1:
        raise InputError(
            f"these detectors were fitted in different precisions ({wanted}) and cannot share a "
            "pass: fit them again in one."
        )
    return next(iter(wanted), None)


def unfitted(classifier: Classifier, detectors: Iterable[Detector]) -> list[Detector]:
    """Those that are not fitted, after checking that the others were fitted for this model.

    Raises:
        InputError: a detector was fitted for another model or precision.
    """
    known = list(detectors)
    for detector in known:
        detector.require_model(classifier)
    return [detector for detector in known if not detector.is_fitted]


def named(detector: Spec | Sequence[Spec]) -> tuple[dict[str, Detector], bool]:
    """Detectors by unique name, and whether several were asked for: a sequence, or ``"all"``.

    Raises:
        InputError: an empty sequence, or something that names no detector.
    """
    if detector == ALL:
        return by_unique_name(DETECTORS), True
    if isinstance(detector, str) or not isinstance(detector, Iterable):
        return by_unique_name([detector]), False
    named = by_unique_name(detector)
    if not named:
        raise InputError("no detector was named: pass at least one.")
    return named, True
