"""What training with auxiliary outliers minimises: L = L_CE + λ_S L_S + λ_grad L_gradS.

The energy S(x) = −logsumexp f(x) is low for in-distribution samples. With margins m_in < m_out:

* L_S, energy fine-tuning (Liu et al., 2020): the squared amount by which an ID sample lies above
  m_in, or an outlier below m_out, averaged over the ID samples and over the outliers.
* L_gradS, the gradient regulariser (Sharifi et al., GReg, ECCV 2024): the L2 norm of ∇ₓS of exactly
  the other samples, ID with S ≤ m_in and outliers with S ≥ m_out, averaged likewise.
* Outlier exposure (Hendrycks et al., 2019), instead of L_S: the cross-entropy of the uniform
  distribution over the classes, of the outliers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grood_fast.batches import Batch, join
from grood_fast.classifier import Classifier, Precision
from grood_fast.errors import InputError
from grood_fast.ops import reference
from grood_fast.training.second_order import SecondOrder

OutlierTerm = Literal["energy", "oe"]
Form = Literal["input", "finite_difference", "features"]

Inputs = list[Tensor]
Energy = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Margins:
    """Between which energies lies what is neither clearly in nor out of distribution.

    Args:
        inside: m_in; ID samples are pushed below it.
        outside: m_out; outliers are pushed above it.

    Raises:
        InputError: the first lies above the second.
    """

    inside: float = -25.0
    outside: float = -7.0

    def __post_init__(self) -> None:
        if not self.inside <= self.outside:
            raise InputError(
                f"the margin of ID samples must not lie above that of the outliers, got "
                f"inside={self.inside} and outside={self.outside}: energies are negative, about "
                "minus the largest logit."
            )

    def met(self, energies: Tensor, inliers: int) -> Tensor:
        """(N,) bool: which of ``inliers`` ID samples and, after them, outliers keep their margin.

        Those feed the gradient regulariser, all others the energy loss.
        """
        return torch.cat([energies[:inliers] <= self.inside, energies[inliers:] >= self.outside])


def energy_margin_loss(energies: Tensor, inliers: int, margins: Margins) -> Tensor:
    """L_S of energies (N,), those of the ``inliers`` ID samples first."""
    above = F.relu(energies[:inliers] - margins.inside)
    below = F.relu(margins.outside - energies[inliers:])
    return above.square().mean() + below.square().mean()


def outlier_exposure_loss(logits: Tensor) -> Tensor:
    """Mean cross-entropy of the uniform distribution, of the outliers' logits (A, C)."""
    return (torch.logsumexp(logits, dim=1) - logits.mean(dim=1)).mean()


@dataclass(frozen=True)
class GradientRegularizer:
    """λ_grad L_gradS, the penalty on ‖∇ₓS‖ of the samples that keep their margin.

    Args:
        weight: λ_grad.
        scale: "authors": λ_grad/(B+A) times the paper's term, with B ID samples and A outliers a
            step. That is what the authors' program computes, since it takes the gradient of batch
            means and then averages its rows' norms. "paper": λ_grad times the two means.
        form: "input": the norm of the input gradient, by differentiating it once more.
            "finite_difference": the slope of S along the (fixed) direction of its gradient, whose
            derivative by the parameters is that of the norm up to O(``step``). "features": a
            surrogate, the norm of ∂S/∂h = −Wᵀp at the penultimate features, which costs nothing.
        batch_norm: "train": as published, the gradient passes through the batch's statistics, so
            that a sample's gradient contains its influence on others. "frozen": batch norm uses
            its running statistics in a forward pass of its own: true per-sample gradients.
        epsilon: inside the root of a sample's norm, whose derivative has no value at 0.
        step: of the finite difference, an L2 distance in the input's own units.

    Raises:
        InputError: an unknown name, or a number out of range.
    """

    weight: float = 1.0
    scale: Literal["authors", "paper"] = "authors"
    form: Form = "input"
    batch_norm: Literal["train", "frozen"] = "train"
    epsilon: float = 1e-12
    step: float = 0.05

    def __post_init__(self) -> None:
        for name, value, known in (
            ("scale", self.scale, ("authors", "paper")),
            ("form", self.form, ("input", "finite_difference", "features")),
            ("batch_norm", self.batch_norm, ("train", "frozen")),
        ):
            if value not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}; got {value!r}.")
        if not self.weight > 0 or not self.epsilon > 0 or not self.step > 0:
            raise InputError(
                f"weight, epsilon and step must be positive, got {self.weight}, {self.epsilon} and "
                f"{self.step}."
            )

    def effective_weight(self, samples: int) -> float:
        """What multiplies the paper's L_gradS in a step of so many samples."""
        return self.weight / samples if self.scale == "authors" else self.weight

    def norms(self, gradients: Inputs, shares: Tensor) -> Tensor:
        """(N,) √(‖g‖² + ε) − √ε times the sample's share, of gradients that contain the share."""
        squares = torch.stack([g.flatten(1).square().sum(dim=1) for g in gradients]).sum(dim=0)
        offset = shares.square() * self.epsilon
        return (squares + offset).sqrt() - offset.sqrt()


