"""The factors (δ, h) multiply to autograd's gradient of the head."""

from __future__ import annotations

import json

import pytest
import torch
import toys

from grood_fast.errors import HeadNotFoundError, InputError
from grood_fast.objectives import Objective
from grood_fast.representations import HeadGradient


def test_the_factors_multiply_to_autograds_gradient() -> None:
    model, x = toys.Net().double().eval(), toys.samples(8, dtype=torch.float64)
    z = HeadGradient({"name": "uniform", "temperature": 2.0})(toys.signals_of(model, x))
    delta = z.objective.logit_gradient(z.statistics.logits).delta
    for sample, d, h in zip(x, delta, z.features, strict=True):
        loss = -(model(sample[None]) / 2).log_softmax(1).sum()
        weight, bias = torch.autograd.grad(loss, [model.head.weight, model.head.bias])
        torch.testing.assert_close(torch.outer(d, h), weight, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(d, bias, rtol=1e-10, atol=1e-12)


def test_nothing_is_copied() -> None:
    signals = toys.signals_of(toys.Net(), toys.samples(4))
    z = HeadGradient("energy", bias=True)(signals)
    assert z.statistics is signals.statistics
    assert z.features is signals.features
    assert z.bias
    assert z.objective == Objective("energy")


@pytest.mark.parametrize(
    "representation",
    [
        HeadGradient(),
        HeadGradient("energy"),
        HeadGradient(Objective("predicted", 2.0), bias=True),
        HeadGradient({"name": "confounding", "target": [1, 0, 1]}),
    ],
    ids=repr,
)
def test_configuration_survives_json(representation: HeadGradient) -> None:
    again = HeadGradient(**json.loads(json.dumps(representation.config())))
    assert again.objective == representation.objective
    assert again.bias == representation.bias
    assert representation.fresh().objective == representation.objective
    assert HeadGradient().objective == Objective("uniform")


def test_it_needs_features() -> None:
    assert HeadGradient.needs == {"features"}
    signals = toys.signals_of(toys.Net(), toys.samples(4), features=False)
    with pytest.raises(HeadNotFoundError):
        HeadGradient("energy")(signals)
    with pytest.raises(InputError, match="unknown objective"):
        HeadGradient("enrgy")
