"""The exceptions of grood-fast: one small family, each also a built-in kind.

Every message says what was wrong, what was expected, and what to do about it.
"""

from __future__ import annotations

import sys
import warnings
from types import FrameType


class GroodFastError(Exception):
    """Base of every error raised on purpose by this package."""


class InputError(GroodFastError, ValueError):
    """Something handed in has a wrong shape, type, value or format."""


class HeadNotFoundError(GroodFastError, ValueError):
    """The model has no last linear layer that could be found, or the named one does not fit."""


class NotFittedError(GroodFastError, RuntimeError):
    """A detector was used before it was fitted, bound to a model or calibrated."""


class PersistenceError(GroodFastError, ValueError):
    """A saved file is damaged, foreign, of another version, or belongs to another model."""


class DataUnavailableError(GroodFastError, RuntimeError):
    """A data set could neither be found in the cache nor fetched."""


class ExtensionError(GroodFastError, ImportError):
    """The compiled extension is missing or does not fit the installed torch."""


class TrainingError(GroodFastError, RuntimeError):
    """Training cannot go on: its loss is not a number."""


class FitWarning(UserWarning):
    """Something about the reference or calibration data deserves a second look."""


class ScoreWarning(UserWarning):
    """Some samples have no score."""


class TrainingWarning(UserWarning):
    """Training goes on, but perhaps not as it was meant."""


class LoaderWarning(UserWarning):
    """The loader's order or length is not what the scores' order relies on."""


class NetworkWarning(UserWarning):
    """Something about a network makes its gradients slower than they could be."""


def warn(message: str, category: type[UserWarning]) -> None:
    """Warn at the line of the user's that led here: the first outside this package and torch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _package(frame) in ("grood_fast", "torch", "contextlib"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _package(frame: FrameType) -> str:
    name: str = frame.f_globals.get("__name__", "")
    return name.partition(".")[0]
