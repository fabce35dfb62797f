"""Detectors that are shown OOD samples: the protocols of the confounding-label papers.

They train a small classifier to tell in-distribution vectors from OOD vectors (Lee and AlRegib,
ICIP 2020). What it is worth depends on which OOD samples it has seen, so every function here is
named for its protocol, and none of these results may stand beside a detector that saw no OOD
sample without saying so. The width, optimiser and number of epochs are our choice.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from grood_fast.errors import InputError
from grood_fast.statistics import require_finite, require_rows

WIDTH, EPOCHS, BATCH, LEARNING_RATE = 64, 50, 256, 1e-3


class OutlierClassifier:
    """A perceptron with one hidden layer that tells in-distribution from OOD vectors.

    Every coordinate is standardised on the in-distribution vectors; both kinds count alike, however
    many there are of each.

    Args:
        inlier: (N, L) floating point.
        outlier: (M, L).
        seed: of the initial weights and the order; the global random state is left alone.

    Raises:
        InputError: other shapes, no samples, NaN or Inf.
    """

    def __init__(self, inlier: Tensor, outlier: Tensor, seed: int = 0) -> None:
        require_rows(inlier)
        require_rows(outlier, inlier.shape[1])
        if not len(inlier) or not len(outlier):
            raise InputError("training takes at least one sample of either kind.")
        for rows in (inlier, outlier):
            require_finite(rows)
        self._mean = inlier.float().mean(dim=0)
        self._deviation = inlier.float().std(dim=0, correction=0).clamp(min=1e-6)
        x = self._standardised(torch.cat([inlier, outlier]))
        y = torch.cat([torch.zeros(len(inlier)), torch.ones(len(outlier))]).to(x.device)
        weight = torch.where(y > 0, 0.5 / len(outlier), 0.5 / len(inlier)) * len(y)
        devices = [x.device] if x.is_cuda else []
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(seed)
            self._network = nn.Sequential(
                nn.Linear(x.shape[1], WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1)
            ).to(x.device)
            optimiser = torch.optim.Adam(self._network.parameters(), lr=LEARNING_RATE)
            for _ in range(EPOCHS):
                for rows in torch.split(torch.randperm(len(x)).to(x.device), BATCH):
                    loss = nn.functional.binary_cross_entropy_with_logits(
                        self._network(x[rows]).squeeze(1), y[rows], weight[rows]
                    )
                    optimiser.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimiser.step()

    @torch.no_grad()
    def __call__(self, z: Tensor) -> Tensor:
        """Scores (B,) of (B, L); higher = more OOD."""
        require_rows(z, len(self._mean))
        scores: Tensor = self._network(self._standardised(z)).squeeze(1)
        return scores

    def _standardised(self, z: Tensor) -> Tensor:
        return (z.float() - self._mean) / self._deviation


def leave_one_out(
    inlier_train: Tensor, inlier_test: Tensor, outliers: Mapping[str, Tensor], seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """For every OOD set, a classifier trained on all the others.

    Args:
        inlier_train, inlier_test: (N, L) vectors of disjoint in-distribution samples.
        outliers: name of the OOD set → (M, L); at least two.
        seed: see :class:`OutlierClassifier`.

    Returns:
        Name → scores of ``inlier_test`` and of the set left out; higher = more OOD.

    Raises:
        InputError: fewer than two OOD sets.
    """
    if len(outliers) < 2:
        raise InputError("leaving one OOD set out needs at least two.")
    results = {}
    for name, left_out in outliers.items():
        shown = torch.cat([rows for other, rows in outliers.items() if other != name])
        classifier = OutlierClassifier(inlier_train, shown, seed)
        results[name] = classifier(inlier_test), classifier(left_out)
    return results


def oracle(
    inlier_train: Tensor, inlier_test: Tensor, outliers: Mapping[str, Tensor], seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """The papers' protocol: trained on one half of an OOD set, tested on the other half.

    An upper bound that no detector in use can have. Arguments and results as for
    :func:`leave_one_out`; of the OOD sets the scores are those of every second sample.
    """
    results = {}
    for name, rows in outliers.items():
        classifier = OutlierClassifier(inlier_train, rows[::2], seed)
        results[name] = classifier(inlier_test), classifier(rows[1::2])
    return results
