"""Ratios in one run: the things compared take turns, so a change of speed meets all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SECONDS = 2.0
"""About how long one comparison takes."""

Call = Callable[[], Any]


@dataclass
class Comparison:
    """One line of a table.

    Attributes:
        table: its title.
        what: the shape or case.
        baseline: what it is compared with.
        value: median of (theirs / ours), or (ours / theirs) where ``lower`` is better.
        spread: the quartiles of the same.
        bar: the value to reach, or None where it is only reported.
        lower: whether a lower value is better.
        ours: median seconds of one call.
    """

    table: str
    what: str
    baseline: str
    value: float
    spread: tuple[float, float]
    bar: float | None
    lower: bool
    ours: float | None = None

    @property
    def verdict(self) -> str:
        """met, missed, or nothing without a bar."""
        if self.bar is None:
            return ""
        met = self.value <= self.bar if self.lower else self.value >= self.bar
        return f"{'≤' if self.lower else '≥'} {self.bar:g} {'met' if met else 'MISSED'}"


@dataclass
class Comparisons:
    """All lines of this run."""

    lines: list[Comparison] = field(default_factory=list)

    def timed(
        self,
        benchmark: Any,
        table: str,
        what: str,
        ours: Call,
        baselines: dict[str, Call],
        *,
        bar: float | None = None,
        lower: bool = False,
        seconds: float = SECONDS,
    ) -> None:
        """Time ours and the baselines in turns and file a line for each baseline.

        ``bar`` applies to the first baseline. With ``lower`` the value is ours / theirs.
        """
        calls = [ours, *baselines.values()]
        times: list[list[float]] = [[] for _ in calls]
        inner = [_repetitions(call) for call in calls]
        gc.disable()
        try:
            end = time.perf_counter() + seconds
            while len(times[0]) < 6 or time.perf_counter() < end:
                # Whoever goes first finds another state of caches and memory: take turns in that.
                order = range(len(calls)) if len(times[0]) % 2 else reversed(range(len(calls)))
                for position in order:
                    call, count, measured = calls[position], inner[position], times[position]
                    start = time.perf_counter()
                    for _ in range(count):
                        call()
                    measured.append((time.perf_counter() - start) / count)
        finally:
            gc.enable()
        for number, name in enumerate(baselines, start=1):
            pairs = zip(times[0], times[number], strict=True)
            ratios = [mine / theirs if lower else theirs / mine for mine, theirs in pairs]
            self.add(
                benchmark,
                Comparison(
                    table,
                    what,
                    name,
                    statistics.median(ratios),
                    _quartiles(ratios),
                    bar if number == 1 else None,
                    lower,
                    statistics.median(times[0]),
                ),
            )
        # pytest-benchmark's own record of ours, for its comparison and JSON output.
        benchmark.pedantic(ours, rounds=5, iterations=inner[0], warmup_rounds=0)

    def add(self, benchmark: Any, comparison: Comparison) -> None:
        """File a line, and keep it in pytest-benchmark's record."""
        self.lines.append(comparison)
        benchmark.extra_info[f"{comparison.what}: {comparison.baseline}"] = comparison.value


def _repetitions(call: Call) -> int:
    """How many calls make a measurable time (2 ms); the first call warms up."""
    call()
    start = time.perf_counter()
    call()
    return max(1, int(0.002 / max(time.perf_counter() - start, 1e-7)))


def _quartiles(values: list[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
