"""Forward passes whose graph is kept, and the gradients of all parameters that it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from grood_fast.batches import Batch
from grood_fast.classifier import Classifier
from grood_fast.errors import HeadNotFoundError, InputError
from grood_fast.network.interception import Probe, Reader, Recorder, Use, compared
from grood_fast.network.selection import Parameters, blocks, resolve

MEMORY_BUDGET = 1 << 30
"""Default limit in bytes on the activations that a graph holds."""

PROBED_SIZES = (2, 3)
TOLERANCE = {torch.float64: 1e-4, torch.float32: 2e-2}
"""How far a norm may be from autograd's; half precision gets 0.5: errors there are of structure."""


@dataclass(frozen=True)
class NetworkNeed:
    """What a detector asks the one pass for: gradients of these parameters.

    Attributes:
        parameters: see :mod:`grood_fast.network.selection`.
        memory_budget: bytes of activations that may be held; larger batches go in pieces.
        checkpoint: hold the inputs of the model's blocks alone and compute the rest again: less
            memory for one more forward pass.
    """

    parameters: Parameters = "all"
    memory_budget: int = MEMORY_BUDGET
    checkpoint: bool = False


@dataclass(eq=False)
class _Plan:
    """What probing a network with one kind of input has found."""

    uses: list[Use]
    order: list[str]
    counts: dict[frozenset[str], dict[str, int]] = field(default_factory=dict)
    sample_bytes: dict[frozenset[str], int] = field(default_factory=dict)


_PLANS: WeakKeyDictionary[nn.Module, dict[Any, _Plan]] = WeakKeyDictionary()


class NetworkGradients:
    """The parameters' gradients of one batch, to be had by a backward pass of the activations.

    Attributes:
        names: the selected parameters.
        shapes: theirs.
    """

    def __init__(
        self,
        recorder: Recorder,
        logits: Tensor,
        shapes: dict[str, tuple[int, ...]],
        resolved: Callable[[Parameters], tuple[str, ...]],
    ) -> None:
        self._recorder: Recorder | None = recorder
        self._logits: Tensor | None = logits
        self._resolved = resolved
        self.shapes = shapes

    def names(self, parameters: Parameters) -> tuple[str, ...]:
        """The names of a selection of parameters."""
        return self._resolved(parameters)

    def read(self, delta: Tensor, reader: Reader) -> None:
        """Send δ back and hand every parameter's gradient to the reader.

        Args:
            delta: (B, C), the objective's gradient on the logits.
            reader: called once a parameter that has a part in the logits, as soon as its gradient
                is complete, with its name and a
                :class:`~grood_fast.network.gradients.LayerGradient`.

        Raises:
            InputError: the graph was released, or no selected parameter has a part in the logits.
        """
        if self._recorder is None or self._logits is None:
            raise InputError(
                "the pass has gone on, and the graph of this batch is gone: read its gradients "
                "before the next batch."
            )
        self._recorder.backward(self._logits, delta, reader)

    def release(self) -> None:
        """Forget the graph and the activations."""
        self._recorder = self._logits = None


