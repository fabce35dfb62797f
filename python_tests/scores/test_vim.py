"""ViM against NumPy in float64 and pytorch-ood."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peers import import_pytorch_ood
from scipy.special import logsumexp
from torch import Tensor

from grood_fast.errors import FitWarning, InputError, NotFittedError
from grood_fast.scores.vim import ViM

CLASSES, DIM = 5, 16


def _head(bias: bool = True) -> Any:
    generator = torch.Generator().manual_seed(7)
    return SimpleNamespace(
        weight=torch.randn(CLASSES, DIM, generator=generator).requires_grad_(),
        bias=(torch.randn(CLASSES, generator=generator) + 2).requires_grad_() if bias else None,
    )


def _signals(head: Any, count: int = 300, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(6))
    features = (torch.randn(count, DIM, generator=generator) @ mix).relu() + 0.5
    logits = torch.nn.functional.linear(features, head.weight, head.bias).detach()
    return SimpleNamespace(features=features, logits=logits)


def _rows(z: Any, rows: Tensor | slice) -> Any:
    return SimpleNamespace(features=z.features[rows], logits=z.logits[rows])


def _fit(score: ViM, head: Any, z: Any, batch: int = 64) -> ViM:
    score.begin(head)
    for indices in torch.arange(len(z.features)).split(batch):
        score.absorb(_rows(z, indices), None, indices)
    score.finish()
    return score


def _expected(head: Any, reference: Any, z: Any, dim: int) -> np.ndarray:
    """The paper's equations, in float64."""
    origin = np.zeros(DIM)
    if head.bias is not None:
        weight, bias = (part.detach().double().numpy() for part in (head.weight, head.bias))
        origin = -np.linalg.pinv(weight) @ bias
    shifted = reference.features.double().numpy() - origin
    _, vectors = np.linalg.eigh(shifted.T @ shifted / len(shifted))
    residual = vectors[:, : DIM - dim]
    norms = np.linalg.norm(shifted @ residual, axis=1)
    alpha = reference.logits.double().numpy().max(1).mean() / norms.mean()
    shifted = z.features.double().numpy() - origin
    virtual = alpha * np.linalg.norm(shifted @ residual, axis=1)
    result: np.ndarray = virtual - logsumexp(z.logits.double().numpy(), axis=1)
    return result


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dim", [0, 1, 7, 15, None])
def test_equals_numpy(dim: int | None, bias: bool) -> None:
    head = _head(bias)
    reference, z = _signals(head), _signals(head, 40, seed=1)
    actual = _fit(ViM(dim), head, reference)(z)
    assert actual.dtype == torch.float32
    assert actual.shape == (40,)
    assert not actual.requires_grad
    expected = _expected(head, reference, z, DIM // 2 if dim is None else dim)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_equals_pytorch_ood() -> None:
    import_pytorch_ood()
    from pytorch_ood.detector import ViM as PeerViM

    head = _head()
    reference, z = _signals(head), _signals(head, 40, seed=1)
    peer = PeerViM(None, d=6, w=head.weight, b=head.bias)
    peer.fit_features(reference.features, torch.zeros(300))
    actual = _fit(ViM(6), head, reference)(z)
    np.testing.assert_allclose(actual, peer.predict_features(z.features), rtol=1e-4, atol=1e-4)


def test_the_paper_chooses_the_dimension_by_the_features() -> None:
    assert [ViM()._principal_dim(features) for features in (64, 767, 768, 2047, 2048)] == [
        32, 383, 512, 512, 1000
    ]  # fmt: skip


@pytest.mark.parametrize("max_samples", [50_000, 100])
def test_merging_in_any_order_equals_one_pass(max_samples: int) -> None:
    head = _head()
    reference, z = _signals(head), _signals(head, 40, seed=1)
    expected = _fit(ViM(6, max_samples), head, reference)(z)
    for order in itertools.permutations(torch.randperm(300).tensor_split(3)):
        merged = ViM(6, max_samples)
        merged.begin(head)
        for shard in order:
            part = ViM(6, max_samples)
            part.begin(head)
            part.absorb(_rows(reference, shard), None, shard)
            merged.merge(part)
        merged.finish()
        torch.testing.assert_close(merged(z), expected, rtol=1e-5, atol=1e-5)


def test_a_subsample_only_moves_alpha_and_little() -> None:
    head = _head()
    reference = _signals(head, 3000)
    whole, part = _fit(ViM(6), head, reference), _fit(ViM(6, 500), head, reference)
    torch.testing.assert_close(whole.fitted["residual"], part.fitted["residual"])
    ratio = float(part.fitted["alpha"] / whole.fitted["alpha"])
    assert ratio != 1
    assert abs(ratio - 1) < 0.1


def test_state_is_the_configuration_and_what_was_fitted() -> None:
    head = _head()
    score, z = _fit(ViM(6, 200), head, _signals(head)), _signals(head, 40, seed=1)
    copy = ViM(**score.config())
    assert copy.config() == score.config()
    assert not copy.is_fitted
    with pytest.raises(NotFittedError):
        copy(z)
    copy.fitted = {name: tensor.clone() for name, tensor in score.fitted.items()}
    assert torch.equal(copy(z), score(z))


def test_half_precision_is_upcast_and_empty_batches_pass() -> None:
    head = _head()
    reference, z = _signals(head), _signals(head, 40, seed=1)
    for signals in (reference, z):
        signals.features, signals.logits = signals.features.bfloat16(), signals.logits.bfloat16()
    actual = _fit(ViM(6), head, reference)(z)
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual, _expected(head, reference, z, 6), rtol=1e-4, atol=1e-4)
    score = ViM(6)
    score.begin(head)
    score.absorb(_rows(reference, slice(0, 0)), None, torch.arange(0))
    score.absorb(reference, None, torch.arange(300))
    score.finish()
    assert torch.equal(score(z), actual)
    assert score(_rows(z, slice(0, 0))).shape == (0,)
    z.features[1, 0], z.logits[2, 0] = float("nan"), float("nan")
    assert score(_rows(z, slice(0, 4))).isnan().tolist() == [False, True, True, False]


