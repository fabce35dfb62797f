"""A detector: a representation, a score on it, what they learned, and a threshold."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import closing
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from grood_fast import persistence
from grood_fast.batches import is_batch, order_warning
from grood_fast.classifier import Classifier, Precision
from grood_fast.detectors.calibration import Calibration, SampleSketch, check_recall
from grood_fast.detectors.passes import (
    find_head,
    fit_together,
    model_facts,
    score_together,
    with_progress,
)
from grood_fast.errors import (
    FitWarning,
    HeadNotFoundError,
    InputError,
    NotFittedError,
    PersistenceError,
    warn,
)
from grood_fast.representations import REPRESENTATIONS, Representation
from grood_fast.results import Column, Scores
from grood_fast.scores import SCORES, Score
from grood_fast.signals import Need, Signals, stream

Self = TypeVar("Self", bound="Detector")

FILE_KIND, FILE_VERSION = "detector", 1


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
    def fit_needs(self) -> frozenset[Need]:
        """The signals it reads beside the logits while it learns."""
        return self.representation.fit_needs

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
        self.require_fitted()
        return self.score_function(signals.read_as(self.representation))

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
            for signals in with_progress(batches, loader, "calibrating", progress):
                find_head(classifier, signals)
                scores.append(self(signals))
                if self.needs_fit:
                    some, again = self._sketch.seen(signals.batch.fingerprints())
                    looked_up, seen = looked_up + some, seen + again
        if seen:
            warn(
                f"{seen} of {looked_up} calibration samples looked up were in the reference as "
                "well: their scores are too low and the threshold will call too much OOD. "
                "Calibrate on samples held out.",
                FitWarning,
            )
        self.calibration = Calibration.of(scores.finish(), id_recall)
        self.card = {**self.card, **model_facts(classifier)}
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
            detector.representation.facts = dict(detector.card.get("representation", {}))
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

    def activation_twin(self) -> Detector | None:
        """The same score on the activations alone, unfitted: what the gradient adds shows beside
        it. None for a detector that reads no gradient."""
        activations = self.representation.activations()
        if activations is None:
            return None
        return Detector(self.score_function.on_activations(), activations, f"{self.name}-twin")

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

    def install(
        self,
        classifier: Classifier,
        representation: Representation,
        score: Score,
        sketch: SampleSketch,
        card: dict[str, Any],
    ) -> None:
        """Become what a pass over the reference has taught; any calibration is void."""
        self.forget(classifier)
        self.representation, self.score_function = representation, score
        self._sketch, self.card = sketch, card

    def forget(self, classifier: Classifier) -> None:
        """Bind to a model, without the threshold that was set for the last."""
        self.calibration, self.card = None, {}
        self._classifier = classifier

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


def _described(component: Representation | Score) -> dict[str, Any]:
    return {"name": component.name, "config": component.config()}


Part = TypeVar("Part", Representation, Score)


def _rebuilt(registry: Mapping[str, type[Part]], described: Mapping[str, Any]) -> Part:
    return registry[described["name"]](**described["config"])
