"""The metrics against scikit-learn, pytorch-ood and brute force, and the bootstrap's coverage."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import import_pytorch_ood
from sklearn.metrics import (
    auc,
    average_precision_score,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)

from grood_fast.errors import InputError
from grood_fast.evaluation import metrics

TWO_SET_METRICS = {
    name: getattr(metrics, name)
    for name in (
        "auroc",
        "aupr_out",
        "aupr_in",
        "average_precision_out",
        "average_precision_in",
        "fpr_at_95_ood_recall",
        "fpr_at_95_id_recall",
    )
}
INTERVAL_METRICS = {
    "auroc",
    "aupr_out",
    "aupr_in",
    "fpr_at_95_ood_recall",
    "fpr_at_95_id_recall",
}

# Few distinct values, so that ties within and between the sets are the rule.
tied_scores = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=30)
any_scores = st.lists(
    st.floats(allow_nan=False, allow_infinity=True, width=32), min_size=1, max_size=30
)


def _score_sets() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(7)
    normal_id, normal_ood = generator.normal(size=1003), generator.normal(0.8, 1.5, size=517)
    infinite = normal_id.copy()
    infinite[:40], infinite[40:60] = np.inf, -np.inf
    return {
        "continuous": (normal_id, normal_ood),
        "rounded": (normal_id.round(1), normal_ood.round(1)),
        "two values": ((normal_id > 0).astype(float), (normal_ood > 0).astype(float)),
        "all tied": (np.zeros(31), np.zeros(57)),
        "separated": (normal_id - 100, normal_ood + 100),
        "wrong way round": (normal_id + 100, normal_ood - 100),
        "infinite": (infinite, np.append(normal_ood, [np.inf, np.inf, -np.inf])),
        "signed zeros": (np.array([0.0, -0.0, 1.0]), np.array([-0.0, 0.0])),
        "one sample each": (np.array([0.5]), np.array([0.25])),
        # Recall reaches 19/20 exactly: whether 0.95 counts as reached must not hang on rounding.
        "multiples of twenty": (generator.normal(size=20), generator.normal(size=60)),
    }


SCORE_SETS = _score_sets()
every_score_set = pytest.mark.parametrize(
    ("id_scores", "ood_scores"), SCORE_SETS.values(), ids=SCORE_SETS.keys()
)


def joined(id_scores: np.ndarray, ood_scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One vector of scores and one that is 1 for OOD: scikit-learn's form."""
    is_ood = np.r_[np.zeros(len(id_scores)), np.ones(len(ood_scores))]
    return is_ood, np.r_[id_scores, ood_scores]


