"""What representations and scores share: configuration, and fitting as a merge of statistics."""

from __future__ import annotations

from abc import ABC
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from grood_fast.errors import NotFittedError

if TYPE_CHECKING:
    from grood_fast.classifier import Classifier

Self = TypeVar("Self", bound="Component")


class Component(ABC):
    """Something a detector is made of.

    One that learns from the reference data sees it once, batch by batch:
    ``begin`` → ``absorb`` (any number of times) → ``merge`` (other shards) → ``finish``.
    What ``finish`` leaves in ``fitted`` is all that scoring needs and all that is saved.

    Attributes:
        name: the registry name.
        needs_fit: whether ``absorb`` and ``finish`` must run before it can be used.
        needs_labels: whether ``absorb`` needs class labels.
        fitted: name → tensor; empty until ``finish``.
    """

    name: ClassVar[str]
    needs_fit: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False

    fitted: dict[str, Tensor]

    def __init__(self) -> None:
        self.fitted = {}

    def config(self) -> dict[str, Any]:
        """The constructor's keyword arguments, JSON-serialisable: ``type(self)(**config)`` is the
        same component, unfitted."""
        return {}

    def fresh(self: Self) -> Self:
        """The same component, unfitted."""
        return type(self)(**self.config())

    def begin(self, classifier: Classifier) -> None:
        """Forget what was fitted and start a new pass over the reference data."""

    def absorb(self, z: Any, labels: Tensor | None, indices: Tensor) -> None:
        """Take in one reference batch.

        Args:
            z: what the component reads: a score its representation, of B samples.
            labels: (B,) int64 in [0, C), or None where ``needs_labels`` is False.
            indices: (B,) int64, each sample's position in the reference data: the key that makes
                the result of merging shards independent of their order.
        """

    def merge(self: Self, other: Self) -> None:
        """Add what another component of the same configuration has absorbed."""

    def finish(self) -> None:
        """Turn what was absorbed into ``fitted``, and drop the rest."""

    @property
    def is_fitted(self) -> bool:
        return not self.needs_fit or bool(self.fitted)

    def require_fitted(self) -> None:
        """Raises NotFittedError where ``is_fitted`` is False."""
        if not self.is_fitted:
            raise NotFittedError(
                f"{type(self).__name__} has not seen reference data yet: call fit(model, "
                "reference) or pass reference= to score()."
            )

    def to(self: Self, device: torch.device | str) -> Self:
        """Move what was fitted to a device."""
        self.fitted = {name: tensor.to(device) for name, tensor in self.fitted.items()}
        return self

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.config().items())
        return f"{type(self).__name__}({arguments})"
