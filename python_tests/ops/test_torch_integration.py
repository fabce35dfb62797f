"""The ops inside PyTorch: schemas, derivatives, compilation, fake tensors, other devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.helpers import DTYPES, TWIN, assert_identical, hard_rows, random_logits, real_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from grood_fast import ops
from grood_fast.ops import reference

EVERY_OUTPUT = (1 << len(ops.OUTPUTS)) - 1
DIFFERENTIABLE = tuple(name for name in ops.OUTPUTS if name != "argmax")
CONSTANT = ("max_logit", "logit_sum")  # objectives whose δ does not change with the logits
SHAPES = [(3, 5), (2, 67)]  # rows across vector lanes, and a row in vectors


def _target(objective: str, classes: int, dtype: torch.dtype = TWIN) -> Tensor | None:
    return torch.linspace(0, 1, classes, dtype=dtype) if objective == "confounding" else None


class TestOpcheck:
    @pytest.mark.parametrize("objective", [0, 3])
    @pytest.mark.parametrize("outputs", [EVERY_OUTPUT, 0b10000001, 0b01000000, 0])
    def test_logit_gradient(self, objective: int, outputs: int) -> None:
        logits = random_logits(3, 5, requires_grad=bool(outputs & 0b10111111))
        target = _target(ops.OBJECTIVES[objective], 5, torch.float32)
        torch.library.opcheck(
            torch.ops.grood_fast.logit_gradient.default,
            (logits, objective, 2.0, target, outputs),
        )

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_logit_gradient_dtypes_and_strides(self, dtype: torch.dtype) -> None:
        logits = random_logits(5, 3, dtype).t()
        torch.library.opcheck(
            torch.ops.grood_fast.logit_gradient.default, (logits, 1, 1.0, None, EVERY_OUTPUT)
        )

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_head_gradient_norm(self, dtype: torch.dtype, bias: bool) -> None:
        logits = random_logits(3, 5, dtype, requires_grad=True)
        features = random_logits(3, 7, dtype, seed=1, requires_grad=True)
        torch.library.opcheck(
            torch.ops.grood_fast.head_gradient_norm.default,
            (logits, features, 2, 1.0, None, 1, bias),
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("objective", ops.OBJECTIVES)
class TestDerivatives:
    """First and second derivatives against finite differences."""

    @pytest.mark.parametrize("outputs", [*((name,) for name in DIFFERENTIABLE), DIFFERENTIABLE])
    def test_logit_gradient(
        self, objective: str, shape: tuple[int, int], outputs: tuple[str, ...]
    ) -> None:
        target = _target(objective, shape[1])
        temperature = 1.0 if target is not None else 1.7

        def function(logits: Tensor) -> tuple[Tensor, ...]:
            result = ops.logit_gradient(
                logits, objective, temperature=temperature, target=target, outputs=outputs
            )
            return tuple(getattr(result, name) for name in outputs)

        logits = random_logits(*shape, TWIN, spread=1.5, requires_grad=True)
        assert torch.autograd.gradcheck(function, logits, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, logits, fast_mode=True)

    @pytest.mark.parametrize("norm", ops.NORMS)
    @pytest.mark.parametrize("bias", [False, True])
    def test_head_gradient_norm(
        self, objective: str, shape: tuple[int, int], norm: str, bias: bool
    ) -> None:
        target = _target(objective, shape[1])

        def function(logits: Tensor, features: Tensor) -> Tensor:
            return ops.head_gradient_norm(
                logits, features, objective, target=target, norm=norm, bias=bias
            )

        logits = random_logits(*shape, TWIN, spread=1.5, requires_grad=True)
        features = random_logits(shape[0], 4, TWIN, seed=1, requires_grad=True)
        assert torch.autograd.gradcheck(function, (logits, features), fast_mode=True)
        if objective in CONSTANT:  # gradgradcheck wants second derivatives of every input
            logits = logits.detach()
            assert torch.autograd.gradgradcheck(
                lambda h: function(logits, h), features, fast_mode=True
            )
        else:
            assert torch.autograd.gradgradcheck(function, (logits, features), fast_mode=True)


class TestBackward:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_gradients_have_the_inputs_dtypes(self, dtype: torch.dtype) -> None:
        logits = random_logits(4, 6, dtype, requires_grad=True)
        features = random_logits(4, 9, dtype, seed=1, requires_grad=True)
        ops.head_gradient_norm(logits, features, "uniform", norm="l2", bias=True).sum().backward()
        wide = [tensor.detach().to(TWIN).requires_grad_() for tensor in (logits, features)]
        reference.head_gradient_norm(*wide, "uniform", norm="l2", bias=True).sum().backward()
        tolerance = 16 * torch.finfo(dtype).eps if dtype != TWIN else 1e-12
        for narrow, expected in zip((logits, features), wide, strict=True):
            assert narrow.grad is not None
            assert narrow.grad.dtype == dtype
            largest = expected.grad.abs().max().item()
            assert_close(narrow.grad.to(TWIN), expected.grad, rtol=0, atol=tolerance * largest)

    def test_only_what_is_used_is_differentiated(self) -> None:
        logits = random_logits(3, 5, TWIN, requires_grad=True)
        result = ops.logit_gradient(logits, "uniform")
        (from_energy,) = torch.autograd.grad(result.energy.sum(), logits)
        assert_close(from_energy, -torch.softmax(logits, dim=1), rtol=1e-12, atol=1e-15)

    def test_argmax_has_no_gradient(self) -> None:
        result = ops.logit_gradient(random_logits(3, 5, requires_grad=True), "energy")
        assert not result.argmax.requires_grad
        assert result.delta.requires_grad

    def test_a_norm_of_zero_sends_back_zero(self) -> None:
        logits = torch.zeros(2, 5, requires_grad=True)  # uniform: δ = 0
        ops.logit_gradient(logits, "uniform", outputs=("l2",)).l2.sum().backward()
        assert not logits.grad.any()


def _both(logits: Tensor, features: Tensor) -> tuple[Any, ...]:
    result = ops.logit_gradient(logits, "predicted", temperature=2.0, outputs=("energy", "delta"))
    norm = ops.head_gradient_norm(logits, features, "uniform", norm="l2", bias=True)
    return result.energy, result.delta, norm


class TestCompile:
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_forward_in_one_graph(self, dynamic: bool) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(_both, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for batch in (3, 8):
            inputs = random_logits(batch, 10), random_logits(batch, 7, seed=1)
            assert_close(compiled(*inputs), _both(*inputs), rtol=0, atol=0)

    def test_backward(self) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(_both, fullgraph=True, backend="aot_eager")
        grads = []
        for function in (_both, compiled):
            inputs = [
                random_logits(3, 10, TWIN, requires_grad=True),
                random_logits(3, 7, TWIN, seed=1, requires_grad=True),
            ]
            energy, delta, norm = function(*inputs)
            (energy.sum() + delta.square().sum() + norm.sum()).backward()
            grads.append([tensor.grad for tensor in inputs])
        assert_close(grads[1], grads[0], rtol=1e-12, atol=1e-14)

    def test_every_output(self) -> None:
        torch._dynamo.reset()

        def function(logits: Tensor) -> ops.LogitGradient:
            return ops.logit_gradient(logits, "uniform")

        logits = random_logits(3, 10)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert_identical(compiled(logits), function(logits))


def _assert_alike(fake: Tensor | None, real: Tensor | None, device: str) -> None:
    assert (fake is None) == (real is None)
    if fake is not None and real is not None:
        assert (fake.shape, fake.dtype, fake.device.type) == (real.shape, real.dtype, device)
        assert fake.stride() == real.stride()


@pytest.mark.parametrize("shape", [(0, 5), (4, 1), (3, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
class TestShapesWithoutNumbers:
    @pytest.mark.parametrize("outputs", [ops.OUTPUTS, ("delta",), ("argmax", "l2"), ()])
    def test_logit_gradient(
        self, dtype: torch.dtype, shape: tuple[int, int], outputs: tuple[str, ...]
    ) -> None:
        real = ops.logit_gradient(torch.zeros(shape, dtype=dtype), "energy", outputs=outputs)
        meta = torch.empty(shape, dtype=dtype, device="meta")
        for one, other in zip(
            ops.logit_gradient(meta, "energy", outputs=outputs), real, strict=True
        ):
            _assert_alike(one, other, "meta")
        with FakeTensorMode():
            fake = torch.empty(shape, dtype=dtype, device="cuda")
            for one, other in zip(
                ops.logit_gradient(fake, "energy", outputs=outputs), real, strict=True
            ):
                _assert_alike(one, other, "cuda")

    def test_head_gradient_norm(self, dtype: torch.dtype, shape: tuple[int, int]) -> None:
        features = (shape[0], 7)
        real = ops.head_gradient_norm(
            torch.zeros(shape, dtype=dtype), torch.zeros(features, dtype=dtype), "energy"
        )
        meta = [torch.empty(size, dtype=dtype, device="meta") for size in (shape, features)]
        _assert_alike(ops.head_gradient_norm(*meta, "energy"), real, "meta")
        with FakeTensorMode():
            fake = [torch.empty(size, dtype=dtype, device="cuda") for size in (shape, features)]
            _assert_alike(ops.head_gradient_norm(*fake, "energy"), real, "cuda")


class TestOtherDevices:
    """Where no kernel was compiled for a device, the twin answers through the same op."""

    @pytest.fixture(params=["as on another device", "cuda"])
    def twin(self, request: pytest.FixtureRequest) -> Any:
        """(logit_gradient, head_gradient_norm, device), called with the ops' own arguments."""
        if request.param == "cuda":
            if not torch.cuda.is_available():
                pytest.skip("needs a CUDA device")
            library = torch.ops.grood_fast
            return library.logit_gradient, library.head_gradient_norm, "cuda"
        return ops._logit_gradient_elsewhere, ops._head_gradient_norm_elsewhere, "cpu"

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("outputs", [EVERY_OUTPUT, 0b10000001, 0b01010000, 0])
    def test_logit_gradient(self, twin: Any, dtype: torch.dtype, outputs: int) -> None:
        function, _, device = twin
        rows = torch.cat([random_logits(9, 10, dtype), hard_rows(10, dtype, extremes=False)])
        for logits in (rows, rows[:0]):
            for index, name in enumerate(ops.OBJECTIVES):
                target = _target(name, 10, real_of(dtype))
                on_device = None if target is None else target.to(device)
                actual = function(logits.to(device), index, 1.0, on_device, outputs)
                expected = torch.ops.grood_fast.logit_gradient(logits, index, 1.0, target, outputs)
                for one, other in zip(actual, expected, strict=True):
                    assert one.device.type == device
                    assert_close(one.cpu(), other, rtol=1e-5, atol=1e-5, equal_nan=True)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bias", [False, True])
    def test_head_gradient_norm(self, twin: Any, dtype: torch.dtype, bias: bool) -> None:
        _, function, device = twin
        rows = torch.cat([random_logits(9, 10, dtype), hard_rows(10, dtype, extremes=False)])
        for logits in (rows, rows[:0]):
            features = random_logits(len(logits), 7, dtype, seed=1)
            for norm in range(len(ops.NORMS)):
                actual = function(logits.to(device), features.to(device), 1, 1.0, None, norm, bias)
                expected = torch.ops.grood_fast.head_gradient_norm(
                    logits, features, 1, 1.0, None, norm, bias
                )
                assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