@dataclass(frozen=True)
class Terms:
    """The loss of one batch, and what it is made of.

    Attributes:
        parts: "cross_entropy", and where they are used "outliers" and "gradient", each a scalar
            with its weight in it.
        met_in, met_out: shares of the ID samples and of the outliers that keep their margins: those
            the gradient regulariser sees.
        energy_in, energy_out: median energies.
        accuracy: share of the ID samples classified right, in training mode.
    """

    parts: dict[str, Tensor]
    met_in: Tensor
    met_out: Tensor
    energy_in: Tensor
    energy_out: Tensor
    accuracy: Tensor

    @property
    def total(self) -> Tensor:
        """The sum of the parts."""
        return torch.stack(list(self.parts.values())).sum()

    def numbers(self) -> dict[str, Tensor]:
        """All of it by name, detached scalars."""
        named = {"loss": self.total, **self.parts}
        for name in ("met_in", "met_out", "energy_in", "energy_out", "accuracy"):
            named[name] = getattr(self, name)
        return {name: value.detach().float() for name, value in named.items()}


@dataclass(frozen=True)
class TrainingObjective:
    """The loss: cross-entropy, a term for the outliers, and the gradient regulariser.

    GReg is ``TrainingObjective("energy", 0.1, regularizer=GradientRegularizer())``; without the
    regulariser it is energy fine-tuning. With ``outliers="oe"`` the regulariser is added to outlier
    exposure, as in the paper's ablation.

    Args:
        outliers: "energy" for L_S, "oe" for outlier exposure, None for cross-entropy alone.
        outlier_weight: λ_S, or the weight of outlier exposure.
        margins: of L_S, and of the regulariser whatever the outliers' term is.
        regularizer: None leaves it out.

    Raises:
        InputError: an unknown term, or a regulariser without outliers.
    """

    outliers: OutlierTerm | None = "energy"
    outlier_weight: float = 0.1
    margins: Margins = field(default_factory=Margins)
    regularizer: GradientRegularizer | None = None

    def __post_init__(self) -> None:
        if self.outliers not in (None, "energy", "oe"):
            raise InputError(f'outliers must be "energy", "oe" or None, got {self.outliers!r}.')
        if self.outliers is None and self.regularizer is not None:
            raise InputError('the regulariser needs outliers: choose outliers="energy" or "oe".')
        if not self.outlier_weight >= 0:
            raise InputError(f"outlier_weight must not be negative, got {self.outlier_weight}.")

    def __call__(
        self,
        classifier: Classifier,
        inliers: Batch,
        outliers: Batch | None = None,
        *,
        precision: Precision = "fp32",
        batches: int = 1,
    ) -> Terms:
        """The loss of one batch, ready for ``backward``.

        One forward pass of all samples together, in the model's current mode. With batch norm
        "frozen" or in bf16 the regulariser makes a second one in float32; it moves no running
        statistics.

        Args:
            classifier: the model, on whose device the batches are.
            inliers: B samples with class labels.
            outliers: A samples; None only without a term for them.
            precision: "bf16" runs the first forward pass under autocast.
            batches: how many batches of this size a step averages the losses of (gradient
                accumulation, processes): the authors' scale counts all their samples.

        Raises:
            InputError: labels or outliers are missing, the two batches have different forms, or an
                input gradient is wanted and no input is floating point.
        """
        if inliers.labels is None:
            raise InputError(
                "training needs class labels: let the ID loader yield (x, y) with y an integer "
                "tensor of shape (B,)."
            )
        if self.outliers is None:
            batch = inliers
        elif outliers is None:
            raise InputError(f"the outlier term {self.outliers!r} needs a batch of outliers.")
        else:
            batch = join(inliers, outliers)
        regularizer, count = self.regularizer, inliers.size
        by_input = regularizer is not None and regularizer.form != "features"
        shared = (
            regularizer is not None and precision == "fp32" and regularizer.batch_norm == "train"
        )
        rules = SecondOrder()
        with ExitStack() as stack:
            stack.enter_context(_autocast(classifier.device, precision))
            watched: Inputs = []
            randomness = _Randomness(classifier.device)
            if by_input and shared:
                batch, watched = _watched(batch)
                if regularizer is not None and regularizer.form == "input":
                    stack.enter_context(rules)
            logits, features = classifier.differentiable(
                batch, features=regularizer is not None and not by_input
            )
        logits = _at_least_float32(logits)
        energies = reference.energy(logits)
        parts = {"cross_entropy": F.cross_entropy(logits[:count], inliers.labels)}
        if self.outliers == "energy":
            loss = energy_margin_loss(energies, count, self.margins)
            parts["outliers"] = self.outlier_weight * loss
        elif self.outliers == "oe":
            parts["outliers"] = self.outlier_weight * outlier_exposure_loss(logits[count:])
        met = self.margins.met(energies.detach(), count)
        if regularizer is not None:
            shares = energies.new_full((len(energies),), 1 / count)
            shares[count:] = 1 / (len(energies) - count)
            weight = regularizer.effective_weight(batches * len(energies))
            if classifier.device.type == "cpu" and not met.any():
                norm = energies.new_zeros(())  # elsewhere, looking would wait for the device
            elif features is not None:
                norm = _feature_gradient_norms(classifier, logits, met, shares, regularizer)
            elif shared:
                norm = self._penalty(
                    classifier, batch, watched, energies, met * shares, shares, rules, randomness
                )
            else:
                norm = self._separate_penalty(classifier, batch, met * shares, shares)
            parts["gradient"] = weight * norm
        right = (logits[:count].detach().argmax(dim=1) == inliers.labels).float().mean()
        found = energies.detach()
        return Terms(
            parts,
            met_in=met[:count].float().mean(),
            met_out=met[count:].float().sum() / max(1, len(met) - count),
            energy_in=found[:count].median(),
            energy_out=found[count:].median() if len(found) > count else found.new_zeros(()),
            accuracy=right,
        )

    def _separate_penalty(
        self, classifier: Classifier, batch: Batch, weights: Tensor, shares: Tensor
    ) -> Tensor:
        """Σ shares·‖∇S‖ of a float32 forward pass of its own."""
        regularizer = self.regularizer
        assert regularizer is not None
        batch, watched = _watched(batch)
        rules, randomness = SecondOrder(), _Randomness(classifier.device)
        with (
            _norm_layers(classifier.model, frozen=regularizer.batch_norm == "frozen"),
            rules if regularizer.form == "input" else nullcontext(),
        ):
            energies = _energies(classifier, batch)
        return self._penalty(
            classifier, batch, watched, energies, weights, shares, rules, randomness
        )

    def _penalty(
        self,
        classifier: Classifier,
        batch: Batch,
        watched: Inputs,
        energies: Tensor,
        weights: Tensor,
        shares: Tensor,
        rules: SecondOrder,
        randomness: _Randomness,
    ) -> Tensor:
        """Σ shares·‖∇S‖ over what was weighted, from energies that depend on ``watched``."""
        regularizer = self.regularizer
        assert regularizer is not None
        scalar = (weights * energies).sum()
        if regularizer.form == "input":
            return regularizer.norms(list(rules.gradients(scalar, watched)), shares).sum()
        gradients = torch.autograd.grad(scalar, watched, retain_graph=True)
        squares = torch.stack([g.flatten(1).square().sum(dim=1) for g in gradients]).sum(dim=0)
        lengths = squares.sqrt()
        scales = torch.where(lengths > 0, regularizer.step / lengths, 0)
        moved = iter(
            x.detach() + g * scales.view(-1, *[1] * (g.ndim - 1))
            for x, g in zip(watched, gradients, strict=True)
        )
        there = batch.map_inputs(lambda x: next(moved) if x.is_floating_point() else x)
        frozen = regularizer.batch_norm == "frozen"
        with _norm_layers(classifier.model, frozen), randomness.again():
            further = _energies(classifier, there)
        return ((weights * further).sum() - scalar) / regularizer.step


