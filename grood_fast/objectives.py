"""Objectives: scalars of the logits, known by their gradient δ = dL/df, in closed form.

Every gradient in this package starts from δ (B, C): the gradient of the last layer's weight is
δ hᵀ, of its bias δ, and of anything deeper what δ sends back. With p = softmax(f/T):

============== ============================== ===================
name           scalar L                       δ
============== ============================== ===================
energy         −T·logsumexp(f/T)              −p
uniform        Σ_c −log p_c                   (C·p − 1)/T
predicted      −log p_ŷ, ŷ = argmax f         (p − e_ŷ)/T
confounding    BCE-with-logits(f, ỹ), summed  σ(f) − ỹ
max_logit      f_ŷ                            e_ŷ
logit_sum      Σ_c f_c                        1
============== ============================== ===================

Sources: ``uniform`` is GradNorm's (Huang et al. 2021); ``energy`` that of the low-dimensional
gradient (Wu et al. 2024), up to its sign; ``confounding`` follows Lee & AlRegib (2020), whose basic
label is all ones; ``max_logit`` and ``logit_sum`` are GradPCA's two readings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grood_fast import ops
from grood_fast.errors import InputError

# Is a large gradient norm a sign of OOD (+1) or of ID (-1)? For the confounding label this is our
# reading: an unfamiliar input asks for a larger update. The others follow from the scalar.
_NORM_SIGN = {
    "energy": -1,
    "uniform": -1,
    "predicted": +1,
    "confounding": +1,
    "max_logit": -1,
    "logit_sum": -1,
}


@dataclass(frozen=True)
class Objective:
    """A scalar of the logits whose gradient is taken.

    Args:
        name: one of the table's names.
        temperature: T > 0; the confounding label, the maximum and the sum have none.
        target: the confounding label ỹ, C numbers in [0, 1]; default all ones.

    Raises:
        InputError: an unknown name, or an argument that the objective does not have.
    """

    name: str
    temperature: float = 1.0
    target: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.name not in ops.OBJECTIVES:
            known = ", ".join(ops.OBJECTIVES)
            raise InputError(f"unknown objective {self.name!r}; known: {known}")
        if not 1e-30 < self.temperature < 1e30:
            raise InputError(f"temperature must be positive and finite, got {self.temperature}")
        if self.temperature != 1 and self.name in ("confounding", "max_logit", "logit_sum"):
            raise InputError(f"the objective {self.name!r} has no temperature")
        if self.target is not None:
            if self.name != "confounding":
                raise InputError(f"the objective {self.name!r} takes no target")
            if not all(0 <= value <= 1 for value in self.target):
                raise InputError("a confounding label's entries lie between 0 and 1")
            object.__setattr__(self, "target", tuple(float(value) for value in self.target))

    @property
    def norm_sign(self) -> int:
        """+1 where a large gradient norm speaks for OOD, −1 where it speaks for ID."""
        return _NORM_SIGN[self.name]

    def logit_gradient(
        self, logits: Tensor, outputs: tuple[str, ...] = ops.OUTPUTS
    ) -> ops.LogitGradient:
        """δ and what comes with it, of logits (B, C); see :func:`grood_fast.ops.logit_gradient`."""
        return ops.logit_gradient(
            logits,
            self.name,
            temperature=self.temperature,
            target=self._target_for(logits),
            outputs=outputs,
        )

    def head_gradient_norm(
        self, logits: Tensor, features: Tensor, norm: str = "l1", bias: bool = False
    ) -> Tensor:
        """‖dL/d(W, b)‖ per sample, (B,); see :func:`grood_fast.ops.head_gradient_norm`."""
        return ops.head_gradient_norm(
            logits,
            features,
            self.name,
            temperature=self.temperature,
            target=self._target_for(logits),
            norm=norm,
            bias=bias,
        )

    def config(self) -> dict[str, Any]:
        """JSON-serialisable arguments; see :meth:`of`."""
        config: dict[str, Any] = {"name": self.name, "temperature": self.temperature}
        return config if self.target is None else {**config, "target": list(self.target)}

    @classmethod
    def of(cls, objective: Objective | str | dict[str, Any]) -> Objective:
        """An objective from its name, its ``config()`` or itself."""
        if isinstance(objective, Objective):
            return objective
        if isinstance(objective, str):
            return cls(objective)
        target: Sequence[float] | None = objective.get("target")
        return cls(**{**objective, "target": None if target is None else tuple(target)})

    def _target_for(self, logits: Tensor) -> Tensor | None:
        if self.target is None:
            return None
        if len(self.target) != logits.shape[1]:
            raise InputError(
                f"the confounding label has {len(self.target)} entries, the logits "
                f"{logits.shape[1]}"
            )
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        return torch.tensor(self.target, dtype=dtype, device=logits.device)
