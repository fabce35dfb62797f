"""A layer's output, the network resumed from it, and a model that comes back as it was."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
import torch
import toys
from peers import import_torchvision
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from grood_fast.classifier import Classifier
from grood_fast.errors import InputError
from grood_fast.evaluation.networks import small_residual_network
from grood_fast.layers import STAGES, layer_need, pooled
from grood_fast.representations import ShortCircuitedLogits
from grood_fast.signals import Signals, stream


class Counted(nn.Conv2d):
    """A convolution that counts how often it computes."""

    computed = 0

    def forward(self, x: Tensor) -> Tensor:
        Counted.computed += 1
        return super().forward(x)


class Residual(nn.Module):
    """Two convolutions, a shared activation that works in place, and a sum in place."""

    def __init__(self, width: int, relu: nn.Module) -> None:
        super().__init__()
        self.first = Counted(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.second = Counted(width, width, 3, padding=1)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.norm(self.first(x)))
        out = functional.hardswish(self.second(out), inplace=True)
        out += x
        return out


class Network(nn.Module):
    """Convolutions in two sizes, one activation module for all, code between the modules."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.relu = nn.ReLU(inplace=True)
        self.stem = Counted(1, 4, 3, padding=1)
        self.low = nn.Sequential(Residual(4, self.relu), Residual(4, self.relu))
        self.down = Counted(4, 6, 3, stride=2, padding=1)
        self.high = nn.Sequential(Residual(6, self.relu), Residual(6, self.relu))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = functional.silu(self.low(x), inplace=True)
        x = self.high(functional.elu_(self.down(x)))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


LAYERS = ("stem", "low", "low.0", "low.1.first", "low.1.norm", "down", "high.0.second", "high")