def _energies(classifier: Classifier, batch: Batch) -> Tensor:
    with _autocast(classifier.device, "fp32"):
        logits, _ = classifier.differentiable(batch)
    return reference.energy(_at_least_float32(logits))


def _feature_gradient_norms(
    classifier: Classifier,
    logits: Tensor,
    met: Tensor,
    shares: Tensor,
    regularizer: GradientRegularizer,
) -> Tensor:
    """Σ shares·‖Wᵀp‖ over the samples that keep their margin."""
    weight = classifier.trainable_weight.to(logits.dtype)
    gradients = (met * shares).unsqueeze(1) * (torch.softmax(logits, dim=1) @ weight)
    return regularizer.norms([gradients], shares).sum()


def _watched(batch: Batch) -> tuple[Batch, Inputs]:
    """The batch with floating-point inputs that autograd follows, and these."""
    watched: Inputs = []

    def watch(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        watched.append(tensor.detach().requires_grad_())
        return watched[-1]

    batch = batch.map_inputs(watch)
    if not watched:
        raise InputError(
            "no input of this model is floating point, so that there is no input gradient to "
            'regularise: use form="features".'
        )
    return batch, watched


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _autocast(device: torch.device, precision: Precision) -> Any:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def _norm_layers(model: nn.Module, frozen: bool) -> Iterator[None]:
    """Batch norm with its running statistics (frozen), or else with the batch's but without moving
    the running ones; afterwards as it was."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with ExitStack() as stack:
        for layer in (layer for layer in layers if layer.training):
            if frozen:
                stack.callback(setattr, layer, "training", True)
                layer.training = False
                continue
            stack.callback(setattr, layer, "momentum", layer.momentum)
            layer.momentum = 0.0
            if layer.num_batches_tracked is not None:
                tracked = layer.num_batches_tracked
                stack.callback(tracked.copy_, tracked.clone())
        yield


class _Randomness:
    """The random state of now, to be had once more: the same dropout in a second forward pass."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def again(self) -> Iterator[None]:
        devices = [self.device] if self.cuda is not None else []
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield
