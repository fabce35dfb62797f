"""Scores on logits against their papers' formulas in float64, and pytorch-ood."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peers import import_pytorch_ood
from torch import Tensor

from grood_fast.errors import InputError
from grood_fast.scores import GEN, MSP, SCORES, Energy, MaxLogit, Score
from grood_fast.signals import LogitStatistics

NAN, INF = math.nan, math.inf


def logits_of(
    count: int = 40, classes: int = 7, spread: float = 3.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (spread * torch.randn(count, classes, generator=generator)).to(dtype)


def msp(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The sum of the probabilities but the largest, which is 1 less it without its rounding."""
    p = (logits.double() / temperature).softmax(1).sort(dim=1).values
    return p[:, :-1].sum(1)


def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    rows = (logits.double() / temperature).tolist()
    return torch.tensor(
        [-temperature * (max(f) + math.log(sum(math.exp(v - max(f)) for v in f))) for f in rows],
        dtype=torch.float64,
    )


def gen(logits: Tensor, gamma: float = 0.1, top: int = 100) -> Tensor:
    """One sample and class at a time; 1 − p as the sum of the other probabilities."""
    totals = []
    for p in logits.double().softmax(1).tolist():
        order = sorted(range(len(p)), key=lambda c: -p[c])[:top]
        others = [math.fsum(p[d] for d in range(len(p)) if d != c) for c in order]
        terms = zip(order, others, strict=True)
        totals.append(math.fsum(p[c] ** gamma * q**gamma for c, q in terms))
    return torch.tensor(totals, dtype=torch.float64)


CASES: list[tuple[Score, Callable[[Tensor], Tensor]]] = [
    (MSP(), msp),
    (MSP(2.5), lambda f: msp(f, 2.5)),
    (MSP(0.2), lambda f: msp(f, 0.2)),
    (MaxLogit(), lambda f: -f.double().amax(1)),
    (Energy(), energy),
    (Energy(10.0), lambda f: energy(f, 10.0)),
    (Energy(0.2), lambda f: energy(f, 0.2)),
    (GEN(), gen),
    (GEN(0.5), lambda f: gen(f, 0.5)),
    (GEN(0.1, 3), lambda f: gen(f, 0.1, 3)),
    (GEN(0.9, 1), lambda f: gen(f, 0.9, 1)),
]
every_case = pytest.mark.parametrize(
    ("score", "formula"), CASES, ids=[repr(score) for score, _ in CASES]
)
ALL = [MSP(), MSP(2.0), MaxLogit(), Energy(), GEN(), GEN(0.1, 2)]
every_score = pytest.mark.parametrize("score", ALL, ids=repr)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_equals_the_formula(score: Score, formula: Any, dtype: torch.dtype) -> None:
    logits = logits_of(dtype=dtype)
    actual = score(logits)
    exact = dtype == torch.float64
    assert actual.dtype == (torch.float64 if exact else torch.float32)
    assert actual.shape == (40,)
    tolerance = 1e-12 if exact else 3e-6
    torch.testing.assert_close(actual.double(), formula(logits), rtol=tolerance, atol=tolerance)


@every_case
@pytest.mark.parametrize("classes", [1, 2, 100, 101, 1000])
def test_any_number_of_classes(score: Score, formula: Any, classes: int) -> None:
    logits = logits_of(8, classes)
    torch.testing.assert_close(score(logits).double(), formula(logits), rtol=1e-5, atol=1e-5)


@every_case
@pytest.mark.parametrize("spread", [1e2, 1e4, 1e6])
def test_huge_logits(score: Score, formula: Any, spread: float) -> None:
    logits = logits_of(spread=spread)
    logits[0, :2] = logits[0].max() + 1  # a tie of the largest
    atol = 1e-5
    if isinstance(score, GEN):
        # The logarithm of p comes from a log-sum-exp that float32 rounds, and 1 − p below float32's
        # smallest number counts as 0.
        atol += 0.2 * 6e-8 * spread + 1.4e-45**score.gamma
    torch.testing.assert_close(score(logits).double(), formula(logits), rtol=1e-5, atol=atol)


