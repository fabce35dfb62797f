"""Which parameters a forward pass uses, where and how: seen at the level of torch's functions.

Functions rather than modules, because not every use of a parameter is a module's call: functional
attention, positional embeddings that are added, weights that are computed from others. Parameters
are handed on detached, so autograd records the activations alone.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from grood_fast.errors import InputError
from grood_fast.network.gradients import Formed, LayerGradient, total

DERIVED_ELEMENTS = 1 << 24
"""How many numbers to pass at once through the computation of a weight from other weights."""

Reader = Callable[[str, LayerGradient], None]
"""What is done with a parameter's gradient: called with its name and the gradient of a batch."""


class Layout(NamedTuple):
    """Where a tensor holds its samples.

    Attributes:
        dim: the dimension.
        factor: how many positions a sample has in it.
        minor: whether the samples of one position are neighbours, not the positions of a sample.
    """

    dim: int
    factor: int
    minor: bool

    def split(self, tensor: Tensor, batch: int) -> Tensor:
        """The tensor with the samples first: (B, factor, ...) or, with factor 1, (B, ...)."""
        if self.factor == 1:
            return tensor.movedim(self.dim, 0)
        sizes = (self.factor, batch) if self.minor else (batch, self.factor)
        parts: Tensor = tensor.unflatten(self.dim, sizes)  # type: ignore[no-untyped-call]
        samples, positions = self.dim + self.minor, self.dim + (not self.minor)
        return parts.movedim((samples, positions), (0, 1))


class Shapes(NamedTuple):
    """One call that combines a parameter with activations, as a probe saw it."""

    function: str
    arguments: tuple[torch.Size, ...]
    results: tuple[torch.Size, ...]
    minor: bool


class Use(NamedTuple):
    """The same, after it was seen with two batch sizes."""

    function: str
    arguments: tuple[Layout | None, ...]
    results: tuple[Layout | None, ...]
    ranks: tuple[int, ...]  # of the results


