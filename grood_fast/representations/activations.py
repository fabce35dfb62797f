"""What the stages of the backbone return, averaged over positions."""

from __future__ import annotations

import torch
from torch import Tensor

from grood_fast.layers import STAGES, pooled
from grood_fast.representations.base import Representation
from grood_fast.signals import Signals


class StageActivations(Representation):
    """Activations at the end of every stage, averaged over positions, side by side: (B, K).

    Stages end where feature maps become smaller, or with each fourth of the blocks of a transformer
    or the layers of a perceptron; see :meth:`grood_fast.layers.Layers.stages`.
    """

    name = "stage_activations"
    needs: frozenset[str] = frozenset({STAGES})

    def __call__(self, signals: Signals) -> Tensor:
        return torch.cat([pooled(stage) for stage in signals.stages.values()], dim=1)
