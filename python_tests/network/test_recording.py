"""The pass: what it leaves as it was, what it refuses, pieces, precision, selections."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from network.helpers import autograd_gradients, read
from torch import Tensor, nn
from toys import INPUTS, Condition, Net, batches, samples, used_model

from grood_fast.classifier import Classifier
from grood_fast.errors import HeadNotFoundError, InputError
from grood_fast.evaluation.networks import small_residual_network
from grood_fast.network import NetworkNeed
from grood_fast.network.interception import Recorder
from grood_fast.network.selection import blocks
from grood_fast.signals import stream


def norms(model: nn.Module, x: Any, **options: Any) -> dict[str, Tensor]:
    return read(model, x, lambda _, g: g.squared_norm(), **options)


def truth(model: nn.Module, x: Any) -> dict[str, Tensor]:
    gradients = autograd_gradients(model, x)
    return {n: g.reshape(len(g), -1).square().sum(dim=1) for n, g in gradients.items()}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.tanh(self.first(x)))


def deep() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 4), Block(), Block(), nn.LayerNorm(4), nn.Linear(4, 3))


@pytest.mark.parametrize("failure", [None, KeyboardInterrupt(), RuntimeError("x")])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_model_is_untouched(failure: BaseException | None, checkpoint: bool) -> None:
    model = used_model()
    before = Condition(model)

    def reader(*_: Any) -> int:
        if failure is not None:
            raise failure
        return 0

    need = NetworkNeed(checkpoint=checkpoint)
    if failure is None:
        read(model, samples(6), reader, need)
    else:
        with pytest.raises(type(failure)):
            read(model, samples(6), reader, need)
    before.assert_same(model)


def test_blocks_get_their_forward_back() -> None:
    model = deep()
    before = Condition(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        read(model, samples(6), fail, NetworkNeed(checkpoint=True))
    before.assert_same(model)
    assert blocks(model) == ["1", "2"]


@pytest.mark.parametrize("mode", ["no_grad", "inference", "autocast", "model in inference mode"])
def test_ambient_modes_make_no_difference(mode: str) -> None:
    expected = norms(deep(), samples(6))
    contexts: dict[str, Any] = {
        "no_grad": torch.no_grad(),
        "inference": torch.inference_mode(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
    }
    if mode == "model in inference mode":
        with torch.inference_mode():
            model = deep()
        found = norms(model, samples(6))
    else:
        with contexts[mode]:
            found = norms(deep(), samples(6).clone())
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values), name


def test_frozen_parameters_have_a_gradient_all_the_same() -> None:
    model, frozen = deep(), deep()
    frozen.requires_grad_(False)
    expected, found = norms(model, samples(6)), norms(frozen, samples(6))
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    assert not any(p.requires_grad for p in frozen.parameters())


def test_pieces_keep_order_labels_and_indices() -> None:
    model = deep()
    x, y = samples(10), torch.arange(10) % 3
    whole = norms(model, x)
    seen: list[Any] = []
    for signals in stream(Classifier(model), [(x, y)], {NetworkNeed(memory_budget=1)}):
        assert len(signals.logits) == 1
        seen.append((signals.indices, signals.labels, signals.batch.args[0]))
    indices, labels, inputs = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert torch.equal(indices, torch.arange(10))
    assert torch.equal(labels, y)
    assert torch.equal(inputs, x)
    found = norms(model, x, need=NetworkNeed(memory_budget=1))
    for name, values in whole.items():
        torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_batches_of_any_size(size: int) -> None:
    model = deep().double()
    x = samples(size, dtype=torch.float64)
    for name, values in truth(model, x).items():
        torch.testing.assert_close(norms(model, x)[name], values, rtol=1e-9, atol=1e-12)


def test_the_same_pass_serves_several_objectives_and_readings() -> None:
    model = deep()
    (signals, *_) = [*_streamed(model, samples(4))]
    assert signals == [True, True, True]


def _streamed(model: nn.Module, x: Tensor) -> Any:
    for signals in stream(Classifier(model), [x], {NetworkNeed(), "features"}):
        found: list[dict[str, Tensor]] = []
        for scale in (1.0, 2.0, 1.0):
            values: dict[str, Tensor] = {}
            signals.gradients.read(
                torch.full_like(signals.logits, scale),
                lambda name, g, values=values: values.update({name: g.squared_norm()}),
            )
            found.append(values)
        yield [
            torch.equal(found[0]["0.weight"], found[2]["0.weight"]),
            torch.allclose(4 * found[0]["0.weight"], found[1]["0.weight"]),
            not signals.logits.requires_grad and not signals.features.requires_grad,
        ]


def test_the_graph_goes_with_its_batch() -> None:
    kept = list(stream(Classifier(deep()), [samples(4), samples(4)], {NetworkNeed()}))
    with pytest.raises(InputError, match="the pass has gone on"):
        kept[0].gradients.read(torch.ones(4, 3), lambda *_: None)


def test_a_pass_without_the_need_has_no_gradients() -> None:
    (signals,) = stream(Classifier(deep()), [samples(4)], set())
    with pytest.raises(InputError, match="hold no network gradients"):
        _ = signals.gradients


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ("all", None),
        ("head", {"4.weight", "4.bias"}),
        (
            "last_block",
            {f"2.{n}.{p}" for n in ("first", "second") for p in ("weight", "bias")}
            | {"3.weight", "3.bias", "4.weight", "4.bias"},
        ),
        (("1.first", "4.bias"), {"1.first.weight", "1.first.bias", "4.bias"}),
    ],
)
def test_selections(parameters: Any, expected: set[str] | None) -> None:
    model = deep().double()
    x = samples(4, dtype=torch.float64)
    expected_norms = truth(model, x)
    found = norms(model, x, need=NetworkNeed(parameters=parameters))
    assert set(found) == (expected or set(expected_norms))
    for name, values in found.items():
        torch.testing.assert_close(values, expected_norms[name], rtol=1e-9, atol=1e-14)


def test_the_graph_begins_at_the_first_selected_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the head alone, nothing before it is recorded."""
    recorded: list[int] = []
    original = Recorder.checked

    def counting(self: Recorder, tensor: Tensor) -> Any:
        recorded.append(int(tensor.requires_grad))
        return original(self, tensor)

    monkeypatch.setattr(Recorder, "checked", counting)
    norms(deep(), samples(4), need=NetworkNeed(parameters="head"))
    assert not any(recorded)


