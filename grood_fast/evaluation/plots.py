"""Pictures of a report: score histograms and ROC curves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from grood_fast.errors import InputError
from grood_fast.evaluation.benchmark import orderable_scores
from grood_fast.evaluation.report import Report
from grood_fast.persistence import atomic_write

BINS = 60


def plot_report(
    report: Report, path: str | os.PathLike[str], detectors: Sequence[str] | None = None
) -> None:
    """One column a detector: histograms of its scores above, ROC curves below.

    Args:
        report: what :func:`grood_fast.evaluate` returned.
        path: the picture; its suffix decides the format (png, svg, pdf).
        detectors: which, by name; default all.

    Raises:
        InputError: matplotlib is missing, or the report has no such detector.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            'a picture needs matplotlib, which is not installed: pip install "grood-fast[plot]".'
        ) from error
    from sklearn.metrics import roc_curve

    chosen = report.detectors if detectors is None else list(detectors)
    if unknown := [name for name in chosen if name not in report.detectors]:
        raise InputError(f"the report has no detectors {unknown}; it has {report.detectors}.")
    figure = Figure(figsize=(3.2 * len(chosen) + 1.2, 6), layout="constrained")
    axes = figure.subplots(2, len(chosen), squeeze=False)
    for column, name in enumerate(chosen):
        histogram, curve = axes[:, column]
        inside = orderable_scores(report.id_scores[name])
        sets = {
            dataset: orderable_scores(table[name]) for dataset, table in report.ood_scores.items()
        }
        # Few extreme samples shall not press all others into one bin.
        everything = np.concatenate([inside, *sets.values()])
        finite = everything[np.isfinite(everything)]
        low, high = np.quantile(finite, [0.005, 0.995]) if len(finite) else (0.0, 1.0)
        edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
        _draw(histogram, inside, edges, label="in-distribution", color="black", linewidth=1.6)
        for dataset, scores in sets.items():
            (line,) = _draw(histogram, scores, edges, label=dataset, linewidth=1)
            truth = np.repeat([0, 1], [len(inside), len(scores)])
            false_positive, true_positive, _ = roc_curve(truth, np.concatenate([inside, scores]))
            auroc = report.result(name, dataset).metrics.auroc
            curve.plot(
                false_positive,
                true_positive,
                color=line.get_color(),
                linewidth=1,
                label=f"{dataset} {100 * auroc:.1f}",
            )
        histogram.set(title=name, xlabel="score (higher = more OOD)", yticks=[])
        curve.plot([0, 1], [0, 1], color="grey", linewidth=0.6, linestyle=":")
        curve.set(xlabel="false positive rate", xlim=(0, 1), ylim=(0, 1.01))
        curve.legend(fontsize="x-small", title="AUROC", title_fontsize="x-small")
    axes[0, 0].legend(fontsize="x-small")
    axes[0, 0].set_ylabel("density")
    axes[1, 0].set_ylabel("true positive rate (OOD found)")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=130)


def _draw(axis: Any, values: Any, edges: Any, **style: Any) -> Any:
    density, _ = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges, density=True)
    return axis.plot((edges[:-1] + edges[1:]) / 2, density, drawstyle="steps-mid", **style)
