"""The length of a representation."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from grood_fast import ops
from grood_fast.errors import InputError
from grood_fast.scores.base import Score
from grood_fast.statistics import require_rows


class Norm(Score):
    """‖z‖ of any representation (B, K): far from the origin is OOD.

    Coordinates in a centred subspace have the reference's mean for origin. Uncentred gradients of
    the energy or of a uniform target shrink out of distribution: for these give ``negated=True``.

    Args:
        norm: ``"l1"``, ``"l2"`` or ``"linf"``.
        negated: score −‖z‖ instead.
    """

    name: ClassVar[str] = "norm"
    representation: ClassVar[str] = "features"

    def __init__(self, norm: str = "l2", negated: bool = False) -> None:
        super().__init__()
        if norm not in ops.NORMS:
            raise InputError(f"unknown norm {norm!r}; known: {', '.join(ops.NORMS)}.")
        self.norm, self.negated = norm, negated

    def config(self) -> dict[str, Any]:
        return {"norm": self.norm, "negated": self.negated}

    def __call__(self, z: Tensor) -> Tensor:
        """Scores (B,) of vectors (B, K), in their dtype; higher = more OOD."""
        require_rows(z)
        length = ops.reference.row_norm(z, self.norm)
        return -length if self.negated else length
