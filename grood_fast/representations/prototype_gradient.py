"""The gradient with respect to an out-of-distribution prototype among the class prototypes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from grood_fast import ops
from grood_fast.batches import Batch
from grood_fast.classifier import Classifier
from grood_fast.errors import InputError
from grood_fast.layers import layer_need
from grood_fast.representations.base import Representation
from grood_fast.representations.forward import PenultimateFeatures
from grood_fast.signals import Signals, stream
from grood_fast.statistics import ClassMeans, Reservoir, keeps_state, require_same_config

SCALE = 2.0**48
"""Of the gradients: their norms reach down to 1e-30, whose squares float32 cannot hold, and are
hardly ever above 1."""

REPLAYED_ROWS = 1024
KEPT_ROWS = 50
"""Samples at once where the network runs again."""

NOISE_KEPT = 10
"""Of so many noise images, one is kept: those with the highest energy."""

Source = Literal["mixup", "noise", "prototype_mean", "validation"]
SOURCES: tuple[Source, ...] = ("mixup", "noise", "prototype_mean", "validation")


class PrototypeGradient(Representation):
    """g = π (h − p)/‖h − p‖, GROOD's gradient with respect to the OOD prototype p, times 2⁴⁸.

    Class prototypes p_k are the mean penultimate features of the classes; π is p's share in the
    softmax over −‖h − p_k‖/T and −‖h − p‖/T. See :func:`grood_fast.ops.prototype_gradient`. The
    score is fitted on the gradients of the reference samples that the classifier gets right.

    Args:
        source: where p comes from. ``"mixup"``: the features that come of reference samples mixed,
            at an early layer, with the prototype there of their second most likely class;
            ``"noise"``: of blurred noise images, the tenth with the highest energy; for models that
            take one batch of images; ``"prototype_mean"``: the mean of the class prototypes;
            ``"validation"``: of ``validation_ood``.
        layer: where ``"mixup"`` mixes, by its name in ``model.named_modules()``; None: the layer
            that ends the last stage but one.
        mixing: λ, the sample's own share in the mixture.
        n_synthetic: how many samples are mixed, or noise images kept.
        temperature: T.
        squared: whether the distances are squared: g = 2 π (h − p)/T.
        max_samples: how many reference samples' features to keep while fitting, chosen by their
            index; None keeps all, D numbers each.
        validation_ood: loader of OOD validation samples: supervision that no other source needs.

    Raises:
        InputError: for an unknown source, settings out of range, or a source without its images.
    """

    name = "prototype_gradient"
    needs: frozenset[str] = frozenset({"features"})
    needs_fit = True
    needs_labels = True

    def __init__(
        self,
        source: Source = "mixup",
        layer: str | None = None,
        mixing: float = 0.5,
        n_synthetic: int = 100,
        temperature: float = 1.0,
        squared: bool = False,
        max_samples: int | None = 50_000,
        *,
        validation_ood: Iterable[Any] | None = None,
    ) -> None:
        super().__init__()
        if source not in SOURCES:
            raise InputError(f"unknown source {source!r}; known: {', '.join(SOURCES)}.")
        if (source == "validation") < (validation_ood is not None):
            raise InputError(f"validation_ood goes with source='validation', not {source!r}.")
        if not 0 <= mixing <= 1:
            raise InputError(f"mixing must lie in [0, 1], got {mixing}.")
        if n_synthetic < 1:
            raise InputError(f"n_synthetic must be at least 1, got {n_synthetic}.")
        if not 1e-30 < temperature < 1e30:
            raise InputError(f"temperature must be positive and finite, got {temperature}.")
        self.source, self.layer, self.mixing = source, layer, mixing
        self.n_synthetic, self.temperature, self.squared = n_synthetic, temperature, squared
        self.max_samples = max_samples
        self.validation_ood = validation_ood
        self._classifier: Classifier | None = None
        self._forget()

    def config(self) -> dict[str, Any]:
        names = (
            "source", "layer", "mixing", "n_synthetic", "temperature", "squared", "max_samples",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def fresh(self) -> PrototypeGradient:
        return type(self)(**self.config(), validation_ood=self.validation_ood)

    @property
    def fit_needs(self) -> frozenset[str]:
        return self.needs | {layer_need(self.layer)} if self.source == "mixup" else self.needs

    def _forget(self) -> None:
        self._means = ClassMeans()
        self._early_means = ClassMeans()
        self._bank = Reservoir(self.max_samples)
        self._inputs = Reservoir(self.n_synthetic, seed=1)
        self._template: Batch | None = None
        self._dtype = torch.float32

    def begin(self, classifier: Classifier) -> None:
        if self.source == "validation" and self.validation_ood is None:
            raise InputError(
                "source='validation' places the OOD prototype by OOD validation samples: pass "
                "validation_ood=loader. The other sources need none."
            )
        self.fitted = {}
        self._forget()
        self._classifier = classifier

    @keeps_state
    def absorb(self, z: Signals, labels: Tensor | None, indices: Tensor) -> None:
        """Take in one reference batch: its signals and labels."""
        assert labels is not None
        self._means.absorb(z.features, labels)
        correct = z.predictions == labels
        features = z.features if z.features.dtype == torch.float64 else z.features.float()
        columns = {"features": features, "labels": labels, "correct": correct}
        self._bank.absorb(columns, indices)
        self._dtype = features.dtype
        if self.source == "mixup":
            self._early_means.absorb(z.layer(self.layer).activation.flatten(1), labels)
        if self.source in ("mixup", "noise"):
            if self._template is None:
                self._template = z.batch.first(1)
            self._inputs.absorb(z.batch.columns(), indices)

    def merge(self, other: PrototypeGradient) -> None:
        require_same_config(self, other)
        self._means.merge(other._means)
        self._early_means.merge(other._early_means)
        self._bank.merge(other._bank)
        self._inputs.merge(other._inputs)
        self._template = self._template or other._template
        self._dtype = torch.promote_types(self._dtype, other._dtype)

    @keeps_state
    def finish(self) -> None:
        classes, prototypes = self._means.finish()
        if len(classes) < 2 and self.source == "mixup":
            raise InputError("mixing with another class needs reference samples of two classes.")
        features = {
            "mixup": lambda: self._mixed(classes),
            "noise": self._noise,
            "prototype_mean": lambda: prototypes,
            "validation": self._validation,
        }[self.source]()
        ood_prototype = features.double().mean(dim=0).to(prototypes.device)
        offsets = prototypes - ood_prototype
        self.fitted = {
            "ood_prototype": ood_prototype.to(self._dtype),
            "offsets": offsets.to(self._dtype),
            "offset_norms": offsets.norm(dim=1).to(self._dtype),
        }
        self.facts = {"ood_prototype_samples": len(features), "classes": len(classes)}
        self._early_means, self._classifier, self._template = ClassMeans(), None, None
        self._inputs = Reservoir(self.n_synthetic, seed=1)

    def replay(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Gradients of the reference samples that were classified right, once, after ``finish``."""
        sample = self._bank.finish()
        self._bank = Reservoir(self.max_samples)
        right = sample["correct"]
        if not bool(right.any()):
            raise InputError("the classifier gets no reference sample right: check the labels.")
        self.facts["correct"] = int(right.sum())
        rows = right.nonzero().flatten()
        for some in torch.split(rows, REPLAYED_ROWS):
            z = self._gradient(sample["features"][some])
            yield z, sample["labels"][some], sample["indices"][some]

    def activations(self) -> PenultimateFeatures:
        """The penultimate features, which the gradient is a function of."""
        return PenultimateFeatures()

    def __call__(self, signals: Signals) -> Tensor:
        """2⁴⁸ g, (B, D), float64 if the reference's features were, else float32."""
        self.require_fitted()
        return self._gradient(signals.features)

    def _gradient(self, features: Tensor) -> Tensor:
        gradient, _ = ops.prototype_gradient(
            features,
            self.fitted["ood_prototype"],
            self.fitted["offsets"],
            offset_norms=self.fitted["offset_norms"],
            temperature=self.temperature,
            squared=self.squared,
            scale=SCALE,
        )
        return gradient

    # --- where the OOD prototype comes from ---------------------------------------------------

    def _mixed(self, classes: Tensor) -> Tensor:
        """(n, D) features of reference samples mixed with another class at an early layer."""
        _, early = self._early_means.finish()
        need = layer_need(self.layer)

        def features(classifier: Classifier, batch: Batch) -> Tensor:
            logits, _ = classifier.forward(batch)
            layer = classifier.layers()[need]
            a = layer.activation
            second = logits[:, classes].topk(2, dim=1).indices[:, 1]
            other = early.to(a.device)[second].reshape(a.shape).to(a.dtype)
            return required(layer.resume(self.mixing * a + (1 - self.mixing) * other)[1])

        return self._of_kept(features, frozenset({need}))

    def _noise(self) -> Tensor:
        """(n, D) features of blurred noise images, the tenth of them with the highest energy."""

        def features(classifier: Classifier, batch: Batch) -> Tensor:
            noise = blurred_noise(_images(batch), NOISE_KEPT)
            logits, h = zip(
                *(classifier.forward(Batch((some,), {}, None, len(some))) for some in noise),
                strict=True,
            )
            energy = -torch.cat(logits).float().logsumexp(dim=1)
            return torch.cat([required(one) for one in h])[energy.topk(batch.size).indices]

        return self._of_kept(features, frozenset())

    def _validation(self) -> Tensor:
        assert self.validation_ood is not None
        assert self._classifier is not None
        with closing(stream(self._classifier, self.validation_ood, {"features"})) as batches:
            return torch.cat([signals.features.clone() for signals in batches])

    def _of_kept(
        self, features: Callable[[Classifier, Batch], Tensor], layers: frozenset[str]
    ) -> Tensor:
        """What a function makes, inside a session, of the reference samples kept."""
        assert self._classifier is not None
        assert self._template is not None
        sample = self._inputs.finish()
        del sample["indices"]
        kept = self._template.with_columns(sample)
        with self._classifier.session(True, layers):
            pieces = [
                features(self._classifier, kept.rows(rows))
                for rows in torch.split(torch.arange(kept.size), KEPT_ROWS)
            ]
        return torch.cat(pieces)


