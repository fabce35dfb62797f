"""The gradient of all of a network's parameters: its norms, and its coordinates in a subspace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from grood_fast.classifier import Classifier
from grood_fast.errors import InputError
from grood_fast.network import MEMORY_BUDGET, NetworkNeed
from grood_fast.network.directions import (
    Coordinates,
    DirectionSketch,
    from_tensors,
    require_equal,
    to_tensors,
)
from grood_fast.network.gradients import Directions, LayerGradient
from grood_fast.network.selection import checked
from grood_fast.objectives import Objective
from grood_fast.representations.activations import StageActivations
from grood_fast.representations.base import Representation
from grood_fast.signals import Need, Signals
from grood_fast.statistics import Moments, Reservoir, keeps_state, require_same_config
from grood_fast.subspaces.components import leading_eigenvectors

REPLAYED_ROWS = 1024
SMALLEST_NORM = 1e-12
"""What is added to a squared norm before its logarithm is taken."""

SHARE_SAMPLES = 256
"""Of so many samples it is measured how much of the gradient the directions see."""

Norm = Literal["l1", "l2"]


@dataclass(frozen=True, eq=False)
class ParameterNorms:
    """One norm a parameter.

    Attributes:
        objective: whose gradient.
        norm: which.
        values: (B, L), of every parameter tensor in the order of ``model.named_parameters()``.
    """

    objective: Objective
    norm: Norm
    values: Tensor


class _NetworkGradient(Representation):
    """What representations of the whole network's gradient share."""

    def __init__(
        self,
        objective: Objective | str | dict[str, Any],
        parameters: str | Sequence[str],
        memory_budget: int,
        checkpoint: bool,
        *needs: str,
    ) -> None:
        super().__init__()
        self.objective = Objective.of(objective)
        self.parameters = checked(parameters)
        self.memory_budget, self.checkpoint = memory_budget, checkpoint
        self.needs = frozenset[Need](
            {NetworkNeed(self.parameters, memory_budget, checkpoint), *needs}
        )

    def config(self) -> dict[str, Any]:
        several = isinstance(self.parameters, tuple)
        return {
            "objective": self.objective.config(),
            "parameters": list(self.parameters) if several else self.parameters,
            "memory_budget": self.memory_budget,
            "checkpoint": self.checkpoint,
        }

    def activations(self) -> Representation:
        """What the activations alone tell of the whole network: those of every stage, pooled."""
        return StageActivations()

    def _delta(self, signals: Signals) -> Tensor:
        delta = self.objective.logit_gradient(signals.logits, outputs=("delta",)).delta
        assert delta is not None
        return delta


