"""KNN against scikit-learn in float64, pytorch-ood, and itself in other blocks and shards."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from peers import import_pytorch_ood
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from grood_fast.errors import InputError, NotFittedError
from grood_fast.scores import knn
from grood_fast.scores.knn import KNN, kth_nearest_distance


def _features(count: int, dim: int = 24, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator).relu() * torch.linspace(0.1, 3, dim) + 0.01


def _fit(score: KNN, features: Tensor, batch: int = 64) -> KNN:
    score.begin(None)  # type: ignore[arg-type]
    for indices in torch.arange(len(features)).split(batch):
        score.absorb(features[indices], None, indices)
    score.finish()
    return score


def _reference(bank: Tensor, queries: Tensor, k: int) -> np.ndarray:
    """Distances to the k-th neighbour by brute force over float64 differences."""
    search = NearestNeighbors(n_neighbors=k, algorithm="kd_tree").fit(bank.double().numpy())
    return search.kneighbors(queries.double().numpy())[0][:, -1]


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("k", [1, 5, 50, 331])
def test_equals_scikit_learn_in_float64(k: int, metric: str, standardize: bool) -> None:
    bank, queries = _features(331), _features(40, seed=1) * 1.5
    score = _fit(KNN(k, metric, standardize), bank)  # type: ignore[arg-type]
    left, right = bank.double(), queries.double()
    if standardize:
        scaler = StandardScaler().fit(left)
        left, right = (torch.from_numpy(scaler.transform(part)) for part in (left, right))
    if metric == "cosine":
        left, right = (torch.nn.functional.normalize(part) for part in (left, right))
    actual = score(queries)
    assert actual.dtype == torch.float32
    assert actual.shape == (40,)
    np.testing.assert_allclose(actual, _reference(left, right, k), rtol=5e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_equals_pytorch_ood(normalize: bool) -> None:
    import_pytorch_ood()
    from pytorch_ood import detector

    bank, queries = _features(200), _features(30, seed=1)
    peer = detector.KNN(None, k=7, normalize=normalize)
    peer.fit_features(bank, torch.zeros(200, dtype=torch.int64))
    score = _fit(KNN(7, "cosine" if normalize else "euclidean"), bank)
    np.testing.assert_allclose(score(queries), peer.predict_features(queries), rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1e-5, 1e-6])
@pytest.mark.parametrize("k", [1, 5, 20, 39, 40])
def test_near_duplicates_keep_their_distances(scale: float, k: int) -> None:
    """40 copies closer to the query than products of float32 can tell, among 200 others."""
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(3, 16, generator=generator)
    noise = torch.randn(3, 40, 16, generator=generator) * torch.arange(1, 41).view(1, 40, 1)
    copies = (query.unsqueeze(1) + scale * noise).flatten(0, 1)
    bank = torch.cat([torch.randn(200, 16, generator=generator), copies])
    bank = bank[torch.randperm(len(bank), generator=generator)]
    actual = kth_nearest_distance(query, bank, k)
    np.testing.assert_allclose(actual, _reference(bank, query, k), rtol=1e-5)
    # The stored unit vectors are float32: 1e-7 absolute is what they can tell apart.
    unit = torch.nn.functional.normalize
    cosine = _fit(KNN(k), bank)(query)
    expected = _reference(unit(bank.double()), unit(query.double()), k)
    np.testing.assert_allclose(cosine, expected, rtol=1e-5, atol=2e-7)


def test_duplicates_of_the_query_are_at_distance_zero() -> None:
    bank = _features(100).repeat(3, 1)
    score = _fit(KNN(3), bank)
    assert torch.equal(score(bank[:10]), torch.zeros(10))
    assert float(_fit(KNN(4), bank)(bank[:10]).min()) > 1e-3


def test_features_far_from_the_origin_do_not_cancel() -> None:
    bank, queries = _features(300) + 1000, _features(20, seed=1) + 1000
    score = _fit(KNN(10, "euclidean"), bank)
    np.testing.assert_allclose(score(queries), _reference(bank, queries, 10), rtol=1e-4)
    directly = kth_nearest_distance(queries, bank, 10)
    np.testing.assert_allclose(directly, _reference(bank, queries, 10), rtol=1e-5)


def test_coarse_products_are_noticed() -> None:
    """Products as rough as TF32's choose wrong neighbours; the answer must not show it."""
    bank, queries = _features(500) - 0.5, _features(30, seed=1) - 0.5

    def rough(some: Tensor, count: int) -> tuple[Tensor, Tensor]:
        products = (some.bfloat16() @ bank.bfloat16().T).float()
        squared = some.square().sum(1, keepdim=True) - 2 * products + bank.square().sum(1)
        values, rows = squared.topk(count, largest=False)
        return values, rows

    expected = _reference(bank, queries, 60)
    np.testing.assert_allclose(
        kth_nearest_distance(queries, bank, 60, search=rough), expected, rtol=1e-5
    )


