"""``logit_gradient`` against its float64 twin."""

from __future__ import annotations

import math

import hypothesis.extra.numpy as numpy_strategies
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.helpers import (
    DTYPES,
    SOFTMAX_OBJECTIVES,
    assert_identical,
    assert_logit_gradient_equals_twin,
    hard_rows,
    layouts,
    random_logits,
    real_of,
)
from torch.testing import assert_close

from grood_fast import ops

CLASSES = (1, 2, 3, 7, 8, 9, 10, 16, 17, 63, 64, 65, 100, 1000, 1001)
BATCHES = (0, 1, 3, 7, 8, 9, 33)


@pytest.mark.parametrize("objective", ops.OBJECTIVES)
@pytest.mark.parametrize("dtype", DTYPES)
class TestAgainstTwin:
    def test_every_shape(self, simd_level: str, dtype: torch.dtype, objective: str) -> None:
        for classes in CLASSES:
            rows = random_logits(max(BATCHES), classes, dtype, seed=classes)
            for batch in BATCHES:
                logits = rows[:batch]
                assert_logit_gradient_equals_twin(
                    ops.logit_gradient(logits, objective), logits, objective
                )

    def test_a_hundred_thousand_classes(
        self, simd_level: str, dtype: torch.dtype, objective: str
    ) -> None:
        logits = random_logits(3, 100_000, dtype)
        assert_logit_gradient_equals_twin(ops.logit_gradient(logits, objective), logits, objective)

    @pytest.mark.parametrize("classes", [1, 10, 65])
    def test_every_layout(
        self, simd_level: str, dtype: torch.dtype, objective: str, classes: int
    ) -> None:
        matrix = random_logits(19, classes, dtype)
        expected = ops.logit_gradient(matrix, objective)
        for logits in layouts(matrix).values():
            assert_identical(ops.logit_gradient(logits, objective), expected)
        one = matrix[:1]
        repeated = ops.logit_gradient(one.expand(19, classes), objective)
        assert_logit_gradient_equals_twin(repeated, one.expand(19, classes), objective)
        constant = matrix[:, :1].expand(19, classes)
        assert_logit_gradient_equals_twin(
            ops.logit_gradient(constant, objective), constant, objective
        )

    @pytest.mark.parametrize("classes", [1, 2, 3, 8, 10, 17, 64, 65, 131])
    def test_hard_values(
        self, simd_level: str, dtype: torch.dtype, objective: str, classes: int
    ) -> None:
        logits = hard_rows(classes, dtype)
        assert_logit_gradient_equals_twin(ops.logit_gradient(logits, objective), logits, objective)


@pytest.mark.parametrize("temperature", [1e-3, 0.5, 3, 1000.0, 1e6])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [10, 131])
def test_temperatures(
    simd_level: str, dtype: torch.dtype, classes: int, temperature: float
) -> None:
    logits = random_logits(9, classes, dtype)
    for objective in ops.OBJECTIVES:
        result = ops.logit_gradient(logits, objective, temperature=temperature)
        assert_logit_gradient_equals_twin(result, logits, objective, temperature)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 10, 64, 65, 131])
def test_confounding_targets(simd_level: str, dtype: torch.dtype, classes: int) -> None:
    logits = torch.cat([random_logits(9, classes, dtype), hard_rows(classes, dtype)])
    real = real_of(dtype)
    generator = torch.Generator().manual_seed(1)
    soft = torch.rand(classes, generator=generator, dtype=real)
    for target in (soft, soft.round(), torch.zeros(classes, dtype=real)):
        result = ops.logit_gradient(logits, "confounding", target=target)
        assert_logit_gradient_equals_twin(result, logits, "confounding", target=target)
    assert_identical(
        ops.logit_gradient(logits, "confounding", target=torch.ones(classes, dtype=real)),
        ops.logit_gradient(logits, "confounding"),
    )


