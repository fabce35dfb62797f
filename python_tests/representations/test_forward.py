"""What the forward pass leaves behind, unchanged."""

from __future__ import annotations

import pytest
import toys

from grood_fast.detectors import Detector
from grood_fast.errors import HeadNotFoundError
from grood_fast.representations import (
    REPRESENTATIONS,
    Logits,
    PenultimateFeatures,
    Representation,
    WholeForward,
)
from grood_fast.scores import SCORES, Energy


def test_they_hand_on_what_the_pass_left() -> None:
    signals = toys.signals_of(toys.Net(), toys.samples(4))
    assert Logits()(signals) is signals.statistics
    assert PenultimateFeatures()(signals) is signals.penultimate
    assert WholeForward()(signals) is signals


def test_they_say_what_they_need() -> None:
    assert Logits.needs == frozenset()
    assert PenultimateFeatures.needs == WholeForward.needs == {"features"}
    without = toys.signals_of(toys.headless(), toys.samples(4), features=False)
    assert Logits()(without).logits is without.logits
    with pytest.raises(HeadNotFoundError, match="no penultimate features"):
        PenultimateFeatures()(without)


REQUIRED = {"joint": ([Logits()],), "detector_scores": ([Detector(Energy())],)}


def test_the_registry() -> None:
    for name, kind in REPRESENTATIONS.items():
        assert kind.name == name
        assert issubclass(kind, Representation)
        representation = kind(*REQUIRED.get(name, ()))
        assert representation.is_fitted is not representation.needs_fit
        again = representation.fresh()
        assert type(again) is kind
        assert again.config() == representation.config()
    assert {kind.representation for kind in SCORES.values()} <= REPRESENTATIONS.keys()
