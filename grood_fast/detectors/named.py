"""The named detectors: each a representation and a score, with the paper they come from.

A named detector differs from :class:`~grood_fast.detectors.base.Detector` in nothing but its
constructor.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

from grood_fast.detectors.base import Detector
from grood_fast.detectors.fusion import DetectorScores
from grood_fast.errors import InputError
from grood_fast.objectives import Objective
from grood_fast.representations import (
    HeadGradient,
    Joint,
    NetworkGradientNorms,
    ProjectedHeadGradient,
    ProjectedNetworkGradient,
    PrototypeGradient,
    Representation,
    ShortCircuitedLogits,
)
from grood_fast.representations.prototype_gradient import Source
from grood_fast.scores import (
    GEN,
    KNN,
    MSP,
    ClassGMM,
    Energy,
    EnergyDrop,
    ExpectedGradientNorm,
    Fusion,
    GradientNorm,
    Mahalanobis,
    MaxLogit,
    NetworkGradientNorm,
    Norm,
    ProjectedGradientNorm,
    RelativeMahalanobis,
    Score,
    SubspaceShare,
    ViM,
)
from grood_fast.scores.fusion import Combination


class GradNorm(Detector):
    """GradNorm (Huang, Geng and Li, NeurIPS 2021, eq. 4): −‖dL/dW‖ of the last layer.

    L is the cross-entropy between the softmax and the uniform distribution, summed over the
    classes as :class:`~grood_fast.objectives.Objective` "uniform"; in-distribution samples have
    the larger gradient, so the norm is negated: higher = more OOD.

    Args:
        norm: ``"l1"`` as in the paper, ``"l2"`` or ``"linf"``.
        temperature: T of the softmax; the paper's 1.
        bias: whether the bias' gradient counts too; the paper takes the weight alone.
        parameters: ``"head"``, as in the paper; or ``"last_block"``, ``"all"`` or names, with all
            biases, in L1 or L2: the L2 norm comes without forming a gradient, the L1 norm forms
            each of them, one tensor at a time.
    """

    def __init__(
        self,
        norm: str = "l1",
        temperature: float = 1.0,
        bias: bool = False,
        parameters: str | Sequence[str] = "head",
    ) -> None:
        objective = {"name": "uniform", "temperature": temperature}
        if parameters == "head":
            super().__init__(GradientNorm(norm), HeadGradient(objective, bias), name="gradnorm")
        else:
            norms = NetworkGradientNorms(objective, parameters, cast(Any, norm))
            super().__init__(NetworkGradientNorm(), norms, name="gradnorm")


class ConfoundingLabel(Detector):
    """Confounding labels (Lee and AlRegib, ICIP 2020; Lee, Prabhushankar and AlRegib 2022).

    The network is asked to learn a label that no sample can have, and the vector of
    log ‖dL/dθ‖² over its parameter tensors θ is what a sample becomes; L is the binary
    cross-entropy between the logits and that label. The papers train a classifier on such vectors
    of in-distribution and OOD samples; this detector sees none of the latter: its score is fitted
    on the in-distribution vectors alone. For the papers' protocols see
    :mod:`grood_fast.evaluation.supervised`.

    Args:
        label: the C entries of the label, in [0, 1]; None for all ones.
        score: on the vectors; default the distance to the 10th neighbour, every entry standardised.
        features: put the penultimate features beside the log norms.
        parameters: ``"all"``, ``"last_block"``, ``"head"`` or names.
    """

    def __init__(
        self,
        label: Sequence[float] | None = None,
        score: Score | None = None,
        features: bool = False,
        parameters: str | Sequence[str] = "all",
    ) -> None:
        objective = Objective("confounding", target=None if label is None else tuple(label))
        output: Literal["log", "log_and_features"] = "log_and_features" if features else "log"
        norms = NetworkGradientNorms(objective, parameters, output=output)
        if score is None:
            score = KNN(k=10, metric="euclidean", standardize=True)
        super().__init__(score, norms, name="confounding")


class ExGrad(Detector):
    """ExGrad (Igoe et al. 2022): the expected L1 norm of the last layer's cross-entropy gradient.

    The expectation is over labels drawn from the model's own softmax; see
    :class:`~grood_fast.scores.ExpectedGradientNorm`. Higher = more OOD.
    """

    def __init__(self) -> None:
        super().__init__(ExpectedGradientNorm(), HeadGradient("predicted"), name="exgrad")


class LowDimensionalGradient(Detector):
    """Low-dimensional gradient (Wu et al., arXiv 2310.17163): a score on projected gradients.

    The gradient of the energy on its principal components over the reference (or on the class
    averages), without ever being formed. The paper takes all parameters of the network; the last
    layer's part of it costs next to nothing, all of it somewhat more than a backward pass of the
    activations.

    Presets, any part of which another argument replaces:

    - ``"cifar"``: the paper's for CIFAR-10, 200 principal components of entries divided by their
      standard deviation, and the 5th neighbour.
    - ``"imagenet"``: the paper's for ImageNet, one direction a class, and the 10th neighbour;
      without that division, which would need all C directions formed.

    Args:
        n_components: K; 64 unless told.
        objective: whose gradient; the paper's ``"energy"``.
        kind: ``"pca"``, or ``"class_averages"``.
        score: on the coordinates; default :class:`~grood_fast.scores.KNN` with k = 5 on
            unit-length vectors. :class:`~grood_fast.scores.LinearProbe` is the paper's other way.
        parameters: ``"head"``: the weight of the last layer; ``"last_block"``: the last of the
            model's blocks and what follows; ``"all"``; or names of parameters or modules.
        preset: ``"cifar"`` or ``"imagenet"``.
        **options: further arguments of
            :class:`~grood_fast.representations.ProjectedHeadGradient` for ``"head"``, else of
            :class:`~grood_fast.representations.ProjectedNetworkGradient`.

    Raises:
        InputError: an unknown preset, or settings that do not go together.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar": {"n_components": 200, "whiten": True},
        "imagenet": {"kind": "class_averages", "k": 10},
    }

    def __init__(
        self,
        n_components: int | None = None,
        objective: Objective | str | None = None,
        kind: Literal["pca", "class_averages"] | None = None,
        score: Score | None = None,
        parameters: str | Sequence[str] = "head",
        preset: Literal["cifar", "imagenet"] | None = None,
        **options: Any,
    ) -> None:
        if preset not in (None, *self.PRESETS):
            raise InputError(f"unknown preset {preset!r}; known: {', '.join(self.PRESETS)}.")
        told = {"n_components": n_components, "objective": objective, "kind": kind}
        settings: dict[str, Any] = {
            "n_components": 64,
            "k": 5,
            **(self.PRESETS[preset] if preset else {}),
            **{name: value for name, value in told.items() if value is not None},
            **options,
        }
        nearest = KNN(k=settings.pop("k"))
        projected: Representation
        if parameters == "head":
            projected = ProjectedHeadGradient(**settings)
        else:
            projected = ProjectedNetworkGradient(parameters=parameters, **settings)
        super().__init__(nearest if score is None else score, projected, name="ldg")


