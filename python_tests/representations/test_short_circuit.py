"""GSC against masked layers, autograd and finite differences."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch
import toys
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

import grood_fast as gf
from grood_fast.classifier import Classifier
from grood_fast.errors import InputError
from grood_fast.layers import layer_need
from grood_fast.representations import ShortCircuitedLogits
from grood_fast.signals import stream

TWIN = torch.float64


class Tail(nn.Module):
    """Smooth behind the layer ``body``, so that first order and exact differ as they should."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.tail = nn.Sequential(nn.Conv2d(4, 6, 3), nn.GELU())
        self.head = nn.Linear(6, 5)

    def after(self, features: Tensor) -> Tensor:
        logits: Tensor = self.head(self.tail(features).mean(dim=(2, 3)))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.body(x))


def tail() -> tuple[Tail, Tensor]:
    model = Tail().double().eval()
    return model, torch.randn(7, 1, 9, 9, dtype=TWIN, generator=torch.Generator().manual_seed(0))


def logits_of(model: nn.Module, x: Tensor, representation: ShortCircuitedLogits) -> Tensor:
    with closing(stream(Classifier(model), [x], representation.needs)) as batches:
        return representation(next(batches)).logits


def by_hand(model: Tail, x: Tensor, by: str, share: float, logits: str) -> Tensor:
    """One sample at a time, with autograd's whole Jacobian."""
    found = []
    for one in model.body(x).detach():
        y = model.after(one[None])[0].detach()
        jacobian = torch.autograd.functional.jacobian(lambda f: model.after(f[None])[0], one)
        g = jacobian[y.argmax()].flatten()
        f = one.flatten()
        importance = g.abs() if by == "gradient" else g * f
        removed = importance.argsort(descending=True)[: max(1, int(share * len(f)))]
        kept = f.clone()
        kept[removed] = 0
        change = jacobian.flatten(1) @ (kept - f)
        if logits == "exact":
            found.append(model.after(kept.reshape(one.shape)[None])[0].detach())
        elif logits == "first_order":
            found.append(y + change)
        else:
            only = y.clone()
            only[y.argmax()] += change[y.argmax()]
            found.append(only)
    return torch.stack(found)


@pytest.mark.parametrize("by", ["gradient", "contribution"])
@pytest.mark.parametrize("logits", ["first_order", "predicted", "exact"])
@pytest.mark.parametrize("share", [1e-6, 0.05, 0.5])
def test_behind_a_layer(by: str, logits: str, share: float) -> None:
    model, x = tail()
    before = toys.Condition(model)
    representation = ShortCircuitedLogits("body", share, by, logits)
    actual = logits_of(model, x, representation)
    before.assert_same(model)
    assert_close(actual, by_hand(model, x, by, share, logits), rtol=1e-9, atol=1e-11)
    assert not actual.requires_grad


def test_first_order_is_not_exact_behind_something_curved() -> None:
    model, x = tail()
    first, exact = (
        logits_of(model, x, ShortCircuitedLogits("body", 0.3, logits=logits))
        for logits in ("first_order", "exact")
    )
    assert (first - exact).abs().max() > 1e-3


@pytest.mark.parametrize("by", ["gradient", "contribution"])
@pytest.mark.parametrize("logits", ["first_order", "predicted", "exact"])
@pytest.mark.parametrize("share", [1e-6, 0.1, 0.17, 0.9])
def test_on_the_head(by: str, logits: str, share: float) -> None:
    model, x = toys.Net(), toys.samples(20)
    plain, h = toys.truth(model, x)
    expected = []
    for f, y in zip(h, plain, strict=True):
        row = model.head.weight.detach()[y.argmax()]
        importance = row.abs() if by == "gradient" else row * f
        removed = importance.argsort(descending=True)[: max(1, int(share * len(f)))]
        kept = f.clone()
        kept[removed] = 0
        new = functional.linear(kept, model.head.weight, model.head.bias).detach()
        if logits == "predicted":
            only = y.clone()
            only[y.argmax()] = new[y.argmax()]
            new = only
        expected.append(new)
    actual = logits_of(model, x, ShortCircuitedLogits("head", share, by, logits))
    assert_close(actual, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_on_the_head_the_mask_depends_on_the_class_alone() -> None:
    """Where the gradient decides; behind something non-linear it is each sample's own."""
    model, x = toys.Net(), toys.samples(200)
    plain, h = toys.truth(model, x)
    actual = logits_of(model, x, ShortCircuitedLogits("head", 0.5))
    predicted = plain.argmax(dim=1)
    for label in range(toys.CLASSES):
        rows = predicted == label
        removed = model.head.weight.detach()[label].abs().argsort(descending=True)[:3]
        pruned = model.head.weight.detach().clone()
        pruned[:, removed] = 0  # one and the same pruned head for all of the class
        expected = functional.linear(h[rows], pruned, model.head.bias.detach())
        assert_close(actual[rows], expected, rtol=1e-5, atol=1e-5)


def test_a_changed_head_is_noticed() -> None:
    model, x = toys.Net(), toys.samples(20)
    detector = gf.GSC().bind(model)
    before = detector.score([x])
    with torch.no_grad():
        model.head.weight.mul_(2)
    fresh = gf.GSC().bind(model).score([x])
    assert_close(detector.score([x]), fresh, rtol=0, atol=0)
    assert not torch.equal(before, fresh)


def test_scores() -> None:
    model, x = toys.Net(), toys.samples(20)
    plain, _ = toys.truth(model, x)
    after = logits_of(model, x, ShortCircuitedLogits())
    scored = {
        score: gf.GSC(score=score).bind(model).score([x])
        for score in ("energy", "msp", "energy_drop")
    }
    assert_close(scored["energy"].as_subclass(Tensor), -after.logsumexp(dim=1))
    msp = 1 - after.softmax(dim=1).amax(dim=1)
    assert_close(scored["msp"].as_subclass(Tensor), msp, rtol=1e-4, atol=1e-6)
    drop = after.logsumexp(dim=1) - plain.logsumexp(dim=1)
    assert_close(scored["energy_drop"].as_subclass(Tensor), drop, rtol=1e-4, atol=1e-5)


def test_refuses() -> None:
    for options in ({"share": 0.0}, {"by": "chance"}, {"logits": "both"}, {"score": "best"}):
        with pytest.raises(InputError):
            gf.GSC(**options)
    signals = toys.signals_of(toys.Net(), toys.samples(3))
    with pytest.raises(InputError, match="compares logits before and after"):
        gf.EnergyDrop()(signals.statistics)

    class Opaque(toys.Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.backbone(x)
            with torch.no_grad():
                return self.head(h)

    with pytest.raises(InputError, match="turns autograd off behind it"):
        gf.GSC("backbone.2").bind(Opaque()).score([toys.samples(4)])


def test_other_things_in_the_same_pass() -> None:
    model, x = tail()
    together = gf.score(model, [x], [gf.GSC(), gf.GSC("body"), gf.GSC(None), "energy"])
    alone = [
        gf.score(model, [x], one) for one in (gf.GSC(), gf.GSC("body"), gf.GSC(None), "energy")
    ]
    for one, other in zip(together.values(), alone, strict=True):
        assert_close(one, other, rtol=0, atol=0)
    assert layer_need("body") in gf.GSC("body").needs
