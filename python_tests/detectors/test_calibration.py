"""Conformal thresholds and p-values against plain loops, their coverage, and the sketch."""

from __future__ import annotations

import itertools
import math
import warnings
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from grood_fast.detectors import calibration
from grood_fast.detectors.calibration import Calibration, SampleSketch, rank_of_threshold
from grood_fast.errors import FitWarning, InputError
from grood_fast.results import Scores

INF, NAN = math.inf, math.nan


def tied(count: int, seed: int = 0) -> Tensor:
    """Few distinct values, so that most are tied."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, (count,), generator=generator).float()


def continuous(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


SETS = {
    "continuous": continuous(57),
    "tied": tied(57),
    "constant": torch.full((20,), 2.5),
    "infinite": torch.cat([continuous(30), torch.tensor([INF, INF, -INF])]),
    "one": torch.tensor([0.25]),
}
every_set = pytest.mark.parametrize("known", SETS.values(), ids=SETS)


@pytest.mark.parametrize("id_recall", [0.01, 0.1, 0.5, 0.8, 0.9])
@every_set
def test_the_threshold_is_the_smallest_that_enough_scores_reach(
    known: Tensor, id_recall: float
) -> None:
    """Count instead of rank: at least (n + 1)·recall of the n scores, in whole numbers, are ≤ t."""
    wanted = Fraction(str(id_recall)) * (len(known) + 1)
    expected = INF
    for candidate in sorted(known.tolist()):
        if sum(value <= candidate for value in known.tolist()) >= wanted:
            expected = candidate
            break
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)
        made = Calibration.of(known, id_recall)
    assert made.threshold == expected
    assert made.id_recall == id_recall
    assert made.scores.tolist() == sorted(known.tolist())
    assert made.scores.dtype == torch.float32


@pytest.mark.parametrize("id_recall", [0.05, 0.5, 0.9, 0.95, 0.99, 0.999])
def test_ranks_are_those_of_exact_arithmetic(id_recall: float) -> None:
    for count in [*range(1, 300), 999, 1999, 99_999]:
        exact = math.ceil(Fraction(str(id_recall)) * (count + 1))
        assert rank_of_threshold(count, id_recall) == exact


@every_set
def test_p_values_are_those_of_a_loop(known: Tensor) -> None:
    probes = torch.cat([known, continuous(9, 1), tied(9, 1), torch.tensor([INF, -INF, NAN])])
    actual = Calibration.of(known, 0.5).p_values(probes)
    assert actual.dtype == torch.float64
    for probe, p in zip(probes.tolist(), actual.tolist(), strict=True):
        at_least = sum(value >= probe for value in known.tolist())  # NaN: none
        assert p == (1 + at_least) / (len(known) + 1)


def test_p_values_of_strided_and_wide_scores() -> None:
    made = Calibration.of(continuous(57), 0.5)
    probes = continuous(20, 1)
    expected = made.p_values(probes)
    assert torch.equal(made.p_values(probes.double()), expected)
    assert torch.equal(made.p_values(probes.repeat_interleave(2)[::2]), expected)
    assert made.p_values(probes[:0]).shape == (0,)


@every_set
def test_ood_is_above_the_threshold_or_nan(known: Tensor) -> None:
    made = Calibration.of(known, 0.5)
    probes = torch.cat([known, torch.tensor([made.threshold, INF, -INF, NAN])])
    actual = made.is_ood(probes)
    assert actual.dtype == torch.bool
    expected = [value > made.threshold or value != value for value in probes.tolist()]
    assert actual.tolist() == expected
    assert actual[-1]


@pytest.mark.parametrize("draw", [continuous, tied])
def test_coverage_of_exchangeable_data(draw: Any) -> None:
    """Over calibration sets, ID samples are kept with probability at least the recall, exactly
    ⌈(n+1)·recall⌉/(n+1) without ties; and p-values are at most t with probability at most t."""
    trials, count, recall = 4000, 24, 0.9
    data = draw(trials * (count + 1)).view(trials, count + 1)
    kept, p_values = [], []
    for row in data:
        made = Calibration.of(row[:count], recall)
        kept.append(not bool(made.is_ood(row[count:])))
        p_values.append(float(made.p_values(row[count:])))
    exact = math.ceil((count + 1) * recall) / (count + 1)
    share, error = sum(kept) / trials, 4 * (exact * (1 - exact) / trials) ** 0.5
    assert share > exact - error
    if draw is continuous:
        assert share < exact + error
    for level in (0.04, 0.2, 0.5, 0.8):
        share = sum(p <= level + 1e-12 for p in p_values) / trials
        error = 4 * (level * (1 - level) / trials) ** 0.5
        assert share < level + error
        if draw is continuous:
            assert share > level - error


@pytest.mark.parametrize(("id_recall", "needed"), [(0.5, 1), (0.9, 9), (0.95, 19), (0.99, 99)])
def test_too_few_samples_call_nothing_ood(id_recall: float, needed: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isfinite(Calibration.of(continuous(needed), id_recall).threshold)
    if needed > 1:
        with pytest.warns(FitWarning, match=f"at least {needed} are needed") as caught:
            made = Calibration.of(continuous(needed - 1), id_recall)
        assert made.threshold == INF
        assert made.is_ood(torch.tensor([1e30, INF, NAN])).tolist() == [False, False, True]
        assert len(caught) == 1


@pytest.mark.parametrize("id_recall", [0, 1, -0.1, 1.5, NAN, 95])
def test_recalls_out_of_range_are_refused(id_recall: float) -> None:
    with pytest.raises(InputError, match="must lie between 0 and 1"):
        Calibration.of(continuous(30), id_recall)


def test_scores_that_do_not_do_are_refused() -> None:
    with pytest.raises(InputError, match="no calibration samples"):
        Calibration.of(torch.empty(0), 0.5)
    with pytest.raises(InputError, match="2 of 4 calibration scores are NaN"):
        Calibration.of(torch.tensor([1.0, NAN, 2.0, NAN]), 0.5)


def test_what_is_kept_is_a_plain_tensor_of_its_own() -> None:
    values = continuous(30).requires_grad_()
    known = Scores.of(values, torch.zeros(30).long(), None, "energy")
    made = Calibration.of(known, 0.5)
    assert type(made.scores) is Tensor
    assert not made.scores.requires_grad
    assert type(made.p_values(known)) is type(made.is_ood(known)) is Tensor
    before = made.scores.clone()
    known.zero_()
    assert torch.equal(made.scores, before)


# --- the sketch ---------------------------------------------------------------------------------


@pytest.fixture(params=[4, 10, 1000])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(calibration, "SKETCH_SIZE", request.param)
    kept: int = request.param
    return kept


def prints(count: int, seed: int = 0, distinct: int = 60) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-distinct // 2, distinct // 2, (count,), generator=generator)


def sketch_of(*batches: Tensor) -> SampleSketch:
    sketch = SampleSketch()
    for batch in batches:
        sketch.absorb(batch)
    return sketch


def assert_is_sketch_of(sketch: SampleSketch, seen: Tensor, size: int) -> None:
    distinct = sorted(set(seen.tolist()))
    assert sketch.fingerprints.tolist() == distinct[:size]
    assert sketch.complete == (len(distinct) <= size)
    assert sketch.fingerprints.dtype == torch.int64


@pytest.mark.parametrize("seed", range(5))
def test_the_smallest_distinct_fingerprints_are_kept(size: int, seed: int) -> None:
    everything = prints(100, seed)
    for batch in (1, 7, 100):
        assert_is_sketch_of(sketch_of(*everything.split(batch)), everything, size)
    assert_is_sketch_of(sketch_of(*everything.split(7), everything), everything, size)
    assert_is_sketch_of(sketch_of(everything[:0]), everything[:0], size)


@pytest.mark.parametrize("seed", range(5))
def test_merging_shards_in_any_order_equals_one_pass(size: int, seed: int) -> None:
    everything = prints(60, seed, distinct=30)
    shards = everything.split([0, 3, 20, 37])
    for order in itertools.permutations(shards):
        merged = SampleSketch()
        for shard in order:
            merged.merge(sketch_of(shard))
        assert_is_sketch_of(merged, everything, size)
        merged.absorb(prints(10, seed + 100))
        assert_is_sketch_of(merged, torch.cat([everything, prints(10, seed + 100)]), size)


def test_what_is_incomplete_stays_so_when_it_meets_nothing_new(size: int) -> None:
    everything = prints(200, distinct=100)
    for few in (everything[:0], everything.sort().values[:1]):
        for parts in ((everything, few), (few, everything)):
            merged = sketch_of(parts[0])
            merged.merge(sketch_of(parts[1]))
            assert_is_sketch_of(merged, everything, size)


def test_seen(size: int) -> None:
    everything = prints(60, distinct=1000)
    sketch = sketch_of(everything)
    kept = sorted(set(everything.tolist()))[:size]
    probes = torch.cat([everything[:20], prints(200, 1, distinct=1000)])
    looked_up = [v for v in probes.tolist() if sketch.complete or v <= kept[-1]]
    assert sketch.seen(probes) == (len(looked_up), sum(v in kept for v in looked_up))
    assert SampleSketch().seen(probes) == (220, 0)
    assert sketch.seen(probes[:0]) == (0, 0)


def test_a_sketch_comes_back_from_its_parts(size: int) -> None:
    """An incomplete one too: a reference of more samples than are kept."""
    everything = prints(60)
    sketch = sketch_of(everything[:50])
    again = SampleSketch(sketch.fingerprints, sketch.complete)
    assert_is_sketch_of(again, everything[:50], size)
    assert again.seen(everything) == sketch.seen(everything)
    again.absorb(everything[50:])
    assert_is_sketch_of(again, everything, size)
    assert_is_sketch_of(sketch, everything[:50], size)
