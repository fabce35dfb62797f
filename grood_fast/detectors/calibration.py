"""From scores to decisions: a threshold and p-values from in-distribution samples held out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grood_fast.errors import FitWarning, InputError, warn

SKETCH_SIZE = 1 << 16
"""How many fingerprints of the reference samples are kept."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Scores of held-out in-distribution samples, and the threshold they give.

    Split conformal prediction (Vovk et al. 2005): for in-distribution samples exchangeable with the
    calibration samples, a p-value is at most t with probability at most t, on average over
    calibration sets; and a sample is declared in-distribution with probability at least
    ``id_recall``.

    Attributes:
        scores: (n,) float32, ascending, on the CPU.
        id_recall: the share of in-distribution samples to be declared so.
        threshold: the ⌈(n + 1)·id_recall⌉-th smallest score; infinite where n is too small for it.
    """

    scores: Tensor
    id_recall: float
    threshold: float

    @classmethod
    def of(cls, scores: Tensor, id_recall: float) -> Calibration:
        """Calibration from (n,) scores of in-distribution samples.

        Warns (:class:`FitWarning`) where n is too small for the recall: then nothing is OOD.

        Raises:
            InputError: a recall out of (0, 1), no scores, or NaN among them.
        """
        check_recall(id_recall)
        if len(scores) == 0:
            raise InputError("no calibration samples: give in-distribution samples held out.")
        if bool(scores.isnan().any()):
            raise InputError(
                f"{int(scores.isnan().sum())} of {len(scores)} calibration scores are NaN: the "
                "inputs or the model's outputs hold NaN or Inf; leave these samples out."
            )
        ordered = scores.detach().to("cpu", torch.float32).sort().values.as_subclass(Tensor)
        rank = rank_of_threshold(len(ordered), id_recall)
        threshold = math.inf
        if rank <= len(ordered):
            threshold = float(ordered[rank - 1])
        else:
            needed = math.ceil(round(id_recall / (1 - id_recall), 9))
            warn(
                f"{len(ordered)} calibration samples cannot give id_recall={id_recall}: at least "
                f"{needed} are needed. The threshold is infinite and nothing will be OOD.",
                FitWarning,
            )
        return cls(ordered, id_recall, threshold)

    def is_ood(self, scores: Tensor) -> Tensor:
        """(B,) bool: above the threshold. A NaN score counts as OOD."""
        return ~(scores <= self.threshold)

    def p_values(self, scores: Tensor) -> Tensor:
        """(1 + #{calibration scores ≥ s}) / (n + 1), (B,) float64; small = OOD.

        A NaN score counts as larger than all.
        """
        plain = scores.detach().to("cpu", torch.float32)
        below = torch.searchsorted(self.scores, plain.contiguous(), side="left")  # NaN: all are
        at_least = len(self.scores) - below
        return (1 + at_least).double() / (len(self.scores) + 1)


def check_recall(id_recall: float) -> None:
    """Raises InputError unless 0 < id_recall < 1."""
    if not 0 < id_recall < 1:
        raise InputError(f"id_recall must lie between 0 and 1, got {id_recall}.")


def rank_of_threshold(count: int, id_recall: float) -> int:
    """⌈(n + 1)·recall⌉, not pushed up by rounding where the product is whole."""
    return math.ceil(round((count + 1) * id_recall, 9))


class SampleSketch:
    """The smallest fingerprints among those of the samples seen, to notice a sample seen again.

    Fingerprints are hashes, so the smallest are a uniform sample of the distinct ones; what is
    kept depends on the set of samples alone, not on their order or shards.

    Args:
        fingerprints, complete: of a sketch made before; default: an empty one.
    """

    def __init__(self, fingerprints: Tensor | None = None, complete: bool = True) -> None:
        empty = torch.empty(0, dtype=torch.int64)
        self._fingerprints = empty if fingerprints is None else fingerprints
        self._complete = complete
        self._arrived: list[Tensor] = []

    @property
    def fingerprints(self) -> Tensor:
        """At most ``SKETCH_SIZE`` distinct int64, ascending, on the CPU."""
        self._sort_in()
        return self._fingerprints

    @property
    def complete(self) -> bool:
        """Whether none had to be dropped."""
        self._sort_in()
        return self._complete

    def absorb(self, fingerprints: Tensor) -> None:
        """Take in (B,) int64 fingerprints."""
        if not self._complete:
            fingerprints = fingerprints[fingerprints <= self._fingerprints[-1]]
        self._arrived.append(fingerprints.cpu())
        # Sorting them in is worth its price for many at once only.
        if sum(map(len, self._arrived)) >= SKETCH_SIZE // 8:
            self._sort_in()

    def merge(self, other: SampleSketch) -> None:
        """Add what another sketch has absorbed."""
        self._arrived.append(other.fingerprints)
        self._sort_in()
        self._complete &= other.complete

    def _sort_in(self) -> None:
        if not self._arrived:
            return
        distinct: Tensor = torch.unique(torch.cat([self._fingerprints, *self._arrived]))
        self._arrived = []
        self._complete &= len(distinct) <= SKETCH_SIZE
        self._fingerprints = distinct[:SKETCH_SIZE]

    def seen(self, fingerprints: Tensor) -> tuple[int, int]:
        """How many of (B,) fingerprints could be looked up, and how many of those were seen."""
        fingerprints = fingerprints.cpu()
        if not self.complete:
            fingerprints = fingerprints[fingerprints <= self.fingerprints[-1]]
        return len(fingerprints), int(torch.isin(fingerprints, self.fingerprints).sum())