@pytest.mark.parametrize("classes", [10, 131])
def test_every_half_precision_number(simd_level: str, classes: int) -> None:
    """All 65,536 patterns of both 16-bit formats are widened to what they mean."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        values = patterns.view(dtype)
        logits = values.unsqueeze(1).expand(-1, classes).contiguous()
        result = ops.logit_gradient(logits, "energy", outputs=("maximum",))
        assert_close(result.maximum, values.float(), rtol=0, atol=0, equal_nan=True)
        # What is infinite or NaN is seen as such at every place of a row.
        alone = torch.zeros(len(values), classes, dtype=dtype)
        alone[torch.arange(len(values)), torch.arange(len(values)) % classes] = values
        result = ops.logit_gradient(alone, "energy", outputs=("maximum",))
        expected = torch.where(values.isnan(), values.float(), values.float().clamp_min(0))
        assert_close(result.maximum, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 66])
def test_exponentials_are_accurate(simd_level: str, dtype: torch.dtype, classes: int) -> None:
    """Two classes that count: every step but the exponential costs less than a rounding."""
    gap = torch.linspace(0, 3, 10_001, dtype=dtype)
    logits = torch.full((len(gap), classes), -1e4, dtype=dtype)
    logits[:, 0] = 0
    logits[:, -1] = -gap
    expected = -torch.exp(-gap.double()) / (1 + torch.exp(-gap.double()))
    actual = ops.logit_gradient(logits, "energy", outputs=("delta",)).delta[:, -1]
    assert_close(actual.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [3, 131])
@pytest.mark.parametrize("gap", [1.0, 10.0, 20.0, 40.0, 80.0])
def test_predicted_keeps_the_digits_of_a_confident_row(
    simd_level: str, dtype: torch.dtype, classes: int, gap: float
) -> None:
    """1 − p of the predicted class is a sum of small numbers, not a difference of large ones."""
    logits = torch.zeros(4, classes, dtype=dtype)
    logits[:, 1] = gap
    other = 1 / (math.exp(gap) + classes - 1)
    rest = (classes - 1) * other
    result = ops.logit_gradient(logits, "predicted")
    rtol = 100 * torch.finfo(dtype).eps  # y = −gap is rounded before the exponential

    def assert_all_are(actual: torch.Tensor | None, expected: float) -> None:
        assert actual is not None
        assert_close(actual, torch.full_like(actual, expected), rtol=rtol, atol=0)

    assert_all_are(result.delta[:, 1], -rest)
    assert_all_are(result.delta[:, 0], other)
    assert_all_are(result.l1, 2 * rest)
    assert_all_are(result.l2, math.sqrt(rest**2 + (classes - 1) * other**2))
    assert_all_are(result.linf, rest)


@pytest.mark.parametrize("classes", [10, 131])
@pytest.mark.parametrize("objective", ops.OBJECTIVES)
def test_each_output_alone_is_what_all_together_give(
    simd_level: str, objective: str, classes: int
) -> None:
    logits = random_logits(19, classes)
    full = ops.logit_gradient(logits, objective)
    every = set(ops.OUTPUTS)
    subsets = [(), ("delta", "energy"), *((name,) for name in ops.OUTPUTS)]
    subsets += [tuple(sorted(every - {name})) for name in ops.OUTPUTS]
    for outputs in subsets:
        expected = full._replace(**dict.fromkeys(every - set(outputs)))
        assert_identical(ops.logit_gradient(logits, objective, outputs=outputs), expected)
    assert_logit_gradient_equals_twin(full, logits, objective)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", ops.OBJECTIVES)
def test_outputs_alone_equal_the_twin_on_hard_values(
    simd_level: str, objective: str, dtype: torch.dtype
) -> None:
    for classes in (10, 131):
        logits = hard_rows(classes, dtype)
        for name in ops.OUTPUTS:
            result = ops.logit_gradient(logits, objective, outputs=(name,))
            assert_logit_gradient_equals_twin(result, logits, objective)


@pytest.mark.parametrize("classes", [3, 10, 64, 131])
@pytest.mark.parametrize("objective", ops.OBJECTIVES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_results_do_not_depend_on_its_neighbours(
    simd_level: str, dtype: torch.dtype, objective: str, classes: int
) -> None:
    logits = torch.cat([hard_rows(classes, dtype), random_logits(9, classes, dtype)])
    logits = logits[torch.randperm(len(logits), generator=torch.Generator().manual_seed(4))]
    together = ops.logit_gradient(logits, objective)
    for index in range(len(logits)):
        alone = ops.logit_gradient(logits[index : index + 1], objective)
        assert_identical(
            alone, ops.LogitGradient(*(field[index : index + 1] for field in together))
        )


@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("objective", ops.OBJECTIVES)
def test_one_thread_or_two(torch_threads: None, objective: str, classes: int) -> None:
    """Enough rows for both threads, not a multiple of anything, some of them hard."""
    easy = random_logits(6001 if classes == 10 else 67, classes)
    logits = torch.cat([easy, hard_rows(classes, torch.float32)])
    logits = logits[torch.randperm(len(logits), generator=torch.Generator().manual_seed(4))]
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(ops.logit_gradient(logits, objective))
    assert_identical(results[1], results[0])
    assert_identical(results[2], results[0])


def test_levels_agree(simd_level: str) -> None:
    """The level is really changed: the widths of the vectors round sums differently."""
    assert ops.simd_level() == simd_level
    logits = random_logits(9, 1001)
    here = ops.logit_gradient(logits, "uniform")
    ops.set_simd_level("baseline")
    baseline = ops.logit_gradient(logits, "uniform")
    assert_close(here.l2, baseline.l2, rtol=1e-6, atol=0)
    assert torch.equal(here.l2, baseline.l2) == (simd_level == "baseline")


values = st.one_of(
    st.floats(-50, 50, width=16),
    st.sampled_from([0.0, -0.0, 1e4, -1e4, math.inf, -math.inf, math.nan]),
)


@settings(max_examples=60, deadline=None)
@given(
    array=numpy_strategies.arrays(
        np.float64, st.tuples(st.integers(0, 20), st.integers(1, 140)), elements=values
    ),
    dtype=st.sampled_from(DTYPES),
    objective=st.sampled_from(ops.OBJECTIVES),
    temperature=st.floats(0.0625, 100, width=32),
    outputs=st.sets(st.sampled_from(ops.OUTPUTS)).map(tuple),
)
def test_any_shape_and_value(
    array: np.ndarray,
    dtype: torch.dtype,
    objective: str,
    temperature: float,
    outputs: tuple[str, ...],
) -> None:
    logits = torch.from_numpy(array).to(dtype)
    if objective not in SOFTMAX_OBJECTIVES:
        temperature = 1.0
    result = ops.logit_gradient(logits, objective, temperature=temperature, outputs=outputs)
    assert {name for name, value in result._asdict().items() if value is not None} == set(outputs)
    assert_logit_gradient_equals_twin(result, logits, objective, temperature)
