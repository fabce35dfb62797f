"""The last layer's gradient, seen through a subspace fitted to the reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from grood_fast.classifier import Classifier
from grood_fast.errors import InputError
from grood_fast.objectives import Objective
from grood_fast.representations.base import Representation
from grood_fast.representations.forward import PenultimateFeatures
from grood_fast.signals import Need, Signals
from grood_fast.statistics import require_same_config, warn_of_missing_classes
from grood_fast.subspaces import FORMS, KINDS, GradientState, build, project

REPLAYED_ROWS = 1024


class ProjectedHeadGradient(Representation):
    """Coordinates z = V (g − ḡ) of the last layer's gradient g = δhᵀ, which is never formed.

    Fitted in one pass: exact sums over all samples, and a class-balanced sample of factor pairs
    that the directions are made of and the score is fitted on. Directions in float64, coordinates
    in float32.

    Args:
        objective: whose gradient; see :class:`~grood_fast.objectives.Objective`.
        kind: ``"pca"``, ``"class_means"`` (PCA of the class means, as GradPCA) or
            ``"class_averages"`` (Wu et al.'s choice for ImageNet).
        n_components: K; see :func:`grood_fast.subspaces.build`.
        form: ``"dual"``, ``"dense"``, ``"factored"``, or ``"auto"`` for the cheapest.
        bias: whether the bias' gradient counts too.
        centred: whether PCA subtracts the mean gradient.
        whiten: divide every entry of the gradient by its standard deviation first.
        unit: scale z to unit length.
        kept_share: of the class means' variance.
        output: ``"coordinates"``: z (B, K); ``"norms"``: (B, 2) of ‖z‖² and ‖g − ḡ‖².
        max_samples: factor pairs to keep while fitting, C + D numbers each.
        max_anchors: how many of them the directions are made of.

    Raises:
        InputError: for settings that do not go together.
    """

    name = "projected_head_gradient"
    needs: frozenset[Need] = frozenset({"features"})
    needs_fit = True

    def __init__(
        self,
        objective: Objective | str | dict[str, Any] = "energy",
        kind: Literal["pca", "class_means", "class_averages"] = "pca",
        n_components: int | None = 64,
        form: Literal["auto", "dual", "dense", "factored"] = "auto",
        bias: bool = False,
        centred: bool = True,
        whiten: bool = False,
        unit: bool = False,
        kept_share: float = 0.99,
        output: Literal["coordinates", "norms"] = "coordinates",
        max_samples: int = 32768,
        max_anchors: int = 8192,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise InputError(f"unknown kind {kind!r}; known: {', '.join(KINDS)}.")
        if form not in ("auto", *FORMS):
            raise InputError(f"unknown form {form!r}; known: auto, {', '.join(FORMS)}.")
        if output not in ("coordinates", "norms"):
            raise InputError(f"output must be 'coordinates' or 'norms', got {output!r}.")
        if kind == "pca" and n_components is None:
            raise InputError("kind='pca' needs n_components.")
        if n_components is not None and n_components < 1:
            raise InputError(f"n_components must be at least 1, got {n_components}.")
        if not 0 < kept_share <= 1:
            raise InputError(f"kept_share must lie in (0, 1], got {kept_share}.")
        if whiten and (kind != "pca" or form not in ("auto", "dense") or output == "norms"):
            raise InputError("whitening goes with PCA, the dense form and coordinates only.")
        self.objective = Objective.of(objective)
        self.kind, self.n_components, self.form = kind, n_components, form
        self.bias, self.centred, self.whiten, self.unit = bias, centred, whiten, unit
        self.kept_share, self.output = kept_share, output
        self.max_samples, self.max_anchors = max_samples, max_anchors
        # Which class a sample belongs to decides the directions; for PCA it only balances.
        self.needs_labels = kind != "pca"  # type: ignore[misc]
        self._state = self._fresh_state()

    def config(self) -> dict[str, Any]:
        names = (
            "kind", "n_components", "form", "bias", "centred", "whiten", "unit", "kept_share",
            "output", "max_samples", "max_anchors",
        )  # fmt: skip
        return {
            "objective": self.objective.config(),
            **{name: getattr(self, name) for name in names},
        }

    def _fresh_state(self) -> GradientState:
        return GradientState(self.max_samples, self.whiten, per_class=self.kind != "pca")

    def begin(self, classifier: Classifier) -> None:
        self.fitted = {}
        self._state = self._fresh_state()

    def absorb(self, z: Signals, labels: Tensor | None, indices: Tensor) -> None:
        """Take in one reference batch: its signals, and labels or predictions to balance by."""
        delta, features = self._factors(z)
        self._state.absorb(delta, features, z.predictions if labels is None else labels, indices)

    def merge(self, other: ProjectedHeadGradient) -> None:
        require_same_config(self, other)
        self._state.merge(other._state)

    def finish(self) -> None:
        if self.kind != "pca":
            sample = self._state.sample()
            warn_of_missing_classes(sample["labels"].tolist(), sample["delta"].shape[1])
        subspace = build(
            self._state,
            kind=self.kind,
            n_components=self.n_components,
            form=self.form,
            centred=self.centred,
            whiten=self.whiten,
            kept_share=self.kept_share,
            max_anchors=self.max_anchors,
        )
        self.fitted = dict(subspace.tensors)
        self.fitted["explained_variance_ratio"] = (
            subspace.components.explained_variance_ratio.float()
        )
        if self.output == "norms":
            self.fitted["centre"] = subspace.centre.float()
        self.facts = subspace.facts

    def __repr__(self) -> str:
        if not self.facts:
            return super().__repr__()
        form, components = self.facts["form"], self.facts["components"]
        return (
            f"{super().__repr__()} [{form} form of {components} components, "
            f"{self.facts['multiplications'][form]:,} multiplications a sample]"
        )

    def activations(self) -> Representation | None:
        """The penultimate features; for norms the summed logits' gradient, which carries only
        them."""
        if self.output == "coordinates":
            return PenultimateFeatures()
        if self.objective.name == "logit_sum":
            return None
        return ProjectedHeadGradient(**{**self.config(), "objective": "logit_sum"})

    def replay(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """What the kept samples became: (z, labels, indices) in blocks, once, after ``finish``."""
        sample = self._state.sample()
        self._state = self._fresh_state()
        for start in range(0, len(sample["indices"]), REPLAYED_ROWS):
            rows = {name: tensor[start : start + REPLAYED_ROWS] for name, tensor in sample.items()}
            yield self._project(rows["delta"], rows["features"]), rows["labels"], rows["indices"]

    def __call__(self, signals: Signals) -> Tensor:
        self.require_fitted()
        return self._project(*self._factors(signals))

    def _factors(self, signals: Signals) -> tuple[Tensor, Tensor]:
        delta = self.objective.logit_gradient(signals.logits, outputs=("delta",)).delta
        assert delta is not None
        features = signals.features.to(delta.dtype)
        if self.bias:
            features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
        return delta, features

    def _project(self, delta: Tensor, features: Tensor) -> Tensor:
        z = project(self.fitted, delta, features)
        if self.output == "norms":
            delta, features, centre = delta.float(), features.float(), self.fitted["centre"]
            along = ((delta @ centre) * features).sum(dim=1)
            whole = (
                delta.square().sum(dim=1) * features.square().sum(dim=1)
                - 2 * along
                + centre.square().sum()
            )
            return torch.stack([z.square().sum(dim=1), whole.clamp(min=0)], dim=1)
        return torch.nn.functional.normalize(z, dim=1) if self.unit else z