class GradPCA(Detector):
    """GradPCA: the share of the last layer's gradient inside the span of the class means.

    −‖U(g − ḡ)‖ / ‖g − ḡ‖, with U the leading principal components of the class-mean gradients.
    With the summed logits for objective this is PCA on class-mean features, and gradients add
    nothing; with the maximal logit it differs. Higher = more OOD.

    Args:
        objective: ``"max_logit"`` or ``"logit_sum"``.
        kept_share: of the class means' variance, which decides the number of components.
        bias: whether the bias' gradient counts too.
    """

    def __init__(
        self, objective: Objective | str = "max_logit", kept_share: float = 0.99, bias: bool = False
    ) -> None:
        projected = ProjectedHeadGradient(
            objective,
            kind="class_means",
            n_components=None,
            kept_share=kept_share,
            bias=bias,
            output="norms",
        )
        super().__init__(SubspaceShare(), projected, name="gradpca")


class GradOrth(Detector):
    """GradOrth (Behpour et al., NeurIPS 2023): −‖dL/dW B Bᵀ‖ of the last layer.

    L is the cross-entropy to the uniform distribution, B the subspace that holds the reference's
    features; see :class:`~grood_fast.scores.ProjectedGradientNorm`. The uniform target and the
    share are our reading. Higher = more OOD.

    Args:
        kept_share: of the features' sum of squares, which decides the subspace's dimension.
    """

    def __init__(self, kept_share: float = 0.97) -> None:
        super().__init__(
            ProjectedGradientNorm(kept_share), HeadGradient("uniform"), name="gradorth"
        )