def images(count: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


def at_signals(model: nn.Module, x: Tensor, layer: str, use: Callable[[Signals], Any]) -> Any:
    needs = {"features", layer_need(layer)}
    with closing(stream(Classifier(model), [x], needs)) as batches:
        return use(next(batches))


@pytest.mark.parametrize("layer", LAYERS)
class TestResuming:
    def test_from_what_was_there_gives_the_same(self, layer: str) -> None:
        model = Network().double().eval()

        def check(signals: Signals) -> None:
            output = signals.layer(layer)
            for _ in range(2):
                logits, features = output.resume(output.activation)
                assert_close(logits, signals.logits, rtol=0, atol=0)
                assert_close(features, signals.features, rtol=0, atol=0)
            changed, _ = output.resume(output.activation + 1)
            assert not torch.allclose(changed, signals.logits)
            assert_close(output.resume(output.activation)[0], signals.logits, rtol=0, atol=0)

        at_signals(model, images(), layer, check)

    def test_nothing_before_the_layer_is_computed(self, layer: str) -> None:
        model = Network().double().eval()
        order = ["stem", "low.0.first", "low.0.second", "low.1.first", "low.1.second", "down",
                 "high.0.first", "high.0.second", "high.1.first", "high.1.second"]  # fmt: skip
        last = max(i for i, name in enumerate(order) if name.startswith(layer) or (
            layer == "low.1.norm" and name == "low.1.first"))  # fmt: skip

        def check(signals: Signals) -> None:
            Counted.computed = 0
            output = signals.layer(layer)
            output.resume(output.activation)
            assert Counted.computed == len(order) - 1 - last

        at_signals(model, images(), layer, check)

    def test_gradient_and_tangent_are_those_of_the_rest_of_the_network(self, layer: str) -> None:
        """By finite differences along a direction."""
        model = Network().double().eval()

        def check(signals: Signals) -> None:
            output = signals.layer(layer)
            direction = torch.randn_like(output.activation)
            with torch.enable_grad():
                leaf = output.activation.clone().requires_grad_()
                total = output.resume(leaf)[0].square().sum()
                (gradient,) = torch.autograd.grad(total, leaf)
            step = 1e-6
            after, before = (
                output.resume(output.activation + sign * step * direction)[0] for sign in (1, -1)
            )
            numeric = (after.square().sum() - before.square().sum()) / (2 * step)
            assert_close((gradient * direction).sum(), numeric, rtol=1e-5, atol=1e-7)
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(output.activation.clone(), direction)
                tangent = torch.autograd.forward_ad.unpack_dual(output.resume(dual)[0]).tangent
            assert_close(tangent, (after - before) / (2 * step), rtol=1e-5, atol=1e-7)

        at_signals(model, images(), layer, check)

    def test_the_model_comes_back_as_it_was(self, layer: str) -> None:
        model = Network().double().train()
        model.high.eval()
        model.low.register_forward_hook(lambda *_: None)
        before = toys.Condition(model)

        def resume(signals: Signals) -> None:
            output = signals.layer(layer)
            output.resume(output.activation)

        at_signals(model, images(), layer, resume)
        before.assert_same(model)

        def fail(signals: Signals) -> None:
            signals.layer(layer).resume(torch.zeros(1, 1))

        with pytest.raises((RuntimeError, ValueError, IndexError)):
            at_signals(model, images(), layer, fail)
        before.assert_same(model)


def test_what_a_layer_returned_is_not_what_later_layers_made_of_it() -> None:
    model = Network().double().eval()
    with torch.no_grad():
        expected = model.stem(images())
        assert (expected < 0).any()  # the activation behind it works in place
    actual = at_signals(model, images(), "stem", lambda s: s.layer("stem").activation.clone())
    assert_close(actual, expected, rtol=0, atol=0)


def test_hooks_of_others_are_applied_once() -> None:
    model = Network().double().eval()
    handle = model.low.register_forward_hook(lambda _m, _i, output: 2 * output + 1)

    def check(signals: Signals) -> None:
        output = signals.layer("down")
        assert_close(output.resume(output.activation)[0], signals.logits, rtol=0, atol=0)
        low = signals.layer("low")
        assert_close(low.resume(low.activation)[0], signals.logits, rtol=0, atol=0)

    for signals in stream(Classifier(model), [images()], {layer_need("down"), layer_need("low")}):
        check(signals)
    handle.remove()


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("nowhere", r"Network calls no layer 'nowhere'.*its stages end with \['low', 'high'\]"),
        ("relu", "the layer 'relu' is called 5 times"),
        ("", ""),
    ],
)
def test_refuses(layer: str, message: str) -> None:
    if not layer:
        signals = toys.signals_of(toys.Net(), toys.samples(3))
        with pytest.raises(InputError, match="these signals hold no output of the layer None"):
            signals.layer(None)
        return
    with pytest.raises(InputError, match=message):
        at_signals(Network().double(), images(), layer, lambda s: None)


def test_another_path_for_another_batch_is_noticed() -> None:
    class Fickle(toys.Net):
        def forward(self, x: Tensor) -> Any:
            if x.shape[0] == 7:
                return self.head(self.backbone[4](functional.pad(x, (0, 3))))
            return super().forward(x)

    classifier = Classifier(Fickle())
    loader = [toys.samples(4), toys.samples(7)]
    with closing(stream(classifier, loader, {layer_need("backbone.2")})) as batches:
        assert next(batches).layer("backbone.2").activation.shape == (4, 8)
        with pytest.raises(InputError, match="the model must take the same path"):
            next(batches)