@pytest.mark.parametrize(
    ("parameters", "model", "error", "message"),
    [
        (("nowhere",), deep, InputError, "no parameter 'nowhere'"),
        ("last_block", Net, InputError, "no blocks"),
        (
            "head",
            lambda: nn.Sequential(nn.Linear(INPUTS, 3), nn.LogSoftmax(dim=1)),
            HeadNotFoundError,
            "",
        ),
    ],
)
def test_selections_that_do_not_fit(parameters: Any, model: Any, error: Any, message: str) -> None:
    if parameters == "last_block":
        model = lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))  # noqa: E731
    with pytest.raises(error, match=message):
        norms(model(), samples(4), need=NetworkNeed(parameters=parameters))


class Coupled(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.head, self.how = nn.Linear(5, 4), nn.Linear(4, 3), how

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        if self.how == "mean":
            y = y - y.mean(dim=0)
        if self.how == "custom":
            y = _Custom.apply(y, self.first.weight)
        if self.how == "path" and len(x) > 2:
            y = self.first(torch.cat([y, y[:, :1]], dim=1))
        if self.how == "changed":
            z = self.head(y)
            y.zero_()
            return z
        return self.head(y)


class _Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w.sum()

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return deltas[0] * w.sum(), (deltas[0] * x).sum().expand_as(w)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("mean", "mixes the samples"),
        ("custom", "out of torch's sight"),
        ("path", "another path"),
        ("changed", "in place"),
    ],
)
def test_models_whose_samples_cannot_be_told_apart(how: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        norms(Coupled(how), samples(6))


def test_bf16_and_channels_last_agree_with_float32() -> None:
    model = small_residual_network()
    x = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = norms(model, x)
    last = norms(
        model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    )
    half = norms(model, x, precision="bf16")
    for name, values in plain.items():
        torch.testing.assert_close(last[name], values, rtol=1e-3, atol=1e-8)
        assert half[name].dtype == torch.float32
        assert float((half[name].sqrt() - values.sqrt()).abs().max()) < 0.1 * float(
            values.sqrt().max()
        ), name


def test_compiled_wrappers_and_batches_as_loaders_yield_them() -> None:
    model = Net()
    expected = norms(model, samples(16))
    wrapped = torch.compile(model)
    found = norms(wrapped, batches(16)[0])
    assert all(torch.equal(found[name], values) for name, values in expected.items())
