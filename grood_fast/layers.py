"""What layers in the middle of a network returned, and the network from there on."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from grood_fast.errors import InputError

STAGES = "stages"
"""The need for the activations at the end of every stage; see :meth:`Layers.stages`."""

PARTS = 4
"""Into how many parts a chain of layers is taken apart where nothing else marks stages."""

_LAYER = "layer:"


def layer_need(name: str | None) -> str:
    """The need for one layer's activation and for the network from there on.

    Args:
        name: as in ``model.named_modules()``; None: the layer that ends the last stage but one.
    """
    return _LAYER + (name or "")


def layer_needs(needs: Iterator[Any] | frozenset[Any] | set[Any]) -> frozenset[str]:
    """Those among the needs of a pass that this module serves."""
    return frozenset(
        need
        for need in needs
        if isinstance(need, str) and (need == STAGES or need.startswith(_LAYER))
    )


@dataclass(frozen=True, eq=False)
class LayerOutput:
    """What a layer returned for one batch.

    Attributes:
        name: the layer's.
        activation: (B, ...).
        resume: logits (B, C) and penultimate features (B, D), or None where nobody asked for them,
            if the layer had returned something else. The layers before it are not computed again.
            Differentiable where autograd is on.
    """

    name: str
    activation: Tensor
    resume: Callable[[Tensor], tuple[Tensor, Tensor | None]]


def pooled(activation: Tensor) -> Tensor:
    """An activation (B, channels, ...) or (B, tokens, channels) averaged over its positions.

    Returns:
        (B, channels) float32 or float64.
    """
    real = activation if activation.dtype == torch.float64 else activation.float()
    if real.ndim <= 2:
        return real
    return real.mean(dim=1) if real.ndim == 3 else real.flatten(2).mean(dim=2)


@dataclass(eq=False)
class _Call:
    """One call of a module.

    Attributes:
        name: the module's.
        number: of the call among the module's own.
        kind: the module's class.
        start, end: when, counted over the beginnings and ends of all calls.
        output: what it returned, without its values.
        changed: whether that was changed in place later on.
    """

    name: str
    number: int
    kind: type
    start: int
    end: int
    output: Any
    changed: bool = False

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.number

    def contains(self, other: _Call) -> bool:
        return self.start < other.start and other.end < self.end


class Layers:
    """Records what layers return in forward passes, and replaces it in passes that resume.

    Which modules come before a layer is found by one traced call of the network. In a pass that
    resumes, these return what they returned before, without computing: only the code between them
    runs again.

    Args:
        network: whose layers.
        wanted: needs, as ``STAGES`` and :func:`layer_need` name them.
        probe: calls the network with a few samples.
        head: name of the head, before which the last stage ends.

    Raises:
        InputError: there is no such layer, it is not called once, or it returns no tensor.
    """

    def __init__(
        self,
        network: nn.Module,
        wanted: frozenset[str],
        probe: Callable[[], Any],
        head: str | None = None,
    ) -> None:
        calls = _traced(network, probe)
        stages = _stages(calls, head)
        self._network = network
        self._stages = stages if STAGES in wanted else []
        self._layers: dict[str, tuple[_Call, list[_Call]]] = {}
        for need in wanted - {STAGES}:
            layer = _named(network, calls, stages, need.removeprefix(_LAYER))
            self._layers[need] = layer, _before(calls, layer)
        kept = [*self._stages]
        for layer, before in self._layers.values():
            kept += [layer, *before]
        self._kept = {call.key: call for call in kept}
        self._outputs: dict[tuple[str, int], Any] = {}
        self._seen: Counter[str] = Counter()
        self._replayed: dict[str, deque[Any]] | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on the modules concerned."""
        with ExitStack() as stack:
            for name in {name for name, _ in self._kept}:
                hook = self._network.get_submodule(name).register_forward_hook(self._hook(name))
                stack.callback(hook.remove)
            yield
        self.begin()

    def begin(self) -> None:
        """Forget the last forward pass; the next one is recorded."""
        self._outputs.clear()
        self._seen.clear()

    @property
    def needs(self) -> list[str]:
        """Those that are about one layer."""
        return list(self._layers)

    def stages(self) -> dict[str, Tensor]:
        """Activations (B, ...) at the end of every stage in the last forward pass, by layer.

        Stages end where feature maps (B, channels, height, width) become smaller; those of
        transformers, and of others without maps of several sizes, with each fourth of the longest
        chain of layers of one kind, else with each fourth of all layers.
        """
        return {call.name: self._output(call).detach() for call in self._stages}

    def output(self, need: str) -> tuple[str, Tensor]:
        """The name of the layer that a need is about, and what it returned, (B, ...)."""
        layer, _ = self._layers[need]
        return layer.name, self._output(layer).detach()

    @contextmanager
    def replaced(self, need: str, activation: Tensor) -> Iterator[None]:
        """Inside, a call of the network resumes at the layer, as if it had returned this."""
        layer, before = self._layers[need]
        queues: dict[str, deque[Any]] = defaultdict(deque)
        for call in before:
            output = self._output(call)
            queues[call.name].append(_copy(output) if call.changed else output)
        # What comes next may work in place, which must not be on the caller's tensor.
        queues[layer.name].append(activation.clone())
        with ExitStack() as stack:
            for name, queue in queues.items():
                stack.enter_context(_returning(self._network.get_submodule(name), queue))
            stack.callback(setattr, self, "_replayed", None)
            self._replayed = queues
            yield

    def _hook(self, name: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if self._replayed is not None:
                # The last word: other hooks have made of it what they do already.
                queue = self._replayed.get(name)
                return queue.popleft() if queue else None
            call = self._kept.get((name, self._seen[name]))
            self._seen[name] += 1
            if call is not None:
                self._outputs[call.key] = _copy(output) if call.changed else output
            return None

        return hook

    def _output(self, call: _Call) -> Any:
        if call.key not in self._outputs:
            raise InputError(
                f"the layer {call.name!r} was not called for this batch, as it was for the first: "
                "the model must take the same path for every batch."
            )
        return self._outputs[call.key]


def _traced(network: nn.Module, probe: Callable[[], Any]) -> list[_Call]:
    """All calls of the network's modules, in the order in which they ended."""
    calls: list[_Call] = []
    versions: list[list[tuple[Tensor, int]]] = []
    starts: list[int] = []
    clock, numbers = 0, Counter[str]()

    def enter(*_: Any) -> None:
        nonlocal clock
        clock += 1
        starts.append(clock)

    def leave(name: str, module: nn.Module, output: Any) -> None:
        nonlocal clock
        clock += 1
        calls.append(_Call(name, numbers[name], type(module), starts.pop(), clock, output))
        numbers[name] += 1
        leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        versions.append([(leaf, leaf._version) for leaf in leaves])

    with ExitStack() as stack:
        for name, module in network.named_modules():
            stack.callback(module.register_forward_pre_hook(enter).remove)
            after = module.register_forward_hook(lambda m, _, out, name=name: leave(name, m, out))
            stack.callback(after.remove)
        probe()
    for call, before in zip(calls, versions, strict=True):
        call.changed = any(tensor._version != version for tensor, version in before)
        call.output = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), call.output)
    return calls