def brute_force_auroc(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
    higher = ood_scores[:, None] > id_scores[None, :]
    tied = ood_scores[:, None] == id_scores[None, :]
    return float((higher + 0.5 * tied).mean())


def brute_force_fpr(positives: np.ndarray, negatives: np.ndarray, recall: float) -> float:
    """Largest threshold with enough positives at or above it; the negatives at or above it."""
    threshold = max(t for t in positives if np.mean(positives >= t) >= recall)
    return float(np.mean(negatives >= threshold))


def assert_equals_pytorch_ood(id_scores: np.ndarray, ood_scores: np.ndarray) -> None:
    import_pytorch_ood()
    from pytorch_ood.metrics import functional

    is_ood, scores = joined(id_scores, ood_scores)
    scores, labels = torch.from_numpy(scores), torch.from_numpy(-is_ood).long()
    expected = {
        "auroc": functional.auroc(scores, labels),
        "aupr_out": functional.aupr(scores, labels, positive="ood"),
        "aupr_in": functional.aupr(scores, labels, positive="id"),
        "fpr_at_95_ood_recall": functional.fpr_at_tpr(scores, labels, tpr=0.95),
    }
    for name, value in expected.items():
        got = TWO_SET_METRICS[name](id_scores, ood_scores)
        assert got == pytest.approx(value.item(), rel=0, abs=1e-9), name
    for recall in (0.0, 0.1, 0.5, 0.8, 0.99, 1.0):
        value = functional.fpr_at_tpr(scores, labels, tpr=recall).item()
        assert metrics.fpr_at_recall(id_scores, ood_scores, recall) == pytest.approx(
            value, abs=1e-9
        )


@every_score_set
def test_equals_pytorch_ood(id_scores: np.ndarray, ood_scores: np.ndarray) -> None:
    assert_equals_pytorch_ood(id_scores, ood_scores)


@settings(deadline=None)
@given(tied_scores, tied_scores)
def test_equals_pytorch_ood_under_ties(id_scores: list[float], ood_scores: list[float]) -> None:
    assert_equals_pytorch_ood(np.array(id_scores), np.array(ood_scores))


@every_score_set
def test_equals_scikit_learn(id_scores: np.ndarray, ood_scores: np.ndarray) -> None:
    is_ood, scores = joined(id_scores, ood_scores)
    # scikit-learn refuses infinities: ranks carry the same information.
    ranks = np.unique(scores, return_inverse=True)[1].astype(float)

    def pr_area(positive: np.ndarray, ranks: np.ndarray) -> float:
        precision, recall, _ = precision_recall_curve(positive, ranks)
        return auc(recall, precision)

    def fpr_at_95(positive: np.ndarray, ranks: np.ndarray) -> float:
        fpr, tpr, _ = roc_curve(positive, ranks, drop_intermediate=False)
        return fpr[np.argmax(tpr >= 0.95)]

    expected = {
        "auroc": roc_auc_score(is_ood, ranks),
        "aupr_out": pr_area(is_ood, ranks),
        "aupr_in": pr_area(1 - is_ood, -ranks),
        "average_precision_out": average_precision_score(is_ood, ranks),
        "average_precision_in": average_precision_score(1 - is_ood, -ranks),
        "fpr_at_95_ood_recall": fpr_at_95(is_ood, ranks),
        "fpr_at_95_id_recall": fpr_at_95(1 - is_ood, -ranks),
    }
    got = {name: metric(id_scores, ood_scores) for name, metric in TWO_SET_METRICS.items()}
    assert got == pytest.approx(expected, rel=0, abs=1e-12)


@every_score_set
def test_brute_force(id_scores: np.ndarray, ood_scores: np.ndarray) -> None:
    assert metrics.auroc(id_scores, ood_scores) == pytest.approx(
        brute_force_auroc(id_scores, ood_scores), abs=1e-12
    )
    for recall in (0.05, 0.5, 0.95, 1.0):
        assert metrics.fpr_at_recall(id_scores, ood_scores, recall) == brute_force_fpr(
            ood_scores, id_scores, recall
        )
        assert metrics.fpr_at_recall(
            id_scores, ood_scores, recall, positive="id"
        ) == brute_force_fpr(-id_scores, -ood_scores, recall)


def test_fpr_of_ties_is_counted_against_the_detector() -> None:
    # 95 % of the OOD samples are only reached at 1.0, where two of the ID samples are flagged too.
    assert metrics.fpr_at_95_ood_recall([0.0, 0.0, 1.0, 1.0], [1.0, 2.0]) == 0.5
    assert metrics.fpr_at_95_id_recall([0.0, 0.0, 1.0, 1.0], [1.0, 2.0]) == 0.5


def test_the_two_fpr95s_are_not_the_same_thing() -> None:
    """15 % of the OOD samples look very in-distribution, which one of the two punishes more."""
    generator = np.random.default_rng(0)
    id_scores = generator.normal(size=10_000)
    ood_scores = np.r_[
        generator.normal(-1.5, 0.5, size=1_500), generator.normal(1.6, 1, size=8_500)
    ]
    at_ood_recall = metrics.fpr_at_95_ood_recall(id_scores, ood_scores)
    at_id_recall = metrics.fpr_at_95_id_recall(id_scores, ood_scores)
    assert at_ood_recall > 0.9
    assert at_id_recall < 0.65
    assert metrics.fpr_at_recall(id_scores, ood_scores) == at_ood_recall
    assert metrics.fpr_at_recall(id_scores, ood_scores, positive="id") == at_id_recall


def test_scores_without_information() -> None:
    assert metrics.auroc(np.ones(7), np.ones(3)) == 0.5
    assert metrics.aupr_out(np.ones(7), np.ones(3)) == pytest.approx((1 + 0.3) / 2)
    assert metrics.average_precision_out(np.ones(7), np.ones(3)) == pytest.approx(0.3)
    assert metrics.fpr_at_95_ood_recall(np.ones(7), np.ones(3)) == 1
    assert metrics.fpr_at_95_id_recall(np.ones(7), np.ones(3)) == 1


def test_infinite_scores_are_ordered() -> None:
    assert metrics.auroc([-math.inf, 0.0], [1.0, math.inf]) == 1
    assert metrics.auroc([math.inf], [-math.inf]) == 0
    assert metrics.auroc([math.inf], [math.inf]) == 0.5


@settings(deadline=None)
@given(any_scores, any_scores)
def test_a_monotone_transform_changes_nothing(
    id_scores: list[float], ood_scores: list[float]
) -> None:
    def stretched(scores: list[float]) -> np.ndarray:
        return np.cbrt(2 * np.array(scores))  # in float64 no two float32 values become equal

    for name, metric in TWO_SET_METRICS.items():
        assert metric(stretched(id_scores), stretched(ood_scores)) == metric(
            id_scores, ood_scores
        ), name


@settings(deadline=None)
@given(any_scores, any_scores)
def test_swapping_the_sets_mirrors(id_scores: list[float], ood_scores: list[float]) -> None:
    assert metrics.auroc(ood_scores, id_scores) == pytest.approx(
        1 - metrics.auroc(id_scores, ood_scores), abs=1e-12
    )
    negated_id, negated_ood = -np.array(id_scores), -np.array(ood_scores)
    assert metrics.aupr_in(id_scores, ood_scores) == metrics.aupr_out(negated_ood, negated_id)
    assert metrics.fpr_at_95_id_recall(id_scores, ood_scores) == metrics.fpr_at_95_ood_recall(
        negated_ood, negated_id
    )


@settings(deadline=None)
@given(tied_scores, tied_scores, st.integers(2, 5))
def test_metrics_do_not_depend_on_order_or_repetition_of_everything(
    id_scores: list[float], ood_scores: list[float], times: int
) -> None:
    for name, metric in TWO_SET_METRICS.items():
        expected = metric(id_scores, ood_scores)
        assert metric(id_scores[::-1], ood_scores[::-1]) == expected, name
        assert metric(id_scores * times, ood_scores * times) == pytest.approx(expected), name


@settings(deadline=None)
@given(tied_scores, tied_scores, st.data())
def test_weighted_equals_repeated(
    id_scores: list[float], ood_scores: list[float], data: st.DataObject
) -> None:
    def draws(size: int) -> np.ndarray:
        indices = st.lists(st.integers(0, size - 1), min_size=1, max_size=2 * size)
        return np.array(data.draw(indices))

    id_drawn, ood_drawn = draws(len(id_scores)), draws(len(ood_scores))
    tally = metrics._Ranking(id_scores, ood_scores).tally(id_drawn, ood_drawn)
    weighted = metrics._measure(tally, list(TWO_SET_METRICS))
    repeated = [
        metric(np.array(id_scores)[id_drawn], np.array(ood_scores)[ood_drawn])
        for metric in TWO_SET_METRICS.values()
    ]
    # Scores that were not drawn add zeros to the sums, which may change how NumPy groups them.
    assert weighted == pytest.approx(repeated, rel=0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_of_any_float_type(dtype: torch.dtype) -> None:
    id_scores = torch.randn(50, generator=torch.Generator().manual_seed(0)).to(dtype)
    ood_scores = (id_scores + 0.5).requires_grad_()
    expected = brute_force_auroc(id_scores.double().numpy(), ood_scores.detach().double().numpy())
    assert metrics.auroc(id_scores, ood_scores) == pytest.approx(expected, abs=1e-12)
    assert ood_scores.requires_grad


def test_lists_integers_strides_and_mixtures() -> None:
    expected = metrics.auroc([1.0, 2.0, 2.0], [2.0, 3.0])
    assert metrics.auroc((1, 2, 2), torch.tensor([2, 3])) == expected
    assert metrics.auroc(np.array([1, 9, 2, 9, 2])[::2], range(2, 4)) == expected
    assert metrics.auroc([False], [True]) == 1
    assert type(metrics.auroc([1], [2])) is float


def test_inputs_are_left_alone() -> None:
    id_scores, ood_scores = np.array([3.0, 1.0, 2.0]), torch.tensor([2.0, 0.0])
    metrics.evaluate_scores(id_scores, ood_scores, resamples=3)
    assert id_scores.tolist() == [3.0, 1.0, 2.0]
    assert ood_scores.tolist() == [2.0, 0.0]


bad_scores = pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([0.0, math.nan, 1.0, math.nan], "2 NaN among its 4"),
        (torch.tensor([math.nan], dtype=torch.bfloat16), "1 NaN among its 1"),
        ([], "is empty"),
        (torch.empty(0), "is empty"),
        (np.zeros((3, 1)), r"shape \(3, 1\)"),
        (1.0, r"shape \(\)"),
        ([[1.0], [1.0, 2.0]], "cannot be read as an array"),
        (["high", "low"], "expected real numbers"),
        ([1 + 2j], "expected real numbers"),
        (torch.tensor([1 + 2j]), "expected real numbers"),
    ],
)


