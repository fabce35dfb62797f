"""A detector: a representation, a score on it, what they learned, and a threshold."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from grood_fast import persistence
from grood_fast.batches import Batch, is_batch, order_warning, preview
from grood_fast.classifier import Classifier, Precision
from grood_fast.detectors.calibration import Calibration, SampleSketch, check_recall
from grood_fast.errors import (
    FitWarning,
    HeadNotFoundError,
    InputError,
    NotFittedError,
    PersistenceError,
    ScoreWarning,
)
from grood_fast.representations import REPRESENTATIONS, Representation
from grood_fast.results import Column, Scores, ScoreTable
from grood_fast.scores import SCORES, Score
from grood_fast.signals import Need, Signals, stream

logger = logging.getLogger(__name__)

Self = TypeVar("Self", bound="Detector")

FILE_KIND, FILE_VERSION = "detector", 1

WARM_UP_BYTES = 256 << 20
"""So many bytes of inputs at most are kept for a warm-up."""


class Detector:
    """Scores samples for one classifier. Higher = more out of distribution.

    Any representation goes with any score that can read it; the named detectors are such pairs.

    Args:
        score: how unusual a representation is.
        representation: what a sample becomes; default: what the score reads.
        name: what results are filed under; default: the score's name.

    Attributes:
        representation, score_function, name: as given.
        card: how the detector was made: model, head, number of reference samples, versions.
        calibration: the held-out scores and the threshold, or None.
    """

    def __init__(
        self,
        score: Score,
        representation: Representation | None = None,
        name: str | None = None,
    ) -> None:
        if not isinstance(score, Score):
            raise InputError(
                f"Detector needs a Score such as grood_fast.KNN(), got {type(score).__name__}."
            )
        if representation is None:
            representation = REPRESENTATIONS[score.representation]()
        self.score_function = score
        self.representation = representation
        self.name = name or score.name
        self.card: dict[str, Any] = {}
        self.calibration: Calibration | None = None
        self._sketch = SampleSketch()
        self._classifier: Classifier | None = None

    # --- what it is ---------------------------------------------------------------------------

    @property
    def needs(self) -> frozenset[Need]:
        """The signals it reads beside the logits."""
        return self.representation.needs

    @property
    def needs_fit(self) -> bool:
        """Whether it must see reference data before it can score."""
        return self.representation.needs_fit or self.score_function.needs_fit

    @property
    def is_fitted(self) -> bool:
        """Whether it can score: it has seen reference data, or needs none."""
        return self.representation.is_fitted and self.score_function.is_fitted

    @property
    def threshold(self) -> float:
        """Scores above it are OOD.

        Raises:
            NotFittedError: before :meth:`calibrate`.
        """
        return self._calibrated().threshold

    def __repr__(self) -> str:
        state = "" if not self.needs_fit else ", fitted" if self.is_fitted else ", not fitted"
        return (
            f"{type(self).__name__}({self.score_function!r}, {self.representation!r}, "
            f"name={self.name!r}{state})"
        )

    def __call__(self, signals: Signals) -> Tensor:
        """Scores of one batch's signals, (B,) on their device; higher = more OOD.

        Raises:
            InputError: for anything but signals.
        """
        if not isinstance(signals, Signals):
            raise InputError(
                f"a detector is called with the signals of a pass, got {type(signals).__name__}: "
                "for inputs there are score(loader), predict(batch) and p_values(batch)."
            )
        return self.score_function(self.representation(signals))

    # --- what a user does with it -------------------------------------------------------------

    def bind(
        self: Self, model: nn.Module, head: str | None = None, precision: Precision | None = None
    ) -> Self:
        """Say which model :meth:`score`, :meth:`predict` and :meth:`calibrate` use.

        Args:
            model: the classifier.
            head: name of its last linear layer, found by itself if None.
            precision: ``"bf16"`` runs a bfloat16 copy of the backbone; see
                :class:`~grood_fast.classifier.Classifier`.

        Raises:
            InputError: the detector was fitted or calibrated for another model.
        """
        classifier = Classifier(model, head, precision)
        self.require_model(classifier)
        self._classifier = classifier
        return self

    def fit(
        self: Self,
        model: nn.Module,
        reference: Iterable[Any],
        *,
        head: str | None = None,
        precision: Precision | None = None,
        progress: bool = True,
    ) -> Self:
        """Learn what is usual from in-distribution samples, in one pass, and bind to the model.

        What was fitted or calibrated before stays until the pass has succeeded.

        Args:
            model: the classifier, which comes back as it was.
            reference: a loader of in-distribution samples, in any order; labels are used where
                the score is made for classes.
            head, precision: see :meth:`bind`.
            progress: show a progress bar if it takes more than a few seconds.

        Raises:
            InputError: an empty loader, batches that do not fit, NaN or Inf among the features.
            HeadNotFoundError: the detector needs features and the model has no linear head.
        """
        classifier = Classifier(model, head, precision)
        fit_together(classifier, [self], reference, progress=progress)
        return self

    def score(self, loader: Iterable[Any], *, progress: bool = True) -> Scores:
        """Scores (N,) of a loader's samples, in its order; higher = more OOD.

        Raises:
            NotFittedError: not fitted, or not bound to a model.
            InputError: an empty loader, or batches that do not fit.
        """
        order_warning(loader)
        classifier = self._bound()
        self.require_model(classifier)
        table = score_together(classifier, {self.name: self}, loader, progress=progress)
        return table[self.name]

    def calibrate(
        self: Self,
        loader: Iterable[Any] | Scores,
        id_recall: float = 0.95,
        *,
        progress: bool = True,
    ) -> Self:
        """Set the threshold from in-distribution samples that were not in the reference.

        Warns (:class:`FitWarning`) where the samples are too few for the recall, or were in the
        reference as well (which scores alone cannot tell).

        Args:
            loader: in-distribution samples, in any order; or this detector's :class:`Scores` of
                them.
            id_recall: the share of in-distribution samples to be declared so, in (0, 1).
            progress: show a progress bar if it takes more than a few seconds.

        Raises:
            NotFittedError: not fitted, or not bound to a model.
            InputError: an empty loader, a recall out of range, or NaN scores.
        """
        check_recall(id_recall)
        if isinstance(loader, Scores):
            self.calibration = Calibration.of(self._scores_of(loader), id_recall)
            return self
        classifier = self._bound()
        self.require_model(classifier)
        self.require_fitted()
        self.to(classifier.device)
        scores = Column(torch.float32, classifier.device)
        looked_up, seen = 0, 0
        with closing(stream(classifier, loader, self.needs)) as batches:
            for signals in _progress(batches, loader, "calibrating", progress):
                _find_head(classifier, signals)
                scores.append(self(signals))
                if self.needs_fit:
                    some, again = self._sketch.seen(signals.batch.fingerprints())
                    looked_up, seen = looked_up + some, seen + again
        if seen:
            warnings.warn(
                f"{seen} of {looked_up} calibration samples looked up were in the reference as "
                "well: their scores are too low and the threshold will call too much OOD. "
                "Calibrate on samples held out.",
                FitWarning,
                stacklevel=2,
            )
        self.calibration = Calibration.of(scores.finish(), id_recall)
        self.card = {**self.card, **_model_facts(classifier)}
        return self

    def predict(self, samples: Any) -> Tensor:
        """(B,) bool on the CPU: True where the score is above the threshold, or NaN.

        Args:
            samples: one batch as a loader yields it (a tensor, a mapping, or a tuple or list
                ``(x, y, ...)`` with labels), a loader or list of batches, or :class:`Scores` of
                this detector.

        Raises:
            NotFittedError: not calibrated, not fitted, or not bound to a model.
        """
        return self._calibrated().is_ood(self._scores_of(samples))

    def p_values(self, samples: Any) -> Tensor:
        """(B,) float64 conformal p-values; small = OOD. See :class:`Calibration`.

        Args and raises as :meth:`predict`.
        """
        return self._calibrated().p_values(self._scores_of(samples))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything but the model to one safetensors file; see :func:`grood_fast.load`.

        Raises:
            NotFittedError: not fitted.
            PersistenceError: the file cannot be written (an older one is untouched), or could not
                be read again, because a part of the detector is in no registry.
        """
        self.require_fitted()
        for known, component in (
            (REPRESENTATIONS, self.representation),
            (SCORES, self.score_function),
        ):
            if known.get(component.name) is not type(component):
                raise PersistenceError(
                    f"{type(component).__name__} could be saved but not loaded: enter it as "
                    f"{component.name!r} in grood_fast.representations.REPRESENTATIONS or "
                    "grood_fast.scores.SCORES first."
                )
        tensors = {
            f"{part}.{key}": tensor
            for part, component in self._parts().items()
            for key, tensor in component.fitted.items()
        }
        header: dict[str, Any] = {
            "name": self.name,
            "card": self.card,
            "representation": _described(self.representation),
            "score": _described(self.score_function),
            "sketch_complete": self._sketch.complete,
        }
        tensors["sketch"] = self._sketch.fingerprints
        if self.calibration is not None:
            header["id_recall"] = self.calibration.id_recall
            tensors["calibration"] = self.calibration.scores
        persistence.write(
            path, kind=FILE_KIND, version=FILE_VERSION, header=header, tensors=tensors
        )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module | None = None,
        *,
        head: str | None = None,
        precision: Precision | None = None,
    ) -> Detector:
        """Read what :meth:`save` has written, and bind it to the model.

        Args:
            path: the file.
            model: the classifier it was fitted for; None leaves it unbound.
            head: the head's name, where it is another than when it was fitted (a model that was
                wrapped since).
            precision: as when it was fitted, unless told.

        Raises:
            PersistenceError: the file is missing, damaged or foreign, or was fitted for another
                model.
        """
        header, tensors = persistence.read(path, kind=FILE_KIND, version=FILE_VERSION)
        try:
            score = _rebuilt(SCORES, header["score"])
            detector = Detector(
                score, _rebuilt(REPRESENTATIONS, header["representation"]), header["name"]
            )
            detector.card = dict(header["card"])
            detector._sketch = SampleSketch(tensors["sketch"], header["sketch_complete"])
            for part, component in detector._parts().items():
                prefix = f"{part}."
                component.fitted = {
                    key.removeprefix(prefix): tensor
                    for key, tensor in tensors.items()
                    if key.startswith(prefix)
                }
            if "calibration" in tensors:
                detector.calibration = Calibration.of(tensors["calibration"], header["id_recall"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PersistenceError(
                f"{os.fspath(path)} does not describe a detector that this grood-fast knows "
                f"({type(error).__name__}: {error})."
            ) from error
        if model is not None:
            try:
                if head is not None and detector.card:
                    detector.card["head"] = head
                known = detector.card.get("head") or None
                detector.bind(model, known, precision or detector.card.get("precision"))
            except (InputError, HeadNotFoundError) as error:
                raise PersistenceError(
                    f"{os.fspath(path)} does not fit the model: {error}"
                ) from error
        return detector

    def to(self: Self, device: torch.device | str) -> Self:
        """Move what was fitted to a device. Scoring does so by itself."""
        for component in self._parts().values():
            component.to(device)
        return self

    # --- what a pass asks of it ---------------------------------------------------------------

    def require_model(self, classifier: Classifier) -> None:
        """Raises InputError where the detector was fitted or calibrated for another model, or in
        another precision."""
        if self.card.get("precision", classifier.precision) != classifier.precision:
            raise InputError(
                f"{self.name} was fitted or calibrated with precision={self.card['precision']!r}, "
                f"not {classifier.precision!r}: its scores would not be comparable."
            )
        expected = self.card.get("fingerprint")
        if expected is None:
            return
        try:
            found = classifier.fingerprint(self.card["head"])
        except HeadNotFoundError as error:
            found = str(error)
        if found != expected:
            layer = self.card["head"]
            part = f"weights of the head {layer!r}" if layer else "weights"
            raise InputError(
                f"{self.name} was fitted or calibrated for another model (a "
                f"{self.card['model']}): the {part} differ. Fit it again, or pass the model it was "
                "fitted for."
            )

    def require_fitted(self) -> None:
        """Raises NotFittedError where ``is_fitted`` is False."""
        for component in self._parts().values():
            component.require_fitted()

    def _parts(self) -> dict[str, Representation | Score]:
        return {"representation": self.representation, "score": self.score_function}

    def _bound(self) -> Classifier:
        if self._classifier is None:
            raise NotFittedError(
                f"{self.name} knows no model yet: call fit(model, reference) or bind(model)."
            )
        return self._classifier

    def _calibrated(self) -> Calibration:
        if self.calibration is None:
            raise NotFittedError(
                f"{self.name} has no threshold yet: call calibrate(loader) with in-distribution "
                "samples held out."
            )
        return self.calibration

    def _scores_of(self, samples: Any) -> Tensor:
        if isinstance(samples, Scores):
            if samples.detector != self.name:
                raise InputError(f"these are scores of {samples.detector}, not of {self.name}.")
            return samples.as_subclass(Tensor)
        one_batch = is_batch(samples)
        loader = [samples] if one_batch else samples
        return self.score(loader, progress=not one_batch).as_subclass(Tensor)


class Fitting:
    """What one pass over the reference teaches a detector: absorb, merge, finish, install.

    The detector itself does not change before :meth:`install`.

    Args:
        detector: to be fitted.
        classifier: the model.
        representation: begun already; a fresh one if None.
    """

    def __init__(
        self,
        detector: Detector,
        classifier: Classifier,
        representation: Representation | None = None,
    ) -> None:
        self.detector = detector
        self.count = 0
        self.representation = detector.representation
        if representation is not None:
            self.representation = representation
        elif self.representation.needs_fit:
            self.representation = self.representation.fresh()
            self.representation.begin(classifier)
        self.score = detector.score_function.fresh()
        self.score.begin(classifier)
        self._sketch = SampleSketch()
        self._pseudo_labels = 0

    def absorb(self, signals: Signals) -> None:
        """Take in one batch."""
        labels = signals.labels
        if labels is None and (self.score.needs_labels or self.representation.needs_labels):
            labels = signals.predictions
            self._pseudo_labels += len(labels)
        if self.representation.needs_fit:
            self.representation.absorb(signals, labels, signals.indices)
        else:
            self.score.absorb(self.representation(signals), labels, signals.indices)
        self._sketch.absorb(signals.batch.fingerprints())
        self.count += len(signals.logits)

    def merge(self, other: Fitting) -> None:
        """Add what the same detector's fitting on another shard has absorbed."""
        if self.representation.needs_fit:
            self.representation.merge(other.representation)
        self.score.merge(other.score)
        self._sketch.merge(other._sketch)
        self._pseudo_labels += other._pseudo_labels
        self.count += other.count

    def finish(self) -> None:
        """Turn what was absorbed into what scoring needs.

        A representation that learns comes first; the score then learns from the samples it kept.
        """
        if self.representation.needs_fit:
            self.representation.finish()
            for z, labels, indices in self.representation.replay():
                self.score.absorb(z, labels, indices)
        self.score.finish()
        if self._pseudo_labels:
            some = f" for {self._pseudo_labels} of {self.count} samples"
            warnings.warn(
                f"the reference has no labels{some if self._pseudo_labels < self.count else ''}: "
                f"{self.detector.name} takes the classes the model predicts instead. Let the "
                "loader yield (x, y) for the true ones.",
                FitWarning,
                stacklevel=4,
            )

    def install(self, classifier: Classifier) -> None:
        """Hand what was learned to the detector, whose calibration is void from here on."""
        self.detector.representation = self.representation
        self.detector.score_function = self.score
        self.detector._classifier = classifier
        self.detector.calibration = None
        self.detector._sketch = self._sketch
        self.detector.card = {
            **_model_facts(classifier),
            "reference_samples": self.count,
            "pseudo_labels": bool(self._pseudo_labels),
            **({"representation": facts} if (facts := self.representation.facts) else {}),
        }


def fit_together(
    classifier: Classifier,
    detectors: Sequence[Detector],
    reference: Iterable[Any],
    *,
    progress: bool = True,
) -> None:
    """Fit any number of detectors in one pass, and bind them; those that need no reference only
    forget their calibration.

    Either all of them are fitted, or, after an error or an interruption, none is changed.
    """
    learners = [detector for detector in detectors if detector.needs_fit]
    for detector in detectors:
        if not detector.needs_fit:  # but a threshold belongs to the model it was set for
            detector.calibration, detector.card = None, {}
            detector._classifier = classifier
    if not learners:
        return
    fittings: list[Fitting] = []
    needs = frozenset[Need]().union(*(detector.needs for detector in learners))
    warmed_up = _warm_up(classifier, learners, reference, needs)
    with closing(stream(classifier, warmed_up.loader, needs)) as batches:
        for signals in _progress(batches, reference, "fitting", progress):
            _find_head(classifier, signals)
            if not fittings:
                fittings = [
                    Fitting(detector, classifier, representation)
                    for detector, representation in zip(
                        learners, warmed_up.representations, strict=True
                    )
                ]
            for fitting in fittings:
                fitting.absorb(signals)
    for fitting in fittings:
        fitting.finish()
    for fitting in fittings:
        fitting.install(classifier)


class _WarmedUp(NamedTuple):
    """The loader, from its start, and the representations that have seen some of it before."""

    loader: Iterable[Any]
    representations: list[Representation | None]


def _warm_up(
    classifier: Classifier,
    detectors: Sequence[Detector],
    reference: Iterable[Any],
    needs: frozenset[Need],
) -> _WarmedUp:
    """Let representations that ask for it see the first samples before the pass.

    The samples are kept meanwhile, so that a loader that can be read but once is read once.
    """
    wanted = max((detector.representation.warm_up_samples for detector in detectors), default=0)
    if not wanted:
        return _WarmedUp(reference, [None] * len(detectors))
    begun: list[Representation | None] = []
    for detector in detectors:
        fresh = None
        if detector.representation.warm_up_samples:
            fresh = detector.representation.fresh()
            fresh.begin(classifier)
        begun.append(fresh)
    _, remaining = preview(reference)
    kept: list[Batch] = []
    count = size = 0
    for batch in remaining:
        kept.append(batch)
        count, size = count + batch.size, size + batch.nbytes
        if count >= wanted or size >= WARM_UP_BYTES:
            break
    seen = 0
    with closing(stream(classifier, kept, needs)) as batches:
        for signals in batches:
            for fresh in begun:
                if fresh is not None and seen < fresh.warm_up_samples:
                    fresh.warm_up(signals)
            seen += len(signals.indices)
    for fresh in begun:
        if fresh is not None:
            fresh.finish_warm_up()
    return _WarmedUp(chain(kept, remaining), begun)


def score_together(
    classifier: Classifier,
    detectors: Mapping[str, Detector],
    loader: Iterable[Any],
    *,
    progress: bool = True,
) -> ScoreTable:
    """Scores of any number of detectors in one pass; memory grows by one number a sample and one.

    Warns (:class:`ScoreWarning`) about samples whose score is NaN.

    Raises:
        NotFittedError: a detector has not seen reference data.
        InputError: an empty loader, or a batch that does not fit.
    """
    missing = [name for name, detector in detectors.items() if not detector.is_fitted]
    if missing:
        raise NotFittedError(
            f"{', '.join(missing)} has not seen reference data yet: call fit(model, reference) or "
            "pass reference= (in-distribution samples, such as the training loader)."
        )
    for detector in detectors.values():
        detector.to(classifier.device)
    needs = frozenset[Need]().union(*(detector.needs for detector in detectors.values()))
    device = classifier.device
    columns = {name: Column(torch.float32, device) for name in detectors}
    predictions, labels = Column(torch.int64, device), Column(torch.int64, device)
    all_labelled = True
    with closing(stream(classifier, loader, needs)) as batches:
        for signals in _progress(batches, loader, "scoring", progress):
            for name, detector in detectors.items():
                columns[name].append(detector(signals))
            predictions.append(signals.predictions)
            all_labelled &= signals.labels is not None
            if signals.labels is not None:
                labels.append(signals.labels)
    table = {name: column.finish() for name, column in columns.items()}
    for name, values in table.items():
        _warn_of_nan(name, values)
    return ScoreTable(table, predictions.finish(), labels.finish() if all_labelled else None)


def _find_head(classifier: Classifier, signals: Signals) -> None:
    """At the first batch: so that the detector knows its model by the head."""
    if classifier.has_head or len(signals.indices) == 0 or int(signals.indices[0]) > 0:
        return
    try:
        classifier.find_head(signals.batch)
    except HeadNotFoundError as error:
        logger.debug("%s", error)


def _model_facts(classifier: Classifier) -> dict[str, Any]:
    """Which model it was, so that another is noticed: by its head, or all of it without one."""
    head = classifier.head_name if classifier.has_head else ""
    return {
        "model": type(classifier.model).__name__,
        "head": head,
        "fingerprint": classifier.fingerprint(head),
        "precision": classifier.precision,
        "torch": torch.__version__,
    }


def _described(component: Representation | Score) -> dict[str, Any]:
    return {"name": component.name, "config": component.config()}


Part = TypeVar("Part", Representation, Score)


def _rebuilt(registry: Mapping[str, type[Part]], described: Mapping[str, Any]) -> Part:
    return registry[described["name"]](**described["config"])


def _progress(
    batches: Iterable[Signals], loader: Iterable[Any], what: str, enabled: bool
) -> Iterable[Signals]:
    try:
        total = len(loader)  # type: ignore[arg-type]
    except TypeError:
        total = None
    # The bar appears after two seconds only.
    bar: Iterable[Signals] = tqdm(
        batches, total=total, desc=what, unit="batch", delay=2, disable=not enabled, leave=False
    )
    return bar


def _warn_of_nan(name: str, values: Tensor) -> None:
    missing = values.isnan().nonzero().flatten()
    if len(missing):
        shown = ", ".join(map(str, missing[:5].tolist())) + (", …" if len(missing) > 5 else "")
        warnings.warn(
            f"{name}: {len(missing)} of {len(values)} scores are NaN (positions {shown}), because "
            "the inputs or the model's outputs are not finite there. predict() calls them OOD.",
            ScoreWarning,
            stacklevel=4,
        )
