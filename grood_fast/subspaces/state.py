"""What one pass over the reference keeps of the last layer's gradients, to be finished later."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grood_fast.statistics import (
    Reservoir,
    checked_labels,
    keeps_state,
    require_rows,
    require_same_config,
)

CLASS_SUMS_BUDGET = 1 << 28
"""How many bytes the sums of all classes, C² D numbers, may take."""


class GradientState:
    """Sufficient statistics of rank-one gradients δhᵀ (C, D) that are never formed.

    Exact, over all samples, in float64: the count, Σ δhᵀ, Σ ‖h‖²δδᵀ, Σ ‖δ‖²hhᵀ, Σ (δ∘δ)(h∘h)ᵀ and
    each class's Σ δhᵀ. And a sample of factor pairs, class-balanced and chosen by a hash of the
    sample index, so that shards may be merged in any order.

    Args:
        max_samples: how many factor pairs to keep, C + D numbers each.
        elementwise: whether to keep Σ (δ∘δ)(h∘h)ᵀ, which only whitening needs.
        per_class: whether to keep each class's Σ δhᵀ, if all of them fit in
            ``CLASS_SUMS_BUDGET``.

    Attributes:
        count: number of gradients absorbed.
        gradient: (C, D) Σ δhᵀ.
        left: (C, C) Σ ‖h‖²δδᵀ.
        right: (D, D) Σ ‖δ‖²hhᵀ.
        squares: (C, D) Σ (δ∘δ)(h∘h)ᵀ, or None.
        class_sums: label → number of samples, (C, D) Σ δhᵀ; empty where they are not kept.
    """

    def __init__(
        self, max_samples: int, elementwise: bool = False, per_class: bool = False
    ) -> None:
        self.max_samples = max_samples
        self.elementwise = elementwise
        self.per_class = per_class
        self.count = 0
        self.gradient: Tensor | None = None
        self.left: Tensor | None = None
        self.right: Tensor | None = None
        self.squares: Tensor | None = None
        self.class_sums: dict[int, tuple[int, Tensor]] = {}
        self._reservoir = Reservoir(max_samples, balanced=True)

    def config(self) -> dict[str, Any]:
        """What two shards must share to be merged."""
        return {
            "max_samples": self.max_samples,
            "elementwise": self.elementwise,
            "per_class": self.per_class,
        }

    @keeps_state
    def absorb(self, delta: Tensor, features: Tensor, labels: Tensor, indices: Tensor) -> None:
        """Take in one batch.

        Args:
            delta: (B, C) floating point.
            features: (B, D) floating point; with a column of ones for the bias.
            labels: (B,) integers in [0, C): to balance the sample, and for the classes' sums.
            indices: (B,) int64, positions in the reference data.

        Raises:
            InputError: for other shapes, labels out of range, or NaN or Inf among the values.
        """
        require_rows(delta, what="δ")
        require_rows(features)
        labels = checked_labels(labels, delta, delta.shape[1])
        self._reservoir.absorb(
            {"delta": delta.float(), "features": features.float(), "labels": labels}, indices
        )
        d, h = delta.double(), features.double()
        self._add(
            len(d),
            d.T @ h,
            (d * h.square().sum(dim=1, keepdim=True)).T @ d,
            (h * d.square().sum(dim=1, keepdim=True)).T @ h,
            d.square().T @ h.square() if self.elementwise else None,
        )
        if self.per_class and 8 * d.shape[1] ** 2 * h.shape[1] <= CLASS_SUMS_BUDGET:
            for label in torch.unique(labels).tolist():
                rows = labels == label
                self._add_class(label, int(rows.sum()), d[rows].T @ h[rows])

    @keeps_state
    def merge(self, other: GradientState) -> None:
        """Add what ``other`` has absorbed; ``other`` is left as it was."""
        require_same_config(self, other)
        self._reservoir.merge(other._reservoir)
        if other.gradient is not None:
            assert other.left is not None
            assert other.right is not None
            self._add(other.count, other.gradient, other.left, other.right, other.squares)
        for label, (count, total) in other.class_sums.items():
            self._add_class(label, count, total)

    def sample(self) -> dict[str, Tensor]:
        """The kept ``delta`` (N, C), ``features`` (N, D), ``labels`` and ``indices`` (N,), in the
        order of the indices.

        Raises:
            InputError: when nothing was absorbed.
        """
        return self._reservoir.finish()

    def _add(
        self, count: int, gradient: Tensor, left: Tensor, right: Tensor, squares: Tensor | None
    ) -> None:
        self.count += count
        if self.gradient is None or self.left is None or self.right is None:
            self.gradient, self.left, self.right = gradient.clone(), left.clone(), right.clone()
            self.squares = None if squares is None else squares.clone()
            return
        self.gradient += gradient.to(self.gradient.device)
        self.left += left.to(self.left.device)
        self.right += right.to(self.right.device)
        if self.squares is not None and squares is not None:
            self.squares += squares.to(self.squares.device)

    def _add_class(self, label: int, count: int, total: Tensor) -> None:
        if label in self.class_sums:
            before, known = self.class_sums[label]
            count, total = before + count, known + total.to(known.device)
        self.class_sums[label] = count, total
