"""Scores on the last layer's gradient against autograd, sample by sample, and pytorch-ood."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toys
from peers import import_pytorch_ood
from torch import Tensor, nn

from grood_fast.classifier import Classifier
from grood_fast.detectors import Detector, ExGrad, GradNorm, GradOrth
from grood_fast.errors import InputError
from grood_fast.representations import HeadGradient
from grood_fast.scores import ExpectedGradientNorm, GradientNorm, ProjectedGradientNorm
from grood_fast.signals import stream

ORDERS = {"l1": 1, "l2": 2, "linf": float("inf")}
X = toys.samples(20, dtype=torch.float64)


def head_gradients(
    model: toys.Net, loss: Callable[[Tensor], Tensor], bias: bool = False
) -> list[Tensor]:
    """Per sample, the flattened gradient of ``loss`` with respect to the head's parameters."""
    model.eval()
    parameters = [p for n, p in model.head.named_parameters() if bias or n == "weight"]
    gradients = []
    for x in X:
        parts = torch.autograd.grad(loss(model(x[None])[0]), parameters)
        gradients.append(torch.cat([part.flatten() for part in parts]))
    return gradients


def uniform(temperature: float) -> Callable[[Tensor], Tensor]:
    """Cross entropy to the uniform distribution, summed over the classes: C times the mean."""
    return lambda f: len(f) * F.cross_entropy(f / temperature, torch.full_like(f, 1 / len(f)))


@pytest.mark.parametrize("classes", [1, 2, toys.CLASSES, 40])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.25, 7.0])
@pytest.mark.parametrize("norm", ORDERS)
def test_gradnorm_is_minus_autograds_norm(
    norm: str, temperature: float, bias: bool, classes: int
) -> None:
    model = toys.Net(classes=classes).double()
    gradients = head_gradients(model, uniform(temperature), bias)
    expected = -torch.stack([gradient.norm(ORDERS[norm]) for gradient in gradients])
    actual = GradNorm(norm, temperature, bias)(toys.signals_of(model, X))
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    if classes == toys.CLASSES:
        single = GradNorm(norm, temperature, bias)(toys.signals_of(model.float(), X.float()))
        assert single.dtype == torch.float32
        torch.testing.assert_close(single, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("objective", "loss"),
    [
        ("energy", lambda f: -f.logsumexp(0)),
        ("predicted", lambda f: F.cross_entropy(f, f.detach().argmax())),
        ("confounding", lambda f: F.binary_cross_entropy_with_logits(f, 0 * f + 1) * len(f)),
        ("max_logit", lambda f: f.max()),
    ],
)
def test_any_objective_with_the_sign_it_calls_for(objective: str, loss: Any) -> None:
    model = toys.Net().double()
    norms = torch.stack([gradient.norm() for gradient in head_gradients(model, loss)])
    detector = Detector(GradientNorm("l2"), HeadGradient(objective))
    sign = {"predicted": 1, "confounding": 1}.get(objective, -1)
    actual = detector(toys.signals_of(model, X))
    torch.testing.assert_close(actual, sign * norms, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("bias", [False, True])
def test_gradnorm_is_pytorch_oods_times_the_classes(bias: bool, temperature: float) -> None:
    """Its loss is averaged over the classes, ours summed; the order of samples is the same."""
    import_pytorch_ood()
    from pytorch_ood.detector import GradNorm as Peer

    net = toys.Net()
    model = nn.Sequential(net.backbone, net.head).eval()
    chosen = ("1.weight", "1.bias") if bias else ("1.weight",)
    peer = Peer(model, param_filter=lambda name: name in chosen, temperature=temperature)
    x = X.float()
    expected = toys.CLASSES * peer.predict(x)
    actual = GradNorm(temperature=temperature, bias=bias)(toys.signals_of(model, x))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def expected_norm(model: toys.Net, temperature: float = 1.0, bias: bool = False) -> Tensor:
    """Σ_y p_y ‖d cross entropy(f/T, y) / d parameters‖₁, label by label."""
    logits, _ = toys.truth(model, X)
    p = (logits / temperature).softmax(1)
    total = torch.zeros(len(X), dtype=torch.float64)
    for label in range(p.shape[1]):

        def loss(f: Tensor, y: int = label) -> Tensor:
            return F.cross_entropy(f / temperature, torch.tensor(y))

        norms = [gradient.abs().sum() for gradient in head_gradients(model, loss, bias)]
        total += p[:, label] * torch.stack(norms)
    return total


@pytest.mark.parametrize("classes", [1, 2, toys.CLASSES, 12])
def test_exgrad_is_the_expectation_of_autograds_norm(classes: int) -> None:
    model = toys.Net(classes=classes).double()
    actual = ExGrad()(toys.signals_of(model, X))
    torch.testing.assert_close(actual, expected_norm(model), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_exgrad_with_bias_and_temperature(temperature: float, bias: bool) -> None:
    model = toys.Net().double()
    objective = {"name": "predicted", "temperature": temperature}
    detector = Detector(ExpectedGradientNorm(), HeadGradient(objective, bias))
    expected = expected_norm(model, temperature, bias)
    torch.testing.assert_close(detector(toys.signals_of(model, X)), expected)


def test_exgrad_keeps_very_confident_samples_apart() -> None:
    """2‖h‖₁(1 − Σp²) in float32, where Σp² rounds to 1."""
    confidence = torch.arange(5.0, 80.0, 0.5)
    head = nn.Linear(1, 4, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0], [0], [0], [0]]))
    actual = ExGrad()(toys.signals_of(head, confidence[:, None]))
    tail = (-confidence.double()).exp()
    p = 1 / (1 + 3 * tail)
    expected = 2 * confidence.double() * (p * 3 * tail * p + 3 * tail * p * (1 - tail * p))
    torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=0)
    assert (actual > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [GradNorm, ExGrad])
