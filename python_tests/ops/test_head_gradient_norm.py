"""``head_gradient_norm`` against its float64 twin and against autograd."""

from __future__ import annotations

import math
from itertools import product

import hypothesis.extra.numpy as numpy_strategies
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.helpers import (
    DTYPES,
    assert_head_gradient_norm_equals_twin,
    hard_rows,
    layouts,
    random_logits,
    real_of,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from grood_fast import ops

CLASSES = (1, 2, 3, 7, 8, 9, 10, 16, 17, 63, 64, 65, 100, 1000, 1001)
BATCHES = (0, 1, 3, 7, 8, 9, 33)
DIMS = (0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 65, 127, 512, 1030, 2049)
NORMS_AND_BIAS = tuple(product(ops.NORMS, (False, True)))


def _check(logits: Tensor, features: Tensor, objective: str, norm: str, bias: bool) -> None:
    result = ops.head_gradient_norm(logits, features, objective, norm=norm, bias=bias)
    assert_head_gradient_norm_equals_twin(result, logits, features, objective, norm=norm, bias=bias)


@pytest.mark.parametrize("dtype", DTYPES)
class TestAgainstTwin:
    @pytest.mark.parametrize("objective", ops.OBJECTIVES)
    def test_every_number_of_classes_and_rows(
        self, simd_level: str, dtype: torch.dtype, objective: str
    ) -> None:
        for number, (classes, batch) in enumerate(product(CLASSES, BATCHES)):
            norm, bias = NORMS_AND_BIAS[number % len(NORMS_AND_BIAS)]
            features = random_logits(batch, 19, dtype, seed=1)
            _check(random_logits(batch, classes, dtype), features, objective, norm, bias)

    @pytest.mark.parametrize(("norm", "bias"), NORMS_AND_BIAS)
    def test_every_number_of_features(
        self, simd_level: str, dtype: torch.dtype, norm: str, bias: bool
    ) -> None:
        logits = random_logits(5, 10, dtype)
        for dim in DIMS:
            _check(logits, random_logits(5, dim, dtype, seed=1), "uniform", norm, bias)

    @pytest.mark.parametrize(("norm", "bias"), NORMS_AND_BIAS)
    def test_every_layout(self, simd_level: str, dtype: torch.dtype, norm: str, bias: bool) -> None:
        logits, features = random_logits(19, 10, dtype), random_logits(19, 37, dtype, seed=1)

        def run(f: Tensor, h: Tensor) -> Tensor:
            return ops.head_gradient_norm(f, h, "uniform", norm=norm, bias=bias)

        expected = run(logits, features)
        for name in (views := layouts(logits)):
            actual = run(views[name], layouts(features)[name])
            assert_close(actual, expected, rtol=0, atol=0, msg=name)
        one, constant = features[:1].expand(19, 37), features[:, :1].expand(19, 37)
        for h in (one, constant):
            assert_close(run(logits, h), run(logits, h.contiguous()), rtol=0, atol=0)

    @pytest.mark.parametrize(("norm", "bias"), NORMS_AND_BIAS)
    def test_hard_values(self, simd_level: str, dtype: torch.dtype, norm: str, bias: bool) -> None:
        for classes, dim in ((3, 5), (10, 40), (131, 19)):
            hard_logits, hard_features = (
                hard_rows(classes, dtype),
                hard_rows(dim, dtype, extremes=False),
            )
            easy_logits = random_logits(len(hard_features), classes, dtype)
            easy_features = random_logits(len(hard_logits), dim, dtype, seed=1)
            for objective in ops.OBJECTIVES:
                _check(hard_logits, easy_features, objective, norm, bias)
                _check(easy_logits, hard_features, objective, norm, bias)

    @pytest.mark.parametrize("temperature", [0.1, 1000.0])
    def test_temperature_and_target(
        self, simd_level: str, dtype: torch.dtype, temperature: float
    ) -> None:
        logits, features = random_logits(9, 10, dtype), random_logits(9, 37, dtype, seed=1)
        for objective in ("energy", "uniform", "predicted"):
            result = ops.head_gradient_norm(logits, features, objective, temperature=temperature)
            assert_head_gradient_norm_equals_twin(result, logits, features, objective, temperature)
        target = torch.linspace(0, 1, 10, dtype=real_of(dtype))
        result = ops.head_gradient_norm(logits, features, "confounding", target=target)
        assert_head_gradient_norm_equals_twin(
            result, logits, features, "confounding", target=target
        )


@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [(torch.float32, 100), (torch.bfloat16, 100), (torch.float64, 900), (torch.float16, 10)],
)
@pytest.mark.parametrize("norm", ops.NORMS)
def test_squares_neither_overflow_nor_underflow(
    simd_level: str, dtype: torch.dtype, exponent: int, norm: str
) -> None:
    """A norm is homogeneous: features scaled by a power of two give the norm scaled by it."""
    logits = random_logits(9, 10, dtype)
    for dim in (1, 5, 40):
        features = random_logits(9, dim, dtype, seed=1).sign() * 1.5
        expected = ops.head_gradient_norm(logits, features, "uniform", norm=norm).double()
        for scale in (2.0**exponent, 2.0**-exponent):
            actual = ops.head_gradient_norm(logits, features * scale, "uniform", norm=norm)
            assert_close(actual.double() / scale, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("norm", "bias"), NORMS_AND_BIAS)
