"""Measuring detectors: metrics, comparison, reports; and the benchmark's data and networks."""

from __future__ import annotations

from grood_fast.evaluation.benchmark import evaluate, measure_costs
from grood_fast.evaluation.metrics import Metrics, evaluate_scores, paired_difference
from grood_fast.evaluation.report import Costs, Report, Result
from grood_fast.evaluation.selection import select, variants

__all__ = [
    "Costs",
    "Metrics",
    "Report",
    "Result",
    "evaluate",
    "evaluate_scores",
    "measure_costs",
    "paired_difference",
    "select",
    "variants",
]
