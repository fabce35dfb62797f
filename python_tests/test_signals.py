"""The one pass: what it leaves of each batch, in which order, and how often it computes it."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
import torch
import toys

from grood_fast import ops
from grood_fast.classifier import Classifier
from grood_fast.errors import HeadNotFoundError, InputError
from grood_fast.signals import LogitStatistics, LogitSummary, Signals, stream


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 20.0])
def test_the_summary_is_that_of_the_formulas(temperature: float, dtype: torch.dtype) -> None:
    logits = (4 * torch.randn(30, 7, generator=torch.Generator().manual_seed(0))).to(dtype)
    summary = LogitStatistics(logits)(temperature)
    f = logits.double() / temperature
    p = f.softmax(1)
    delta = p.clone()
    delta[torch.arange(30), f.argmax(1)] -= 1
    delta /= temperature
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, expected in {
        "energy": -temperature * f.logsumexp(1),
        "log_sum_exp": f.logsumexp(1),
        "maximum": logits.double().amax(1),
        "l1": delta.abs().sum(1),
        "l2": delta.norm(dim=1),
    }.items():
        actual = getattr(summary, name)
        assert actual.dtype == wide
        torch.testing.assert_close(actual.double(), expected, rtol=3e-6, atol=1e-6, msg=name)
    assert torch.equal(summary.argmax, logits.argmax(1))
    assert summary._fields == LogitSummary._fields


def test_statistics_are_computed_once_a_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    temperatures = []
    original = ops.logit_gradient

    def counted(*args: Any, temperature: float, **options: Any) -> Any:
        temperatures.append(temperature)
        return original(*args, temperature=temperature, **options)

    monkeypatch.setattr(ops, "logit_gradient", counted)
    statistics = LogitStatistics(torch.randn(4, 3))
    assert statistics() is statistics(1.0)
    assert statistics(2.0) is not statistics()
    statistics(2.0)
    assert temperatures == [1.0, 2.0]
    assert LogitStatistics.of(statistics) is statistics
    assert LogitStatistics.of(statistics.logits).logits is statistics.logits


def test_signals_of_every_batch() -> None:
    model = toys.Net()
    loader = toys.batches(20, size=8)
    model.train()
    logits, features = toys.truth(model, torch.cat([x for x, _ in loader]))
    classifier = Classifier(model)
    everything = list(stream(classifier, loader, {"features"}))
    assert [len(signals.logits) for signals in everything] == [8, 8, 4]
    assert model.training
    torch.testing.assert_close(torch.cat([s.logits for s in everything]), logits)
    torch.testing.assert_close(torch.cat([s.features for s in everything]), features)
    assert torch.equal(torch.cat([s.predictions for s in everything]), logits.argmax(1))
    assert torch.cat([s.indices for s in everything]).tolist() == list(range(20))
    assert torch.equal(torch.cat([s.labels for s in everything]), torch.arange(20) % 3)
    for signals, (x, _) in zip(everything, loader, strict=True):
        assert signals.batch.args[0] is x
        assert signals.indices.dtype == signals.labels.dtype == torch.int64
        assert signals.statistics is signals.statistics
        assert signals.statistics.logits is signals.logits
        assert not signals.logits.requires_grad
        assert not signals.logits.is_inference()
        assert not signals.features.requires_grad


def test_features_come_where_they_are_asked_for() -> None:
    signals = toys.signals_of(toys.headless(), toys.samples(4), features=False)
    assert signals.penultimate is None
    assert signals.labels is None
    with pytest.raises(HeadNotFoundError, match=r'needs=\{"features"\}'):
        _ = signals.features
    with pytest.raises(HeadNotFoundError, match="No linear head"):
        toys.signals_of(toys.headless(), toys.samples(4))


def test_empty_batches_in_between() -> None:
    x = toys.samples(5)
    loader = [x[:3], x[:0], x[3:]]
    everything = list(stream(Classifier(toys.Net()), loader, {"features"}))
    assert [s.indices.tolist() for s in everything] == [[0, 1, 2], [], [3, 4]]
    assert everything[1].predictions.shape == (0,)


@pytest.mark.parametrize("loader", [[], iter(())])
def test_an_empty_loader_is_refused(loader: Any) -> None:
    with pytest.raises(InputError, match="no batch"):
        list(stream(Classifier(toys.Net()), loader, set()))


@pytest.mark.parametrize("failure", [None, ValueError("mine"), KeyboardInterrupt()])
def test_the_model_is_given_back_however_the_pass_ends(failure: BaseException | None) -> None:
    model = toys.used_model()
    before = toys.Condition(model)
    classifier = Classifier(model)
    loader = toys.batches(40)
    if failure is None:
        with closing(stream(classifier, loader, {"features"})) as signals:
            next(signals)
            assert not any(module.training for module in model.modules())
    else:
        with (
            pytest.raises(type(failure)),
            closing(stream(classifier, toys.failing(loader, failure), {"features"})) as signals,
        ):
            list(signals)
    before.assert_same(model)


def test_signals_can_be_made_by_hand() -> None:
    signals = toys.signals_of(toys.Net(), toys.samples(4))
    again = Signals(signals.logits, None, None, signals.indices, signals.batch)
    assert torch.equal(again.predictions, signals.predictions)
