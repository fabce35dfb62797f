"""GROOD against its paper's steps, written out: a loop, autograd, and no closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

import grood_fast as gf
from grood_fast import ops
from grood_fast.errors import FitWarning, InputError
from grood_fast.representations.prototype_gradient import SCALE, PrototypeGradient, blurred_noise

EARLY = "backbone.2"
TWIN = torch.float64


def network() -> toys.Net:
    return toys.Net().double().eval()


def by_hand(
    model: toys.Net,
    data: list[tuple[Tensor, Tensor]],
    queries: Tensor,
    mixing: float = 0.5,
    temperature: float = 1.0,
    squared: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The OOD prototype, the queries' gradients and their distance to the nearest of the
    reference's that are classified right."""
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    start, end = model.backbone[:3], model.backbone[3:]
    with torch.no_grad():
        early = start(x)
        h = end(early)
        logits = model.head(h)
        prototypes = torch.stack([h[y == c].mean(dim=0) for c in range(toys.CLASSES)])
        early_prototypes = torch.stack([early[y == c].mean(dim=0) for c in range(toys.CLASSES)])
        mixed = []
        for a, f in zip(early, logits, strict=True):
            second = f.argsort(descending=True)[1]
            mixed.append(end((mixing * a + (1 - mixing) * early_prototypes[second])[None])[0])
        ood_prototype = torch.stack(mixed).mean(dim=0)
        features = end(start(queries))
        predicted = model.head(features).argmax(dim=1)

    def gradients(features: Tensor, labels: Tensor) -> Tensor:
        found = []
        for h, label in zip(features, labels, strict=True):
            p = ood_prototype.clone().requires_grad_()
            distances = torch.stack([(h - q).norm() for q in (*prototypes, p)])
            s = -(distances**2 if squared else distances) / temperature
            functional.cross_entropy(s[None], label[None]).backward()
            assert p.grad is not None
            found.append(p.grad)
        return torch.stack(found)

    right = logits.argmax(dim=1) == y
    bank = gradients(h[right], y[right])
    g = gradients(features, predicted)
    nearest = torch.stack([(one - bank).norm(dim=1).min() for one in g])
    return ood_prototype, g, nearest


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_equals_the_paper_step_by_step(temperature: float, squared: bool) -> None:
    model, data = network(), toys.batches(90, dtype=TWIN)
    queries = toys.samples(25, seed=5, dtype=TWIN)
    detector = gf.GROOD(layer=EARLY, n_synthetic=90, temperature=temperature, squared=squared)
    detector.fit(model, data)
    expected = by_hand(model, data, queries, temperature=temperature, squared=squared)
    representation = detector.representation
    assert isinstance(representation, PrototypeGradient)
    assert_close(representation.fitted["ood_prototype"], expected[0], rtol=1e-9, atol=1e-12)
    z = representation(toys.signals_of(model, queries))
    assert z.dtype == TWIN
    assert_close(z / SCALE, expected[1], rtol=1e-9, atol=1e-12)
    scores = detector.score([queries]).double() / SCALE
    assert_close(scores, expected[2], rtol=1e-5, atol=1e-9)


def test_the_gradient_is_no_unit_vector() -> None:
    """A shortcut in the public code takes the softmax over a single entry, which is 1, for π."""
    torch.manual_seed(0)
    h, p = torch.randn(7, dtype=TWIN), torch.randn(7, dtype=TWIN).requires_grad_()
    prototypes = torch.randn(4, 7, dtype=TWIN)
    s = -torch.stack([(h - q).norm() for q in (*prototypes, p)])
    functional.cross_entropy(s[None], torch.tensor([2])).backward()
    direction = ((h - p) / (h - p).norm()).detach()
    shortcut = (torch.softmax(s[-1:], dim=0) * direction).detach()
    point = p.detach()
    ours, _ = ops.prototype_gradient(h[None], point, prototypes - point)
    assert_close(ours[0], p.grad, rtol=1e-9, atol=1e-12)
    assert shortcut.norm().item() == pytest.approx(1)
    assert p.grad.norm() < 0.9
    assert not torch.allclose(shortcut, p.grad)
    assert_close(ours[0] / ours[0].norm(), shortcut)


def test_other_ood_prototypes() -> None:
    model, data = network(), toys.batches(90, dtype=TWIN)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    h = toys.truth(model, x)[1]
    means = torch.stack([h[y == c].mean(dim=0) for c in range(toys.CLASSES)])
    outliers = 3 * toys.samples(40, seed=9, dtype=TWIN)
    found = {
        "prototype_mean": gf.GROOD("prototype_mean").fit(model, data),
        "validation": gf.GROOD("validation", validation_ood=[outliers]).fit(model, data),
    }
    expected = {
        "prototype_mean": means.mean(dim=0),
        "validation": toys.truth(model, outliers)[1].mean(dim=0),
    }
    for source, detector in found.items():
        actual = detector.representation.fitted["ood_prototype"]
        assert_close(actual, expected[source], rtol=1e-9, atol=1e-12, msg=source)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU()
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x).mean(dim=(2, 3)))
        return logits


def image_batches(count: int = 60) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(count, 2, 9, 9, generator=torch.Generator().manual_seed(3))
    return list(zip(x.split(16), (torch.arange(count) % 3).split(16), strict=True))