@pytest.mark.parametrize("score", [MSP(), GEN(), GEN(0.1, 2)], ids=repr)
def test_very_confident_samples_stay_apart(score: Score) -> None:
    """1 − p rounds to 0 in float32 beyond 17 and in float64 beyond 37."""
    confidence = torch.arange(5.0, 80.0, 0.5)
    logits = torch.zeros(len(confidence), 4)
    logits[:, 2] = confidence
    actual = score(logits)
    assert (actual.diff() < 0).all()
    assert (actual > 0).all()
    formula = msp if isinstance(score, MSP) else lambda f: gen(f, score.gamma, score.top)
    torch.testing.assert_close(actual.double(), formula(logits), rtol=2e-5, atol=0)


@every_score
def test_unsure_is_higher_than_sure(score: Score) -> None:
    unsure, sure = score(torch.tensor([[0.1, 0, 0.2, 0], [9, 0, 0.2, 0]]))
    assert unsure > sure


def test_the_range_of_msp() -> None:
    assert float(MSP()(torch.zeros(1, 8))) == 1 - 1 / 8
    assert float(MSP()(torch.tensor([[1e4, 0.0, 0.0]]))) == 0


def test_one_class_is_always_certain() -> None:
    logits = torch.tensor([[-3.0], [0.0], [200.0]])
    assert MSP()(logits).tolist() == [0, 0, 0]
    assert GEN()(logits).tolist() == [0, 0, 0]
    assert Energy()(logits).tolist() == [3, 0, -200]
    assert MaxLogit()(logits).tolist() == [3, 0, -200]


@every_score
def test_statistics_and_logits_give_the_same(score: Score) -> None:
    logits = logits_of()
    before = logits.clone()
    statistics = LogitStatistics(logits)
    assert torch.equal(score(statistics), score(logits))
    assert torch.equal(score(statistics), score(logits)), "also a second time"
    assert torch.equal(logits, before)
    assert score(logits[:0]).shape == (0,)


@every_score
def test_nan_and_masked_classes(score: Score) -> None:
    logits = torch.tensor([[NAN, 1, 2], [1, 2, NAN], [1.0, 2, 3], [1, -INF, 3]])
    actual = score(logits)
    assert actual.isnan().tolist() == [True, True, False, False]
    if not (isinstance(score, GEN) and score.top == 2):
        without = score(torch.tensor([[1.0, 3.0]]))
        torch.testing.assert_close(actual[3:], without)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_equals_pytorch_ood(temperature: float) -> None:
    import_pytorch_ood()
    from pytorch_ood import detector

    logits = logits_of(200, 10)
    peer = detector.MaxSoftmax(None, t=temperature).predict_logits(logits)
    torch.testing.assert_close(MSP(temperature)(logits) - 1, peer, rtol=0, atol=1e-6)
    peer = detector.EnergyBased(None, t=temperature).predict_logits(logits)
    torch.testing.assert_close(Energy(temperature)(logits), peer)
    peer = detector.MaxLogit(None).predict_logits(logits)
    assert torch.equal(MaxLogit()(logits), peer)


@pytest.mark.parametrize(("gamma", "top"), [(0.1, 100), (0.1, 4), (0.7, 10)])
def test_gen_is_pytorch_oods_times_the_classes_it_counts(gamma: float, top: int) -> None:
    """The paper sums over the classes, pytorch-ood averages; the sign is the same."""
    import_pytorch_ood()
    from pytorch_ood import detector

    logits = logits_of(200, 10, spread=1.5)  # inside the peer's clamp at 1e-7
    peer = detector.GEN(None, gamma=gamma, M=top).predict_logits(logits)
    torch.testing.assert_close(GEN(gamma, top)(logits), peer * min(top, 10), rtol=1e-5, atol=1e-6)


@every_score
def test_configuration(score: Score) -> None:
    assert not score.needs_fit
    assert score.is_fitted
    assert score.representation == "logits"
    assert SCORES[score.name] is type(score)
    again = score.fresh()
    assert again is not score
    assert again.config() == score.config()
    assert repr(again) == repr(score)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MSP(0), "temperature must be positive and finite, got 0"),
        (lambda: MSP(float("inf")), "temperature must be positive and finite"),
        (lambda: Energy(-1), "temperature must be positive"),
        (lambda: Energy(NAN), "temperature must be positive"),
        (lambda: GEN(0), "gamma must lie in"),
        (lambda: GEN(1.0), "gamma must lie in"),
        (lambda: GEN(NAN), "gamma must lie in"),
        (lambda: GEN(0.1, 0), "top be positive"),
    ],
)
def test_refuses(make: Callable[[], Score], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