class NetworkPass:
    """Makes the forward passes of a session so that gradients can be had from them.

    Args:
        classifier: inside a session.
        needs: of all detectors together.
    """

    def __init__(self, classifier: Classifier, needs: Iterable[NetworkNeed]) -> None:
        self.classifier, self.needs = classifier, tuple(needs)
        self._plan: _Plan | None = None
        self._network: nn.Module = classifier.model
        self._selected = frozenset[str]()
        self._checkpoint = any(need.checkpoint for need in self.needs)
        self._shapes: dict[str, tuple[int, ...]] = {}

    def pieces(self, batch: Batch) -> Iterator[Batch]:
        """The batch in pieces that keep within the memory budget; none if it is empty."""
        if batch.size == 0:
            return
        if self._plan is None:
            self._prepare(batch)
        assert self._plan is not None
        budget = min(need.memory_budget for need in self.needs)
        size = max(1, budget // max(1, self._plan.sample_bytes[self._selected]))
        yield from batch.split(size)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor | None, NetworkGradients]:
        """Logits and features without their graph, and the gradients that can be read from it."""
        assert self._plan is not None
        recorder = self._recorder(batch.size)
        logits, features = self._run(recorder, batch)
        gradients = NetworkGradients(recorder, logits, self._shapes, self._resolve)
        return logits.detach(), None if features is None else features.detach(), gradients

    def _recorder(self, size: int, checkpoint: bool | None = None) -> Recorder:
        assert self._plan is not None
        return Recorder(
            self._network,
            self._plan.uses,
            self._selected,
            size,
            self._plan.counts.get(self._selected),
        )

    def _run(
        self, recorder: Recorder, batch: Batch, checkpoint: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            batch = batch.map_inputs(lambda t: t.clone() if t.is_inference() else t)
            if self._checkpoint if checkpoint is None else checkpoint:
                for name in blocks(self._network):
                    stack.enter_context(recorder.checkpointing(self._network.get_submodule(name)))
            stack.enter_context(recorder)
            return self.classifier.forward(batch)

    def _resolve(self, parameters: Parameters) -> tuple[str, ...]:
        assert self._plan is not None
        head = self.classifier.head_name if self.classifier.has_head else None
        return resolve(parameters, self._network, self._plan.order, head)

    def _prepare(self, batch: Batch) -> None:
        self._network = self.classifier.network(batch)
        inputs = (*batch.args, *batch.kwargs.values())
        key = tuple((t.shape[1:], t.dtype) if isinstance(t, Tensor) else repr(t) for t in inputs)
        plans = _PLANS.setdefault(self._network, {})
        known = plans.get(key)
        small, large = (batch.resized(size) for size in PROBED_SIZES)
        if known is None:
            probes = []
            for some in (small, large):
                probe = Probe(self._network)
                with probe:
                    self.classifier.forward(some)
                probes.append(probe)
            uses = compared(probes[0].calls, probes[1].calls, PROBED_SIZES)
            known = plans[key] = _Plan(uses, list(probes[0].order))
        self._plan = known
        if not self.classifier.has_head:
            try:
                self.classifier.find_head(batch)
            except HeadNotFoundError:
                if any(need.parameters == "head" for need in self.needs):
                    raise
        names = [name for need in self.needs for name in self._resolve(need.parameters)]
        self._selected = frozenset(names)
        self._shapes = {
            name: tuple(parameter.shape)
            for name, parameter in self._network.named_parameters()
            if name in self._selected
        }
        if self._selected not in known.counts:
            self._check(known, large)

    def _check(self, plan: _Plan, batch: Batch) -> None:
        """Compare one sample's gradient norms inside a batch with autograd's for it alone."""
        recorder = self._recorder(batch.size)
        held: dict[int, int] = {}

        def hold(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
            return tensor

        own = {p.untyped_storage().data_ptr() for p in self._network.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            logits, _ = self._run(recorder, batch, checkpoint=False)
        for tensor in recorder.read_later:
            hold(tensor)
        norms: dict[str, float] = {}
        delta = torch.cos(torch.arange(1, logits.shape[1] + 1, dtype=torch.float64) * 1.7)
        delta = delta.to(logits).expand(batch.size, -1)
        recorder.backward(
            logits, delta, lambda name, g: norms.update({name: float(g.squared_norm()[0]) ** 0.5})
        )
        expected = self._autograd_norms(batch.first(1), delta[:1])
        scale = sum(norm**2 for norm in expected.values()) ** 0.5
        for name in sorted(self._selected):
            dtype = self._network.get_parameter(name).dtype
            tolerance = TOLERANCE.get(dtype, 0.5)
            if min(p.itemsize for p in self._network.parameters()) < 4:
                tolerance = 0.5
            found, truth = norms.get(name, 0.0), expected[name]
            if abs(found - truth) > tolerance * (truth + 0.02 * scale):
                raise InputError(
                    f"the gradient of {name} for one sample is {found:.3g} long inside a batch, "
                    f"and {truth:.3g} for the sample alone: the model mixes the samples of a batch "
                    "(does it need training mode?), or uses the parameter out of torch's sight "
                    "(TorchScript, a custom autograd function). Leave such parameters out: "
                    "parameters=[...] takes names."
                )
        plan.counts[self._selected] = dict(recorder.uses)
        total = sum(size for pointer, size in held.items() if pointer not in own)
        plan.sample_bytes[self._selected] = max(1, total // batch.size)

    def _autograd_norms(self, batch: Batch, delta: Tensor) -> dict[str, float]:
        with torch.inference_mode(False), torch.enable_grad():
            batch = batch.map_inputs(lambda t: t.clone() if t.is_inference() else t)
            leaves = {
                name: parameter.detach().clone().requires_grad_()
                for name, parameter in self._network.named_parameters()
                if name in self._selected
            }
            with _parameters_replaced(self._network, leaves):
                logits, _ = self.classifier.forward(batch)
            if not logits.requires_grad:
                return dict.fromkeys(leaves, 0.0)
            gradients = torch.autograd.grad(
                logits, list(leaves.values()), delta.to(logits.dtype), allow_unused=True
            )
        return {
            name: 0.0 if gradient is None else float(gradient.double().norm())
            for name, gradient in zip(leaves, gradients, strict=True)
        }


@contextmanager
def _parameters_replaced(network: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """The network with other tensors in its parameters' places, tied ones in all of them."""
    replaced = {id(network.get_parameter(name)): value for name, value in values.items()}
    places = [
        (module, key, parameter)
        for module in network.modules()
        for key, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in replaced
    ]
    try:
        for module, key, parameter in places:
            module._parameters[key] = replaced[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for module, key, parameter in places:
            module._parameters[key] = parameter