class NetworkGradientNorms(_NetworkGradient):
    """Norms of every parameter tensor's gradient, per sample.

    Args:
        objective: whose gradient; see :class:`~grood_fast.objectives.Objective`.
        parameters: ``"head"``, ``"last_block"``, ``"all"`` or names of parameters or modules.
        norm: ``"l2"``, exact and without forming the gradient; or ``"l1"``, for which every
            gradient has to be formed, one tensor at a time: about one forward pass more, and
            B times the largest tensor in memory.
        output: ``"norms"``: :class:`ParameterNorms`; ``"log"``: (B, L) of log(‖·‖² + 1e-12) or, for
            ``"l1"``, log(‖·‖₁ + 1e-12); ``"log_and_features"``: these beside the penultimate
            features, (B, L + D).
        memory_budget: bytes of activations; larger batches go in pieces.
        checkpoint: hold less of the forward pass and compute it again.

    Raises:
        InputError: an unknown setting.
    """

    name = "network_gradient_norms"

    def __init__(
        self,
        objective: Objective | str | dict[str, Any] = "confounding",
        parameters: str | Sequence[str] = "all",
        norm: Norm = "l2",
        output: Literal["norms", "log", "log_and_features"] = "norms",
        memory_budget: int = MEMORY_BUDGET,
        checkpoint: bool = False,
    ) -> None:
        if norm not in ("l1", "l2"):
            raise InputError(f"norm must be 'l1' or 'l2', got {norm!r}.")
        if output not in ("norms", "log", "log_and_features"):
            raise InputError(
                f"output must be 'norms', 'log' or 'log_and_features', got {output!r}."
            )
        more = ("features",) if output == "log_and_features" else ()
        super().__init__(objective, parameters, memory_budget, checkpoint, *more)
        self.norm: Norm = norm
        self.output = output

    def config(self) -> dict[str, Any]:
        return {**super().config(), "norm": self.norm, "output": self.output}

    def __call__(self, signals: Signals) -> Any:
        values: dict[str, Tensor] = {}

        def read(name: str, gradient: LayerGradient) -> None:
            if name in wanted:
                l1 = self.norm == "l1"
                values[name] = gradient.absolute_sum() if l1 else gradient.squared_norm()

        names = signals.gradients.names(self.parameters)
        wanted = set(names)
        delta = self._delta(signals)
        signals.gradients.read(delta, read)
        zero = delta.new_zeros(len(delta))
        sums = torch.stack([values.get(name, zero).to(zero) for name in names], dim=1)
        if self.output == "norms":
            norms = sums if self.norm == "l1" else sums.sqrt()
            return ParameterNorms(self.objective, self.norm, norms)
        logs = (sums + SMALLEST_NORM).log()
        if self.output == "log":
            return logs
        return torch.cat([logs, signals.features.to(logs)], dim=1)


