"""Which of many candidate outliers to train on, chosen anew at every step."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from grood_fast import ops
from grood_fast.batches import Batch
from grood_fast.classifier import Classifier
from grood_fast.errors import InputError
from grood_fast.ops import reference
from grood_fast.signals import stream
from grood_fast.training.feeds import Feed
from grood_fast.training.kmeans import kmeans
from grood_fast.training.randomness import decode, encode

Strategy = Literal["random", "boundary", "clustered", "two_way"]
STRATEGIES: tuple[Strategy, ...] = ("random", "boundary", "clustered", "two_way")


class OutlierSampler:
    """GReg+'s energy-based sampling (Sharifi et al., 2024, algorithm 1), and what it is held
    against.

    Candidates are drawn from a loader, a pool a step, and pass through the model in evaluation
    mode. Chosen are, by strategy:

    * "random": the next candidates, unseen.
    * "boundary": those of lowest energy, which look most in-distribution, as NTOM (Chen et al.,
      2021) mines them.
    * "clustered": after k-means on the L2-normalised penultimate features, each cluster's member
      of lowest energy, which the energy loss has to push up.
    * "two_way": also each cluster's member of highest energy, which the gradient regulariser has
      to smooth: GReg+.

    What is still missing then is filled up at random from the rest of the pool. Memory is that of
    one pool. Where the model is on a GPU, only the stop of k-means waits for it.

    Args:
        strategy: one of the above.
        seed: of k-means and of the filling up; the choice depends on nothing else random.

    Raises:
        InputError: an unknown strategy.
    """

    def __init__(self, strategy: Strategy = "two_way", seed: int = 0) -> None:
        if strategy not in STRATEGIES:
            raise InputError(
                f"unknown sampling {strategy!r}; known: {', '.join(map(repr, STRATEGIES))}."
            )
        self.strategy = strategy
        self._generator = torch.Generator().manual_seed(seed)

    def sample(
        self, classifier: Classifier, candidates: Feed, count: int, pool: int, clusters: int
    ) -> Batch:
        """The outliers of one step, on the model's device.

        Args:
            classifier: the model in training; it comes back in the mode it was in.
            candidates: where the pool is drawn from.
            count: A, how many outliers are chosen.
            pool: how many candidates they are chosen from; "random" draws just ``count``.
            clusters: of k-means.

        Raises:
            InputError: the pool is smaller than what is to be chosen from it.
            HeadNotFoundError: clusters are wanted and the model has no linear head.
        """
        if self.strategy == "random":
            return candidates.take(count).to(classifier.device)
        if pool < count:
            raise InputError(
                f"cannot choose {count} outliers from a pool of {pool}: enlarge the pool."
            )
        batch = candidates.take(pool).to(classifier.device)
        needs = frozenset[str]() if self.strategy == "boundary" else frozenset({"features"})
        (signals,) = stream(classifier, [batch], needs)
        energies = reference.energy(signals.logits.float())
        chosen = self.choose(energies, signals.penultimate, count, clusters)
        return batch.rows(chosen)

    def choose(
        self, energies: Tensor, features: Tensor | None, count: int, clusters: int
    ) -> Tensor:
        """(count,) different indices of candidates.

        Args:
            energies: (N,) S = −logsumexp of the logits.
            features: (N, D) penultimate features; "boundary" and "random" need none.
            count: at most N.
            clusters: at most N.
        """
        # The smallest keys are chosen: first the clusters' lowest, then their highest, then any.
        keys = torch.rand(len(energies) + 1, generator=self._generator).to(energies.device)
        if self.strategy == "boundary":
            keys[:-1] = torch.nan_to_num(energies, nan=torch.inf)
        elif self.strategy in ("clustered", "two_way"):
            assert features is not None
            points = F.normalize(torch.nan_to_num(features.float()))
            assignments = kmeans(points, clusters, self._generator).assignments
            lowest, highest = ops.cluster_extremes(assignments, energies, clusters)
            if self.strategy == "two_way":
                keys[highest] -= 1  # an empty cluster's is −1: the last key, which is left out
            keys[lowest] -= 2
        return keys[:-1].argsort(stable=True)[:count]

    def state(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {"generator": encode(self._generator.get_state())}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` wrote down."""
        self._generator.set_state(decode(state["generator"]))