def blurred_noise(images: Tensor, count: int) -> list[Tensor]:
    """Uniform noise in the range of the images, blurred by a Gaussian 5 x 7 pixels wide.

    Args:
        images: (B, channels, height, width).
        count: how many batches of noise of the same shape; each blurred by another σ, evenly
            between 0.2 and 5.
    """
    generator = torch.Generator().manual_seed(0)
    low, high = (float(bound) for bound in images.aminmax())
    batches = []
    for sigma in torch.linspace(0.2, 5, count):
        noise = low + (high - low) * torch.rand(images.shape, generator=generator)
        for dim, width in ((2, 5), (3, 7)):
            kernel = torch.exp(-(torch.arange(width) - width // 2).square() / (2 * sigma**2))
            taps = (kernel / kernel.sum()).reshape([-1 if d == dim else 1 for d in range(4)])
            sides = [0, 0, width // 2, width // 2] if dim == 2 else [width // 2, width // 2, 0, 0]
            padded = functional.pad(noise, sides, mode="replicate")
            channels = images.shape[1]
            noise = functional.conv2d(padded, taps.repeat(channels, 1, 1, 1), groups=channels)
        batches.append(noise.to(images.device, images.dtype))
    return batches


def required(features: Tensor | None) -> Tensor:
    """The features of a session that was opened for them."""
    assert features is not None
    return features


def _images(batch: Batch) -> Tensor:
    images = batch.args[0] if batch.args and not batch.kwargs else None
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        raise InputError(
            "source='noise' makes images: the model must take one floating-point batch (B, "
            "channels, height, width). Use source='mixup'."
        )
    return images
