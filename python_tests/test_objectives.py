"""Objectives against autograd on the scalars they are named after, in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from grood_fast import ops
from grood_fast.errors import InputError
from grood_fast.objectives import Objective

B, C, D = 7, 5, 4
TARGET = (0.0, 1.0, 0.25, 1.0, 0.0)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(B, C, generator=generator, dtype=torch.float64)
    return logits, torch.randn(B, D, generator=generator, dtype=torch.float64)


def bce(target: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda f: F.binary_cross_entropy_with_logits(f, target, reduction="sum")


CASES: list[tuple[Objective, Callable[[Tensor], Tensor]]] = [
    (Objective("energy"), lambda f: -f.logsumexp(0)),
    (Objective("energy", 2.5), lambda f: -2.5 * (f / 2.5).logsumexp(0)),
    (Objective("uniform"), lambda f: -f.log_softmax(0).sum()),
    (Objective("uniform", 0.5), lambda f: -(f / 0.5).log_softmax(0).sum()),
    (Objective("predicted"), lambda f: F.cross_entropy(f, f.detach().argmax())),
    (Objective("predicted", 3.0), lambda f: F.cross_entropy(f / 3, f.detach().argmax())),
    (Objective("confounding"), bce(torch.ones(C, dtype=torch.float64))),
    (Objective("confounding", target=TARGET), bce(torch.tensor(TARGET, dtype=torch.float64))),
    (Objective("max_logit"), lambda f: f.max()),
    (Objective("logit_sum"), lambda f: f.sum()),
]
every_case = pytest.mark.parametrize(
    ("objective", "scalar"), CASES, ids=[str(objective.config()) for objective, _ in CASES]
)


@every_case
def test_the_logit_gradient_is_autograds(objective: Objective, scalar: Any) -> None:
    logits, _ = data()
    leaf = logits.clone().requires_grad_()
    expected = torch.stack([torch.autograd.grad(scalar(row), row)[0] for row in leaf.unbind()])
    actual = objective.logit_gradient(logits)
    torch.testing.assert_close(actual.delta, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual.l1, expected.abs().sum(1), rtol=1e-12, atol=1e-12)
    only = objective.logit_gradient(logits.float(), outputs=("l2",))
    assert only.delta is None
    torch.testing.assert_close(only.l2, expected.norm(dim=1).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("norm", "order"), [("l1", 1), ("l2", 2), ("linf", float("inf"))])
@every_case
def test_the_head_gradient_norm_is_autograds(
    objective: Objective, scalar: Any, norm: str, order: float, bias: bool
) -> None:
    logits, features = data()
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(C, D, generator=generator, dtype=torch.float64, requires_grad=True)
    expected = []
    for f, h in zip(logits, features, strict=True):
        offset = (f - weight.detach() @ h).requires_grad_()
        parts = torch.autograd.grad(scalar(weight @ h + offset), [weight, offset])
        kept = parts if bias else parts[:1]
        expected.append(torch.cat([part.flatten() for part in kept]).norm(order))
    actual = objective.head_gradient_norm(logits, features, norm, bias)
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-10, atol=1e-12)


def test_signs_follow_the_scalar() -> None:
    """A confident row against an unsure one: where is the gradient larger?"""
    rows = torch.tensor([[9.0, 0, 0, 0, 0], [0.2, 0.1, 0, 0, 0]], dtype=torch.float64)
    sure, unsure = Objective("uniform").logit_gradient(rows).l1
    assert sure > unsure
    assert Objective("uniform").norm_sign == -1
    sure, unsure = Objective("predicted").logit_gradient(rows).l1
    assert sure < unsure
    assert Objective("predicted").norm_sign == 1
    assert {name: Objective(name).norm_sign for name in ops.OBJECTIVES} == {
        "energy": -1, "uniform": -1, "predicted": 1,
        "confounding": 1, "max_logit": -1, "logit_sum": -1,
    }  # fmt: skip


@every_case
def test_config_survives_json(objective: Objective, scalar: Any) -> None:
    again = Objective.of(json.loads(json.dumps(objective.config())))
    assert again == objective
    assert hash(again) == hash(objective)


def test_of() -> None:
    objective = Objective("energy", 2.0)
    assert Objective.of(objective) is objective
    assert Objective.of("energy") == Objective("energy", 1.0)
    assert Objective("confounding", target=[1, 0]).target == (1.0, 0.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "entropy"}, "unknown objective 'entropy'; known: energy, uniform"),
        ({"name": "energy", "temperature": 0.0}, "positive and finite, got 0.0"),
        ({"name": "energy", "temperature": -1.0}, "positive"),
        ({"name": "energy", "temperature": float("nan")}, "positive"),
        ({"name": "max_logit", "temperature": 2.0}, "has no temperature"),
        ({"name": "confounding", "temperature": 2.0}, "has no temperature"),
        ({"name": "uniform", "target": (1.0,)}, "takes no target"),
        ({"name": "confounding", "target": (0.5, 1.5)}, "between 0 and 1"),
        ({"name": "confounding", "target": (float("nan"),)}, "between 0 and 1"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Objective(**arguments)


def test_a_label_of_another_length_is_refused() -> None:
    logits, features = data()
    objective = Objective("confounding", target=(1.0, 0.0))
    with pytest.raises(InputError, match="has 2 entries, the logits 5"):
        objective.logit_gradient(logits)
    with pytest.raises(InputError, match="has 2 entries, the logits 5"):
        objective.head_gradient_norm(logits, features)


def test_empty_batches_and_one_class() -> None:
    for objective, _ in CASES:
        if objective.target is None:
            assert objective.logit_gradient(torch.empty(0, 3)).delta.shape == (0, 3)
            one = objective.logit_gradient(torch.tensor([[2.0]])).delta
            expected = {"energy": -1, "max_logit": 1, "logit_sum": 1}.get(objective.name, 0)
            if objective.name == "confounding":
                expected = torch.tensor(2.0).sigmoid() - 1
            torch.testing.assert_close(one, torch.tensor([[float(expected)]]))