@pytest.mark.parametrize("block", [1, 99, 100, 101, 200])
def test_blocks_of_any_size_give_the_same(block: int) -> None:
    """Blocks of 1, N - 1, N, N + 1 and 2 N rows of the bank, and of as many queries."""
    bank, queries = _features(100), _features(100, seed=1)
    for k in (1, 9, 100):
        expected = _reference(bank, queries, k)
        values, rows = knn._nearest_by_products(queries, bank, k, block)
        np.testing.assert_allclose(values[:, -1].sqrt(), expected, rtol=1e-3)
        assert values.shape == rows.shape == (100, k)
        for rows_at_once in (1, 99, 100, 101):
            budget = 8 * bank.shape[1] * (2 * knn.RANKS_BESIDE + 1) * rows_at_once
            actual = kth_nearest_distance(queries, bank, k, block_bytes=budget)
            np.testing.assert_allclose(actual, expected, rtol=1e-5)
    np.testing.assert_allclose(
        kth_nearest_distance(queries, bank, 9, block_bytes=1), _reference(bank, queries, 9), 1e-5
    )


def test_fitting_in_blocks_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, queries = _features(100), _features(10, seed=1)
    expected = _fit(KNN(5, standardize=True), bank)(queries)
    monkeypatch.setattr(knn, "BLOCK_BYTES", 1)
    torch.testing.assert_close(_fit(KNN(5, standardize=True), bank)(queries), expected)


@pytest.mark.parametrize("max_samples", [None, 60])
def test_merging_in_any_order_equals_one_pass(max_samples: int | None) -> None:
    bank, queries = _features(200), _features(20, seed=1)
    expected = _fit(KNN(5, standardize=True, max_samples=max_samples), bank)(queries)
    for order in itertools.permutations(torch.randperm(200).tensor_split(3)):
        merged = KNN(5, standardize=True, max_samples=max_samples)
        for shard in order:
            part = KNN(5, standardize=True, max_samples=max_samples)
            part.absorb(bank[shard], None, shard)
            merged.merge(part)
        merged.finish()
        assert torch.equal(merged(queries), expected)


def test_a_subsample_holds_rows_of_the_reference() -> None:
    bank = _features(200)
    score = _fit(KNN(5, "euclidean", max_samples=60), bank)
    rows = score.fitted["bank"] + score.fitted["offset"]
    assert rows.shape == (60, 24)
    np.testing.assert_allclose(_reference(bank, rows, 1), 0, atol=1e-5)


def test_constant_features_are_only_centred() -> None:
    bank = _features(50)
    bank[:, 4], bank[:, 5] = 0.1, 0.0
    score = _fit(KNN(3, "euclidean", standardize=True), bank)
    assert score.fitted["scale"][4:6].tolist() == [1.0, 1.0]
    moved = bank[:5].clone()
    moved[:, 5] = 2.0
    torch.testing.assert_close(
        score(moved), (score(bank[:5]).square() + 4).sqrt(), rtol=1e-5, atol=1e-5
    )