@bad_scores
@pytest.mark.parametrize("metric", [*TWO_SET_METRICS.values(), metrics.evaluate_scores])
def test_bad_scores(metric, bad, message: str) -> None:
    with pytest.raises(InputError, match=f"^id_scores .*{message}"):
        metric(bad, [1.0, 2.0])
    with pytest.raises(InputError, match=f"^ood_scores .*{message}"):
        metric([1.0, 2.0], bad)


@bad_scores
def test_bad_scores_of_a_pair(bad, message: str) -> None:
    good = [1.0, 2.0]
    for position, name in enumerate(("id_a", "ood_a", "id_b", "ood_b")):
        arguments = [good] * position + [bad] + [good] * (3 - position)
        with pytest.raises(InputError, match=f"^{name} .*{message}"):
            metrics.paired_difference(*arguments)


@pytest.mark.parametrize("recall", [-0.1, 1.01, math.nan, 95])
def test_bad_recall(recall: float) -> None:
    with pytest.raises(InputError, match="recall is"):
        metrics.fpr_at_recall([0.0], [1.0], recall)


def test_bad_options() -> None:
    with pytest.raises(InputError, match="positive is 'OOD'"):
        metrics.fpr_at_recall([0.0], [1.0], positive="OOD")
    with pytest.raises(InputError, match="confidence is 95"):
        metrics.evaluate_scores([0.0], [1.0], confidence=95)
    with pytest.raises(InputError, match="resamples is 0"):
        metrics.evaluate_scores([0.0], [1.0], resamples=0)
    with pytest.raises(InputError, match="no metric 'AUROC'; expected one of auroc, "):
        metrics.paired_difference([0.0], [1.0], [0.0], [1.0], "AUROC")
    with pytest.raises(InputError, match="same samples"):
        metrics.paired_difference([0.0], [1.0], [0.0], [1.0, 2.0])