def _before(calls: list[_Call], layer: _Call) -> list[_Call]:
    """The outermost calls that had ended when the layer's did, in order."""
    ended = [call for call in calls if call.end < layer.end and not layer.contains(call)]
    return [call for call in ended if not any(other.contains(call) for other in ended)]


def _named(network: nn.Module, calls: list[_Call], stages: list[_Call], name: str) -> _Call:
    kind = type(network).__name__
    if not name:
        if not stages:
            raise InputError(f"{kind} has no layer before its head that returns a tensor (B, ...).")
        return stages[max(0, len(stages) - 2)]
    own = [call for call in calls if call.name == name]
    if not own:
        raise InputError(
            f"{kind} calls no layer {name!r} in its forward pass; its stages end with "
            f"{[call.name for call in stages]}, and model.named_modules() has all names."
        )
    if len(own) > 1 or not isinstance(own[0].output, Tensor):
        fault = f"is called {len(own)} times" if len(own) > 1 else "does not return one tensor"
        raise InputError(f"the layer {name!r} {fault} in a forward pass: name another.")
    return own[0]


def _stages(calls: list[_Call], head: str | None) -> list[_Call]:
    """The calls that end stages; see :meth:`Layers.stages`."""
    heads = [call for call in calls if call.name == head]
    times = Counter(call.name for call in calls)
    found = [
        call
        for call in calls
        if isinstance(call.output, Tensor)
        and call.output.ndim >= 2
        and times[call.name] == 1
        and not any(call.end >= one.start for one in heads)
        and call.name
    ]
    chains: dict[tuple[Any, ...], list[_Call]] = defaultdict(list)
    for call in found:
        parent, _, key = call.name.rpartition(".")
        if key.isdigit():
            chains[parent, call.kind, tuple(call.output.shape[1:])].append(call)
    chain = max(chains.values(), key=len, default=[])
    of_tokens = len(chain) >= PARTS and chain[0].output.ndim == 3
    maps: dict[tuple[int, ...], list[_Call]] = defaultdict(list)
    for call in found:
        if max(call.output.shape[2:], default=1) > 1 and call.output.ndim >= 4:
            maps[tuple(call.output.shape[2:])].append(call)
    if len(maps) > 1 and not of_tokens:  # attention has four dimensions as well
        return sorted(map(_last_outermost, maps.values()), key=lambda call: call.end)
    if len(chain) < PARTS:
        chain = [call for call in found if not any(call.contains(other) for other in found)]
    ends = {-(-len(chain) * part // PARTS) - 1 for part in range(1, PARTS + 1)}
    return [chain[end] for end in sorted(ends) if end >= 0]


def _last_outermost(calls: list[_Call]) -> _Call:
    depth = min(call.name.count(".") for call in calls)
    outermost = (call for call in calls if call.name.count(".") == depth)
    return max(outermost, key=lambda call: call.end)


@contextmanager
def _returning(module: nn.Module, queue: deque[Any]) -> Iterator[None]:
    """The module's forward returns what the queue holds, and computes once that is used up.

    The queue moves on when the hook takes from it.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise InputError(
            "a network with TorchScript modules cannot be resumed from a layer: give the original."
        )
    original, own = module.forward, vars(module).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        return queue[0] if queue else original(*args, **kwargs)

    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _copy(output: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, output)