class GROOD(Detector):
    """GROOD (ElAraby et al., TMLR 2025): nearest neighbour of the gradient at an OOD prototype.

    The loss is the cross-entropy over negative distances to the class prototypes and one OOD
    prototype; its gradient with respect to the latter is compared with those of the reference
    samples that the classifier gets right. See
    :class:`~grood_fast.representations.PrototypeGradient`. Scores are in units of 2⁻⁴⁸; higher =
    more OOD.

    Args:
        source: where the OOD prototype comes from; the default needs no OOD data.
        score: ``"nearest"``: distance to the k-th nearest gradient; ``"cosine"``: the same between
            directions; ``"norm"``: the gradient's norm; or any score on vectors.
        k: of the nearest; the paper's 1.
        validation_ood: loader of OOD validation samples for ``source="validation"``.
        **options: further arguments of :class:`~grood_fast.representations.PrototypeGradient`.
    """

    def __init__(
        self,
        source: Source = "mixup",
        score: Literal["nearest", "cosine", "norm"] | Score = "nearest",
        k: int = 1,
        validation_ood: Iterable[Any] | None = None,
        **options: Any,
    ) -> None:
        if isinstance(score, str):
            if score not in ("nearest", "cosine", "norm"):
                raise InputError(f"score must be nearest, cosine, norm or a Score, got {score!r}.")
            score = {
                "nearest": KNN(k, "euclidean", centred=False),
                "cosine": KNN(k, "cosine"),
                "norm": Norm(),
            }[score]
        gradient = PrototypeGradient(source, validation_ood=validation_ood, **options)
        super().__init__(score, gradient, name="grood")


class GSC(Detector):
    """Gradient short-circuit (Gu, Qiao and Li, ICCV 2025): energy without the decisive features.

    The features whose gradient of the predicted logit is largest are set to zero; see
    :class:`~grood_fast.representations.ShortCircuitedLogits`, also for what that means on the
    head. The share, the score and the layer are our reading. Higher = more OOD.

    Args:
        layer: ``"head"``, a layer's name, or None for the end of the last stage but one.
        score: ``"energy"``, ``"msp"``, ``"energy_drop"`` or any score on logits.
        **options: further arguments of
            :class:`~grood_fast.representations.ShortCircuitedLogits`.
    """

    def __init__(
        self,
        layer: str | None = "head",
        score: Literal["energy", "msp", "energy_drop"] | Score = "energy",
        **options: Any,
    ) -> None:
        if isinstance(score, str):
            known: dict[str, type[Score]] = {
                "energy": Energy,
                "msp": MSP,
                "energy_drop": EnergyDrop,
            }
            if score not in known:
                raise InputError(f"score must be one of {', '.join(known)}, got {score!r}.")
            score = known[score]()
        super().__init__(score, ShortCircuitedLogits(layer, **options), name="gsc")


class JointDensity(Detector):
    """Negative log-density of activations at all depths and of gradient norms; higher = more OOD.

    Activations at the end of every stage, averaged over positions, beside logarithms of gradient
    norms, standardised, under one Gaussian a class. What is unusual at any depth counts, so that
    attacked and corrupted inputs, which leave the last layer unmoved, are noticed too.

    Args:
        gradients: a representation that gives vectors, or its name: what of the gradient stands
            beside the activations; None leaves it out.
        score: on the joint vector; default :class:`~grood_fast.scores.ClassGMM` on standardised
            coordinates, with one covariance for all classes where there are too many.
    """

    def __init__(
        self,
        gradients: Representation | str | None = "head_gradient_log_norms",
        score: Score | None = None,
    ) -> None:
        parts: list[Representation | str] = ["stage_activations"]
        if gradients is not None:
            parts.append(gradients)
        score = ClassGMM(shrinkage=1e-3, standardize=True, tied=None) if score is None else score
        super().__init__(score, Joint(parts), name="density")


