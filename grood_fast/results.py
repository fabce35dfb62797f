"""What scoring returns: one number a sample, and what the classifier said about it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Column:
    """A 1-D tensor that grows by batches.

    Not a list of them: small tensors kept between the large ones of a forward pass would pin the
    allocator's free memory in pieces too small for the next batch.

    Args:
        dtype: of the values.
        device: of the values.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._buffer = torch.empty(4096, dtype=dtype, device=device)
        self._size = 0

    def append(self, values: Tensor) -> None:
        """Add (B,) values."""
        end = self._size + len(values)
        if end > len(self._buffer):
            grown = self._buffer.new_empty(max(2 * len(self._buffer), end))
            grown[: self._size] = self._buffer[: self._size]
            self._buffer = grown
        self._buffer[self._size : end] = values
        self._size = end

    def finish(self) -> Tensor:
        """All values, (N,) on the CPU."""
        return self._buffer[: self._size].to("cpu", copy=True)


class Scores(Tensor):
    """Scores of one detector: a 1-D float32 CPU tensor in loader order; higher = more OOD.

    It is a tensor, and what is computed from it is a plain one.

    Attributes:
        predictions: (N,) int64 predicted classes.
        labels: (N,) int64 labels the loader gave, or None.
        detector: the detector's name.
    """

    predictions: Tensor
    labels: Tensor | None
    detector: str

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, values: Tensor, predictions: Tensor, labels: Tensor | None, name: str) -> Scores:
        """Scores from (N,) values."""
        scores = values.detach().to("cpu", torch.float32).as_subclass(cls)
        scores.predictions, scores.labels, scores.detector = predictions, labels, name
        return scores

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Tensor's own would drop the attributes on copies and on the way to another process.
        plain = self.as_subclass(Tensor)
        return Scores.of, (plain, self.predictions, self.labels, self.detector)

    def __deepcopy__(self, memo: Any) -> Scores:
        plain = self.as_subclass(Tensor)
        parts = copy.deepcopy((plain, self.predictions, self.labels), memo)
        return Scores.of(*parts, self.detector)


class ScoreTable(dict[str, Scores]):
    """Scores of several detectors from one pass: unique name → :class:`Scores`, in order.

    Attributes:
        predictions: (N,) int64 predicted classes.
        labels: (N,) int64 labels the loader gave, or None.
    """

    def __init__(
        self, columns: Mapping[str, Tensor], predictions: Tensor, labels: Tensor | None
    ) -> None:
        super().__init__(
            {name: Scores.of(values, predictions, labels, name) for name, values in columns.items()}
        )
        self.predictions = predictions
        self.labels = labels
