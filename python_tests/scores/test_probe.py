"""The linear probe against scikit-learn, autograd and NumPy, and the norm against NumPy."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from grood_fast.errors import InputError, NotFittedError
from grood_fast.scores import GEN, KNN, MSP, Energy, LinearProbe, MaxLogit, Norm, Score

CLASSES, DIM = 4, 6


def _data(count: int = 600, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Overlapping classes of very different scales."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(count) % CLASSES
    z = centres[labels] + 1.5 * torch.randn(count, DIM, generator=generator)
    return z * torch.logspace(-2, 2, DIM) + 3, labels


def _fit(probe: LinearProbe, z: Tensor, labels: Tensor, batch: int = 100) -> LinearProbe:
    probe.begin(None)  # type: ignore[arg-type]
    for indices in torch.arange(len(z)).split(batch):
        probe.absorb(z[indices], labels[indices], indices)
    probe.finish()
    return probe


def test_learns_what_logistic_regression_learns() -> None:
    """Without a penalty both have one optimum, up to what is added to all logits of a sample."""
    z, labels = _data(2000)
    probe = LinearProbe(epochs=1500, learning_rate=0.5, weight_decay=0.0, batch_size=2000)
    ours = _fit(probe, z, labels).logits(z).double().numpy()
    scaler = StandardScaler().fit(z)
    peer = LogisticRegression(C=np.inf, max_iter=5000, tol=1e-8).fit(scaler.transform(z), labels)
    theirs = peer.decision_function(scaler.transform(z))
    ours -= ours.mean(axis=1, keepdims=True)
    theirs -= theirs.mean(axis=1, keepdims=True)
    assert np.abs(ours - theirs).max() < 0.01 * np.abs(theirs).max()


def test_the_defaults_classify_as_well() -> None:
    (z, labels), (test, truth) = _data(2000), _data(1000, seed=1)
    probe = _fit(LinearProbe(), z, labels)
    scaler = StandardScaler().fit(z)
    peer = LogisticRegression(max_iter=1000).fit(scaler.transform(z), labels)
    accuracy = float((probe.logits(test).argmax(1) == truth).float().mean())
    assert accuracy > peer.score(scaler.transform(test), truth) - 0.01


@pytest.mark.parametrize("score", ["msp", "maxlogit", "energy", "gen", Energy(2.0), GEN(0.3, 2)])
def test_scores_its_logits(score: Any) -> None:
    z, labels = _data()
    probe = _fit(LinearProbe(score), z, labels)
    weight, bias = probe.fitted["weight"].double(), probe.fitted["bias"].double()
    logits = (z.double() @ weight.T + bias).float()
    kinds: dict[str, Score] = {
        "msp": MSP(),
        "maxlogit": MaxLogit(),
        "energy": Energy(),
        "gen": GEN(),
    }
    inner = kinds[score] if isinstance(score, str) else score
    torch.testing.assert_close(probe(z), inner(logits), rtol=1e-4, atol=1e-5)


def test_odin_against_autograd() -> None:
    z, labels = _data()
    temperature, step = 10.0, 0.05
    probe = _fit(LinearProbe(MSP(temperature), perturbation=step), z, labels)
    x = z[:50].clone().requires_grad_()
    logits = nn.functional.linear(x, probe.fitted["weight"], probe.fitted["bias"]) / temperature
    torch.log_softmax(logits, 1).amax(1).sum().backward()
    assert x.grad is not None
    moved = x.detach() - step * torch.sign(-x.grad)
    moved_logits = nn.functional.linear(moved, probe.fitted["weight"], probe.fitted["bias"])
    expected = 1 - torch.softmax(moved_logits / temperature, 1).amax(1)
    torch.testing.assert_close(probe(z[:50]), expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(probe(z[:50]), _fit(LinearProbe(MSP(temperature)), z, labels)(z[:50]))


def test_react_clips_at_a_quantile_of_the_reference() -> None:
    z, labels = _data()
    probe = _fit(LinearProbe(shaping="react", quantile=0.8, unshaped=2), z, labels)
    plain = _fit(LinearProbe(), z, labels)
    threshold = np.quantile(z[:, 2:].numpy(), 0.8, method="inverted_cdf")
    clipped = z.clone()
    clipped[:, 2:] = clipped[:, 2:].clamp(max=float(threshold))
    assert not torch.equal(clipped, z)
    torch.testing.assert_close(probe(z), plain(clipped))


def test_bats_confines_to_the_references_deviations() -> None:
    z, labels = _data()
    probe = _fit(LinearProbe(shaping="bats", deviations=0.5, unshaped=1), z, labels)
    plain = _fit(LinearProbe(), z, labels)
    mean, deviation = z.numpy().mean(0), z.numpy().std(0)
    confined = np.clip(z.numpy(), mean - 0.5 * deviation, mean + 0.5 * deviation)
    confined[:, 0] = z[:, 0]
    torch.testing.assert_close(probe(z), plain(torch.from_numpy(confined)), rtol=1e-4, atol=1e-4)


def test_everything_unshaped_is_not_shaped() -> None:
    z, labels = _data()
    for shaping in ("react", "bats"):
        probe = _fit(LinearProbe(shaping=shaping, unshaped=DIM + 1), z, labels)
        assert torch.equal(probe(z), _fit(LinearProbe(), z, labels)(z))


def test_comes_out_the_same_and_leaves_the_random_state_alone() -> None:
    z, labels = _data()
    state = torch.get_rng_state()
    first = _fit(LinearProbe(), z, labels)
    torch.rand(3)
    torch.set_rng_state(state)
    again = _fit(LinearProbe(**first.config()), z, labels, batch=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first(z), again(z))
    assert not torch.equal(first(z), _fit(LinearProbe(seed=1), z, labels)(z))


@pytest.mark.parametrize("max_samples", [50_000, 100])
def test_merging_shards_in_any_order_equals_one_pass(max_samples: int) -> None:
    z, labels = _data()
    expected = _fit(LinearProbe(max_samples=max_samples), z, labels)(z)
    for order in permutations([slice(0, 100), slice(100, 350), slice(350, 600)]):
        shards = []
        for part in order:
            shards.append(LinearProbe(max_samples=max_samples))
            shards[-1].begin(None)  # type: ignore[arg-type]
            shards[-1].absorb(z[part], labels[part], torch.arange(600)[part])
        for other in shards[1:]:
            shards[0].merge(other)
        shards[0].finish()
        assert torch.equal(shards[0](z), expected)


def test_classes_that_do_not_occur_are_left_out() -> None:
    z, labels = _data()
    probe = _fit(LinearProbe(), z, labels * 3 + 1)
    assert torch.equal(probe(z), _fit(LinearProbe(), z, labels)(z))


def test_edges() -> None:
    z, labels = _data()
    probe = _fit(LinearProbe(), z, labels)
    assert probe(z[:0]).shape == (0,)
    assert probe(z[:1]).dtype == torch.float32
    bad = z[:3].clone()
    bad[1, 2] = math.nan
    assert probe(bad).isnan().tolist() == [False, True, False]
    constant = z.clone()
    constant[:, 3] = 5.0
    assert _fit(LinearProbe(), constant, labels)(constant).isfinite().all()
    with torch.inference_mode():
        assert torch.equal(_fit(LinearProbe(), z, labels)(z), probe(z))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "softmax"}, "unknown logit score 'softmax'; known: msp"),
        ({"score": KNN()}, "a probe's score is one of msp"),
        ({"shaping": "ash"}, "shaping must be"),
        ({"quantile": 1.0}, "quantile must lie"),
        ({"deviations": 0.0}, "deviations must be positive"),
        ({"epochs": 0}, "epochs must be positive"),
        ({"learning_rate": math.inf}, "learning_rate must be positive"),
        ({"perturbation": -1.0}, "must not be negative"),
        ({"batch_size": 1}, "at least 2"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LinearProbe(**options)


def test_reference_data_that_does_not_fit() -> None:
    z, labels = _data(20)
    with pytest.raises(InputError, match="at least two classes"):
        _fit(LinearProbe(), z, torch.zeros_like(labels))
    with pytest.raises(InputError, match="labels must be at least 0"):
        _fit(LinearProbe(), z, labels - 1)
    with pytest.raises(InputError, match="class labels are needed"):
        LinearProbe().absorb(z, None, torch.arange(20))
    with pytest.raises(InputError, match="no reference samples"):
        _fit(LinearProbe(), z[:0], labels[:0])
    with pytest.raises(NotFittedError):
        LinearProbe()(z)
    probe = _fit(LinearProbe(), z, labels)
    with pytest.raises(InputError, match=f"must have {DIM} columns"):
        probe(z[:, 1:])


@pytest.mark.parametrize(("norm", "order"), [("l1", 1), ("l2", 2), ("linf", np.inf)])
@pytest.mark.parametrize("negated", [False, True])
def test_norm(norm: str, order: float, negated: bool) -> None:
    z, _ = _data(20)
    expected = np.linalg.norm(z.numpy(), ord=order, axis=1) * (-1 if negated else 1)
    np.testing.assert_allclose(Norm(norm, negated)(z), expected, rtol=1e-5)
    assert Norm(**Norm(norm, negated).config()).config() == Norm(norm, negated).config()


def test_norm_refuses() -> None:
    with pytest.raises(InputError, match="unknown norm"):
        Norm("l3")
    with pytest.raises(InputError, match="shape"):
        Norm()(torch.ones(3))