class TestStages:
    def test_where_feature_maps_become_smaller(self) -> None:
        names = at_stages(small_residual_network(10), torch.randn(2, 1, 28, 28))
        assert names == {
            "stem": (2, 16, 28, 28),
            "blocks.0": (2, 32, 14, 14),
            "blocks.1": (2, 64, 7, 7),
            "blocks": (2, 128, 4, 4),
        }

    def test_each_fourth_of_a_transformers_blocks(self) -> None:
        class Transformer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.patches = nn.Conv2d(1, 8, 7, stride=7)
                layers = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(6)]
                self.blocks = nn.ModuleList(layers)
                self.head = nn.Linear(8, 5)

            def forward(self, x: Tensor) -> Tensor:
                x = self.patches(x).flatten(2).mT
                for block in self.blocks:
                    x = block(x)
                logits: Tensor = self.head(x.mean(dim=1))
                return logits

        names = at_stages(Transformer(), torch.randn(2, 1, 28, 28))
        assert list(names) == ["blocks.1", "blocks.2", "blocks.4", "blocks.5"]
        assert set(names.values()) == {(2, 16, 8)}

    def test_each_fourth_of_a_perceptrons_layers(self) -> None:
        names = at_stages(toys.Net(), toys.samples(2))
        assert list(names) == ["backbone.1", "backbone.2", "backbone.3", "backbone.4"]

    def test_activations_are_those_of_the_layers(self) -> None:
        model = Network().double().eval()
        kept: dict[str, Tensor] = {}
        for name in ("low", "high"):
            model.get_submodule(name).register_forward_hook(
                lambda _m, _i, out, name=name: kept.__setitem__(name, out.clone())
            )
        with torch.no_grad():
            model(images())
        expected = dict(kept)
        for signals in stream(Classifier(model), [images()], {STAGES}):
            assert list(signals.stages) == ["low", "high"]
            for name, activation in signals.stages.items():
                assert_close(activation, expected[name], rtol=0, atol=0)
                assert_close(pooled(activation), expected[name].mean(dim=(2, 3)))


def at_stages(model: nn.Module, x: Tensor) -> dict[str, tuple[int, ...]]:
    classifier = Classifier(model)
    found = [
        {name: tuple(activation.shape) for name, activation in signals.stages.items()}
        for signals in stream(classifier, [x], {STAGES})
    ]
    return found[0]


def test_pooled() -> None:
    assert_close(pooled(torch.ones(2, 3)), torch.ones(2, 3))
    tokens = torch.arange(12.0).reshape(1, 4, 3)
    assert_close(pooled(tokens), tokens.mean(dim=1))
    maps = torch.arange(24.0).reshape(1, 2, 3, 4)
    assert_close(pooled(maps.bfloat16()), maps.mean(dim=(2, 3)))


def test_bf16_resumes_in_the_copy() -> None:
    model = small_residual_network(10)
    needs = {"features", layer_need(None)}
    for signals in stream(Classifier(model, precision="bf16"), [torch.randn(3, 1, 28, 28)], needs):
        output = signals.layer(None)
        assert output.activation.dtype == torch.bfloat16
        logits, features = output.resume(output.activation)
        assert_close(logits, signals.logits, rtol=0, atol=0)
        assert_close(features, signals.features, rtol=0, atol=0)


def test_a_pass_that_has_moved_on_cannot_be_resumed() -> None:
    needs = {layer_need("backbone.2")}
    classifier = Classifier(toys.Net())
    kept = [s.layer("backbone.2") for s in stream(classifier, [toys.samples(4)] * 2, needs)]
    assert torch.equal(kept[0].activation, kept[1].activation)
    with pytest.raises(InputError, match="the pass has moved on"):
        kept[1].resume(kept[1].activation)
    with closing(stream(classifier, [toys.samples(4)] * 2, needs)) as batches:
        first, _second = next(batches), next(batches)
        with pytest.raises(InputError, match="the pass has moved on"):
            first.layer("backbone.2").resume(first.layer("backbone.2").activation)


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("resnet18", ["act1", "layer1", "layer2", "layer3", "layer4"]),
        ("vit_tiny_patch16_224", ["blocks.2", "blocks.5", "blocks.8", "blocks.11"]),
        ("convnext_atto", ["stem", "stages.1", "stages.2", "norm_pre"]),
    ],
)
def test_published_architectures(name: str, stages: list[str]) -> None:
    """Stages, resuming, and a forward-mode derivative behind the last stage but one."""
    import_torchvision()
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, pretrained=False, num_classes=7)
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    representation = ShortCircuitedLogits(None)
    needs = {STAGES, "features", *representation.needs}
    with closing(stream(Classifier(model), [x], needs)) as batches:
        signals = next(batches)
        assert list(signals.stages) == stages
        output = signals.layer(None)
        assert output.name == stages[-2]
        logits, features = output.resume(output.activation)
        assert torch.equal(logits, signals.logits)
        assert features is not None
        assert torch.equal(features, signals.features)
        assert representation(signals).logits.isfinite().all()