def test_refuses_what_does_not_fit() -> None:
    head = _head()
    reference = _signals(head)
    with pytest.raises(InputError, match="dim=16 leaves no residual of 16 features"):
        _fit(ViM(16), head, reference)
    with pytest.raises(InputError, match="must not be negative"):
        ViM(-1)
    with pytest.raises(InputError, match="must have 16 columns, got 15"):
        _fit(ViM(), head, SimpleNamespace(features=torch.rand(9, 15), logits=torch.rand(9, 5)))
    with pytest.raises(InputError, match="logits must be"):
        ViM().absorb(
            SimpleNamespace(features=torch.rand(9, 16), logits=None), None, torch.arange(9)
        )
    with pytest.raises(InputError, match="same settings"):
        ViM(3).merge(ViM(4))
    unbegun = ViM(3)
    unbegun.absorb(reference, None, torch.arange(300))
    with pytest.raises(InputError, match=r"begin\(classifier\)"):
        unbegun.finish()
    with pytest.raises(InputError, match="no reference samples"):
        _fit(ViM(), head, _rows(reference, slice(0, 0)))
    reference.features[17, 3] = float("inf")
    with pytest.raises(InputError, match=r"positions 17\)"):
        _fit(ViM(), head, reference)


def test_says_when_no_residual_is_left_or_alpha_is_not_positive() -> None:
    head = _head(bias=False)
    z = _signals(head)
    z.features[:, 4:] = 0
    with pytest.raises(InputError, match="no residual is left: give a smaller dim"):
        _fit(ViM(6), head, z)
    z = _signals(head)
    z.logits -= 100
    with pytest.warns(FitWarning, match="alpha is not positive"):
        _fit(ViM(6), head, z)
