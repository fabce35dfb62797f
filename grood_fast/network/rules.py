"""One rule a function: how a parameter's gradient follows from its call's input and δ.

A rule runs the function on the detached parameters and says, for each, what its gradient is made
of once the gradient of the output is there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from grood_fast import ops
from grood_fast.errors import InputError, NetworkWarning
from grood_fast.network.gradients import (
    Convolution,
    Formed,
    Geometry,
    LayerGradient,
    Lookup,
    OuterProducts,
    widened,
)
from grood_fast.network.interception import Layout, Source, Use, _name, _replaced

if TYPE_CHECKING:
    from grood_fast.network.interception import Recorder


class Call(NamedTuple):
    """One call where parameters meet activations."""

    recorder: Recorder
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: list[Tensor]
    use: Use

    def layout(self, tensor: Tensor) -> Layout | None:
        """Where an argument holds its samples."""
        for argument, layout in zip(self.tensors, self.use.arguments, strict=True):
            if argument is tensor:
                return layout
        return None

    @property
    def result(self) -> Layout | None:
        """Where the result holds its samples, if it is one tensor."""
        return self.use.results[0] if len(self.use.results) == 1 else None

    def source(self, argument: Tensor | None) -> Source | None:
        return None if argument is None else self.recorder.source(argument)

    def samples_first(self, layout: Layout) -> Callable[[Tensor], Tensor]:
        batch = self.recorder.batch
        return lambda tensor: layout.split(tensor, batch)


def apply(call: Call) -> Any:
    """Run a call by its rule, or else by the most general way that fits."""
    rule = RULES.get(call.function)
    if rule is not None and call.result is not None:
        out = rule(call, *call.args, **call.kwargs)
        if out is not NotImplemented:
            return out
    return _in_general(call)


# --- products with a matrix -----------------------------------------------------------------------


def _linear(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return _matrix_product(call, input, weight, bias, F.linear, transposed=False)


def _matmul(call: Call, input: Tensor, other: Tensor) -> Any:
    return _matrix_product(
        call, input, other, None, lambda x, w, _: torch.matmul(x, w), transposed=True
    )


def _addmm(
    call: Call, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Any:
    if beta != 1 or alpha != 1 or input.ndim != 1:
        return NotImplemented
    return _matrix_product(
        call, mat1, mat2, input, lambda x, w, b: torch.addmm(cast(Tensor, b), x, w), transposed=True
    )


def _matrix_product(
    call: Call,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    function: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    transposed: bool,
) -> Any:
    w, b = call.source(weight), call.source(bias)
    given, made = call.layout(input), call.result
    if w is None or (bias is not None and b is None) or w.value.ndim != 2:
        return NotImplemented
    if given is None or made is None or given.dim == input.ndim - 1:
        return NotImplemented
    recorder, bias_value = call.recorder, None if b is None else b.value
    out = recorder.rooted(lambda: function(input, w.value, bias_value), [input], w, b)
    read = recorder.checked(input)
    batch = recorder.batch

    def rows(tensor: Tensor, layout: Layout) -> Tensor:
        return layout.split(tensor, batch).reshape(batch, -1, tensor.shape[-1])

    def weight_gradient(delta: Tensor) -> LayerGradient:
        left, right = rows(delta, made), rows(read(), given)
        return OuterProducts(right, left) if transposed else OuterProducts(left, right)

    recorder.watch(
        out, (w, weight_gradient), (b, lambda delta: Formed(widened(rows(delta, made)).sum(dim=1)))
    )
    return out


# --- convolutions ---------------------------------------------------------------------------------


def _convolution(
    call: Call,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    w, b = call.source(weight), call.source(bias)
    given = call.layout(input)
    if w is None or (bias is not None and b is None) or given is None or given.dim != 0:
        return NotImplemented
    recorder = call.recorder
    batch, factor = recorder.batch, given.factor
    geometry = _geometry(tuple(w.value.shape[2:]), stride, padding, dilation)
    bias_value = None if b is None else b.value
    out = recorder.rooted(
        lambda: call.function(input, w.value, bias_value, stride, padding, dilation, groups),
        [input],
        w,
        b,
    )
    read = recorder.checked(input)

    def merged(gradient: Tensor) -> Tensor:  # of several maps a sample
        return given.split(gradient, batch).sum(dim=1) if factor > 1 else gradient

    def weight_gradient(delta: Tensor) -> LayerGradient:
        if groups == 1:
            gradient = Convolution(read(), delta, geometry)
            return gradient if factor == 1 else Formed(merged(gradient.formed()))
        return Formed(merged(_grouped(read(), delta, geometry, groups)))

    def bias_gradient(delta: Tensor) -> LayerGradient:
        return Formed(merged(channel_sums(delta)[1]))

    recorder.watch(out, (w, weight_gradient), (b, bias_gradient))
    return out


def _geometry(kernel: tuple[int, ...], stride: Any, padding: Any, dilation: Any) -> Geometry:
    def each(value: Any) -> tuple[int, ...]:
        values = (value,) if isinstance(value, int) else tuple(value)
        return values * len(kernel) if len(values) == 1 else values

    strides, dilations = each(stride), each(dilation)
    if padding == "same":
        spans = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
        pads = tuple((span // 2, span - span // 2) for span in spans)
    else:
        pads = tuple((p, p) for p in each(0 if padding == "valid" else padding))
    return Geometry(kernel, strides, pads, dilations)


def _grouped(activation: Tensor, delta: Tensor, geometry: Geometry, groups: int) -> Tensor:
    """(B, M, N', *kernel): a batch is one sample whose groups are all samples' groups."""
    batch, rows = delta.shape[:2]
    dimensions = len(geometry.kernel)
    if any(before != after for before, after in geometry.padding):
        activation = F.pad(activation, [n for pair in reversed(geometry.padding) for n in pair])
        padding = [0] * dimensions
    else:
        padding = [before for before, _ in geometry.padding]
    weight = activation.new_empty(batch * rows, activation.shape[1] // groups, *geometry.kernel)
    _, gradient, _ = torch.ops.aten.convolution_backward(
        delta.reshape(1, -1, *delta.shape[2:]),
        activation.reshape(1, -1, *activation.shape[2:]),
        weight,
        None,
        list(geometry.stride),
        padding,
        list(geometry.dilation),
        False,
        [0] * dimensions,
        batch * groups,
        [False, True, False],
    )
    made: Tensor = gradient.reshape(batch, rows, *weight.shape[1:])
    return made


# --- normalisation --------------------------------------------------------------------------------

Normalise = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


def _batch_norm(
    call: Call,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if training or running_mean is None or running_var is None:
        raise InputError(
            "the model normalises over the batch even in evaluation mode (batch normalisation "
            "without running statistics): a sample has no gradient of its own there."
        )
    inverse = (running_var + eps).rsqrt()
    w, b, recorder, given = (
        call.source(weight),
        call.source(bias),
        call.recorder,
        call.layout(input),
    )

    def normalise(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        return F.batch_norm(x, running_mean, running_var, w, b, False, momentum, eps)

    def normalised(products: Tensor, sums: Tensor) -> Tensor:  # Σ δ x̂ from Σ δ x and Σ δ
        return (products - running_mean * sums) * inverse

    alone = given is not None and given.dim == 0 and given.factor == 1
    plain = w is not None and b is not None and input.dtype == w.value.dtype == inverse.dtype
    wanted = w is not None and b is not None and (w.names or b.names)
    if not (alone and plain and wanted and torch.is_grad_enabled()) or inverse.itemsize < 4:
        return _channel_affine(
            call,
            input,
            weight,
            bias,
            normalise,
            lambda x, delta: normalised(*channel_sums(delta, x)),
        )
    assert w is not None
    assert b is not None
    read = recorder.checked(input)

    def backward(delta: Tensor) -> Tensor:
        # One read of δ for what torch and the sums would read it three times for.
        onward, products, sums = ops.channel_affine_backward(delta, read(), w.value * inverse)
        recorder.collect(w, Formed(normalised(products, sums)))
        recorder.collect(b, Formed(sums))
        return onward

    return recorder.taken_over(lambda: normalise(input, w.value, b.value), backward, input, w, b)


def _group_norm(
    call: Call,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    def normalise(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        return F.group_norm(x, num_groups, w, b, eps)

    return _channel_affine(call, input, weight, bias, normalise)


def _instance_norm(
    call: Call,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    def normalise(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        return F.instance_norm(x, running_mean, running_var, w, b, use_input_stats, momentum, eps)

    return _channel_affine(call, input, weight, bias, normalise)


def _channel_affine(
    call: Call,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalise: Normalise,
    with_input: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Any:
    given, batch = call.layout(input), call.recorder.batch
    if given is None or given.dim != 0:
        return NotImplemented

    def merged(sums: Tensor) -> Tensor:  # of several maps a sample
        return given.split(sums, batch).sum(dim=1) if given.factor > 1 else sums

    def of_weight(x: Tensor, delta: Tensor) -> Tensor:
        if with_input is not None:
            return merged(with_input(x, delta))
        return merged(channel_sums(delta, normalise(x, None, None))[0])

    return _affine(
        call, input, weight, bias, normalise, of_weight, lambda d: merged(channel_sums(d)[1])
    )


def _layer_norm(
    call: Call,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    shape = list(normalized_shape)

    def normalise(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        return F.layer_norm(x, shape, w, b, eps)

    return _trailing_affine(call, input, shape, weight, bias, normalise)


def _rms_norm(
    call: Call,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    shape = list(normalized_shape)

    def normalise(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        return F.rms_norm(x, shape, w, eps)

    return _trailing_affine(call, input, shape, weight, None, normalise)


def _trailing_affine(
    call: Call,
    input: Tensor,
    shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    normalise: Normalise,
) -> Any:
    given, batch = call.layout(input), call.recorder.batch
    if given is None or given.dim >= input.ndim - len(shape):
        return NotImplemented

    def summed(tensor: Tensor) -> Tensor:
        return given.split(tensor, batch).reshape(batch, -1, *shape).sum(dim=1)

    return _affine(
        call,
        input,
        weight,
        bias,
        normalise,
        lambda x, delta: summed(widened(delta) * normalise(x, None, None)),
        lambda delta: summed(widened(delta)),
    )


def _affine(
    call: Call,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalise: Normalise,
    of_weight: Callable[[Tensor, Tensor], Tensor],
    of_bias: Callable[[Tensor], Tensor],
) -> Any:
    w, b = call.source(weight), call.source(bias)
    if (weight is not None and w is None) or (bias is not None and b is None):
        return NotImplemented
    recorder = call.recorder
    values = None if w is None else w.value, None if b is None else b.value
    out = recorder.rooted(lambda: normalise(input, *values), [input], w, b)
    read = recorder.checked(input)
    recorder.watch(
        out,
        (w, lambda delta: Formed(of_weight(read(), delta))),
        (b, lambda delta: Formed(of_bias(delta))),
    )
    return out


def channel_sums(delta: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Σ δ·factor and Σ δ over the positions, each (B, C), of (B, C, *spatial)."""
    if factor is None:
        plain = widened(delta).flatten(2).sum(dim=2) if delta.ndim > 2 else widened(delta)
        return plain, plain
    if factor.dtype != delta.dtype:
        delta, factor = widened(delta), widened(factor)
    _, products, sums = ops.channel_affine_backward(delta, factor)
    return products, sums


# --- embeddings -----------------------------------------------------------------------------------


def _embedding(
    call: Call,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    w, given, made = call.source(weight), call.layout(input), call.result
    if w is None or given is None or made is None or max_norm is not None or scale_grad_by_freq:
        return NotImplemented
    recorder = call.recorder
    batch, rows = recorder.batch, len(w.value)
    out = recorder.rooted(lambda: F.embedding(input, w.value, padding_idx), [], w)

    def gradient(delta: Tensor) -> LayerGradient:
        indices = given.split(input, batch).reshape(batch, -1)
        by_position = made.split(delta, batch).reshape(batch, -1, delta.shape[-1])
        if padding_idx is not None:  # which autograd leaves out as well
            padding = indices == padding_idx % rows
            by_position = by_position.masked_fill(padding.unsqueeze(2), 0)
        return Lookup(indices, by_position, rows)

    recorder.watch(out, (w, gradient))
    return out


# --- whatever has no rule of its own --------------------------------------------------------------


def _in_general(call: Call) -> Any:
    """A parameter that is added, scaled with, concatenated: every sample gets a copy of it, whose
    gradient autograd gives. Where that cannot be, torch.func differentiates this call alone."""
    recorder = call.recorder
    sources = {
        id(tensor): source
        for tensor in call.tensors
        if (source := recorder.source(tensor)) is not None
    }

    def run(values: Callable[[Tensor], Tensor]) -> Any:
        return call.function(*_replaced(call.args, values), **_replaced(call.kwargs, values))

    wanted = [t for t in call.tensors if id(t) in sources and sources[id(t)].names]
    if not wanted or not torch.is_grad_enabled():
        return run(lambda t: sources[id(t)].value if id(t) in sources else t)
    copies = {}
    for tensor in wanted:
        copy = _copied(call, tensor, sources[id(tensor)])
        if copy is None:
            return _by_torch_func(call, sources, wanted)
        copies[id(tensor)] = copy
    return run(
        lambda t: (
            copies[id(t)] if id(t) in copies else sources[id(t)].value if id(t) in sources else t
        )
    )


def _copied(call: Call, tensor: Tensor, source: Source) -> Tensor | None:
    """A copy of a parameter for every sample, watched; None where there is no room for one."""
    recorder, batch = call.recorder, call.recorder.batch
    layout = call.layout(tensor)
    if layout is not None:  # it was expanded to the batch before
        copy = recorder.rooted(lambda: source.value, [], source)
        if source.tensor is None or not copy.requires_grad:
            return None  # a parameter itself does not grow with the batch
        _watch_expanded(call, copy, source, layout)
        return copy
    made = call.result
    if made is None or _name(call.function) not in ELEMENTWISE:
        return None
    rank = call.use.ranks[0]
    shape = [1] * (rank - tensor.ndim) + list(tensor.shape)
    if rank < tensor.ndim or shape[made.dim] != 1:
        return None
    shape[made.dim] = batch * made.factor
    aligned = source.value.reshape([1] * (rank - tensor.ndim) + list(tensor.shape))
    copy = recorder.rooted(lambda: aligned.expand(shape), [], source)

    def gradient(delta: Tensor) -> LayerGradient:
        by_sample = made.split(delta, batch)
        if made.factor > 1:
            by_sample = by_sample.sum(dim=1)
        return Formed(by_sample.reshape(batch, *tensor.shape))

    recorder.watch(copy, (source, gradient))
    return copy


def _watch_expanded(call: Call, copy: Tensor, source: Source, layout: Layout) -> None:
    recorder, batch = call.recorder, call.recorder.batch
    for name in source.names:
        recorder.uses[name] = recorder.uses.get(name, 0) + 1

    def arrived(delta: Tensor) -> None:
        by_sample = layout.split(delta, batch)

        def cotangents(start: int, stop: int) -> Tensor:  # of one sample each, 0 for all others
            alone = delta.new_zeros(stop - start, *delta.shape)
            for number in range(start, stop):
                layout.split(alone[number - start], batch)[number] = by_sample[number]
            return alone

        recorder.collect_derived(source, cotangents)

    copy.register_hook(arrived)  # type: ignore[no-untyped-call]


def _by_torch_func(call: Call, sources: dict[int, Source], wanted: list[Tensor]) -> Any:
    recorder, batch, made = call.recorder, call.recorder.batch, call.result
    name = _name(call.function)
    activations = [t for t in call.tensors if id(t) not in sources]
    layouts = [call.layout(t) for t in activations]
    named = ", ".join(sorted(n for t in wanted for n in sources[id(t)].names))
    if made is None or any(layout is not None and layout.factor > 1 for layout in layouts):
        raise InputError(
            f"{name} uses the parameter {named} in a way in which the samples' shares of its "
            "gradient cannot be told apart. Leave it out: parameters=[...] takes names."
        )
    warnings.warn(
        f"no rule knows how {name} uses {named}: torch.func differentiates this call, one sample "
        "at a time, which is exact and slow.",
        NetworkWarning,
        stacklevel=2,
    )

    def values(tensor: Tensor) -> Tensor:
        return sources[id(tensor)].value if id(tensor) in sources else tensor

    out: Tensor = recorder.rooted(
        lambda: call.function(*_replaced(call.args, values), **_replaced(call.kwargs, values)),
        activations,
        *(sources[id(t)] for t in wanted),
    )
    reads = [recorder.checked(t) for t in activations]

    def gradient(position: int, delta: Tensor) -> LayerGradient:
        target = wanted[position]

        def one(d: Tensor, *inputs: Tensor) -> Tensor:
            own = {
                id(t): x if layout is None else x.unsqueeze(layout.dim)
                for t, x, layout in zip(activations, inputs, layouts, strict=True)
            }

            def function(parameter: Tensor) -> Any:
                def value(tensor: Tensor) -> Tensor:
                    if tensor is target:
                        return parameter
                    return own[id(tensor)] if id(tensor) in own else values(tensor)

                return call.function(*_replaced(call.args, value), **_replaced(call.kwargs, value))

            pull_back = torch.func.vjp(function, sources[id(target)].value)[1]
            return cast(Tensor, pull_back(d.unsqueeze(made.dim))[0])

        dims = tuple(None if layout is None else layout.dim for layout in layouts)
        formed = torch.func.vmap(one, (made.dim, *dims))(delta, *(read() for read in reads))
        return Formed(formed.reshape(batch, *target.shape))

    recorder.watch(
        out,
        *((sources[id(t)], lambda d, p=p: gradient(p, d)) for p, t in enumerate(wanted)),
    )
    return out


ELEMENTWISE = frozenset(
    f"{name}{suffix}"
    for name in (
        "add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "true_divide", "pow",
        "where", "maximum", "minimum", "lerp", "addcmul", "addcdiv",
    )
    for suffix in ("", "_")
) | frozenset(
    f"__{prefix}{name}__"
    for prefix in ("", "r", "i")
    for name in ("add", "sub", "mul", "truediv", "div", "pow")
)  # fmt: skip
"""Functions whose result has the broadcast shape of its arguments."""

RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    Tensor.mm: _matmul,
    torch.addmm: _addmm,
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    F.conv3d: _convolution,
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    F.embedding: _embedding,
}
