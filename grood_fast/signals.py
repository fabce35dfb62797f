"""The one pass over a loader, and what it leaves of each batch for the representations to read."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grood_fast import ops
from grood_fast.batches import Batch, preview
from grood_fast.classifier import Classifier
from grood_fast.errors import HeadNotFoundError, InputError
from grood_fast.layers import LayerOutput, layer_need, layer_needs
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
        classifier: that made them.
        layers: need → a layer's output, and the network from there on for as long as the pass is at
            this batch.
        stages: layer → (B, ...) what the last layer of every stage returned.
        network: the gradients of the network's parameters, for as long as the pass is at this
            batch; None where nobody asked for them.
    """

    logits: Tensor
    penultimate: Tensor | None
    labels: Tensor | None
    indices: Tensor
    batch: Batch
    classifier: Classifier | None = None
    layers: Mapping[str, LayerOutput] = field(default_factory=dict)
    stages: Mapping[str, Tensor] = field(default_factory=dict)
    network: NetworkGradients | None = None

    @classmethod
    def of_last(
        cls,
        classifier: Classifier,
        outputs: tuple[Tensor, Tensor | None],
        batch: Batch,
        start: int = 0,
        network: NetworkGradients | None = None,
    ) -> Signals:
        """What the classifier's last forward pass left.

        Args:
            classifier: inside a session.
            outputs: what ``classifier.forward(batch)`` returned.
            batch: of which.
            start: position of its first sample in the loader.
            network: gradients that can be had from the same pass.
        """
        logits, features = outputs
        labels = None if batch.labels is None else batch.labels.to(logits.device)
        indices = torch.arange(start, start + batch.size)
        layers, stages = classifier.layers(), classifier.stages()
        return cls(logits, features, labels, indices, batch, classifier, layers, stages, network)

    def rows(self, rows: Tensor) -> Signals:
        """Those of some samples, by (N,) indices; from their layers nothing can be resumed."""
        rows = rows.to(self.logits.device)

        def cannot_resume(_: Tensor) -> tuple[Tensor, Tensor | None]:
            raise InputError("a network is resumed for whole batches, not for some samples.")

        return Signals(
            self.logits[rows],
            None if self.penultimate is None else self.penultimate[rows],
            None if self.labels is None else self.labels[rows],
            self.indices[rows.cpu()],
            self.batch.rows(rows),
            self.classifier,
            {
                need: LayerOutput(layer.name, layer.activation[rows], cannot_resume)
                for need, layer in self.layers.items()
            },
            {name: stage[rows] for name, stage in self.stages.items()},
        )

    def layer(self, name: str | None) -> LayerOutput:
        """What a layer returned, and the network from there on; None: see :func:`layer_need`.

        Raises:
            InputError: the pass was made without it.
        """
        try:
            return self.layers[layer_need(name)]
        except KeyError:
            raise InputError(
                f"these signals hold no output of the layer {name!r}: make the pass with needs="
                f"{{layer_need({name!r})}}."
            ) from None

    @property
    def known_classifier(self) -> Classifier:
        """The classifier that made the signals.

        Raises:
            InputError: nobody said which.
        """
        if self.classifier is None:
            raise InputError("these signals were made by hand, without their classifier.")
        return self.classifier

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

    @cached_property
    def _readings(self) -> dict[int, tuple[object, Any]]:
        return {}

    def read_as(self, representation: Callable[[Signals], Any]) -> Any:
        """What a representation makes of this batch, made once for all scores that read it."""
        key = id(representation)
        if key not in self._readings:
            # Kept with what made it: an identity is one only while its owner lives.
            self._readings[key] = representation, representation(self)
        return self._readings[key][1]

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
        needs: signals beside the logits: ``"features"``, ``"stages"``,
            :func:`~grood_fast.layers.layer_need`, and a
            :class:`~grood_fast.network.NetworkNeed` for gradients of the whole network. With one,
            batches may come in pieces, to keep within its memory budget.

    Raises:
        InputError: an empty loader, or a batch that does not fit.
        HeadNotFoundError: features are needed and the model has no linear head.
    """
    network_needs = [need for need in needs if isinstance(need, NetworkNeed)]
    others = frozenset(need for need in needs if isinstance(need, str))
    with classifier.session("features" in others, layer_needs(others)):
        network_pass = NetworkPass(classifier, network_needs) if network_needs else None
        start = 0
        for batch in preview(loader)[1]:
            for piece in [batch] if network_pass is None else network_pass.pieces(batch):
                gradients = None
                if network_pass is None:
                    logits, features = classifier.forward(piece)
                else:
                    logits, features, gradients = network_pass.forward(piece)
                yield Signals.of_last(classifier, (logits, features), piece, start, gradients)
                start += piece.size
                if gradients is not None:
                    gradients.release()  # whoever keeps the signals shall not keep the graph