def test_accuracy() -> None:
    import_pytorch_ood()
    from pytorch_ood.metrics import functional

    predictions = torch.tensor([0, 1, 2, 2, 1, 0])
    labels = torch.tensor([0, 1, 1, 2, -1, -7])
    assert metrics.accuracy(predictions, labels) == 0.75
    assert metrics.accuracy(predictions, labels) == functional.accuracy(predictions, labels).item()
    assert metrics.accuracy([1], [1]) == 1
    with pytest.raises(InputError, match="6 predictions but 5 labels"):
        metrics.accuracy(predictions, labels[1:])
    with pytest.raises(InputError, match="Every label is negative"):
        metrics.accuracy([1, 2], [-1, -1])
    with pytest.raises(InputError, match=r"predictions has shape \(6, 3\)"):
        metrics.accuracy(torch.zeros(6, 3), labels)


@every_score_set
def test_evaluate_scores_has_the_same_points(id_scores: np.ndarray, ood_scores: np.ndarray) -> None:
    result = metrics.evaluate_scores(id_scores, ood_scores, resamples=20)
    assert set(result.intervals) == INTERVAL_METRICS
    for name, (low, high) in result.intervals.items():
        assert getattr(result, name) == TWO_SET_METRICS[name](id_scores, ood_scores), name
        assert 0 <= low <= high <= 1, name


def test_intervals_are_percentiles_of_repeated_samples() -> None:
    """The bootstrap done the slow way: draw, index, call the public function."""
    generator = np.random.default_rng(5)
    id_scores, ood_scores = generator.normal(size=61).round(1), generator.normal(1, 1, 43).round(1)
    resamples, seed, confidence = 40, 3, 0.8
    result = metrics.evaluate_scores(
        id_scores, ood_scores, resamples=resamples, seed=seed, confidence=confidence
    )
    id_draws, ood_draws = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(2))
    resampled = [
        (id_scores[id_draws.integers(61, size=61)], ood_scores[ood_draws.integers(43, size=43)])
        for _ in range(resamples)
    ]
    assert result.confidence == confidence
    for name, interval in result.intervals.items():
        replicates = [TWO_SET_METRICS[name](*sets) for sets in resampled]
        assert interval == pytest.approx(tuple(np.quantile(replicates, [0.1, 0.9])), abs=1e-12)


