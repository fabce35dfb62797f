"""Gaussian scores against SciPy and scikit-learn in float64, and pytorch-ood."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from peers import import_pytorch_ood
from sklearn.covariance import OAS
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from torch import Tensor

from grood_fast.errors import FitWarning, InputError, NotFittedError
from grood_fast.scores.base import Score
from grood_fast.scores.gaussian import ClassGMM, Mahalanobis, RelativeMahalanobis

CLASSES = 4


def _data(count: int = 400, dim: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated features in float64 whose mean and spread differ by class."""
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    labels = torch.arange(count) % CLASSES
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    means = torch.randn(CLASSES, dim, generator=torch.Generator().manual_seed(8)) * 3 + 5
    spread = 1 + 0.3 * labels.unsqueeze(1)
    return torch.randn(count, dim, **options) @ mix * spread + means[labels], labels


def _fit(score: Score, features: Tensor, labels: Tensor, batch: int = 64) -> Any:
    score.begin(None)  # type: ignore[arg-type]
    for indices in torch.arange(len(features)).split(batch):
        score.absorb(features[indices], labels[indices], indices)
    score.finish()
    return score


def _queries(dim: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(50, dim, generator=generator, dtype=torch.float64) * 4 + 5


def _class_means(features: Tensor, labels: Tensor) -> np.ndarray:
    return np.stack([features[labels == label].numpy().mean(0) for label in range(CLASSES)])


def _squared_distances(queries: Tensor, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    shift = queries.numpy() - mean
    return np.einsum("bi,ij,bj->b", shift, scipy.linalg.pinvh(covariance), shift)


def _expected_mahalanobis(
    features: Tensor, labels: Tensor, queries: Tensor, relative: bool = False
) -> np.ndarray:
    means = _class_means(features, labels)
    within = np.cov(features.numpy() - means[labels], rowvar=False, bias=True)
    distances = np.stack([_squared_distances(queries, mean, within) for mean in means])
    expected: np.ndarray = distances.min(0)
    if relative:
        total = np.cov(features.numpy(), rowvar=False, bias=True)
        expected = expected - _squared_distances(queries, features.numpy().mean(0), total)
    return expected


@pytest.mark.parametrize("relative", [False, True])
def test_mahalanobis_equals_scipy(relative: bool) -> None:
    features, labels = _data()
    score = _fit(RelativeMahalanobis() if relative else Mahalanobis(), features, labels)
    actual = score(_queries())
    assert actual.dtype == torch.float32
    assert actual.shape == (50,)
    expected = _expected_mahalanobis(features, labels, _queries(), relative)
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-5)
    assert score.rank == 9


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_float32_features_far_from_the_origin_do_not_cancel(offset: float) -> None:
    features, labels = _data()
    features, queries = (features + offset).float(), (_queries() + offset).float()
    score = _fit(Mahalanobis(), features, labels)
    expected = _expected_mahalanobis(features.double(), labels, queries.double())
    np.testing.assert_allclose(score(queries), expected, rtol=1e-5)


def test_the_mean_of_a_class_is_at_distance_zero() -> None:
    features, labels = _data()
    score = _fit(Mahalanobis(), features, labels)
    means = torch.from_numpy(_class_means(features, labels))
    assert 0 <= float(score(means).min()) <= float(score(means).max()) < 1e-20


@pytest.mark.parametrize("relative", [False, True])
def test_equals_pytorch_ood(relative: bool) -> None:
    """Its covariance is the scatter, not divided by N, plus 1e-6 on the diagonal; its Mahalanobis
    is half the squared distance."""
    import_pytorch_ood()
    from pytorch_ood.detector import RMD
    from pytorch_ood.detector import Mahalanobis as PeerMahalanobis

    features, labels = (part.float() if part.is_floating_point() else part for part in _data())
    queries = _queries().float()
    peer = (RMD if relative else PeerMahalanobis)(None)
    peer.fit_features(features, labels)
    scale = len(features) if relative else 2 * len(features)
    score = _fit(RelativeMahalanobis() if relative else Mahalanobis(), features, labels)
    np.testing.assert_allclose(
        score(queries), peer.predict_features(queries) * scale, rtol=2e-3, atol=2e-2
    )


def test_singular_covariances_use_the_pseudo_inverse() -> None:
    features, labels = _data()
    copied = torch.cat([features, features[:, :3] - features[:, 3:6], torch.ones(400, 2)], dim=1)
    queries = torch.cat([_queries(), _queries()[:, :3] * 0, torch.ones(50, 2)], dim=1)
    score = _fit(Mahalanobis(), copied, labels)
    assert score.rank == 9
    expected = _expected_mahalanobis(copied, labels, queries)
    np.testing.assert_allclose(score(queries), expected, rtol=1e-6)
    # Within the span of the data nothing changes, and constant features are not looked at.
    redundant = torch.cat([_queries(), _queries()[:, :3] - _queries()[:, 3:6]], dim=1)
    redundant = torch.cat([redundant, torch.full((50, 2), 7.0)], dim=1)
    np.testing.assert_allclose(
        score(redundant), _fit(Mahalanobis(), features, labels)(_queries()), rtol=1e-6
    )


def test_rounding_of_float32_features_is_not_taken_for_a_direction() -> None:
    features, labels = _data()
    shares = features.float().softmax(dim=1)
    assert _fit(Mahalanobis(), shares, labels).rank == 8


def test_fewer_samples_than_features() -> None:
    features, labels = _data(count=20, dim=40)
    with pytest.warns(FitWarning, match="cannot determine the covariance of 40 features"):
        score = _fit(Mahalanobis(), features, labels)
    assert score.rank == 16
    expected = _expected_mahalanobis(features, labels, _queries(40))
    np.testing.assert_allclose(score(_queries(40)), expected, rtol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _fit(Mahalanobis("oas"), features, labels).rank == 40


def test_oas_equals_scikit_learn() -> None:
    features, labels = _data(count=60)
    means = _class_means(features, labels)
    oas = OAS(assume_centered=True).fit(features.numpy() - means[labels])
    shrunk = np.min(
        [_squared_distances(_queries(), mean, oas.covariance_) for mean in means], axis=0
    )
    assert 0 < oas.shrinkage_ < 1
    np.testing.assert_allclose(_fit(Mahalanobis("oas"), features, labels)(_queries()), shrunk, 1e-6)
    given = _fit(Mahalanobis(oas.shrinkage_), features, labels)
    np.testing.assert_allclose(given(_queries()), shrunk, 1e-6)


def _mixture(weights: np.ndarray, means: np.ndarray, covariances: np.ndarray) -> GaussianMixture:
    mixture = GaussianMixture(len(weights))
    mixture.weights_, mixture.means_, mixture.covariances_ = weights, means, covariances
    mixture.precisions_cholesky_ = np.stack(
        [np.linalg.cholesky(np.linalg.inv(covariance)) for covariance in covariances]
    )
    return mixture


def _class_covariances(features: Tensor, labels: Tensor, shrinkage: float) -> np.ndarray:
    covariances = []
    for label in range(CLASSES):
        covariance = np.cov(features[labels == label].numpy(), rowvar=False, bias=True)
        target = np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        covariances.append((1 - shrinkage) * covariance + shrinkage * target)
    return np.stack(covariances)


@pytest.mark.parametrize("n_components", [None, 9, 4])
@pytest.mark.parametrize("shrinkage", [0.0, 1e-3, 0.2])
def test_gmm_equals_scikit_learn(shrinkage: float, n_components: int | None) -> None:
    features, labels = _data()
    labels = torch.where(torch.arange(400) < 100, 0, labels)  # unequal priors
    queries = _queries()
    score = _fit(ClassGMM(shrinkage, n_components), features, labels)
    actual = score(queries)
    if n_components is not None:
        pca = PCA(n_components).fit(features)
        features, queries = (torch.from_numpy(pca.transform(part)) for part in (features, queries))
    mixture = _mixture(
        labels.bincount().numpy() / 400,
        _class_means(features, labels),
        _class_covariances(features, labels, shrinkage),
    )
    assert actual.dtype == torch.float32
    assert actual.shape == (50,)
    np.testing.assert_allclose(actual, -mixture.score_samples(queries), rtol=1e-6)


def test_gmm_fills_up_small_classes_with_the_pooled_covariance() -> None:
    features, labels = _data()
    labels = torch.where((labels == 3) & (torch.arange(400) > 20), 0, labels)  # 5 left of class 3
    with pytest.warns(FitWarning, match="1 of 4 classes have no more samples than the 9 features"):
        score = _fit(ClassGMM(0.0), features, labels)
    counts, means = labels.bincount().numpy(), _class_means(features, labels)
    covariances = _class_covariances(features, labels, 0.0)
    pooled = (counts[:, None, None] * covariances).sum(0) / 400
    covariances[3] = (5 * covariances[3] + 5 * pooled) / 10
    expected = -_mixture(counts / 400, means, covariances).score_samples(_queries())
    np.testing.assert_allclose(score(_queries()), expected, rtol=1e-6)


def test_gmm_takes_a_class_of_one_sample_and_one_class_alone() -> None:
    features, labels = _data()
    labels = torch.where(labels == 3, 2, labels)
    labels[0] = 3
    with pytest.warns(FitWarning, match="1 of 4 classes"):
        score = _fit(ClassGMM(), features, labels)
    assert bool(score(_queries()).isfinite().all())
    alone = _fit(ClassGMM(0.0), features, torch.zeros_like(labels))
    covariance = np.cov(features.numpy(), rowvar=False, bias=True)
    mixture = _mixture(np.ones(1), features.numpy().mean(0)[None], covariance[None])
    np.testing.assert_allclose(alone(_queries()), -mixture.score_samples(_queries()), rtol=1e-6)


def test_gmm_refuses_a_singular_covariance() -> None:
    features, labels = _data()
    features[:, 2] = 1.0
    with pytest.raises(InputError, match=r"class 0 is singular at shrinkage=0\.0"):
        _fit(ClassGMM(0.0), features, labels)
    assert bool(_fit(ClassGMM(), features, labels)(_queries()).isfinite().all())


ALL = [Mahalanobis(), RelativeMahalanobis("oas"), ClassGMM(), ClassGMM("oas", 3)]


@pytest.mark.parametrize("score", ALL, ids=repr)
class TestEveryGaussianScore:
    def test_merging_in_any_order_equals_one_pass(self, score: Any) -> None:
        features, labels = _data()
        expected = _fit(score, features, labels)(_queries())
        for order in itertools.permutations(torch.randperm(400).tensor_split(3)):
            merged = type(score)(**score.config())
            merged.merge(type(score)(**score.config()))  # a shard that saw nothing
            for shard in order:
                part = type(score)(**score.config())
                part.absorb(features[shard], labels[shard], shard)
                merged.merge(part)
            merged.finish()
            torch.testing.assert_close(merged(_queries()), expected, rtol=1e-6, atol=1e-6)

    def test_state_is_the_configuration_and_what_was_fitted(self, score: Any) -> None:
        _fit(score, *_data())
        copy = type(score)(**score.config())
        assert copy.config() == score.config()
        assert not copy.is_fitted
        copy.fitted = {name: tensor.clone() for name, tensor in score.fitted.items()}
        assert torch.equal(copy(_queries()), score(_queries()))

    def test_half_precision_is_upcast(self, score: Any) -> None:
        features, labels = _data()
        features, queries = features.bfloat16(), _queries().bfloat16()
        actual = _fit(score, features, labels)(queries)
        assert actual.dtype == torch.float32
        assert torch.equal(actual, _fit(score, features.double(), labels)(queries.double()))

    def test_empty_batches_and_nan(self, score: Any) -> None:
        features, labels = _data()
        score.begin(None)
        with pytest.raises(NotFittedError):
            score(_queries())
        score.absorb(features[:0], labels[:0], torch.arange(0))
        score.absorb(features, labels, torch.arange(400))
        score.finish()
        assert score(_queries()[:0]).shape == (0,)
        queries = _queries()[:3]
        queries[1, 4] = float("nan")
        assert score(queries).isnan().tolist() == [False, True, False]

    def test_classes_without_samples_are_left_out(self, score: Any) -> None:
        features, labels = _data()
        expected = _fit(score, features, labels)(_queries())
        with pytest.warns(FitWarning, match="no reference samples"):
            _fit(score, features, labels * 2)
        torch.testing.assert_close(score(_queries()), expected, rtol=1e-6, atol=1e-6)

    def test_refuses_what_does_not_fit(self, score: Any) -> None:
        features, labels = _data()
        with pytest.raises(InputError, match="labels are needed"):
            type(score)().absorb(features, None, torch.arange(400))
        with pytest.raises(InputError, match="no reference samples"):
            type(score)().finish()
        with pytest.raises(InputError, match="same settings"):
            score.merge(type(score)(0.7))
        with pytest.raises(InputError, match="same settings"):
            score.merge(object())
        broken = features.clone()
        broken[123, 0] = float("nan")
        with pytest.raises(InputError, match=r"positions 123\)"):
            _fit(type(score)(), broken, labels)
        with pytest.raises(InputError, match="must have 9 columns"):
            _fit(score, features, labels)(torch.rand(2, 8))
        for shrinkage in (-0.1, 1.1, "ledoit-wolf", None):
            with pytest.raises(InputError, match="shrinkage must be"):
                type(score)(shrinkage)


def test_constant_features_alone_are_refused() -> None:
    with pytest.raises(InputError, match="do not vary within the classes"):
        _fit(Mahalanobis(0.1), torch.ones(40, 3), torch.arange(40) % 2)
    with pytest.raises(InputError, match="n_components=10 is more than the 9 features"):
        _fit(ClassGMM(n_components=10), *_data())
    with pytest.raises(InputError, match="n_components must be at least 1"):
        ClassGMM(n_components=0)