def test_unit_length_does_not_depend_on_the_scale() -> None:
    """Gradients of a confident net are tiny: their squares vanish in float32."""
    bank, queries = _features(50), _features(10, seed=1)
    expected = _fit(KNN(3), bank)(queries)
    for scale in (1e-30, 1e30):
        actual = _fit(KNN(3), bank * scale)(queries * scale)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(_fit(KNN(3), bank)(torch.zeros(1, 24)), torch.ones(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_scored_in_float32(dtype: torch.dtype) -> None:
    bank, queries = _features(80).to(dtype), _features(10, seed=1).to(dtype)
    actual = _fit(KNN(5), bank)(queries)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, _fit(KNN(5), bank.float())(queries.float()))


def test_empty_batches_nan_and_graphs() -> None:
    score = _fit(KNN(5), _features(80))
    assert score(torch.empty(0, 24)).shape == (0,)
    queries = _features(3, seed=1)
    queries[1, 2] = float("nan")
    assert score(queries.requires_grad_()).isnan().tolist() == [False, True, False]
    assert not score(queries).requires_grad
    empty = KNN(5)
    empty.absorb(torch.empty(0, 24), None, torch.empty(0, dtype=torch.int64))
    with pytest.raises(InputError, match="got 0"):
        empty.finish()


def test_state_is_the_configuration_and_what_was_fitted() -> None:
    score = _fit(KNN(5, "euclidean", True, 60), _features(80))
    copy = KNN(**score.config())
    assert copy.config() == score.config()
    assert not copy.is_fitted
    copy.fitted = {name: tensor.clone() for name, tensor in score.fitted.items()}
    queries = _features(10, seed=1)
    assert torch.equal(copy(queries), score(queries))
    score.begin(None)  # type: ignore[arg-type]
    with pytest.raises(NotFittedError):
        score(queries)


def test_refuses_what_does_not_fit() -> None:
    bad: list[dict[str, Any]] = [
        {"k": 0}, {"metric": "manhattan"}, {"backend": "annoy"}, {"k": 9, "max_samples": 8}
    ]  # fmt: skip
    for config in bad:
        with pytest.raises(InputError):
            KNN(**config)
    with pytest.raises(InputError, match="k=81 neighbours need as many reference samples, got 80"):
        _fit(KNN(81), _features(80))
    with pytest.raises(InputError, match="must have 24 columns, got 23"):
        _fit(KNN(5), _features(80))(torch.rand(2, 23))
    with pytest.raises(InputError, match="same settings"):
        KNN(5).merge(KNN(6))
    features = _features(80)
    features[70, 0] = float("inf")
    with pytest.raises(InputError, match=r"positions 70\)"):
        _fit(KNN(5), features)


def test_faiss_gives_the_same() -> None:
    pytest.importorskip("faiss")
    bank = torch.cat([_features(300), _features(40).repeat(5, 1)])
    queries = torch.cat([_features(40, seed=1), bank[:10], bank[300:305] + 1e-5])
    for metric in ("cosine", "euclidean"):
        expected = _fit(KNN(9, metric), bank)  # type: ignore[arg-type]
        actual = _fit(KNN(9, metric, backend="faiss"), bank)  # type: ignore[arg-type]
        torch.testing.assert_close(actual(queries), expected(queries), rtol=1e-5, atol=1e-7)
        assert actual(queries[:0]).shape == (0,)


def test_says_how_to_get_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match=r'pip install "grood-fast\[faiss\]"'):
        KNN(backend="faiss")


@pytest.mark.parametrize("count", [1, 7, 60])
@pytest.mark.parametrize("size", [60, 100, 959, 4000, 4013])
def test_the_smallest_are_selected_by_groups(size: int, count: int) -> None:
    generator = torch.Generator().manual_seed(size)
    values = torch.randint(0, 500, (20, size), generator=generator).float()  # with ties
    values[3, 5], values[4] = -math.inf, math.inf
    found, where = knn._smallest(values, count)
    assert torch.equal(found, values.sort(dim=1).values[:, :count])
    assert torch.equal(values.gather(1, where), found)
    assert all(len(set(row)) == count for row in where.tolist())


def test_an_inverted_file_finds_most_neighbours_and_true_distances() -> None:
    pytest.importorskip("faiss")
    bank, queries = _features(4000), _features(100, seed=1)
    exact = _fit(KNN(5), bank)(queries)
    for probes, found in ((30, 0.8), (102, 1.0)):
        approximate = _fit(KNN(5, backend="faiss_ivf", probes=probes), bank)(queries)
        assert (approximate >= exact * (1 - 1e-5)).all()
        equal = torch.isclose(approximate, exact, rtol=1e-5, atol=0)
        assert equal.float().mean() >= found
    # Cells with too few rows for the question do not leave it unanswered.
    few = _fit(KNN(50, backend="faiss_ivf", probes=1), bank)(queries)
    assert few.isfinite().all()
    tiny = _fit(KNN(3, backend="faiss_ivf"), bank[:20])(queries)
    torch.testing.assert_close(tiny, _fit(KNN(3), bank[:20])(queries), rtol=1e-5, atol=0)
    with pytest.raises(InputError, match="probes must be at least 1"):
        KNN(backend="faiss_ivf", probes=0)


def test_without_centring_what_is_near_the_origin_keeps_its_digits() -> None:
    lengths = 10.0 ** -torch.linspace(0, 16, 300).unsqueeze(1)
    bank = torch.nn.functional.normalize(_features(300)) * lengths
    queries = 1.01 * bank[::7]
    expected = _reference(bank, queries, 1)
    actual = _fit(KNN(1, "euclidean", centred=False), bank)(queries)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    moved = _fit(KNN(1, "euclidean"), bank)(queries)
    assert not np.allclose(moved, expected, rtol=1e-2, atol=0)


def test_the_nearest_alone_is_the_first_of_several() -> None:
    bank, queries = _features(2500), _features(70, seed=1)
    for metric in ("cosine", "euclidean"):
        expected = _fit(KNN(1, metric, backend="faiss"), bank)(queries)  # type: ignore[arg-type]
        actual = _fit(KNN(1, metric), bank)(queries)  # type: ignore[arg-type]
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
