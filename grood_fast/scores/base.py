"""What every score is: a number per sample that says how unusual its representation is."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from grood_fast.component import Component


class Score(Component):
    """How unusual a representation is. **Higher = more out of distribution**, always.

    Attributes:
        representation: registry name of the representation it reads when none is given.
    """

    representation: ClassVar[str]

    @abstractmethod
    def __call__(self, z: Any) -> Tensor:
        """Scores of one batch, shape (B,), floating point; higher = more OOD."""

    def on_activations(self) -> Score:
        """This score, unfitted, as it reads the activations alone."""
        return self.fresh()
