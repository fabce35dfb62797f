"""Several representations side by side, for one score on all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grood_fast.errors import InputError
from grood_fast.objectives import Objective
from grood_fast.representations.base import Representation
from grood_fast.signals import Signals
from grood_fast.statistics import require_rows

FLOOR = 1e-12
"""Added to a squared norm before its logarithm."""


class HeadGradientLogNorms(Representation):
    """Logarithms of the squared norms of the head's gradients, two for each objective: (B, 2M).

    Of the weight, log(‖δ‖² ‖h‖² + 1e-12), and of the bias, log(‖δ‖² + 1e-12): the head's part of
    the gradient representation of Lee et al. (2022), for any objectives.

    Args:
        objectives: names of or :class:`~grood_fast.objectives.Objective`; default: the confounding
            label, and the cross-entropy to the predicted one.
    """

    name = "head_gradient_log_norms"
    needs: frozenset[str] = frozenset({"features"})

    def __init__(
        self,
        objectives: Sequence[Objective | str | dict[str, Any]] = ("confounding", "predicted"),
    ) -> None:
        super().__init__()
        self.objectives = [Objective.of(objective) for objective in objectives]
        if not self.objectives:
            raise InputError("give at least one objective.")

    def config(self) -> dict[str, Any]:
        return {"objectives": [objective.config() for objective in self.objectives]}

    def __call__(self, signals: Signals) -> Tensor:
        columns = []
        for objective in self.objectives:
            norm = objective.logit_gradient(signals.logits, outputs=("l2",)).l2
            assert norm is not None
            length = torch.linalg.vector_norm(signals.features.to(norm.dtype), dim=1)
            columns += [(norm * length).square() + FLOOR, norm.square() + FLOOR]
        return torch.stack(columns, dim=1).log()


class Joint(Representation):
    """Representations (B, K₁), (B, K₂), ... side by side: (B, ΣK).

    Args:
        parts: representations that give vectors and need no reference, or their names and
            arguments as ``config()`` describes them.

    Raises:
        InputError: no parts, or one that learns from the reference.
    """

    name = "joint"

    def __init__(self, parts: Sequence[Representation | str | Mapping[str, Any]]) -> None:
        super().__init__()
        self.parts = [_part(part) for part in parts]
        learning = [part.name for part in self.parts if part.needs_fit]
        if learning or not self.parts:
            raise InputError(
                "a joint representation is made of at least one that needs no reference; got "
                f"{', '.join(learning) or 'none'}."
            )
        self.needs = frozenset().union(*(part.needs for part in self.parts))

    def config(self) -> dict[str, Any]:
        return {"parts": [{"name": part.name, "config": part.config()} for part in self.parts]}

    def __call__(self, signals: Signals) -> Tensor:
        columns = [part(signals) for part in self.parts]
        for part, column in zip(self.parts, columns, strict=True):
            require_rows(column, what=part.name)
        return torch.cat([column.to(torch.float64) for column in columns], dim=1)


def _part(part: Representation | str | Mapping[str, Any]) -> Representation:
    if isinstance(part, Representation):
        return part
    from grood_fast.representations import REPRESENTATIONS

    described: Mapping[str, Any] = {"name": part} if isinstance(part, str) else part
    kind = REPRESENTATIONS.get(described["name"])
    if kind is None:
        raise InputError(
            f"unknown representation {described['name']!r}; known: {', '.join(REPRESENTATIONS)}."
        )
    return kind(**described.get("config", {}))
