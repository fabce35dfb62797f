"""A small classifier, its data, and what a pass must leave as it was."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from grood_fast.classifier import Classifier
from grood_fast.signals import Signals, stream

INPUTS, FEATURES, CLASSES = 5, 6, 3


class Net(nn.Module):
    """A backbone and a linear head; ``output`` makes what the model returns of the logits."""

    def __init__(
        self,
        output: Callable[[Tensor], Any] | None = None,
        classes: int = CLASSES,
        bias: bool = True,
        seed: int = 3,  # with which every class is predicted
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.backbone = nn.Sequential(
                nn.Linear(INPUTS, 8),
                nn.BatchNorm1d(8),
                nn.Tanh(),
                nn.Dropout(0.5),
                nn.Linear(8, FEATURES),
            )
            self.head = nn.Linear(FEATURES, classes, bias=bias)
            nn.init.normal_(self.head.weight, std=2)
        self.output = output
        self.forwards = 0

    def forward(self, x: Tensor) -> Any:
        self.forwards += 1
        logits = self.head(self.backbone(x))
        return logits if self.output is None else self.output(logits)


def headless() -> nn.Module:
    """Class log-probabilities: no linear layer's output is the model's."""
    return nn.Sequential(nn.Linear(INPUTS, CLASSES), nn.LogSoftmax(dim=1))


def samples(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """(count, INPUTS) inputs."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, INPUTS, generator=generator).to(dtype)


def batches(
    count: int, seed: int = 0, size: int = 16, dtype: torch.dtype = torch.float32
) -> list[tuple[Tensor, Tensor]]:
    """A list of (x, y), the classes in turn, none of them missing."""
    x, y = samples(count, seed, dtype), torch.arange(count) % CLASSES
    return list(zip(x.split(size), y.split(size), strict=True))


class Counting:
    """A loader that counts how often it is read."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.iterations = 0

    def __iter__(self) -> Iterator[Any]:
        self.iterations += 1
        return iter(self.loader)


def failing(loader: Iterable[Any], failure: BaseException, after: int = 2) -> Iterator[Any]:
    """The first batches of a loader, then an exception."""
    for number, batch in enumerate(loader):
        if number == after:
            raise failure
        yield batch


def signals_of(model: nn.Module, x: Tensor, features: bool = True) -> Signals:
    """One batch's signals."""
    needs = {"features"} if features else set[str]()
    (signals,) = stream(Classifier(model), [x], needs)
    return signals


def truth(model: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and penultimate features in evaluation mode, by calling the layers."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        features = model.backbone(x)
        logits = model.head(features)
    for module, training in modes:
        module.training = training
    return logits, features


class Condition:
    """All of a model and of the process that a pass could change."""

    def __init__(self, model: nn.Module) -> None:
        hooks = [name for name in vars(nn.Module()) if "hooks" in name]
        modules = dict(model.named_modules())
        digest = hashlib.sha256()
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name}{tensor.dtype}{tensor.device}{tensor.data_ptr()}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        self.facts: dict[str, Any] = {
            "state": digest.hexdigest(),
            "modes": {name: module.training for name, module in modules.items()},
            "hooks": {
                (name, kind): list(getattr(module, kind).items())
                for name, module in modules.items()
                for kind in hooks
            },
            "attributes": {name: list(vars(module)) for name, module in modules.items()},
            "requires_grad": [p.requires_grad for p in model.parameters()],
            "grads": [
                None if p.grad is None else (id(p.grad), p.grad.tolist())
                for p in model.parameters()
            ],
            "torch": torch.get_rng_state().tolist(),
            "numpy": str(np.random.get_state()),  # noqa: NPY002
            "python": random.getstate(),
            "autograd": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        }

    def assert_same(self, model: nn.Module) -> None:
        now = Condition(model).facts
        for key, value in self.facts.items():
            assert now[key] == value, key


class Restless(Net):
    """Disturbs in its forward pass what it can."""

    def forward(self, x: Tensor) -> Any:
        torch.rand(3)
        np.random.rand(3)  # noqa: NPY002
        random.random()
        torch.set_grad_enabled(True)
        return super().forward(x)


def used_model() -> Net:
    """A model in the middle of things: mixed modes, gradients, frozen weights and hooks."""
    model = Restless()
    model.train()
    model.backbone[1].eval()
    model.backbone[0].bias.requires_grad_(False)
    model(samples(8)).sum().backward()
    model.head.register_forward_hook(lambda *_: None)
    model.register_forward_pre_hook(lambda *_: None)
    return model
