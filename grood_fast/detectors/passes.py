"""One pass over a loader for any number of detectors: to fit them, or to score with them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grood_fast.batches import Batch, preview
from grood_fast.classifier import Classifier
from grood_fast.detectors.calibration import SampleSketch
from grood_fast.errors import (
    FitWarning,
    HeadNotFoundError,
    NotFittedError,
    ScoreWarning,
    warn,
)
from grood_fast.progress import bar
from grood_fast.progress import progress as progress_shown
from grood_fast.representations import Representation
from grood_fast.results import Column, ScoreTable
from grood_fast.scores import Score
from grood_fast.signals import Need, Signals, stream

if TYPE_CHECKING:
    from grood_fast.detectors.base import Detector

logger = logging.getLogger(__name__)

WARM_UP_BYTES = 256 << 20
"""So many bytes of inputs at most are kept for a warm-up."""


@dataclass
class _Lesson:
    """A representation, and the scores of all the detectors that read the same one."""

    representation: Representation
    detectors: list[Detector] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)

    @property
    def needs_labels(self) -> bool:
        return any(map(self.taught_by_labels, self.scores))

    def taught_by_labels(self, score: Score) -> bool:
        return self.representation.needs_labels or score.needs_labels


class Fitting:
    """What one pass over the reference teaches detectors: absorb, merge, finish, install.

    Detectors with the same representation share one, which learns, and is computed, once. The
    detectors themselves do not change before :meth:`install`.

    Args:
        detectors: which to teach.
        classifier: whose signals will come.

    Attributes:
        count: reference samples absorbed.
    """

    def __init__(self, detectors: Sequence[Detector], classifier: Classifier) -> None:
        self.count = 0
        self._unlabelled = 0
        self._warmed_up = 0
        self._sketch = SampleSketch()
        lessons: dict[tuple[type, str], _Lesson] = {}
        for detector in detectors:
            own = detector.representation
            key = type(own), json.dumps(own.config(), sort_keys=True)
            if key not in lessons:
                lessons[key] = _Lesson(own.fresh() if own.needs_fit else own)
                if own.needs_fit:
                    lessons[key].representation.begin(classifier)
            score = detector.score_function.fresh()
            score.begin(classifier)
            lessons[key].detectors.append(detector)
            lessons[key].scores.append(score)
        self._lessons = list(lessons.values())

    @property
    def representations(self) -> list[Representation]:
        """Those that learn or are read, each once."""
        return [lesson.representation for lesson in self._lessons]

    def warm_up(self, signals: Signals) -> None:
        """Let representations that ask for it see a batch before the pass over all of them."""
        for lesson in self._lessons:
            if self._warmed_up < lesson.representation.warm_up_samples:
                lesson.representation.warm_up(signals)
        self._warmed_up += len(signals.indices)

    def finish_warm_up(self) -> None:
        """After the last of those batches."""
        for lesson in self._lessons:
            if lesson.representation.warm_up_samples:
                lesson.representation.finish_warm_up()

    def absorb(self, signals: Signals) -> None:
        """Take in one batch."""
        labels = signals.labels
        if labels is None:
            self._unlabelled += len(signals.logits)
        for lesson in self._lessons:
            known = labels
            if labels is None and lesson.needs_labels:
                known = signals.predictions
            if lesson.representation.needs_fit:
                lesson.representation.absorb(signals, known, signals.indices)
            else:
                z = lesson.representation(signals)
                for score in lesson.scores:
                    score.absorb(z, known, signals.indices)
        self._sketch.absorb(signals.batch.fingerprints())
        self.count += len(signals.logits)

    def merge(self, other: Fitting) -> None:
        """Add what a fitting of the same detectors on another shard has absorbed."""
        for mine, theirs in zip(self._lessons, other._lessons, strict=True):
            if mine.representation.needs_fit:
                mine.representation.merge(theirs.representation)
            for score, their_score in zip(mine.scores, theirs.scores, strict=True):
                score.merge(their_score)
        self._sketch.merge(other._sketch)
        self._unlabelled += other._unlabelled
        self.count += other.count

    def finish(self) -> None:
        """Turn what was absorbed into what scoring needs.

        A representation that learns comes first; its scores then learn from the samples it kept.
        """
        for lesson in self._lessons:
            if lesson.representation.needs_fit:
                lesson.representation.finish()
                for z, labels, indices in lesson.representation.replay():
                    for score in lesson.scores:
                        score.absorb(z, labels, indices)
            for score in lesson.scores:
                score.finish()
        guessing = [
            detector.name
            for lesson in self._lessons
            for detector, score in zip(lesson.detectors, lesson.scores, strict=True)
            if lesson.taught_by_labels(score)
        ]
        if self._unlabelled and guessing:
            some = f" for {self._unlabelled} of {self.count} samples"
            warn(
                f"the reference has no labels{some if self._unlabelled < self.count else ''}: "
                f"{', '.join(guessing)} takes the classes the model predicts instead. Let the "
                "loader yield (x, y) for the true ones.",
                FitWarning,
            )

    def install(self, classifier: Classifier) -> None:
        """Hand what was learned to the detectors, whose calibration is void from here on."""
        facts = model_facts(classifier)
        for lesson in self._lessons:
            for detector, score in zip(lesson.detectors, lesson.scores, strict=True):
                card = {
                    **facts,
                    "reference_samples": self.count,
                    "pseudo_labels": bool(self._unlabelled) and lesson.taught_by_labels(score),
                }
                if lesson.representation.facts:
                    card["representation"] = lesson.representation.facts
                detector.install(classifier, lesson.representation, score, self._sketch, card)


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
            detector.forget(classifier)
    if not learners:
        return
    fitting: Fitting | None = None
    needs = frozenset[Need]().union(*(detector.fit_needs for detector in learners))
    loader = reference
    wanted = max(detector.representation.warm_up_samples for detector in learners)
    if wanted:
        _, remaining = preview(reference)
        first = list(_first(remaining, wanted))
        with closing(stream(classifier, first, needs)) as batches:
            for signals in batches:
                find_head(classifier, signals)
                if fitting is None:
                    fitting = Fitting(learners, classifier)
                fitting.warm_up(signals)
        assert fitting is not None
        fitting.finish_warm_up()
        # Kept meanwhile, so that a loader that can be read but once is read once.
        loader = chain(first, remaining)
    with closing(stream(classifier, loader, needs)) as batches:
        for signals in with_progress(batches, reference, "fitting", progress):
            find_head(classifier, signals)
            if fitting is None:
                fitting = Fitting(learners, classifier)
            fitting.absorb(signals)
    assert fitting is not None  # an empty loader has been refused
    with progress_shown(progress):
        fitting.finish()
    fitting.install(classifier)


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
        for signals in with_progress(batches, loader, "scoring", progress):
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


def _first(batches: Iterable[Batch], samples: int) -> Iterator[Batch]:
    """Batches until so many samples, or ``WARM_UP_BYTES`` of inputs, are together."""
    count = size = 0
    for batch in batches:
        yield batch
        count, size = count + batch.size, size + batch.nbytes
        if count >= samples or size >= WARM_UP_BYTES:
            return


def find_head(classifier: Classifier, signals: Signals) -> None:
    """At the first batch with samples: so that the detector knows its model by the head."""
    if classifier.has_head or len(signals.indices) == 0 or int(signals.indices[0]) > 0:
        return
    try:
        classifier.find_head(signals.batch)
    except HeadNotFoundError as error:
        logger.debug("%s", error)


def model_facts(classifier: Classifier) -> dict[str, Any]:
    """Which model it was, so that another is noticed: by its head, or all of it without one."""
    head = classifier.head_name if classifier.has_head else ""
    return {
        "model": type(classifier.model).__name__,
        "head": head,
        "fingerprint": classifier.fingerprint(head),
        "precision": classifier.precision,
        "torch": torch.__version__,
    }


def with_progress(
    batches: Iterable[Signals], loader: Iterable[Any], what: str, shown: bool
) -> Iterable[Signals]:
    """The batches of a loader, behind a bar."""
    try:
        total = len(loader)  # type: ignore[arg-type]
    except TypeError:
        total = None
    with progress_shown(shown):
        known: Iterable[Signals] = bar(batches, what, unit="batch", total=total)
    return known


def _warn_of_nan(name: str, values: Tensor) -> None:
    missing = values.isnan().nonzero().flatten()
    if len(missing):
        shown = ", ".join(map(str, missing[:5].tolist())) + (", …" if len(missing) > 5 else "")
        warn(
            f"{name}: {len(missing)} of {len(values)} scores are NaN (positions {shown}), because "
            "the inputs or the model's outputs are not finite there. predict() calls them OOD.",
            ScoreWarning,
        )
