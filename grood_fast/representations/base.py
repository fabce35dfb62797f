"""What every representation is: a reading of one batch's signals."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from grood_fast.component import Component
from grood_fast.signals import Signals


class Representation(Component):
    """What a sample becomes, read off the signals of the one pass.

    Attributes:
        needs: the signals it reads beside the logits, a subset of ``{"features"}``.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def __call__(self, signals: Signals) -> Any:
        """The representation of one batch; first dimension B where it is a tensor."""
