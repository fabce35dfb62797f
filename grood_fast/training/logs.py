"""What a training writes down while it runs."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grood_fast.errors import InputError, PersistenceError


class CsvLog:
    """A table of numbers, one line at a time, that starts anew after a given step.

    Args:
        path: of the file.
        columns: their names; the first is "step".
        after: lines of later steps are dropped: what a resumed training will do again.

    Raises:
        PersistenceError: it cannot be written.
    """

    def __init__(self, path: Path, columns: list[str], after: int) -> None:
        self.path = path
        self._columns = columns
        kept: list[list[str]] = []
        try:
            if after > 0 and path.is_file():
                with path.open(newline="", encoding="utf-8") as file:
                    kept = [
                        row
                        for row in csv.reader(file)
                        if len(row) == len(columns) and row[0].isdigit() and int(row[0]) <= after
                    ]
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([columns, *kept])
        except OSError as error:
            raise PersistenceError(f"could not write {path} ({error}).") from error

    def write(self, values: Mapping[str, Any]) -> None:
        """Add a line; columns without a value stay empty."""
        row = [_text(values.get(column)) for column in self._columns]
        try:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(row)
        except OSError as error:
            raise PersistenceError(
                f"could not write {self.path} ({error}): make room and resume from the last "
                "checkpoint, which is complete."
            ) from error


class TensorBoardLog:
    """The same numbers for TensorBoard.

    Args:
        folder: where its event files go.

    Raises:
        InputError: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(
                "tensorboard=True needs tensorboard: pip install tensorboard"
            ) from error
        self._writer = SummaryWriter(str(folder))

    def write(self, group: str, values: Mapping[str, Any]) -> None:
        """Add the numbers among the values at their "step"."""
        for name, value in values.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(f"{group}/{name}", value, values["step"])
        self._writer.flush()


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
