"""Statistics against NumPy over all the data at once, however they are split."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grood_fast.errors import FitWarning, InputError
from grood_fast.hashing import hash_indices
from grood_fast.statistics import ClassMoments, Moments, Reservoir


def _rows(count: int = 301, dim: int = 7, mean: float = 0.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mix + mean


def _labels(count: int = 301, classes: int = 5, seed: int = 1) -> Tensor:
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))


def _shards(count: int, shards: int, seed: int = 2) -> Iterator[Tensor]:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return iter(order.tensor_split(shards))


class TestMoments:
    @pytest.mark.parametrize("mean", [0.0, 1e6])
    def test_equals_numpy_also_when_the_mean_dwarfs_the_spread(self, mean: float) -> None:
        rows = _rows(mean=mean)
        moments = Moments(7)
        for batch in rows.split(32):
            moments.absorb(batch)
        assert moments.count == 301
        np.testing.assert_allclose(moments.mean, rows.numpy().mean(0), rtol=1e-14)
        expected = np.cov(rows.numpy() - mean, rowvar=False, bias=True)
        # At 1e6 the data themselves are rounded to 1e-10; E[xx] - mean mean would keep 3 digits.
        np.testing.assert_allclose(moments.covariance(), expected, rtol=1e-9, atol=1e-9)

    def test_merging_in_any_order_equals_one_pass(self) -> None:
        rows = _rows(mean=10.0)
        whole = Moments()
        whole.absorb(rows)
        for order in itertools.permutations(_shards(301, 3)):
            merged = Moments()
            for shard in order:
                part = Moments()
                part.absorb(rows[shard])
                merged.merge(part)
            assert merged.count == whole.count
            torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(merged.scatter, whole.scatter, rtol=1e-12, atol=1e-10)

    def test_merging_leaves_the_other_alone_and_takes_empty_shards(self) -> None:
        first, second = Moments(), Moments()
        second.absorb(_rows(10))
        first.merge(second)
        first.absorb(_rows(10, seed=3))
        first.merge(Moments())
        assert (first.count, second.count) == (20, 10)
        np.testing.assert_allclose(second.mean, _rows(10).mean(0), rtol=1e-14)

    def test_empty_batches_single_rows_and_half_precision(self) -> None:
        rows = _rows(5).half()
        moments = Moments(7)
        moments.absorb(rows[:0])
        assert moments.count == 0
        for row in rows.split(1):
            moments.absorb(row)
        np.testing.assert_allclose(moments.mean, rows.double().mean(0), rtol=1e-14)
        assert moments.mean is not None
        assert moments.mean.dtype == torch.float64

    def test_survives_the_inference_mode_of_the_pass(self) -> None:
        moments, classes, reservoir = Moments(), ClassMoments(), Reservoir(8)
        with torch.inference_mode():
            for start in (0, 10):
                rows, indices = _rows(10).float(), torch.arange(start, start + 10)
                moments.absorb(rows)
                classes.absorb(rows, _labels(10))
                reservoir.absorb({"rows": rows}, indices)
        moments.absorb(_rows(10))
        classes.absorb(_rows(10), _labels(10))
        reservoir.absorb({"rows": _rows(10).float()}, torch.arange(20, 30))
        assert moments.mean is not None
        assert not moments.mean.is_inference()
        assert not reservoir.finish()["rows"].is_inference()

    def test_refuses_what_is_not_finite_and_says_where(self) -> None:
        rows = _rows(20)
        rows[3, 1], rows[11, 0] = float("nan"), float("-inf")
        with pytest.raises(InputError, match=r"2 of 20 samples hold NaN or Inf \(positions 103, 1"):
            Moments().absorb(rows, torch.arange(100, 120))
        with pytest.raises(InputError, match=r"rows of the batch 3, 11"):
            Moments().absorb(rows)

    def test_refuses_other_shapes(self) -> None:
        with pytest.raises(InputError, match="flatten or pool"):
            Moments().absorb(torch.rand(2, 3, 4))
        with pytest.raises(InputError, match="floating-point"):
            Moments().absorb(torch.ones(2, 3, dtype=torch.int64))
        with pytest.raises(InputError, match="must have 7 columns, got 6"):
            Moments(7).absorb(torch.rand(2, 6))
        with pytest.raises(InputError, match="no reference samples"):
            Moments(7).covariance()
        seven, six = Moments(), Moments()
        seven.absorb(_rows(3, 7))
        six.absorb(_rows(3, 6))
        with pytest.raises(InputError, match="cannot merge moments of 6 features with 7"):
            seven.merge(six)


class TestClassMoments:
    @pytest.mark.parametrize("covariance", ["tied", "class"])
    @pytest.mark.parametrize("num_classes", [None, 5])
    @pytest.mark.parametrize("mean", [0.0, 1e5])
    def test_equals_numpy(self, covariance: str, num_classes: int | None, mean: float) -> None:
        rows, labels = _rows(mean=mean), _labels()
        rows += labels.unsqueeze(1)
        moments = ClassMoments(num_classes, covariance=covariance)  # type: ignore[arg-type]
        for batch in torch.arange(301).split(17):
            moments.absorb(rows[batch], labels[batch])
        scatters = []
        for label in range(5):
            group = rows[labels == label].numpy()
            scatters.append(np.cov(group, rowvar=False, bias=True) * len(group))
            assert int(moments.counts[label]) == len(group)
            np.testing.assert_allclose(moments.means[label], group.mean(0), rtol=1e-13)
            if covariance == "class":
                np.testing.assert_allclose(
                    moments.class_scatter(label), scatters[-1], rtol=1e-9, atol=1e-9
                )
        np.testing.assert_allclose(moments.within_scatter(), sum(scatters), rtol=1e-9, atol=1e-8)
        total = moments.total()
        np.testing.assert_allclose(total.mean, rows.numpy().mean(0), rtol=1e-13)
        expected = np.cov(rows.numpy(), rowvar=False, bias=True)
        np.testing.assert_allclose(total.covariance(), expected, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("covariance", ["tied", "class"])
    def test_merging_in_any_order_equals_one_pass(self, covariance: str) -> None:
        rows, labels = _rows(), _labels().sort().values  # sorted: shards see different classes
        whole = ClassMoments(covariance=covariance)  # type: ignore[arg-type]
        whole.absorb(rows, labels)
        for order in itertools.permutations(torch.arange(301).tensor_split(3)):
            merged = ClassMoments(covariance=covariance)  # type: ignore[arg-type]
            for shard in order:
                part = ClassMoments(covariance=covariance)  # type: ignore[arg-type]
                part.absorb(rows[shard], labels[shard])
                merged.merge(part)
            assert torch.equal(merged.counts, whole.counts)
            torch.testing.assert_close(merged.means, whole.means, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(
                merged.within_scatter(), whole.within_scatter(), rtol=1e-12, atol=1e-10
            )

    def test_a_class_without_samples_is_left_out_with_a_warning(self) -> None:
        moments = ClassMoments(6)
        moments.absorb(_rows(20), _labels(20, 2) * 3)
        with pytest.warns(FitWarning, match=r"4 of 6 classes have no reference samples \(1, 2, 4"):
            assert moments.seen_classes().tolist() == [0, 3]

    def test_refuses_labels_that_do_not_fit(self) -> None:
        rows = _rows(4)
        with pytest.raises(InputError, match="less than 3, got 0 to 3"):
            ClassMoments(3).absorb(rows, torch.arange(4))
        with pytest.raises(InputError, match="at least 0, got -1 to 2"):
            ClassMoments().absorb(rows, torch.arange(4) - 1)
        with pytest.raises(InputError, match="not one-hot"):
            ClassMoments().absorb(rows, torch.eye(4, dtype=torch.int64))
        with pytest.raises(InputError, match="integers"):
            ClassMoments().absorb(rows, torch.rand(4))
        with pytest.raises(InputError, match="labels are needed"):
            ClassMoments().absorb(rows, None)
        with pytest.raises(InputError, match="no reference samples"):
            ClassMoments().seen_classes()

    def test_refuses_to_outgrow_its_budget(self) -> None:
        rows, labels = torch.rand(2, 2048), torch.tensor([0, 1])
        with pytest.raises(InputError, match="use Mahalanobis"):
            ClassMoments(covariance="class", budget=2 * 2048**2 * 8).absorb(rows, labels)
        with pytest.raises(InputError, match="check that the labels are class numbers"):
            ClassMoments().absorb(rows, torch.tensor([0, 10**9]))

    def test_refuses_to_merge_another_kind(self) -> None:
        with pytest.raises(InputError, match="same settings"):
            ClassMoments(covariance="class").merge(ClassMoments())


def _chosen_by_definition(
    indices: list[int], labels: list[int] | None, capacity: int, seed: int = 0
) -> list[int]:
    """The kept set by a hash in Python's integers and a plain sort."""

    def key(index: int) -> int:
        mask = 2**64 - 1
        state = (index + 0x9E3779B97F4A7C15 * (seed + 1)) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
        return state - 2**64 if state >= 2**63 else state

    ranked: list[tuple[int, int, int]] = []
    groups = labels or [0] * len(indices)
    for group in set(groups):
        members = [i for i, own in zip(indices, groups, strict=True) if own == group]
        ranked += [
            (rank if labels else 0, key(index), index)
            for rank, index in enumerate(sorted(members, key=key))
        ]
    return sorted(index for _, _, index in sorted(ranked)[:capacity])


