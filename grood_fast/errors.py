"""The exceptions of grood-fast: one small family, each also a built-in kind.

Every message says what was wrong, what was expected, and what to do about it.
"""

from __future__ import annotations


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


class FitWarning(UserWarning):
    """Something about the reference or calibration data deserves a second look."""


class ScoreWarning(UserWarning):
    """Some samples have no score."""


class LoaderWarning(UserWarning):
    """The loader's order or length is not what the scores' order relies on."""


class NetworkWarning(UserWarning):
    """Something about a network makes its gradients slower than they could be."""
