"""Gradients of single samples: by autograd, one sample at a time, and by the one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from grood_fast.batches import parse_batch
from grood_fast.classifier import Classifier
from grood_fast.network import LayerGradient, NetworkNeed
from grood_fast.objectives import Objective
from grood_fast.signals import stream

OBJECTIVE = Objective("energy")


def logits_of(output: Any) -> Tensor:
    return output.logits if hasattr(output, "logits") else output


def autograd_gradients(
    model: nn.Module, batch: Any, objective: Objective = OBJECTIVE
) -> dict[str, Tensor]:
    """Parameter → (B, *shape), by one backward pass a sample in evaluation mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    parsed, parameters = parse_batch(batch), dict(model.named_parameters())
    flags = [p.requires_grad for p in parameters.values()]
    found: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for p in parameters.values():
        p.requires_grad_(True)
    for i in range(parsed.size):
        one = parsed.map_inputs(lambda t, i=i: t[i : i + 1])
        with torch.enable_grad():
            logits = logits_of(model(*one.args, **one.kwargs))
            delta = objective.logit_gradient(logits.detach(), outputs=("delta",)).delta
            gradients = torch.autograd.grad(
                logits, list(parameters.values()), delta, allow_unused=True
            )
        for (name, p), gradient in zip(parameters.items(), gradients, strict=True):
            found[name].append(torch.zeros_like(p) if gradient is None else gradient)
    for module, training in modes:
        module.training = training
    for p, flag in zip(parameters.values(), flags, strict=True):
        p.requires_grad_(flag)
    return {name: torch.stack(rows).detach() for name, rows in found.items()}


def read(
    model: nn.Module,
    batch: Any,
    measure: Callable[[str, LayerGradient], Any],
    need: NetworkNeed | None = None,
    objective: Objective = OBJECTIVE,
    precision: Any = None,
) -> dict[str, Any]:
    """Parameter → what ``measure`` makes of its gradient, pieces of the batch joined."""
    pieces: list[dict[str, Any]] = []
    for signals in stream(Classifier(model, precision=precision), [batch], {need or NetworkNeed()}):
        found: dict[str, Any] = {}

        def reader(name: str, gradient: LayerGradient, found: Any = found) -> None:
            assert name not in found, f"{name} came twice"
            found[name] = measure(name, gradient)

        delta = objective.logit_gradient(signals.logits, outputs=("delta",)).delta
        assert delta is not None
        signals.gradients.read(delta, reader)
        pieces.append(found)
    return {
        name: torch.cat([piece[name] for piece in pieces]) if isinstance(value, Tensor) else value
        for name, value in pieces[0].items()
    }


def assert_exact(
    model: nn.Module, batch: Any, need: NetworkNeed | None = None, tolerance: float = 1e-9
) -> None:
    """Gradients, norms and projections of all parameters equal autograd's, one by one."""
    truth = autograd_gradients(model, batch)
    generator = torch.Generator().manual_seed(1)
    bases = {
        name: torch.randn(3, *g.shape[1:], generator=generator, dtype=g.dtype)
        for name, g in truth.items()
    }
    measures: dict[str, Callable[[str, LayerGradient], Tensor]] = {
        "formed": lambda _, g: g.formed(),
        "squared_norm": lambda _, g: g.squared_norm(),
        "absolute_sum": lambda _, g: g.absolute_sum(),
        "projected": lambda name, g: g.projected(bases[name]),
    }
    scale = max(float(g.abs().max()) for g in truth.values())
    assert scale > 0
    for what, measure in measures.items():
        found = read(model, batch, measure, need)
        for name, gradient in truth.items():
            flat = gradient.reshape(len(gradient), -1)
            expected = {
                "formed": gradient,
                "squared_norm": flat.square().sum(dim=1),
                "absolute_sum": flat.abs().sum(dim=1),
                "projected": flat @ bases[name].reshape(3, -1).T,
            }[what]
            if name not in found:  # it has no part in the logits
                assert float(expected.abs().max()) == 0, name
                continue
            torch.testing.assert_close(
                found[name].reshape(expected.shape),
                expected,
                rtol=tolerance,
                atol=tolerance * max(scale, scale**2) * flat.shape[1],
                msg=lambda m, name=name, what=what: f"{what} of {name}: {m}",
            )