class TestReservoir:
    @settings(max_examples=60, deadline=None)
    @given(
        count=st.integers(1, 80),
        capacity=st.integers(1, 40),
        classes=st.integers(0, 6),
        seed=st.integers(0, 2**40),
        parts=st.integers(1, 6),
    )
    def test_keeps_what_the_definition_says_however_the_data_are_split(
        self, count: int, capacity: int, classes: int, seed: int, parts: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        indices = torch.randperm(10 * count, generator=generator)[:count]
        # Squared uniforms: some classes are rare and run short of their quota.
        labels = (torch.rand(count, generator=generator) ** 2 * classes).long()
        columns = {"rows": torch.stack([indices, -indices], 1).float(), "labels": labels}
        expected = _chosen_by_definition(
            indices.tolist(), labels.tolist() if classes else None, capacity, seed
        )

        def fresh() -> Reservoir:
            return Reservoir(capacity, balanced=classes > 0, seed=seed)

        shards = list(torch.randperm(count, generator=generator).tensor_split(parts))
        streamed, merged = fresh(), fresh()
        for shard in shards:
            part = fresh()
            for reservoir in (streamed, part):
                reservoir.absorb({n: c[shard] for n, c in columns.items()}, indices[shard])
            merged.merge(part)
        for reservoir in (streamed, merged):
            kept = reservoir.finish()
            assert kept["indices"].tolist() == expected
            assert torch.equal(kept["rows"][:, 1], -kept["indices"].float())
            assert (reservoir.seen, reservoir.kept) == (count, min(count, capacity))

    def test_balanced_quotas_are_refilled_where_a_class_runs_short(self) -> None:
        labels = torch.tensor([0] * 500 + [1] * 500 + [2] * 4)
        reservoir = Reservoir(60, balanced=True)
        for batch in torch.arange(1004).split(100):
            reservoir.absorb({"labels": labels[batch]}, batch)
        assert reservoir.finish()["labels"].bincount().tolist() == [28, 28, 4]

    def test_without_a_capacity_keeps_everything(self) -> None:
        rows, reservoir = _rows(1000), Reservoir()
        for batch in torch.arange(1000).flip(0).split(7):
            reservoir.absorb({"rows": rows[batch]}, batch)
        assert torch.equal(reservoir.finish()["rows"], rows)
        assert reservoir._buffers["rows"].shape[0] < 2000

    def test_holds_little_more_than_its_capacity(self) -> None:
        reservoir = Reservoir(50)
        for batch in torch.arange(1000).split(33):
            reservoir.absorb({"rows": torch.rand(len(batch), 3)}, batch)
            assert reservoir.kept <= 50
        assert len(reservoir._buffers["rows"]) <= 50 * 1.25 + 33

    def test_the_sample_is_uniform_and_changes_with_the_seed(self) -> None:
        kept = []
        for seed in (0, 1):
            reservoir = Reservoir(2000, seed=seed)
            reservoir.absorb({}, torch.arange(20_000))
            kept.append(reservoir.finish()["indices"])
        shares = torch.histc(kept[0].float(), 10, 0, 20_000)
        assert float((shares - 200).abs().max()) < 60  # 4.5 standard deviations
        common = np.intersect1d(kept[0], kept[1])
        assert 120 < len(common) < 280  # 200 expected

    def test_the_hash_does_not_collide(self) -> None:
        assert len(hash_indices(torch.arange(100_000)).unique()) == 100_000

    def test_keeps_dtypes_and_refuses_other_columns(self) -> None:
        reservoir = Reservoir(4)
        columns = {"rows": torch.rand(3, 2).bfloat16()}
        reservoir.absorb(columns, torch.arange(3))
        assert reservoir.finish()["rows"].dtype == torch.bfloat16
        with pytest.raises(InputError, match="keep their names, dtypes and row shapes"):
            reservoir.absorb({"rows": torch.rand(3, 2)}, torch.arange(3))
        with pytest.raises(InputError, match="does not go with 4 indices"):
            reservoir.absorb(columns, torch.arange(4))
        with pytest.raises(InputError, match="int64"):
            reservoir.absorb(columns, torch.arange(3).int())
        with pytest.raises(InputError, match=r"rows of 1 of 1 samples .*\(positions 9\)"):
            reservoir.absorb({"rows": torch.tensor([[1.0, float("inf")]])}, torch.tensor([9]))
        with pytest.raises(InputError, match="needs a column 'labels'"):
            Reservoir(4, balanced=True).absorb(columns, torch.arange(3))
        with pytest.raises(InputError, match="at least 1"):
            Reservoir(0)
        with pytest.raises(InputError, match="same settings"):
            Reservoir(4).merge(Reservoir(4, seed=1))
        with pytest.raises(InputError, match="no reference samples"):
            Reservoir(4).finish()
