"""What every representation is: a reading of one batch's signals."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from grood_fast.component import Component
from grood_fast.signals import Need, Signals


class Representation(Component):
    """What a sample becomes, read off the signals of the one pass.

    Attributes:
        needs: the signals it reads beside the logits; see :func:`grood_fast.signals.stream`.
        warm_up_samples: how many reference samples it wants to see before the pass, which then
            yields them again.
        facts: what fitting chose and found, JSON-serialisable, for the detector's card.
    """

    needs: frozenset[Need] = frozenset()
    warm_up_samples: int = 0

    def __init__(self) -> None:
        super().__init__()
        self.facts: dict[str, Any] = {}

    @property
    def fit_needs(self) -> frozenset[Need]:
        """The signals that ``absorb`` reads, where these are more than ``needs``."""
        return self.needs

    @abstractmethod
    def __call__(self, signals: Signals) -> Any:
        """The representation of one batch; first dimension B where it is a tensor."""

    def activations(self) -> Representation | None:
        """What is left of it without a gradient: an unfitted representation of the activations
        alone that the same scores can read. None where it is one already."""
        return None

    def warm_up(self, signals: Signals) -> None:
        """Take in a batch before the pass over the reference."""

    def finish_warm_up(self) -> None:
        """Use what the warm-up has shown."""

    def replay(self) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Of one that learns, once after ``finish``: what reference samples became, their labels
        or predicted classes, and their indices, in blocks. The score is fitted on these."""
        return iter(())
