"""Detectors of detectors: their scores as a representation, fused on held-out samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from grood_fast.batches import Batch
from grood_fast.classifier import Classifier
from grood_fast.detectors.base import Detector
from grood_fast.detectors.passes import Fitting
from grood_fast.errors import InputError
from grood_fast.hashing import hash_indices
from grood_fast.layers import layer_needs
from grood_fast.representations import REPRESENTATIONS, Representation
from grood_fast.scores import SCORES
from grood_fast.scores.fusion import Combination, Fusion
from grood_fast.signals import Need, Signals
from grood_fast.statistics import Reservoir, require_same_config

SEED = 2
REPLAYED_ROWS = 64
HELD_OUT_BYTES = 256 << 20
"""How much memory the inputs of the held-out samples may take while fitting."""


class DetectorScores(Representation):
    """The scores of several detectors: (B, M) float64.

    While it is fitted, every ``1/held_out``-th sample, chosen by a hash of its index, is kept from
    the detectors; their scores of these samples are what a score on this representation learns
    from. For that the network runs on them once more. (A score that learns from what
    resumes the network from a layer, as on GSC's logits, cannot be a member.)

    Args:
        members: detectors, or their descriptions as in ``config()``.
        held_out: share of the reference to hold out, in (0, 1).
        max_held_out: at most so many samples, and no more than fit into 256 MiB, are kept of them.

    Raises:
        InputError: no detectors, or a share out of range.
    """

    name = "detector_scores"
    needs_fit = True

    def __init__(
        self,
        members: Sequence[Detector | Mapping[str, Any]],
        held_out: float = 0.05,
        max_held_out: int = 2000,
    ) -> None:
        self.members = [_member(member) for member in members]
        super().__init__()
        if not self.members:
            raise InputError("an ensemble needs at least one detector.")
        if not 0 < held_out < 1:
            raise InputError(f"held_out must lie between 0 and 1, got {held_out}.")
        self.held_out, self.max_held_out = held_out, max_held_out
        self.needs = frozenset[Need]().union(*(member.needs for member in self.members))
        self.needs_labels = any(  # type: ignore[misc]
            part.needs_labels for member in self.members for part in member._parts().values()
        )
        inner = (member.representation for member in self.members)
        # Another sample than that of ensembles among the members, or nothing is left for those.
        self._seed: int = max(
            (one._seed + 2 for one in inner if isinstance(one, DetectorScores)), default=SEED
        )
        self._fitting: Fitting | None = None
        self._classifier: Classifier | None = None
        self._finished = False
        self._forget()

    def config(self) -> dict[str, Any]:
        return {
            "members": [_description(member) for member in self.members],
            "held_out": self.held_out,
            "max_held_out": self.max_held_out,
        }

    @property
    def fit_needs(self) -> frozenset[Need]:
        return frozenset[Need]().union(*(member.fit_needs for member in self._learners))

    @property
    def _learners(self) -> list[Detector]:
        return [member for member in self.members if member.needs_fit]

    @property
    def fitted(self) -> dict[str, Tensor]:
        """What the detectors have learned: "member.part.name" → tensor."""
        found = {
            f"{number}.{part}.{key}": tensor
            for number, member in enumerate(self.members)
            for part, component in member._parts().items()
            for key, tensor in component.fitted.items()
        }
        return {"finished": torch.ones(1), **found} if self._finished else {}

    @fitted.setter
    def fitted(self, tensors: dict[str, Tensor]) -> None:
        self._finished = bool(tensors)
        for number, member in enumerate(self.members):
            for part, component in member._parts().items():
                prefix = f"{number}.{part}."
                component.fitted = {
                    key.removeprefix(prefix): tensor
                    for key, tensor in tensors.items()
                    if key.startswith(prefix)
                }

    def _forget(self) -> None:
        self._kept: Reservoir | None = None
        self._template: Batch | None = None

    def begin(self, classifier: Classifier) -> None:
        self.fitted = {}
        self._forget()
        self._classifier = classifier
        self._fitting = Fitting(self._learners, classifier)

    def absorb(self, z: Signals, labels: Tensor | None, indices: Tensor) -> None:
        """Take in one reference batch: some samples are held out, the detectors get the others."""
        assert self._fitting is not None
        threshold = int((2 * self.held_out - 1) * (2**63 - 1))
        held_out = hash_indices(indices, self._seed) < threshold
        if z.labels is None and labels is not None:  # predictions: whoever called has said so
            z = replace(z, labels=labels)
        if bool((~held_out).any()):
            rows = (~held_out).nonzero().flatten()
            self._fitting.absorb(z.rows(rows))
        if bool(held_out.any()):
            kept = z.batch.rows(held_out.nonzero().flatten())
            if self._kept is None:
                self._template = kept.first(1)
                sample = sum(value[:1].nbytes for value in kept.columns().values())
                most = max(2, min(self.max_held_out, HELD_OUT_BYTES // max(1, sample)))
                self._kept = Reservoir(most, seed=self._seed + 1)
            self._kept.absorb(kept.columns(), indices[held_out])

    def merge(self, other: DetectorScores) -> None:
        require_same_config(self, other)
        assert self._fitting is not None
        assert other._fitting is not None
        self._fitting.merge(other._fitting)
        if self._kept is None:
            self._kept, self._template = other._kept, other._template
        elif other._kept is not None:
            self._kept.merge(other._kept)

    def finish(self) -> None:
        assert self._fitting is not None
        assert self._classifier is not None
        if self._kept is None or self._kept.kept < 2:
            raise InputError(
                f"held_out={self.held_out} of the reference are less than two samples: give more "
                "reference, or hold out more."
            )
        self._fitting.finish()
        self._fitting.install(self._classifier)
        self._finished = True
        self.facts = {
            "held_out_samples": self._kept.kept,
            "members": [member.name for member in self.members],
        }
        self._fitting = None

    def replay(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The detectors' scores of the samples held out, once, after ``finish``."""
        assert self._kept is not None
        assert self._template is not None
        assert self._classifier is not None
        sample, template, classifier = self._kept.finish(), self._template, self._classifier
        self._forget()
        self._classifier = None
        indices = sample.pop("indices")
        kept = template.with_columns(sample)
        with classifier.session("features" in self.needs, layer_needs(self.needs)):
            for rows in torch.split(torch.arange(kept.size), REPLAYED_ROWS):
                batch = kept.rows(rows)
                signals = Signals.of_last(classifier, classifier.forward(batch), batch)
                yield self(signals), signals.predictions, indices[rows]

    def __call__(self, signals: Signals) -> Tensor:
        return torch.stack([member(signals).double() for member in self.members], dim=1)

    def require_fitted(self) -> None:
        for member in self.members:
            member.require_fitted()

    def to(self, device: torch.device | str) -> DetectorScores:
        for member in self.members:
            member.to(device)
        return self


REPRESENTATIONS[DetectorScores.name] = DetectorScores


def ensemble(
    detectors: Sequence[Any],
    *,
    combine: Combination = "mean",
    scale: Literal["moments", "ranks"] = "moments",
    weights: Sequence[float] | None = None,
    held_out: float = 0.05,
    name: str = "ensemble",
) -> Detector:
    """One detector of several, whose scores are combined on a common scale.

    The scale is that of in-distribution samples which the detectors have not seen: a part of the
    reference is held out for it. Fitted, calibrated, saved and loaded as any detector.

    Args:
        detectors: names, scores or detectors; they are copied and fitted anew.
        combine, scale, weights: see :class:`~grood_fast.scores.Fusion`.
        held_out: share of the reference to hold out.
        name: what results are filed under.

    Raises:
        InputError: no detectors, or settings out of range.
    """
    from grood_fast.detectors.named import by_unique_name

    members = list(by_unique_name(detectors).values())
    return Detector(
        Fusion(combine, scale, weights=weights), DetectorScores(members, held_out), name=name
    )


def _description(member: Detector) -> dict[str, Any]:
    return {
        "name": member.name,
        **{
            part: {"name": component.name, "config": component.config()}
            for part, component in member._parts().items()
        },
    }


def _member(member: Detector | Mapping[str, Any]) -> Detector:
    if isinstance(member, Detector):
        representation = member.representation.fresh()
        return Detector(member.score_function.fresh(), representation, member.name)
    parts = {part: cast(Mapping[str, Any], member[part]) for part in ("score", "representation")}
    score = SCORES[parts["score"]["name"]](**parts["score"]["config"])
    kind = REPRESENTATIONS[parts["representation"]["name"]]
    return Detector(score, kind(**parts["representation"]["config"]), member["name"])