def test_features_whose_norm_exceeds_float32(simd_level: str, norm: str, bias: bool) -> None:
    """The product with a small δ is representable even where ‖h‖ alone is not."""
    logits, features = random_logits(9, 10), torch.full((9, 37), 3e38)
    result = ops.head_gradient_norm(
        logits, features, "uniform", temperature=1e4, norm=norm, bias=bias
    )
    assert result.isfinite().all()
    assert_head_gradient_norm_equals_twin(
        result, logits, features, "uniform", 1e4, norm=norm, bias=bias
    )


@pytest.mark.parametrize("features_dtype", DTYPES)
@pytest.mark.parametrize("logits_dtype", DTYPES)
def test_dtypes_mix_but_for_float64(logits_dtype: torch.dtype, features_dtype: torch.dtype) -> None:
    logits = random_logits(9, 10, logits_dtype)
    features = random_logits(9, 37, features_dtype, seed=1)
    if (logits_dtype == torch.float64) == (features_dtype == torch.float64):
        _check(logits, features, "predicted", "l2", True)
    else:
        with pytest.raises(RuntimeError, match="both be float64, or neither"):
            ops.head_gradient_norm(logits, features, "predicted")


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layers_gradient_norm_without_its_gradient(bias: bool) -> None:
    """GradNorm as it is published, a backward for each sample, in float32."""
    torch.manual_seed(0)
    head = nn.Linear(33, 12, bias=bias)
    features = torch.randn(7, 33)
    with torch.no_grad():
        logits = head(features)
    expected = []
    for h in features:
        head.zero_grad()
        (-functional.log_softmax(head(h), dim=0)).sum().backward()
        expected.append(sum(parameter.grad.abs().sum() for parameter in head.parameters()))
    actual = ops.head_gradient_norm(logits, features, "uniform", norm="l1", bias=bias)
    assert_close(actual, torch.stack(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("norm", "bias"), NORMS_AND_BIAS)
def test_one_thread_or_two(torch_threads: None, norm: str, bias: bool) -> None:
    hard = hard_rows(10, torch.float32)
    logits = torch.cat([random_logits(5003, 10), hard])
    logits = logits[torch.randperm(len(logits), generator=torch.Generator().manual_seed(4))]
    features = random_logits(len(logits), 65, seed=1)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(ops.head_gradient_norm(logits, features, "predicted", norm=norm, bias=bias))
    assert_close(results[1], results[0], rtol=0, atol=0, equal_nan=True)
    assert_close(results[2], results[0], rtol=0, atol=0, equal_nan=True)


finite = st.floats(-50, 50, width=16)
logit_values = st.one_of(
    finite, st.sampled_from([0.0, -0.0, 1e4, -1e4, math.inf, -math.inf, math.nan])
)
# No infinity: times a δ that the twin's subtraction rounded to 0 it would be NaN there alone.
feature_values = st.one_of(finite, st.sampled_from([0.0, -0.0, 1e4, -1e4, math.nan]))


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    shape=st.tuples(st.integers(0, 20), st.integers(1, 140), st.integers(0, 70)),
    dtype=st.sampled_from(DTYPES),
    objective=st.sampled_from(ops.OBJECTIVES),
    norm=st.sampled_from(ops.NORMS),
    bias=st.booleans(),
)
def test_any_shape_and_value(
    data: st.DataObject,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    objective: str,
    norm: str,
    bias: bool,
) -> None:
    batch, classes, dim = shape
    logits, features = (
        torch.from_numpy(
            data.draw(numpy_strategies.arrays(np.float64, (batch, columns), elements=values))
        ).to(dtype)
        for columns, values in ((classes, logit_values), (dim, feature_values))
    )
    _check(logits, features, objective, norm, bias)