def test_the_seed_decides_the_draws() -> None:
    generator = np.random.default_rng(1)
    id_scores, ood_scores = generator.normal(size=200), generator.normal(1, 1, 150)
    first = metrics.evaluate_scores(id_scores, ood_scores, seed=4)
    assert metrics.evaluate_scores(id_scores, ood_scores, seed=4) == first
    assert metrics.evaluate_scores(id_scores, ood_scores, seed=5).intervals != first.intervals
    assert metrics.evaluate_scores(2 * id_scores, 2 * ood_scores, seed=4) == first


def test_the_id_draws_do_not_depend_on_the_ood_set() -> None:
    """With the OOD scores all equal, only the ID draws can move the AUROC."""
    id_scores = np.random.default_rng(2).normal(size=100)
    few, many = (metrics.evaluate_scores(id_scores, np.zeros(size)) for size in (10, 1000))
    assert few.intervals["auroc"] == many.intervals["auroc"]
    assert few.intervals["auroc"][0] < few.intervals["auroc"][1]


def test_intervals_widen_with_confidence_and_narrow_with_samples() -> None:
    generator = np.random.default_rng(3)
    id_scores, ood_scores = generator.normal(size=4000), generator.normal(1, 1, 4000)

    def width(samples: int, confidence: float) -> float:
        result = metrics.evaluate_scores(
            id_scores[:samples], ood_scores[:samples], confidence=confidence
        )
        low, high = result.intervals["auroc"]
        return high - low

    assert width(4000, 0.5) < width(4000, 0.95)
    assert width(250, 0.95) / width(4000, 0.95) == pytest.approx(4, rel=0.35)


def test_metrics_are_immutable_and_plain() -> None:
    result = metrics.evaluate_scores([0.0, 1.0, 2.0], [1.5, 3.0], resamples=10)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.auroc = 1.0
    plain = dataclasses.asdict(result)
    assert json.loads(json.dumps(plain))["auroc"] == result.auroc
    assert all(type(plain[name]) is float for name in INTERVAL_METRICS)


def test_bootstrap_covers_the_true_auroc_of_gaussians() -> None:
    shift = 1.0
    true_auroc = statistics.NormalDist().cdf(shift / math.sqrt(2))
    covered = 0
    for repetition in range(40):
        generator = np.random.default_rng(repetition)
        id_scores, ood_scores = generator.normal(size=300), generator.normal(shift, 1, size=200)
        low, high = metrics.evaluate_scores(id_scores, ood_scores).intervals["auroc"]
        covered += low <= true_auroc <= high
    assert covered >= 34  # 38 expected; an honest 95 % interval has fewer than 34 with p = 0.003


def test_paired_difference_is_sharper_than_two_intervals() -> None:
    generator = np.random.default_rng(11)
    id_a, ood_a = generator.normal(size=1000), generator.normal(1, 1, size=1000)
    id_b = id_a + generator.normal(0, 0.4, size=1000)
    ood_b = ood_a + generator.normal(0, 0.4, size=1000)
    a, b = metrics.evaluate_scores(id_a, ood_a), metrics.evaluate_scores(id_b, ood_b)
    difference = metrics.paired_difference(id_a, ood_a, id_b, ood_b)
    assert difference.value == pytest.approx(a.auroc - b.auroc)
    low, high = difference.interval
    assert 0 < low < difference.value < high
    # Unpaired, the two intervals overlap and would not tell the detectors apart.
    assert b.intervals["auroc"][1] > a.intervals["auroc"][0]


def test_paired_difference_mirrors_and_vanishes() -> None:
    generator = np.random.default_rng(12)
    a = generator.normal(size=90), generator.normal(1, 1, size=70)
    b = generator.normal(size=90), generator.normal(1, 1, size=70)
    for name in TWO_SET_METRICS:
        forth = metrics.paired_difference(*a, *b, name)
        back = metrics.paired_difference(*b, *a, name)
        assert back.value == -forth.value
        assert back.interval == pytest.approx((-forth.interval[1], -forth.interval[0]))
        same = metrics.paired_difference(*a, *a, name, confidence=0.9)
        assert same == metrics.Difference(value=0.0, interval=(0.0, 0.0), confidence=0.9)
