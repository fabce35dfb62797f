"""Bars on what takes more than a few seconds, unless the caller wants none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm.auto import tqdm

DELAY = 2
"""Seconds before a bar appears."""

_shown: ContextVar[bool] = ContextVar("progress", default=True)


@contextmanager
def progress(shown: bool) -> Iterator[None]:
    """Whether bars appear inside the block."""
    token = _shown.set(shown)
    try:
        yield
    finally:
        _shown.reset(token)


def bar(
    iterable: Iterable[Any], description: str, unit: str = "it", total: int | None = None
) -> Any:
    """The iterable, behind a bar on the standard error.

    Args:
        iterable: what to go through.
        description: what is being done.
        unit: of one step.
        total: number of steps; the iterable's length unless told.
    """
    return tqdm(
        iterable,
        description,
        total=total,
        unit=unit,
        delay=DELAY,
        disable=not _shown.get(),
        leave=False,
    )
