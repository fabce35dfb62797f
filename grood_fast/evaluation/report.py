"""What an evaluation found: numbers with intervals and costs, as records, Markdown or JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from grood_fast.errors import InputError
from grood_fast.evaluation.metrics import Metrics
from grood_fast.persistence import atomic_write
from grood_fast.results import ScoreTable


@dataclass(frozen=True)
class Costs:
    """Time, measured on one batch of the in-distribution data, one thing after the other.

    Attributes:
        batch_size: samples in that batch.
        forward_seconds: the model on it, median.
        detector_seconds: detector → what it takes beside the forward, on its own, median.
    """

    batch_size: int
    forward_seconds: float
    detector_seconds: dict[str, float]

    def ratio(self, detector: str) -> float:
        """(forward + detector) / forward."""
        return 1 + self.detector_seconds[detector] / self.forward_seconds


@dataclass(frozen=True)
class Result:
    """One detector on one OOD set.

    Attributes:
        detector: its name.
        group: the group of the OOD set, or "" without groups.
        dataset: the OOD set's name.
        samples: number of OOD samples.
        metrics: with intervals.
    """

    detector: str
    group: str
    dataset: str
    samples: int
    metrics: Metrics


@dataclass(frozen=True)
class Report:
    """What :func:`grood_fast.evaluate` found.

    Attributes:
        results: one for each detector and OOD set.
        costs: what each detector takes beside the forward pass.
        accuracy: of the classifier on the in-distribution samples with labels, or None.
        id_samples: number of in-distribution samples.
        environment: where it was measured; see :func:`grood_fast.environment.environment`.
        id_scores: the in-distribution scores.
        ood_scores: OOD set → its scores.
    """

    results: list[Result]
    costs: Costs
    accuracy: float | None
    id_samples: int
    environment: dict[str, Any]
    id_scores: ScoreTable = field(repr=False)
    ood_scores: dict[str, ScoreTable] = field(repr=False)

    @property
    def detectors(self) -> list[str]:
        """Names, in the order they were given."""
        return list(self.id_scores)

    @property
    def datasets(self) -> list[tuple[str, str]]:
        """(group, OOD set) pairs, in the order they were given."""
        return list(dict.fromkeys((result.group, result.dataset) for result in self.results))

    def result(self, detector: str, dataset: str) -> Result:
        """The result of one detector on one OOD set.

        Raises:
            InputError: there is none.
        """
        for result in self.results:
            if (result.detector, result.dataset) == (detector, dataset):
                return result
        raise InputError(f"there is no result of {detector!r} on {dataset!r} in this report.")

    def mean(self, detector: str, metric: str = "auroc", group: str | None = None) -> float:
        """Unweighted mean of a metric over the OOD sets of a group, or over all of them."""
        values = [
            getattr(result.metrics, metric)
            for result in self.results
            if result.detector == detector and group in (None, result.group)
        ]
        if not values:
            raise InputError(f"there is no result of {detector!r} in group {group!r}.")
        return math.fsum(values) / len(values)

    def records(self) -> list[dict[str, Any]]:
        """One flat mapping a result, for a data frame: metrics and ``<metric>_low``, ``_high``."""
        return [
            {
                "detector": result.detector,
                "group": result.group,
                "dataset": result.dataset,
                "ood_samples": result.samples,
                **{
                    name: value
                    for name, value in asdict(result.metrics).items()
                    if name not in ("intervals", "confidence")
                },
                **{
                    f"{name}_{end}": bound
                    for name, interval in result.metrics.intervals.items()
                    for end, bound in zip(("low", "high"), interval, strict=True)
                },
                "cost_ratio": self.costs.ratio(result.detector),
            }
            for result in self.results
        ]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the summary, in percent: AUROC ± half the interval on each OOD set,
        then the means of AUROC and FPR at 95 % OOD recall over each group, and the cost."""
        groups = list(dict.fromkeys(group for group, _ in self.datasets))
        header = ["detector"]
        for group in groups:
            names = [name for of_group, name in self.datasets if of_group == group]
            header += names
            if len(names) > 1:
                header.append(f"{group} mean".strip())
        header += [f"{group} FPR95".strip() for group in groups] + ["cost"]
        return header, [list(self._cells(name, groups)) for name in self.detectors]

    def to_markdown(self) -> str:
        """The summary of :meth:`table` as a Markdown table."""
        header, rows = self.table()
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def to_json(self) -> str:
        """Everything but the scores, as JSON."""
        return json.dumps(
            {
                "accuracy": self.accuracy,
                "id_samples": self.id_samples,
                "results": self.records(),
                "costs": asdict(self.costs),
                "environment": self.environment,
            },
            indent=2,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_json` to a file, whole or not at all."""
        with atomic_write(path) as temporary:
            temporary.write_text(self.to_json())

    def _cells(self, detector: str, groups: list[str]) -> Iterator[str]:
        yield detector
        for group in groups:
            names = [name for of_group, name in self.datasets if of_group == group]
            for name in names:
                metrics = self.result(detector, name).metrics
                low, high = metrics.intervals["auroc"]
                yield f"{100 * metrics.auroc:.1f} ±{50 * (high - low):.1f}"
            if len(names) > 1:
                yield f"{100 * self.mean(detector, 'auroc', group):.1f}"
        for group in groups:
            yield f"{100 * self.mean(detector, 'fpr_at_95_ood_recall', group):.1f}"
        yield f"{self.costs.ratio(detector):.2f}x"