class ProjectedNetworkGradient(_NetworkGradient):
    """Coordinates of the gradient of many parameters in a low-dimensional subspace.

    No gradient is formed. Every parameter's gradient G (M, N) becomes U G Vᵀ along fixed directions
    that a warm-up on some reference samples has found; of these numbers together, F in all, the
    pass over the reference takes the principal components.

    Args:
        objective: whose gradient.
        parameters: ``"head"``, ``"last_block"``, ``"all"`` or names of parameters or modules.
        n_components: K; None keeps all F numbers.
        kind: ``"pca"``, or ``"class_averages"``: the unit-length class means about the mean.
        directions: ``"eigenvectors"`` of the mode covariances, or ``"random"``, which need no
            warm-up.
        numbers: about how many a weight matrix may become.
        small_numbers: the same for what is formed: biases, affine parameters of normalisations,
            weights of grouped convolutions.
        centred: whether PCA subtracts the mean.
        whiten: divide every one of the F numbers by its standard deviation over the reference
            first.
        unit: scale z to unit length.
        seed: of the random vectors.
        warm_up: at most so many reference samples find the directions.
        max_samples: of so many reference samples the numbers are kept, F each, for the score to be
            fitted on.
        memory_budget: bytes of activations; larger batches go in pieces.
        checkpoint: hold less of the forward pass and compute it again.

    Raises:
        InputError: for settings that do not go together.
    """

    name = "projected_network_gradient"
    needs_fit = True

    _directions: dict[str, Directions]
    _sketches: dict[str, DirectionSketch]
    _moments: Moments
    _reservoir: Reservoir
    _class_sums: tuple[Tensor, Tensor] | None
    _shared: tuple[float, float]
    _shared_samples: int

    def __init__(
        self,
        objective: Objective | str | dict[str, Any] = "energy",
        parameters: str | Sequence[str] = "all",
        n_components: int | None = 64,
        kind: Literal["pca", "class_averages"] = "pca",
        directions: Literal["eigenvectors", "random"] = "eigenvectors",
        numbers: int = 192,
        small_numbers: int = 16,
        centred: bool = True,
        whiten: bool = False,
        unit: bool = False,
        seed: int = 0,
        warm_up: int = 1024,
        max_samples: int = 8192,
        memory_budget: int = MEMORY_BUDGET,
        checkpoint: bool = False,
    ) -> None:
        super().__init__(objective, parameters, memory_budget, checkpoint)
        if kind not in ("pca", "class_averages"):
            raise InputError(f"kind must be 'pca' or 'class_averages', got {kind!r}.")
        if directions not in ("eigenvectors", "random"):
            raise InputError(f"directions must be 'eigenvectors' or 'random', got {directions!r}.")
        for what, value in {
            "numbers": numbers,
            "small_numbers": small_numbers,
            "n_components": 1 if n_components is None else n_components,
            "max_samples": max_samples,
            "warm_up": warm_up,
        }.items():
            if value < 1:
                raise InputError(f"{what} must be at least 1, got {value}.")
        self.n_components, self.kind, self.directions = n_components, kind, directions
        self.numbers, self.small_numbers = numbers, small_numbers
        self.centred, self.whiten, self.unit, self.seed = centred, whiten, unit, seed
        self.warm_up_samples, self.max_samples = warm_up, max_samples
        self.needs_labels = kind == "class_averages"  # type: ignore[misc]
        self._forget()

    def config(self) -> dict[str, Any]:
        names = (
            "n_components", "kind", "directions", "numbers", "small_numbers", "centred", "whiten",
            "unit", "seed", "max_samples",
        )  # fmt: skip
        return {
            **super().config(),
            **{name: getattr(self, name) for name in names},
            "warm_up": self.warm_up_samples,
        }

    def begin(self, classifier: Classifier) -> None:
        self._forget()

    def warm_up(self, signals: Signals) -> None:
        """Take in a batch whose gradients shall decide the directions."""
        random = self.directions == "random"
        if self._directions or (random and self._sketches):
            return

        def read(name: str, gradient: LayerGradient) -> None:
            if name not in wanted:
                return
            if name not in self._sketches:
                self._sketches[name] = DirectionSketch(
                    name, gradient, self.numbers, self.small_numbers, self.seed
                )
            if not random:
                self._sketches[name].absorb(gradient)

        wanted = set(signals.gradients.names(self.parameters))
        signals.gradients.read(self._delta(signals), read)

    def finish_warm_up(self) -> None:
        if not self._directions:
            self.use_directions(
                {name: self._sketches[name].finish() for name in sorted(self._sketches)}
            )

    def use_directions(self, directions: Mapping[str, Directions]) -> None:
        """Project on these instead of the warm-up's: what shards share before they are merged."""
        self._directions = dict(directions)
        self._sketches = {}

    @property
    def shared_directions(self) -> dict[str, Directions]:
        """Every parameter's, after the warm-up or the fit."""
        return self._directions or from_tensors(self.fitted)

    @keeps_state
    def absorb(self, z: Signals, labels: Tensor | None, indices: Tensor) -> None:
        """Take in one reference batch: its signals, and labels or predictions to balance by."""
        if not self._directions:  # the pass was made without a warm-up
            self.warm_up(z)
            self.finish_warm_up()
        coordinates, squares = self._coordinates(z, self._shared_samples < SHARE_SAMPLES)
        if squares is not None:
            self._shared_samples += len(squares)
            self._shared = (
                self._shared[0] + float(coordinates.double().square().sum()),
                self._shared[1] + float(squares.double().sum()),
            )
        labels = z.predictions if labels is None else labels
        self._moments.absorb(coordinates, indices)
        if self.kind == "class_averages":
            classes = z.logits.shape[1]
            sums = coordinates.new_zeros(classes, coordinates.shape[1], dtype=torch.float64)
            sums.index_add_(0, labels, coordinates.double())
            counts = torch.bincount(labels, minlength=classes)
            self._add_classes(sums, counts)
        self._reservoir.absorb({"z": coordinates, "labels": labels}, indices)

    def merge(self, other: ProjectedNetworkGradient) -> None:
        require_same_config(self, other)
        if not other._directions:
            return
        if not self._directions:
            self.use_directions(other._directions)
        require_equal(self._directions, other._directions)
        self._moments.merge(other._moments)
        self._reservoir.merge(other._reservoir)
        if other._class_sums is not None:
            self._add_classes(*other._class_sums)
        self._shared = (
            self._shared[0] + other._shared[0],
            self._shared[1] + other._shared[1],
        )

    def finish(self) -> None:
        covariance = self._moments.covariance()
        mean = self._moments.mean
        assert mean is not None
        total = float(covariance.diagonal().sum())
        scale = torch.ones_like(mean)
        if self.whiten:
            variance = covariance.diagonal()
            known = variance > 1e-12 * variance.max()
            scale = torch.where(known, variance.clamp(min=1e-300).rsqrt(), 0.0)
        centre = mean if self.centred else torch.zeros_like(mean)
        if not self.centred:
            covariance = covariance + torch.outer(mean, mean)
        covariance = scale[:, None] * covariance * scale
        ratio = torch.ones(0)
        if self.kind == "class_averages":
            basis = self._class_averages(mean) * scale
            basis = basis / basis.norm(dim=1, keepdim=True)
        elif self.n_components is None:
            basis = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
        else:
            size = float(covariance.diagonal().sum())
            values, vectors = leading_eigenvectors(
                covariance, min(self.n_components, len(mean)), size
            )
            basis, ratio = vectors.T, values / size
        basis = basis * scale
        self.fitted = {"offset": (basis @ centre).float()}
        if self.n_components is not None or self.kind == "class_averages" or self.whiten:
            self.fitted["basis"] = basis.float().contiguous()
        self.fitted.update(to_tensors(self._directions))
        seen, whole = self._shared
        self.facts = {
            "kind": self.kind,
            "parameters": len(self._directions),
            "numbers": len(mean),
            "components": len(basis),
            "variance_of_numbers": total,
            "explained_variance": float(ratio.sum()),
            "share_seen_by_directions": seen / whole if whole else None,
        }
        self._directions = {}

    def replay(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """What the kept samples became: (z, labels, indices) in blocks, once, after ``finish``."""
        sample = self._reservoir.finish()
        self._reservoir = Reservoir(self.max_samples, balanced=True)
        for start in range(0, len(sample["indices"]), REPLAYED_ROWS):
            rows = {name: tensor[start : start + REPLAYED_ROWS] for name, tensor in sample.items()}
            yield self._reduced(rows["z"]), rows["labels"], rows["indices"]

    def __call__(self, signals: Signals) -> Tensor:
        self.require_fitted()
        return self._reduced(self._coordinates(signals)[0])

    def _coordinates(self, signals: Signals, norms: bool = False) -> tuple[Tensor, Tensor | None]:
        directions = self.shared_directions
        reader = Coordinates(directions)
        squares: list[Tensor] = []

        def read(name: str, gradient: LayerGradient) -> None:
            reader(name, gradient)
            if norms and name in directions:
                squares.append(gradient.squared_norm())

        delta = self._delta(signals)
        signals.gradients.read(delta, read)
        whole = torch.stack([s.double() for s in squares]).sum(dim=0) if squares else None
        return reader.finish(delta), whole

    def _reduced(self, coordinates: Tensor) -> Tensor:
        basis = self.fitted.get("basis")
        z = coordinates if basis is None else coordinates.float() @ basis.T
        z = z - self.fitted["offset"]
        return torch.nn.functional.normalize(z, dim=1) if self.unit else z

    def _class_averages(self, mean: Tensor) -> Tensor:
        assert self._class_sums is not None
        sums, counts = self._class_sums
        seen = counts > 0
        if int(seen.sum()) < 2:
            raise InputError("class means need at least two classes in the reference.")
        return sums[seen] / counts[seen].unsqueeze(1) - mean

    def _add_classes(self, sums: Tensor, counts: Tensor) -> None:
        if self._class_sums is None:
            self._class_sums = sums, counts
        else:
            self._class_sums = self._class_sums[0] + sums, self._class_sums[1] + counts

    def _forget(self) -> None:
        self.fitted = {}
        self._directions = {}
        self._sketches = {}
        self._moments = Moments()
        self._reservoir = Reservoir(self.max_samples, balanced=True)
        self._class_sums = None
        self._shared, self._shared_samples = (0.0, 0.0), 0