class Interception(TorchFunctionMode):
    """Tells what a forward pass computes from parameters and constants alone ("derived"), and what
    from the inputs ("activations"): :meth:`mix` is called where the two meet.

    Args:
        network: whose forward pass runs inside.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in network.named_parameters()}
        # Whatever does not depend on the inputs, with the parameters it is computed from; holding
        # the tensors keeps their ids from being used again.
        self._known: dict[int, tuple[Tensor, frozenset[str]]] = {
            id(buffer): (buffer, frozenset()) for buffer in network.buffers()
        }
        for name, parameter in network.named_parameters():
            self._known[id(parameter)] = (parameter, frozenset({name}))
        self._minor = False

    def origins(self, tensor: Tensor) -> frozenset[str] | None:
        """The parameters a tensor is computed from; None if the inputs have a part in it."""
        known = self._known.get(id(tensor))
        return None if known is None else known[1]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return self._attention(args, kwargs)
        tensors = list(_tensors((args, kwargs)))
        origins = [self.origins(tensor) for tensor in tensors]
        activations = None in origins
        if any(origins):
            if activations:
                return self.mix(func, args, kwargs, tensors)
            out = self.derive(func, args, kwargs)
            self._remember(out, frozenset[str]().union(*filter(None, origins)))
            return out
        out = func(*args, **kwargs)
        if not activations:
            self._remember(out, frozenset())
        elif origins[0] is not None and (out is tensors[0] or func is Tensor.__setitem__):
            self._known.pop(id(tensors[0]), None)  # a constant that was written into
        return out

    def derive(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call with parameters, or what was computed from them, and no activations."""
        return func(*args, **kwargs)

    def mix(self, func: Callable[..., Any], args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """A call with both."""
        raise NotImplementedError

    def _remember(self, out: Any, origins: frozenset[str]) -> None:
        for tensor in _tensors(out):
            self._known.setdefault(id(tensor), (tensor, origins))

    def _attention(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Its projections are calls inside it; inside, the samples are the second dimension.
        before, self._minor = self._minor, True
        try:
            with self:
                return _attention_seen_through(*args, **kwargs)
        finally:
            self._minor = before


class Probe(Interception):
    """Notes the shapes of every call where parameters meet activations."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.calls: list[Shapes] = []
        self.order: dict[str, None] = {}  # parameters as they are used, each once

    def mix(self, func: Callable[..., Any], args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        shapes = tuple(tensor.shape for tensor in tensors)
        out = func(*args, **kwargs)
        for tensor in tensors:
            self.order.update(dict.fromkeys(sorted(self.origins(tensor) or ())))
        results = tuple(tensor.shape for tensor in _tensors(out))
        self.calls.append(Shapes(_name(func), shapes, results, self._minor))
        return out


def compared(small: list[Shapes], large: list[Shapes], sizes: tuple[int, int]) -> list[Use]:
    """What two probes with different batch sizes tell about where the samples are.

    Raises:
        InputError: the two took different paths.
    """
    if [call.function for call in small] != [call.function for call in large]:
        raise InputError(
            "the model takes another path for another batch size: gradients of single samples "
            "inside a batch need a model that treats every sample alike."
        )

    def layouts(
        first: tuple[torch.Size, ...], second: tuple[torch.Size, ...], minor: bool
    ) -> tuple[Layout | None, ...]:
        return tuple(_layout(a, b, sizes, minor) for a, b in zip(first, second, strict=True))

    return [
        Use(
            a.function,
            layouts(a.arguments, b.arguments, a.minor),
            layouts(a.results, b.results, a.minor),
            tuple(map(len, a.results)),
        )
        for a, b in zip(small, large, strict=True)
    ]


def _layout(
    small: torch.Size, large: torch.Size, sizes: tuple[int, int], minor: bool
) -> Layout | None:
    if len(small) != len(large):
        raise InputError(f"a tensor has the shape {tuple(small)} for {sizes[0]} samples and "
                         f"{tuple(large)} for {sizes[1]}.")  # fmt: skip
    growing = [dim for dim, (a, b) in enumerate(zip(small, large, strict=True)) if a != b]
    if not growing:
        return None
    dim, *others = growing
    factor, rest = divmod(small[dim], sizes[0])
    if others or rest or large[dim] != factor * sizes[1]:
        raise InputError(
            f"a tensor has the shape {tuple(small)} for {sizes[0]} samples and {tuple(large)} for "
            f"{sizes[1]}: its samples are not one dimension, so their gradients cannot be told "
            "apart."
        )
    return Layout(dim, factor, minor and factor > 1)


@dataclass(frozen=True)
class Source:
    """A parameter, or what was computed from parameters, as an argument of a call.

    Attributes:
        value: without its derivatives, for the call.
        tensor: with them, where it is no parameter itself.
        names: the selected parameters behind it.
    """

    value: Tensor
    tensor: Tensor | None = None
    names: frozenset[str] = frozenset()


@dataclass
class _Collected:
    """The gradients of one backward pass, until all uses of a parameter are there."""

    reader: Reader
    parts: dict[str, list[LayerGradient]] = field(default_factory=dict)


class Recorder(Interception):
    """Records what a backward pass of the activations needs to know of every parameter.

    Args:
        network: whose forward pass runs inside.
        plan: from the probes.
        selected: names of the parameters whose gradients are wanted.
        batch: B.
        counts: how often each parameter is used, where that is known before the forward pass.

    Attributes:
        uses: how often each parameter was used.
        read_later: the activations that the backward pass will read.
    """

    def __init__(
        self,
        network: nn.Module,
        plan: list[Use],
        selected: frozenset[str],
        batch: int,
        counts: dict[str, int] | None = None,
    ) -> None:
        super().__init__(network)
        self.selected, self.batch = selected, batch
        self.uses: dict[str, int] = {}
        self.read_later: list[Tensor] = []
        self._counts = self.uses if counts is None else counts
        self._plan, self._position = plan, 0
        self._leaves: dict[str, Tensor] = {}
        self._collected: _Collected | None = None
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        self._root = torch.zeros((), device=device, requires_grad=True)

    # --- the forward pass -------------------------------------------------------------------------

    def derive(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return func(*_replaced(args, self._as_leaf), **_replaced(kwargs, self._as_leaf))

    def mix(self, func: Callable[..., Any], args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        from grood_fast.network.rules import Call, apply

        use = self._next(func)
        call = Call(self, func, args, kwargs, tensors, use)
        return apply(call)

    def source(self, tensor: Tensor) -> Source | None:
        """What a tensor is as an argument; None for an activation."""
        origins = self.origins(tensor)
        if origins is None:
            return None
        value = _usable(tensor.detach())
        if id(tensor) in self.names:
            return Source(value, None, origins & self.selected)
        # Where the model computed it under no_grad, or detached it, no gradient goes through it.
        names = origins & self.selected if tensor.requires_grad else frozenset[str]()
        return Source(value, tensor, names)

    def rooted(
        self, compute: Callable[[], Tensor], inputs: Iterable[Tensor], *sources: Source | None
    ) -> Tensor:
        """A result that autograd tracks if a source's gradient is wanted, also where none of the
        inputs is tracked yet."""
        wanted = torch.is_grad_enabled() and any(s is not None and s.names for s in sources)
        if not wanted or any(tensor.requires_grad for tensor in inputs):
            return compute()
        out: Tensor = _Rooted.apply(self._root, compute)  # type: ignore[no-untyped-call]
        return out

    def taken_over(
        self,
        compute: Callable[[], Tensor],
        backward: Callable[[Tensor], Tensor],
        input: Tensor,
        *sources: Source | None,
    ) -> Tensor:
        """A result whose backward pass is computed here: it has to :meth:`collect` the gradients
        of the sources from that of the result, and gives the gradient of the input."""
        for source in sources:
            self._count(source)
        out: Tensor = _TakenOver.apply(  # type: ignore[no-untyped-call]
            self._root, input, compute, backward
        )
        return out

    def _count(self, source: Source | None) -> None:
        for name in () if source is None else source.names:
            self.uses[name] = self.uses.get(name, 0) + 1

    def watch(
        self, out: Tensor, *gradients: tuple[Source | None, Callable[[Tensor], LayerGradient]]
    ) -> None:
        """When the gradient of ``out`` arrives, make those of the sources from it."""
        wanted = [(source, make) for source, make in gradients if source and source.names]
        if not wanted or not out.requires_grad:
            return
        for source, _ in wanted:
            self._count(source)

        def arrived(delta: Tensor) -> None:
            for source, make in wanted:
                self.collect(source, make(delta))

        out.register_hook(arrived)  # type: ignore[no-untyped-call]

    def checked(self, tensor: Tensor) -> Callable[[], Tensor]:
        """An activation to be read in the backward pass; raises if it was changed until then."""
        if not torch.is_grad_enabled():
            return lambda: tensor
        kept, version = tensor.detach(), tensor._version
        self.read_later.append(kept)

        def read() -> Tensor:
            if kept._version != version:
                raise InputError(
                    "the model changes a layer's input in place after the layer has read it, so "
                    "its gradient cannot be computed: use the out-of-place operation there."
                )
            return kept

        return read

    @contextmanager
    def checkpointing(self, block: nn.Module) -> Iterator[None]:
        """Calls of a module keep its inputs alone, and run again when the gradient arrives."""
        original = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            position = self._position

            def again(*tensors: Any) -> Any:
                after, self._position = self._position, position
                try:  # in the backward pass nothing is intercepted yet
                    with self if torch.is_grad_enabled() else nullcontext():
                        return original(*tensors, **kwargs)
                finally:
                    self._position = max(after, self._position)

            if not torch.is_grad_enabled():
                return again(*args)
            return _Checkpointed.apply(self._root, again, *args)  # type: ignore[no-untyped-call]

        block.forward = forward
        try:
            yield
        finally:
            del block.forward

    # --- the backward pass ------------------------------------------------------------------------

    def backward(self, logits: Tensor, delta: Tensor, reader: Reader) -> None:
        """Send δ (B, C) back from the logits, and every selected parameter's gradient to the
        reader as soon as it is complete.

        Raises:
            InputError: no selected parameter has a part in the logits.
        """
        if not logits.requires_grad:
            raise InputError(
                "the logits do not depend on the selected parameters in a way autograd sees: does "
                "the model compute them under no_grad, or detach them?"
            )
        self._collected = _Collected(reader)
        try:
            torch.autograd.grad(
                logits, self._root, delta.to(logits.dtype), retain_graph=True, allow_unused=True
            )
            for name, parts in self._collected.parts.items():
                reader(name, total(parts))  # of a use that had no part in the logits
        finally:
            self._collected = None

    def collect(self, source: Source | None, gradient: LayerGradient) -> None:
        """Take in the gradient of one use of a source, if it is wanted."""
        if source is None or not source.names or self._collected is None:
            return
        if source.tensor is None:
            (name,) = source.names
            self._deliver(name, gradient)
            return
        cotangents = gradient.formed().reshape(self.batch, *source.tensor.shape)
        self.collect_derived(source, lambda start, stop: cotangents[start:stop])

    def collect_derived(self, source: Source, cotangents: Callable[[int, int], Tensor]) -> None:
        """The same for what was computed from parameters: through that computation, each sample.

        Args:
            source: with a ``tensor``.
            cotangents: for the samples from ``start`` to ``stop``, (stop − start, *tensor.shape).
        """
        assert source.tensor is not None
        names = sorted(source.names)
        leaves = [self._leaves[name] for name in names]
        step = max(1, DERIVED_ELEMENTS // max(1, source.tensor.numel()))
        parts: list[tuple[Tensor | None, ...]] = []
        with torch.enable_grad():
            for start in range(0, self.batch, step):
                given = cotangents(start, min(start + step, self.batch))
                parts.append(
                    torch.autograd.grad(
                        source.tensor,
                        leaves,
                        given.to(source.tensor.dtype),
                        is_grads_batched=True,
                        retain_graph=True,
                        allow_unused=True,
                    )
                )
        for name, leaf, pieces in zip(names, leaves, zip(*parts, strict=True), strict=True):
            found = [piece for piece in pieces if piece is not None]
            zero = leaf.detach().new_zeros(self.batch, *leaf.shape)
            self._deliver(name, Formed(torch.cat(found) if found else zero))

    def _deliver(self, name: str, gradient: LayerGradient) -> None:
        assert self._collected is not None
        parts = self._collected.parts.setdefault(name, [])
        parts.append(gradient)
        if len(parts) == self._counts[name]:
            del self._collected.parts[name]
            self._collected.reader(name, total(parts))

    def _next(self, func: Callable[..., Any]) -> Use:
        position, self._position = self._position, self._position + 1
        if position >= len(self._plan) or self._plan[position].function != _name(func):
            raise InputError(
                f"the model calls {_name(func)} with a parameter where it did not for the first "
                "samples: gradients of single samples inside a batch need a model that takes the "
                "same path for every batch."
            )
        return self._plan[position]

    def _as_leaf(self, tensor: Tensor) -> Tensor:
        name = self.names.get(id(tensor))
        if name is None:
            return tensor
        if name not in self._leaves:
            leaf = _usable(tensor.detach())
            self._leaves[name] = leaf.requires_grad_(name in self.selected)
        return self._leaves[name]


class _Rooted(torch.autograd.Function):
    """A tensor that autograd tracks though nothing it was computed from is tracked."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        return compute()

    @staticmethod
    def backward(ctx: Any, *deltas: Any) -> Any:
        return None, None


class _TakenOver(torch.autograd.Function):
    """A call whose backward pass its rule computes, together with the parameters' gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        root: Tensor,
        input: Tensor,
        compute: Callable[[], Tensor],
        backward: Callable[[Tensor], Tensor],
    ) -> Tensor:
        ctx.take_over = backward
        return compute()

    @staticmethod
    def backward(ctx: Any, *deltas: Any) -> Any:
        onward = ctx.take_over(deltas[0])
        return None, onward if ctx.needs_input_grad[1] else None, None, None


class _Checkpointed(torch.autograd.Function):
    """A part of the forward pass of which only the inputs are kept."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, run: Callable[..., Any], *args: Any) -> Any:
        ctx.run, ctx.root = run, root
        ctx.tensors = [isinstance(arg, Tensor) for arg in args]
        ctx.others = [None if isinstance(arg, Tensor) else arg for arg in args]
        ctx.save_for_backward(*(arg for arg in args if isinstance(arg, Tensor)))
        return run(*args)

    @staticmethod
    def backward(ctx: Any, *deltas: Any) -> Any:
        saved = iter(ctx.saved_tensors)
        args = [
            next(saved).detach() if is_tensor else other
            for is_tensor, other in zip(ctx.tensors, ctx.others, strict=True)
        ]
        needed = ctx.needs_input_grad[2:]
        wanted = [arg.requires_grad_() for arg, need in zip(args, needed, strict=True) if need]
        with torch.enable_grad():
            out = ctx.run(*args)
        outs = [out] if isinstance(out, Tensor) else list(out)
        pairs = [(o, d) for o, d in zip(outs, deltas, strict=True) if d is not None]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs],
                [*wanted, ctx.root],
                [d for _, d in pairs],
                allow_unused=True,
            )
        )
        return None, None, *(next(found) if need else None for need in needed)


def _name(func: Callable[..., Any]) -> str:
    return getattr(func, "__name__", repr(func))


def _usable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where autograd could not keep it."""
    return tensor.clone() if tensor.is_inference() else tensor


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        for item in value:
            yield from _tensors(item)


def _replaced(value: Any, replace: Callable[[Tensor], Any]) -> Any:
    """The same nested value with its tensors replaced."""
    if isinstance(value, Tensor):
        return replace(value)
    if isinstance(value, dict):
        return {key: _replaced(item, replace) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_replaced(item, replace) for item in value)
    return value


def _seen_through(function: Any, replaced: dict[str, Any]) -> Any:
    """The same code, with its calls of some other functions replaced.

    A function of torch that may be overridden offers itself whole to an interception, and cannot
    be asked again for what it calls inside.
    """
    copied = types.FunctionType(
        function.__code__,
        {**function.__globals__, **replaced},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _never(_: Iterable[Any]) -> bool:
    return False


_attention_seen_through = _seen_through(
    F.multi_head_attention_forward, {"has_torch_function": _never}
)
