"""Compare detectors on one classifier: one pass a data set, all detectors together."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm.auto import tqdm

from grood_fast.batches import Batch, order_warning, preview
from grood_fast.classifier import Classifier, Precision
from grood_fast.detectors import Detector, fit_together, score_together, with_twins
from grood_fast.environment import environment
from grood_fast.errors import FitWarning, InputError, warn
from grood_fast.evaluation.metrics import accuracy, evaluate_scores
from grood_fast.evaluation.report import Costs, Report, Result
from grood_fast.layers import layer_needs
from grood_fast.network import NetworkNeed
from grood_fast.results import Scores, ScoreTable
from grood_fast.scores import Score
from grood_fast.scoring import fitted_precision, named, unfitted
from grood_fast.signals import Signals, stream

MEASURED_SECONDS = 2.0
"""About how long costs are measured for."""

Loaders = Mapping[str, Iterable[Any]]


def evaluate(
    model: nn.Module,
    detectors: str | Score | Detector | Sequence[str | Score | Detector],
    *,
    id: Iterable[Any],
    ood: Loaders | Mapping[str, Loaders],
    reference: Iterable[Any] | None = None,
    head: str | None = None,
    precision: Precision | None = None,
    twins: bool = True,
    confidence: float = 0.95,
    resamples: int = 200,
    progress: bool = True,
) -> Report:
    """Fit what needs fitting, score every set in one pass each, and measure.

    A sample whose score is NaN counts as the most OOD of all, as it does for ``predict``.

    Args:
        model: a trained classifier, which comes back as it was.
        detectors: names, scores or detectors; see :func:`grood_fast.score`.
        id: loader of in-distribution test samples; with labels, the accuracy is reported too.
        ood: name → loader, or group → name → loader (for example ``{"near": {...}, "far":
            {...}}``), of which means are reported too.
        reference: in-distribution samples for the detectors that are not fitted yet.
        head, precision: see :func:`grood_fast.score`.
        twins: beside each gradient detector, report the same score on the activations alone.
        confidence, resamples: of the bootstrap intervals; see
            :func:`grood_fast.evaluation.metrics.evaluate_scores`.
        progress: show progress bars.

    Raises:
        InputError, NotFittedError, HeadNotFoundError: as :func:`grood_fast.score`.
    """
    found, _ = named(detectors)
    asked = set(found)
    if twins:
        found = with_twins(found)
    if not isinstance(ood, Mapping) or not ood:
        raise InputError(
            "ood maps names to loaders, {'mnist': loader}, or groups to such mappings, and is not "
            f"empty; got {type(ood).__name__}."
        )
    sets = dict(_flat(ood))
    classifier = Classifier(model, head, precision or fitted_precision(found.values()))
    names = [dataset for _, dataset in sets]
    if len(set(names)) < len(names):
        raise InputError(f"OOD sets need different names, also across groups; got {names}.")
    for loader in (id, *sets.values()):
        order_warning(loader)
    missing = unfitted(classifier, found.values())
    if reference is not None:
        fit_together(classifier, missing, reference, progress=progress)
    elif left_out := [one.name for one in missing if one.name not in asked]:
        found = {name: one for name, one in found.items() if name not in left_out}
        warn(
            f"{', '.join(left_out)} needs a fit and is left out: pass reference=, or twins=False.",
            FitWarning,
        )
    first, batches = preview(id)
    id_scores = score_together(classifier, found, batches, progress=progress)
    costs = measure_costs(classifier, found, first)
    bar = tqdm(
        sets.items(), desc="evaluating", unit="set", delay=2, disable=not progress, leave=False
    )
    ood_scores: dict[str, ScoreTable] = {}
    results = []
    for (group, dataset), loader in bar:
        bar.set_postfix_str(dataset)
        table = score_together(classifier, found, loader, progress=False)
        ood_scores[dataset] = table
        for name in found:
            metrics = evaluate_scores(
                orderable_scores(id_scores[name]),
                orderable_scores(table[name]),
                confidence=confidence,
                resamples=resamples,
            )
            results.append(Result(name, group, dataset, len(table[name]), metrics))
    return Report(
        results=results,
        costs=costs,
        accuracy=_accuracy(id_scores),
        id_samples=len(id_scores.predictions),
        environment=environment(),
        id_scores=id_scores,
        ood_scores=ood_scores,
    )


def measure_costs(classifier: Classifier, detectors: Mapping[str, Detector], batch: Batch) -> Costs:
    """How long each detector takes on one batch beside the bare model, on its own.

    What detectors share in a common pass (the softmax statistics) is counted for each of them. The
    model and the detectors take turns, so that a change of the machine's speed meets all alike.

    Args:
        classifier: the user's model.
        detectors: fitted.
        batch: samples to measure with.
    """
    with_network = {
        name: detector
        for name, detector in detectors.items()
        if any(isinstance(need, NetworkNeed) for need in detector.needs)
    }
    others = {name: one for name, one in detectors.items() if name not in with_network}
    needs = frozenset(
        need for one in others.values() for need in one.needs if isinstance(need, str)
    )
    moved = batch.to(classifier.device)
    forward: list[float] = []
    rest: dict[str, list[float]] = {name: [] for name in others}
    with classifier.session("features" in needs, layer_needs(needs)):
        outputs = classifier.forward(moved)  # also a warm-up
        signals = Signals.of_last(classifier, outputs, moved)
        for detector in others.values():
            detector(replace(signals))
        end = time.perf_counter() + MEASURED_SECONDS
        while len(forward) < 3 or (time.perf_counter() < end and len(forward) < 200):
            forward.append(_seconds(lambda: classifier.forward(moved), classifier.device))
            for name, detector in others.items():
                # A copy has computed nothing yet.
                alone = replace(signals)
                call = lambda alone=alone, detector=detector: detector(alone)  # noqa: E731
                rest[name].append(_seconds(call, classifier.device))
    forward_seconds = statistics.median(forward)
    beside = {name: statistics.median(times) for name, times in rest.items()}
    for name, detector in with_network.items():
        # Their forward pass is recorded, and so another: the whole pass is measured.
        whole = [
            _seconds(lambda: _one_pass(classifier, detector, moved), classifier.device)  # noqa: B023
            for _ in range(4)
        ]
        beside[name] = max(0.0, statistics.median(whole[1:]) - forward_seconds)
    return Costs(
        batch_size=batch.size,
        forward_seconds=forward_seconds,
        detector_seconds={name: beside[name] for name in detectors},
    )


def _one_pass(classifier: Classifier, detector: Detector, batch: Batch) -> None:
    with closing(stream(classifier, [batch], detector.needs)) as batches:
        for signals in batches:
            detector(signals)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _flat(ood: Loaders | Mapping[str, Loaders]) -> Iterator[tuple[tuple[str, str], Iterable[Any]]]:
    for name, value in ood.items():
        if isinstance(value, Mapping):
            for dataset, loader in value.items():
                yield (name, dataset), loader
        else:
            yield ("", name), value


def orderable_scores(scores: Scores) -> NDArray[np.float32]:
    """Scores as an array, NaN as the largest: ``predict`` calls it OOD."""
    values: NDArray[np.float32] = scores.numpy().copy()
    values[np.isnan(values)] = np.inf
    return values


def _accuracy(table: ScoreTable) -> float | None:
    if table.labels is None or not bool((table.labels >= 0).any()):
        return None
    return accuracy(table.predictions.numpy(), table.labels.numpy())
