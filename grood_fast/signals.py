"""The one pass over a loader, and what it leaves of each batch for the representations to read."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Set
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from grood_fast import ops
from grood_fast.batches import Batch, preview
from grood_fast.classifier import Classifier
from grood_fast.errors import HeadNotFoundError, InputError
from grood_fast.network import NetworkGradients, NetworkNeed, NetworkPass

Need = str | NetworkNeed
"""What a detector asks the pass for beside the logits: ``"features"``, or gradients."""


class LogitSummary(NamedTuple):
    """Softmax statistics of one batch of logits at one temperature T, each (B,).

    Attributes:
        energy: −T·logsumexp(f/T).
        log_sum_exp: logsumexp(f/T).
        maximum: max_c f_c.
        l1: ‖(p − e_ŷ)/T‖₁, of the predicted-label gradient.
        l2: ‖(p − e_ŷ)/T‖₂.
        argmax: ŷ, int64.
    """

    energy: Tensor
    log_sum_exp: Tensor
    maximum: Tensor
    l1: Tensor
    l2: Tensor
    argmax: Tensor


class LogitStatistics:
    """One batch of logits, and what all scores on logits share, computed once a temperature.

    Calling it with a temperature gives the :class:`LogitSummary`, from one read of the logits:
    see :func:`grood_fast.ops.logit_gradient`.

    Args:
        logits: (B, C) floating point.
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self._summaries: dict[float, LogitSummary] = {}

    def __call__(self, temperature: float = 1.0) -> LogitSummary:
        summary = self._summaries.get(temperature)
        if summary is None:
            fields = LogitSummary._fields
            gradient = ops.logit_gradient(
                self.logits, "predicted", temperature=temperature, outputs=fields
            )
            summary = LogitSummary(*(getattr(gradient, field) for field in fields))
            self._summaries[temperature] = summary
        return summary

    @classmethod
    def of(cls, logits: LogitStatistics | Tensor) -> LogitStatistics:
        """Plain logits (B, C) as statistics; statistics as they are."""
        return logits if isinstance(logits, LogitStatistics) else cls(logits)


@dataclass(frozen=True, eq=False)
class Signals:
    """What one batch of B samples left behind.

    Attributes:
        logits: (B, C), in the model's dtype, on its device.
        penultimate: (B, D) penultimate features, or None where nobody asked for them.
        labels: (B,) int64 on the model's device, or None where the loader gives none.
        indices: (B,) int64 on the CPU, the samples' positions in the loader.
        batch: what the model was given, as the loader yielded it, or a piece of that.
        network: the gradients of the network's parameters, for as long as the pass is at this
            batch; None where nobody asked for them.
    """

    logits: Tensor
    penultimate: Tensor | None
    labels: Tensor | None
    indices: Tensor
    batch: Batch
    network: NetworkGradients | None = None

    @property
    def features(self) -> Tensor:
        """The penultimate features, (B, D).

        Raises:
            HeadNotFoundError: the pass was made without them.
        """
        if self.penultimate is None:
            raise HeadNotFoundError(
                'These signals hold no penultimate features: make the pass with needs={"features"}.'
            )
        return self.penultimate

    @property
    def gradients(self) -> NetworkGradients:
        """The gradients of the network's parameters.

        Raises:
            InputError: the pass was made without them.
        """
        if self.network is None:
            raise InputError(
                "These signals hold no network gradients: make the pass with needs={NetworkNeed()}."
            )
        return self.network

    @cached_property
    def statistics(self) -> LogitStatistics:
        """The logits' softmax statistics, shared by everything that reads them."""
        return LogitStatistics(self.logits)

    @property
    def predictions(self) -> Tensor:
        """(B,) int64 predicted classes."""
        return self.statistics().argmax


def stream(
    classifier: Classifier, loader: Iterable[object], needs: Set[Need]
) -> Generator[Signals, None, None]:
    """One pass of the classifier over a loader, batch by batch, in evaluation mode.

    The model is borrowed from the first batch to the end of the iteration, and comes back as it
    was when the iterator ends, is closed or fails: close it (``contextlib.closing``) where the
    loop may stop early.

    Args:
        classifier: the user's model.
        loader: yields batches; see :func:`grood_fast.batches.parse_batch`.
        needs: signals beside the logits: ``"features"``, and a
            :class:`~grood_fast.network.NetworkNeed` for gradients of the whole network. With one,
            batches may come in pieces, to keep within its memory budget.

    Raises:
        InputError: an empty loader, or a batch that does not fit.
        HeadNotFoundError: features are needed and the model has no linear head.
    """
    network_needs = [need for need in needs if isinstance(need, NetworkNeed)]
    with classifier.session(features="features" in needs):
        network_pass = NetworkPass(classifier, network_needs) if network_needs else None
        start = 0
        for batch in preview(loader)[1]:
            for piece in [batch] if network_pass is None else network_pass.pieces(batch):
                gradients = None
                if network_pass is None:
                    logits, features = classifier.forward(piece)
                else:
                    logits, features, gradients = network_pass.forward(piece)
                labels = None if piece.labels is None else piece.labels.to(logits.device)
                indices = torch.arange(start, start + piece.size)
                start += piece.size
                yield Signals(logits, features, labels, indices, piece, gradients)
                if gradients is not None:
                    gradients.release()  # whoever keeps the signals shall not keep the graph
