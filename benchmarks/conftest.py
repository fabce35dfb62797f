"""Every benchmark files its ratios in ``comparisons``; the tables are printed at the end, with the
environment. Nothing here fails because of a time: bars are reported as met or missed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comparisons import Comparisons
from rich.console import Console
from rich.table import Table

from grood_fast.environment import environment

LEFT = ("what", "against")

_comparisons = Comparisons()


@pytest.fixture
def comparisons() -> Comparisons:
    return _comparisons


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Each number of threads in turn; 2 only where there are two processors."""
    before = torch.get_num_threads()
    if request.param > environment()["cpus"]:
        pytest.skip(f"this machine has fewer than {request.param} processors")
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _comparisons.lines:
        return
    console = Console(width=120)
    facts = environment()
    with console.capture() as capture:
        for title in dict.fromkeys(line.table for line in _comparisons.lines):
            lines = [line for line in _comparisons.lines if line.table == title]
            meaning = "ours / theirs" if lines[0].lower else "theirs / ours"
            table = Table(title=f"{title} ({meaning})", title_justify="left")
            for column in ("what", "against", "ratio", "quartiles", "ours", "bar"):
                table.add_column(
                    column, justify="left" if column in ("what", "against") else "right"
                )
            for line in lines:
                table.add_row(
                    line.what,
                    line.baseline,
                    f"{line.value:.3f}" if line.lower else f"{line.value:.2f}",
                    f"{line.spread[0]:.3g} – {line.spread[1]:.3g}",
                    "" if line.ours is None else _duration(line.ours),
                    line.verdict,
                )
            console.print(table)
        for key, value in facts.items():
            console.print(f"{key}: {value}", highlight=False)
    terminalreporter.write_line(capture.get())


def _duration(seconds: float) -> str:
    return f"{1e6 * seconds:.1f} µs" if seconds < 1e-2 else f"{1e3 * seconds:.1f} ms"