class Fused(Detector):
    """Three kinds of evidence as one score: a relative distance, a logit score and a density.

    The mean, on the scale of samples held out of the reference, of the relative Mahalanobis
    distance, the energy and :class:`JointDensity`. For inputs of other classes and other data sets;
    where inputs may be attacked or corrupted, the density alone does better.

    Args:
        gradients: see :class:`JointDensity`.
        combine, scale: see :class:`~grood_fast.scores.Fusion`.
        members: detectors, names or scores in place of the three.
        held_out: share of the reference to hold out for the scale.
    """

    def __init__(
        self,
        gradients: Representation | str | None = "head_gradient_log_norms",
        combine: Combination = "mean",
        scale: Literal["moments", "ranks"] = "moments",
        members: Sequence[str | Score | Detector] | None = None,
        held_out: float = 0.05,
    ) -> None:
        if members is None:
            members = [RelativeMahalanobis(), Energy(), JointDensity(gradients)]
        made = list(by_unique_name(members).values())
        super().__init__(Fusion(combine, scale), DetectorScores(made, held_out), name="fused")


DETECTORS: dict[str, Callable[..., Score | Detector]] = {
    "msp": MSP,
    "maxlogit": MaxLogit,
    "energy": Energy,
    "gen": GEN,
    "knn": KNN,
    "mahalanobis": Mahalanobis,
    "rmd": RelativeMahalanobis,
    "gmm": ClassGMM,
    "vim": ViM,
    "gradnorm": GradNorm,
    "exgrad": ExGrad,
    "ldg": LowDimensionalGradient,
    "gradpca": GradPCA,
    "gradorth": GradOrth,
    "grood": GROOD,
    "gsc": GSC,
    "density": JointDensity,
    "fused": Fused,
    "confounding": ConfoundingLabel,
}
"""Registry name → what makes it; every name is also the detector's own."""


def detector(spec: str | Score | Detector, **options: Any) -> Detector:
    """A detector from its registry name, from a score, or itself.

    Args:
        spec: a name in ``DETECTORS``; a :class:`~grood_fast.scores.Score`, which becomes a detector
            on the representation it reads; or a detector.
        **options: arguments of the named detector or score.

    Raises:
        InputError: an unknown name, options it does not take, or options beside an object.
    """
    if isinstance(spec, str):
        maker = DETECTORS.get(spec)
        if maker is None:
            raise InputError(f"unknown detector {spec!r}; known: {', '.join(DETECTORS)}.")
        signature = inspect.signature(maker)
        try:
            signature.bind(**options)
        except TypeError as error:
            known = [f"{name}={p.default!r}" for name, p in signature.parameters.items()]
            raise InputError(
                f"{spec}: {error}; its options: {', '.join(known) or 'none'}."
            ) from None
        spec = maker(**options)
    elif options:
        raise InputError(
            f"options {sorted(options)} go with a detector's name, not with an object that has "
            "been made already."
        )
    if isinstance(spec, Detector):
        return spec
    if isinstance(spec, Score):
        return Detector(spec)
    raise InputError(
        f"expected a detector's name, a score or a detector, got {type(spec).__name__}; names: "
        f"{', '.join(DETECTORS)}."
    )


def by_unique_name(specs: Iterable[str | Score | Detector]) -> dict[str, Detector]:
    """Detectors by name, in order; a name that comes again gets a number: knn, knn-2, knn-3.

    A detector made here is called so itself; one that was handed in keeps its own name.
    """
    named: dict[str, Detector] = {}
    for spec in specs:
        made = detector(spec)
        name, number = made.name, 1
        while name in named:
            number += 1
            name = f"{made.name}-{number}"
        if made is not spec:
            made.name = name
        named[name] = made
    return named


def with_twins(detectors: Mapping[str, Detector]) -> dict[str, Detector]:
    """The same, each gradient detector followed by its twin on the activations alone.

    Twins that are among them already are not made again.
    """
    beside: dict[str, Detector] = {}
    for name, known in detectors.items():
        beside[name] = known
        twin = known.activation_twin()
        if twin is not None and f"{name}-twin" not in detectors:
            twin.name = f"{name}-twin"
            beside[twin.name] = twin
    return beside