def test_half_precision_features_are_added_up_in_float32(
    make: Callable[[], Detector], dtype: torch.dtype
) -> None:
    """The L1 norm of 2000 halves is more than float16 can hold, and bfloat16 drops its digits."""
    head = nn.Linear(2000, 3).to(dtype)
    with torch.no_grad():
        head.weight.mul_(0.01)
    h = (100 * torch.rand(8, 2000, generator=torch.Generator().manual_seed(0))).to(dtype)
    signals = toys.signals_of(head, h)
    logits, wide = signals.logits.double(), h.double()
    p = logits.softmax(1)
    expected = {
        GradNorm: -(3 * p - 1).abs().sum(1) * wide.abs().sum(1),
        ExGrad: 2 * wide.abs().sum(1) * (1 - p.square().sum(1)),
    }[make]
    actual = make()(signals)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=1e-2)


def test_alone_they_read_gradnorms_gradient() -> None:
    signals = toys.signals_of(toys.Net(), X.float())
    assert torch.equal(Detector(GradientNorm("l2"))(signals), GradNorm("l2")(signals))
    assert torch.equal(Detector(ExpectedGradientNorm())(signals), ExGrad()(signals))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("cast", [Tensor.float, Tensor.double])
def test_a_model_may_cast_its_output(cast: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    model = toys.Net(output=cast).to(dtype)
    mixed = toys.signals_of(model, X.to(dtype))
    assert mixed.features.dtype == dtype
    assert mixed.logits.dtype == cast(X).dtype
    plain = toys.signals_of(toys.Net(), X.float())
    tolerance = 5e-2 if dtype == torch.float16 else 1e-4
    for detector in (GradNorm(), ExGrad()):
        torch.testing.assert_close(
            detector(mixed).float(), detector(plain), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("detector", [GradNorm(), GradNorm("linf", 2.0, True), ExGrad()], ids=repr)
def test_empty_batches_and_nan(detector: Detector) -> None:
    x = X.float().clone()
    signals = toys.signals_of(toys.Net(), x)
    assert detector(signals).shape == (20,)
    x[3, 0] = torch.nan
    assert detector(toys.signals_of(toys.Net(), x)).isnan().nonzero().tolist() == [[3]]
    _, empty = stream(Classifier(toys.Net()), [x[:2], x[:0]], {"features"})
    assert detector(empty).shape == (0,)


def test_configuration() -> None:
    assert GradientNorm("l2").config() == {"norm": "l2"}
    assert GradientNorm("l2").fresh().norm == "l2"
    assert ExpectedGradientNorm().config() == {}
    with pytest.raises(InputError, match="unknown norm 'l3'; known: l1, l2, linf"):
        GradientNorm("l3")
    with pytest.raises(InputError, match="unknown norm 'L1'"):
        GradNorm("L1")
    with pytest.raises(InputError, match="temperature must be positive"):
        GradNorm(temperature=0)


@pytest.mark.parametrize("kept_share", [0.5, 0.97, 1.0])
def test_gradorth_is_the_norm_of_the_projected_gradient(kept_share: float) -> None:
    """Autograd's gradient matrix times the leading right-singular vectors of the features."""
    model = toys.Net().double()
    reference = toys.batches(90, dtype=torch.float64)
    detector = GradOrth(kept_share).fit(model, reference)
    features = torch.cat([toys.truth(model, x)[1] for x, _ in reference])
    _, singular, right = torch.linalg.svd(features, full_matrices=False)
    shares = singular.square().cumsum(0) / singular.square().sum()
    basis = right[: int((shares < kept_share - 1e-12).sum()) + 1]
    gradients = head_gradients(model, uniform(1.0))
    expected = [-(g.reshape(toys.CLASSES, -1) @ basis.T).norm() for g in gradients]
    actual = detector(toys.signals_of(model, X))
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-9, atol=1e-12)
    if kept_share == 1.0:  # all of the features' space: GradNorm in the L2 norm
        whole = GradNorm("l2")(toys.signals_of(model, X))
        torch.testing.assert_close(actual, whole, rtol=1e-9, atol=1e-12)


def test_gradorth_refuses_and_merges() -> None:
    with pytest.raises(InputError, match=r"kept_share must lie in \(0, 1\]"):
        GradOrth(0.0)
    model = toys.Net()
    whole = GradOrth().fit(model, toys.batches(64))
    parts = [ProjectedGradientNorm(), ProjectedGradientNorm()]
    representation = HeadGradient("uniform")
    for part, shard in zip(parts, (slice(0, 2), slice(2, 4)), strict=True):
        part.begin(None)  # type: ignore[arg-type]
        for x, _ in toys.batches(64)[shard]:
            z = representation(toys.signals_of(model, x))
            part.absorb(z, None, torch.arange(len(x)))
    parts[0].merge(parts[1])
    parts[0].finish()
    z = representation(toys.signals_of(model, X.float()))
    torch.testing.assert_close(parts[0](z), whole.score_function(z), rtol=1e-5, atol=1e-6)
