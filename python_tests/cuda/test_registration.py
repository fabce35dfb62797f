"""The CUDA path as PyTorch sees it, without a GPU: registrations, fake tensors, graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from devices import ARCHITECTURES, OPS, load_emulated_ops
from ops.helpers import DTYPES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from grood_fast import ops

compiled = pytest.mark.skipif(not ARCHITECTURES, reason="compiled without nvcc, for the CPU only")


@compiled
class TestRegistration:
    @pytest.mark.parametrize("name", OPS)
    def test_every_op_has_a_cuda_kernel(self, name: str) -> None:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"grood_fast::{name}", "CUDA")

    def test_what_was_compiled_is_told(self) -> None:
        assert ARCHITECTURES == ("sm_80", "sm_90", "sm_100")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu_nothing_is_initialised(self) -> None:
        assert not torch.cuda.is_initialized()


@pytest.mark.parametrize("name", OPS)
def test_every_op_runs_on_the_emulated_device(name: str) -> None:
    assert hasattr(load_emulated_ops(), name)
    schema = getattr(torch.ops.grood_fast, name).default._schema
    emulated = getattr(torch.ops.grood_fast_emulated, name).default._schema
    assert str(schema).split("::")[1] == str(emulated).split("::")[1]


Call = tuple[Callable[..., Any], tuple[Tensor, ...]]


def _calls(device: str, dtype: torch.dtype) -> dict[str, Call]:
    """Each op with tensors for it on ``device``."""
    real = torch.float64 if dtype == torch.float64 else torch.float32
    library = torch.ops.grood_fast

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return {
        # The norms are rows of one tensor, which torch without CUDA does not index.
        "logit_gradient": (
            partial(ops.logit_gradient, objective="uniform", outputs=("delta",)),
            (zeros(3, 5),),
        ),
        "head_gradient_norm": (
            partial(ops.head_gradient_norm, objective="energy", bias=True),
            (zeros(3, 5), zeros(3, 7)),
        ),
        "dual_project": (
            ops.dual_project,
            (zeros(3, 5), zeros(3, 7), zeros(4, 5), zeros(4, 7), zeros(4, 2, dtype=real)),
        ),
        "nearest_distance": (
            lambda *tensors: library.nearest_distance(*tensors, 0.0),
            (zeros(3, 5), zeros(4, 5), zeros(4, dtype=real)),
        ),
        "prototype_gradient": (
            lambda *tensors: library.prototype_gradient(*tensors, 1.0, False, 1.0),
            (
                zeros(3, 5),
                zeros(5, dtype=real),
                zeros(4, 5, dtype=real),
                zeros(4, dtype=real),
            ),
        ),
        "short_circuit_logits": (
            lambda *tensors: library.short_circuit_logits(*tensors),
            (
                zeros(3, 4),
                zeros(3, 5),
                zeros(5, 4, dtype=real),
                zeros(3, 2, dtype=torch.int64),
            ),
        ),
        "cluster_extremes": (
            lambda *tensors: library.cluster_extremes(*tensors, 3),
            (zeros(6, dtype=torch.int64), zeros(6)),
        ),
        "layer_gradient_sqnorm": (
            lambda *tensors: library.layer_gradient_sqnorm(*tensors, [0, 1]),
            (zeros(2, 4, 5), zeros(2, 3, 6)),
        ),
        "channel_affine_backward": (
            lambda *tensors: library.channel_affine_backward(*tensors, None),
            (zeros(2, 3, 4), zeros(2, 3, 4)),
        ),
    }


def _tensors(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return [one for one in results if one is not None]  # what was not asked for


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPS)
class TestFakeCudaTensors:
    def test_shapes_dtypes_and_devices(self, name: str, dtype: torch.dtype) -> None:
        function, arguments = _calls("cpu", dtype)[name]
        real = _tensors(function(*arguments))
        with FakeTensorMode():
            function, arguments = _calls("cuda", dtype)[name]
            fake = _tensors(function(*arguments))
        for one, other in zip(fake, real, strict=True):
            assert one.device == torch.device("cuda", 0)
            assert (one.shape, one.dtype, one.stride()) == (
                other.shape,
                other.dtype,
                other.stride(),
            )

    def test_one_graph_with_the_op_in_it(self, name: str, dtype: torch.dtype) -> None:
        """What is traced for CUDA tensors is the op itself, not the twin's parts."""
        with FakeTensorMode(allow_non_fake_inputs=True):
            function, arguments = _calls("cuda", dtype)[name]
            graph = make_fx(lambda *tensors: function(*tensors))(*arguments)
        called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        assert f"grood_fast.{name}.default" in called
        assert not [target for target in called if "softmax" in target or "mm" in target]


@pytest.mark.parametrize("name", OPS)
def test_torch_compile_takes_cuda_tensors_in_one_graph(name: str) -> None:
    torch._dynamo.reset()
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    with FakeTensorMode():
        function, arguments = _calls("cuda", torch.float32)[name]
        compiled_function = torch.compile(
            lambda *tensors: function(*tensors), backend=keep, fullgraph=True
        )
        results = _tensors(compiled_function(*arguments))
    assert all(result.device.type == "cuda" for result in results)
    assert len(graphs) == 1
    assert f"grood_fast.{name}" in graphs[0].code