def test_noise_with_the_highest_energy() -> None:
    model, data = Images(), image_batches()
    detector = gf.GROOD("noise", n_synthetic=20).fit(model, data)
    kept = torch.cat([x for x, _ in data])
    assert detector.card["representation"]["ood_prototype_samples"] == 20
    scores = detector.score(data)
    assert scores.isfinite().all()
    # Blurred noise stays in the images' range and is smoother than it was.
    batches = blurred_noise(kept[:5], 10)
    assert all(noise.shape == kept[:5].shape for noise in batches)
    assert all(kept.min() <= noise.min() and noise.max() <= kept.max() for noise in batches)
    rough = [float(noise.diff(dim=3).abs().mean() / noise.std()) for noise in batches]
    assert rough[-1] < rough[0] / 2


def test_on_images_the_layer_is_found() -> None:
    model, data = Images(), image_batches()
    before = toys.Condition(model)
    default = gf.GROOD().fit(model, data)
    named = gf.GROOD(layer="body.1").fit(model, data)
    before.assert_same(model)
    other = gf.GROOD("prototype_mean").fit(model, data)
    assert not torch.equal(default.score(data), other.score(data))
    assert_close(default.score(data), named.score(data), rtol=0, atol=0)


def test_scores_on_the_gradient() -> None:
    model, data = network().float(), toys.batches(90)
    queries = toys.samples(25, seed=5)
    z = gf.GROOD().fit(model, data).representation(toys.signals_of(model, queries))
    norm = gf.GROOD(score="norm").fit(model, data).score([queries])
    assert_close(norm.as_subclass(Tensor), z.norm(dim=1))
    cosine = gf.GROOD(score="cosine").fit(model, data).score([queries])
    assert (cosine <= 2).all()
    third = gf.GROOD(k=3).fit(model, data).score([queries])
    first = gf.GROOD(k=1).fit(model, data).score([queries])
    assert (third >= first).all()
    assert gf.GROOD(score=gf.Mahalanobis()).fit(model, data).score([queries]).isfinite().all()


def test_saturated_weights_keep_their_order(tmp_path: Any) -> None:
    """Features far apart: π is 1e-30 and less, and float32 still tells them apart."""
    model, data = network().float(), toys.batches(300)
    with torch.no_grad():
        model.backbone[4].weight.mul_(3000)
        model.head.weight.div_(3000)
    queries = toys.samples(60, seed=5)
    detector = gf.GROOD(layer=EARLY, n_synthetic=300).fit(model, data)
    scores = detector.score([queries])
    assert scores.min() / SCALE < 1e-12
    wide = toys.Net().double()
    wide.load_state_dict(model.state_dict())
    double = [(x.double(), y) for x, y in data]
    exact = gf.GROOD(layer=EARLY, n_synthetic=300).fit(wide, double).score([queries.double()])
    assert_close(scores.as_subclass(Tensor), exact.as_subclass(Tensor), rtol=1e-3, atol=0)
    detector.save(tmp_path / "grood.safetensors")
    again = gf.load(tmp_path / "grood.safetensors", model)
    assert torch.equal(again.score([queries]), scores)


def test_shards_merge_into_the_whole() -> None:
    from grood_fast.classifier import Classifier
    from grood_fast.detectors import Fitting
    from grood_fast.signals import stream

    model, data = network(), toys.batches(96, dtype=TWIN)
    whole = gf.GROOD(n_synthetic=30).fit(model, data)
    detector = gf.GROOD(n_synthetic=30)
    classifier = Classifier(model)
    shards = []
    for shard in (0, 1):
        fitting = Fitting([detector], classifier)
        for number, signals in enumerate(stream(classifier, data, detector.fit_needs)):
            if number % 2 == shard:
                fitting.absorb(signals)
        shards.append(fitting)
    shards[1].merge(shards[0])
    shards[1].finish()
    shards[1].install(classifier)
    queries = [toys.samples(25, seed=5, dtype=TWIN)]
    assert_close(
        detector.score(queries).as_subclass(Tensor), whole.score(queries).as_subclass(Tensor)
    )


def test_refuses() -> None:
    with pytest.raises(InputError, match="unknown source 'magic'"):
        gf.GROOD("magic")
    with pytest.raises(InputError, match="validation_ood goes with source='validation'"):
        gf.GROOD(validation_ood=[toys.samples(3)])
    with pytest.raises(InputError, match="pass validation_ood=loader"):
        gf.GROOD("validation").fit(network(), toys.batches(30, dtype=TWIN))
    with pytest.raises(InputError, match="makes images"):
        gf.GROOD("noise").fit(network(), toys.batches(30, dtype=TWIN))
    for options in ({"mixing": 1.5}, {"n_synthetic": 0}, {"temperature": 0.0}, {"score": "best"}):
        with pytest.raises(InputError):
            gf.GROOD(**options)
    wrong = [(x, (y + 1) % toys.CLASSES) for x, y in toys.batches(30)]
    model = toys.Net()
    predicted = [(x, (toys.truth(model, x)[0].argmax(dim=1) + 1) % 3) for x, _ in wrong]
    with pytest.raises(InputError, match="gets no reference sample right"):
        gf.GROOD().fit(model, predicted)
    with pytest.warns(FitWarning, match="takes the classes the model predicts"):
        gf.GROOD().fit(model, [x for x, _ in wrong])
