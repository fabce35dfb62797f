"""The registry: every name makes its detector, and anything else is refused with the names."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import toys

from grood_fast.detectors import DETECTORS, Detector, ExGrad, GradNorm, by_unique_name, detector
from grood_fast.errors import InputError
from grood_fast.representations import HeadGradient
from grood_fast.scores import KNN, MSP, Energy, GradientNorm, Mahalanobis

NEEDS_REFERENCE = {
    *("confounding", "knn", "mahalanobis", "rmd", "gmm", "vim"),
    *("ldg", "gradpca", "gradorth", "grood", "density", "fused"),
}


@pytest.mark.parametrize("name", DETECTORS)
def test_every_name_makes_the_detector_of_that_name(name: str) -> None:
    made = detector(name)
    assert isinstance(made, Detector)
    assert made.name == name
    assert made.needs_fit == (name in NEEDS_REFERENCE)
    assert made.is_fitted != made.needs_fit
    assert made is not detector(name)
    assert name in repr(made)


def test_options_reach_the_detector() -> None:
    assert detector("knn", k=7, metric="euclidean").score_function.config()["k"] == 7
    made = detector("gradnorm", norm="l2", temperature=2.0, bias=True)
    expected = GradNorm("l2", 2.0, True)
    assert made.score_function.config() == expected.score_function.config()
    assert made.representation.config() == expected.representation.config()
    assert made.representation.config() == {
        "objective": {"name": "uniform", "temperature": 2.0},
        "bias": True,
    }


@pytest.mark.parametrize("name", DETECTORS)
def test_every_option_a_name_takes_has_a_default(name: str) -> None:
    parameters = inspect.signature(DETECTORS[name]).parameters
    assert all(
        p.default is not inspect.Parameter.empty or p.kind is inspect.Parameter.VAR_KEYWORD
        for p in parameters.values()
    )


def test_scores_and_detectors() -> None:
    score = KNN(3)
    made = detector(score)
    assert made.score_function is score
    assert made.name == "knn"
    assert made.representation.name == "features"
    assert detector(made) is made
    assert detector(GradientNorm("l2")).representation.config() == HeadGradient().config()


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("knm", {}, "unknown detector 'knm'; known: msp, maxlogit, energy"),
        ("", {}, "unknown detector ''"),
        ("knn", {"neighbours": 3}, "knn: .*'neighbours'; its options: k=50, metric='cosine'"),
        ("exgrad", {"norm": "l2"}, "exgrad: .*'norm'; its options: none"),
        ("knn", {"k": 0}, "k must be at least 1"),
        (KNN(3), {"k": 5}, r"options \['k'\] go with a detector's name"),
        (7, {}, "expected a detector's name, a score or a detector, got int; names: msp"),
        (None, {}, "got NoneType"),
        (KNN, {}, "expected a detector's name"),
    ],
)
def test_refuses(spec: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        detector(spec, **options)


def test_names_are_unique_and_in_order() -> None:
    mine = GradNorm()
    named = by_unique_name(["knn", KNN(3), mine, "gradnorm", KNN(5), "energy"])
    assert list(named) == ["knn", "knn-2", "gradnorm", "gradnorm-2", "knn-3", "energy"]
    assert named["gradnorm"] is mine
    assert named["knn-2"].score_function.k == 3
    assert [made.name for made in named.values()] == list(named)
    assert by_unique_name([]) == {}


def test_a_detector_that_was_handed_in_keeps_its_own_name() -> None:
    first, second = GradNorm(), GradNorm("l2")
    named = by_unique_name([first, second, first])
    assert list(named) == ["gradnorm", "gradnorm-2", "gradnorm-3"]
    assert second.name == first.name == "gradnorm"
    assert named["gradnorm-3"] is first


def test_names_that_look_numbered_do_not_clash() -> None:
    odd = Detector(Energy(), name="knn-2")
    assert list(by_unique_name([odd, "knn", "knn"])) == ["knn-2", "knn", "knn-3"]


def test_a_detector_is_its_representation_and_score_and_no_more() -> None:
    signals = toys.signals_of(toys.Net(), toys.samples(8))
    by_hand = Detector(GradientNorm("l2"), HeadGradient("uniform"), name="gradnorm")
    assert torch.equal(by_hand(signals), GradNorm("l2")(signals))
    assert repr(ExGrad()).startswith("ExGrad(ExpectedGradientNorm()")
    assert torch.equal(Detector(MSP())(signals), MSP()(signals.logits))
    assert Detector(Mahalanobis(), name="mine").name == "mine"
    with pytest.raises(InputError, match=r"needs a Score such as grood_fast.KNN\(\), got str"):
        Detector("knn")  # type: ignore[arg-type]
