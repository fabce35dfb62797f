"""The named detectors: each a representation and a score, with the paper they come from.

A named detector differs from :class:`~grood_fast.detectors.base.Detector` in nothing but its
constructor.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, cast

from grood_fast.detectors.base import Detector
from grood_fast.errors import InputError
from grood_fast.objectives import Objective
from grood_fast.representations import (
    HeadGradient,
    NetworkGradientNorms,
    ProjectedHeadGradient,
    ProjectedNetworkGradient,
    Representation,
)
from grood_fast.scores import (
    GEN,
    KNN,
    MSP,
    ClassGMM,
    Energy,
    ExpectedGradientNorm,
    GradientNorm,
    Mahalanobis,
    MaxLogit,
    NetworkGradientNorm,
    RelativeMahalanobis,
    Score,
    SubspaceShare,
    ViM,
)


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

    Args:
        n_components: K; the paper's 200 for CIFAR-10.
        objective: whose gradient; the paper's ``"energy"``.
        kind: ``"pca"``, or ``"class_averages"``, the paper's choice for ImageNet.
        score: on the coordinates; default :class:`~grood_fast.scores.KNN` with the paper's k = 5 on
            unit-length vectors.
        parameters: ``"head"``: the weight of the last layer; ``"last_block"``: the last of the
            model's blocks and what follows; ``"all"``; or names of parameters or modules.
        **options: further arguments of
            :class:`~grood_fast.representations.ProjectedHeadGradient` for ``"head"``, else of
            :class:`~grood_fast.representations.ProjectedNetworkGradient`, such as ``whiten=True``
            after the paper's normalisation.
    """

    def __init__(
        self,
        n_components: int = 64,
        objective: Objective | str = "energy",
        kind: Literal["pca", "class_averages"] = "pca",
        score: Score | None = None,
        parameters: str | Sequence[str] = "head",
        **options: Any,
    ) -> None:
        projected: Representation
        if parameters == "head":
            projected = ProjectedHeadGradient(
                objective, kind=kind, n_components=n_components, **options
            )
        else:
            projected = ProjectedNetworkGradient(
                objective, parameters, kind=kind, n_components=n_components, **options
            )
        super().__init__(KNN(k=5) if score is None else score, projected, name="ldg")


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
