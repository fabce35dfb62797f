"""Derivatives of an input gradient at the price of first-order kernels.

Differentiating ∇ₓS once more goes through PyTorch's own formulas for the second derivative of
convolution and of batch norm in training mode. Those are made of general products and of dozens of
element-wise operations; on the CPU they take several times as long as everything else of a step.
Both have a form in which the same fused kernels as in the first backward pass do the work:

* The gradient a convolution sends back to its input is linear in what arrives (g) and in the
  weight. With v what arrives at that gradient, g receives the convolution of v, and the weight
  what it would receive if v were the input.
* Batch norm sends back w·r·P g with the projection P g = g − mean(g) − x̂·mean(g x̂), r = 1/σ, which
  is self-adjoint: g receives w·r·P v, which is batch norm's first backward pass of v.
  The input receives −r (w r x̂ ⟨v, P g⟩/M + mean(g x̂)·w r P v + mean(v x̂)·w r P g), over the M
  values of a channel, and w receives r ⟨v, P g⟩.

ReLU's own second derivative is zero, which PyTorch would write out and add.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_RELUS = (functional.relu, torch.relu)
_CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)


class SecondOrder(TorchFunctionMode):
    """While it is entered, these layers are recorded with the derivatives above.

    The values are PyTorch's own. Meant for one forward pass, from which :meth:`gradients` is then
    taken; only derivatives of that with respect to parameters are supported beyond it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inputs_only = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _CONVOLUTIONS:
            result = self._convolution(func, *args, **(kwargs or {}))
        elif func is functional.batch_norm:
            result = self._batch_norm(*args, **(kwargs or {}))
        elif func in _RELUS:
            result = self._relu(*args, **(kwargs or {}))
        else:
            result = None
        return func(*args, **(kwargs or {})) if result is None else result

    def gradients(self, scalar: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """d scalar / d inputs, itself differentiable, without computing any weight's gradient."""
        self.inputs_only = True
        try:
            return torch.autograd.grad(scalar, inputs, create_graph=True)
        finally:
            self.inputs_only = False

    def _convolution(
        self,
        func: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor | None:
        dimensions = weight.ndim - 2
        if isinstance(padding, str) or input.ndim != weight.ndim:
            return None
        stride, padding, dilation = (
            [value] * dimensions if isinstance(value, int) else list(value)
            for value in (stride, padding, dilation)
        )
        geometry = (stride, padding, dilation, False, [0] * dimensions, groups)
        result: Tensor = _Convolution.apply(input, weight, bias, geometry, self)  # type: ignore[no-untyped-call]
        return result

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor | None:
        if not training or input.shape[:1].numel() * input.shape[2:].numel() < 2:
            return None  # without batch statistics it is affine; and too few values are an error
        result: Tensor = _BatchNorm.apply(  # type: ignore[no-untyped-call]
            input, weight, bias, running_mean, running_var, momentum, eps, self
        )
        return result

    def _relu(self, input: Tensor, inplace: bool = False) -> Tensor | None:
        result: Tensor = _ReLU.apply(input, inplace)  # type: ignore[no-untyped-call]
        return result


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
        out = x.relu_() if inplace else x.relu()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (out,) = ctx.saved_tensors
        # Detached: what was kept and what not does not change with the values.
        return torch.ops.aten.threshold_backward(grad, out.detach(), 0), None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any, rules: SecondOrder
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.rules = geometry, rules
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        # What the loss sends to the network's own input is of no use to anybody.
        ctx.is_input = x.is_leaf and not isinstance(x, nn.Parameter)
        out: Tensor = torch.ops.aten.convolution(x, weight, bias, *geometry)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if ctx.rules.inputs_only:
            if not ctx.needs_input_grad[0]:
                return None, None, None, None, None
            inner = _ConvolutionInput.apply(grad, weight, x.detach(), ctx.geometry)  # type: ignore[no-untyped-call]
            return inner, None, None, None, None
        wanted = [ctx.needs_input_grad[0] and not ctx.is_input, *ctx.needs_input_grad[1:3]]
        results = torch.ops.aten.convolution_backward(
            grad, x, weight, ctx.bias_sizes, *ctx.geometry, wanted
        )
        return *results, None, None


class _ConvolutionInput(torch.autograd.Function):
    """What a convolution sends back to its input, and the derivative of that."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, weight: Tensor, x: Tensor, geometry: Any) -> Tensor:
        ctx.save_for_backward(grad, weight)
        ctx.geometry = geometry
        result: Tensor = torch.ops.aten.convolution_backward(
            grad, x, weight, None, *geometry, [True, False, False]
        )[0]
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        grad, weight = ctx.saved_tensors
        to_grad = to_weight = None
        if ctx.needs_input_grad[0]:
            to_grad = torch.ops.aten.convolution(v, weight, None, *ctx.geometry)
        if ctx.needs_input_grad[1]:
            to_weight = torch.ops.aten.convolution_backward(
                grad, v, weight, None, *ctx.geometry, [False, True, False]
            )[1]
        return to_grad, to_weight, None, None


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        rules: SecondOrder,
    ) -> Tensor:
        out, mean, inverse_std = torch.native_batch_norm(
            x, weight, bias, running_mean, running_var, True, momentum, eps
        )
        ctx.save_for_backward(x, weight, mean, inverse_std)
        ctx.eps, ctx.rules = eps, rules
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_std = ctx.saved_tensors
        if ctx.rules.inputs_only:
            inner = _BatchNormInput.apply(grad, x, weight, mean, inverse_std, ctx.eps)  # type: ignore[no-untyped-call]
            return inner, *[None] * 7
        wanted = list(ctx.needs_input_grad[:3])
        return *_back(grad, x, weight, mean, inverse_std, ctx.eps, wanted), *[None] * 5


class _BatchNormInput(torch.autograd.Function):
    """What batch norm sends back to its input, and the derivative of that."""

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        inverse_std: Tensor,
        eps: float,
    ) -> Tensor:
        to_x, sum_gx, sum_g = _back(grad, x, weight, mean, inverse_std, eps, [True] * 3)
        ctx.save_for_backward(grad, x, weight, mean, inverse_std, to_x, sum_gx, sum_g)
        ctx.eps = eps
        return to_x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        grad, x, weight, mean, r, sent, sum_gx, sum_g = ctx.saved_tensors
        to_grad, sum_vx, sum_v = _back(v, x, weight, mean, r, ctx.eps, [True] * 3)
        count = x.numel() // x.shape[1]
        met = _channel_sums(v, grad) - (sum_v * sum_g + sum_vx * sum_gx) / count  # ⟨v, P g⟩
        slope = -(r**3 if weight is None else weight * r**3) * met / count
        shape = [-1, *[1] * (x.ndim - 2)]
        to_x = torch.addcmul((-slope * mean).view(shape), x, slope.view(shape))
        to_x.addcmul_(to_grad, (-r * sum_gx / count).view(shape))
        to_x.addcmul_(sent, (-r * sum_vx / count).view(shape))
        return to_grad, to_x, r * met if ctx.needs_input_grad[2] else None, None, None, None


def _back(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    inverse_std: Tensor,
    eps: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """What goes back to input, weight and bias: w r P g, Σ g x̂ and Σ g of each channel."""
    if weight is None:  # CUDA's kernel gives the sums only with one
        weight = torch.ones_like(mean)
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, None, None, mean, inverse_std, True, eps, wanted
    )
    return result


def _channel_sums(a: Tensor, b: Tensor) -> Tensor:
    """Σ a·b of each channel (dimension 1), in one pass: what a batch norm that does nothing would
    send to its weight."""
    zeros = torch.zeros(b.shape[1], dtype=b.dtype, device=b.device)
    return _back(a, b, None, zeros, zeros + 1, 0.0, [False, True, False])[1]
