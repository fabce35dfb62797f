"""``nearest_distance`` against all distances in float64."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.helpers import DTYPES, TWIN, assert_within, layouts, random_logits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from grood_fast import ops
from grood_fast.ops import reference

OP = torch.ops.grood_fast.nearest_distance


def operands(
    queries: int, rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    return (
        random_logits(queries, columns, dtype, spread=1.0, seed=seed),
        random_logits(rows, columns, dtype, spread=1.0, seed=seed + 1),
    )


def decades(rows: int, columns: int, low: float, high: float, seed: int) -> Tensor:
    """Directions at random, lengths over many orders of magnitude."""
    directions = torch.nn.functional.normalize(random_logits(rows, columns, TWIN, seed=seed))
    exponents = torch.rand(rows, 1, generator=torch.Generator().manual_seed(seed), dtype=TWIN)
    return directions * 10 ** (low + (high - low) * exponents)


def check(queries: Tensor, bank: Tensor, relative: float | None = None) -> None:
    """The distances are the nearest's, and the indices are rows at these distances."""
    distances, indices = ops.nearest_distance(queries, bank)
    real = TWIN if bank.dtype == TWIN else torch.float32
    assert distances.dtype == real
    wide = queries.to(real).to(TWIN), bank.to(real).to(TWIN)
    expected, _ = reference.nearest_distance(*wide)
    eps = torch.finfo(real).eps if relative is None else relative
    assert_within(distances, expected, 16 * eps * expected.nan_to_num(), "distance")
    if len(indices):
        assert indices.min() >= 0
        assert indices.max() < len(bank)
    finite = distances.isfinite()
    at = (wide[0] - wide[1][indices]).norm(dim=1)
    assert_within(distances[finite], at[finite], 16 * eps * at[finite], "distance of the index")


@pytest.mark.parametrize("dtype", DTYPES)
class TestAgainstAllDistances:
    def test_every_size(self, simd_level: str, dtype: torch.dtype) -> None:
        for queries, rows, columns in product(
            (0, 1, 63, 65), (1, 2, 127, 129, 1023, 1025, 2049), (1, 17, 64)
        ):
            check(*operands(queries, rows, columns, dtype))

    def test_many_queries(self, simd_level: str, dtype: torch.dtype) -> None:
        check(*operands(600, 1500, 5, dtype))

    def test_every_layout(self, simd_level: str, dtype: torch.dtype) -> None:
        queries, bank = operands(40, 1100, 9, dtype)
        for name, view in layouts(queries).items():
            check(view, layouts(bank)[name])

    def test_rows_of_the_bank_itself(self, simd_level: str, dtype: torch.dtype) -> None:
        bank = operands(1, 1500, 40, dtype)[1]
        distances, indices = ops.nearest_distance(bank[::7], bank)
        assert not distances.any()
        assert_close(indices, torch.arange(0, 1500, 7))


class TestNumbers:
    @pytest.mark.parametrize("real", [torch.float32, TWIN])
    @pytest.mark.parametrize("sort", [False, True])
    def test_lengths_over_many_decades(
        self, simd_level: str, real: torch.dtype, sort: bool
    ) -> None:
        """A product's rounding is larger than most distances here."""
        bank = decades(3000, 20, -16, 0, 1)
        queries = torch.cat([decades(200, 20, -16, 0, 2), 1.001 * bank[::30]]).to(real)
        bank = bank[bank.norm(dim=1).argsort()] if sort else bank
        check(queries, bank.to(real))

    @pytest.mark.parametrize("size", [1e-37, 1e-25, 1e25, 1e37])
    def test_squares_that_do_not_fit(self, simd_level: str, size: float) -> None:
        queries, bank = (one * size for one in operands(20, 1100, 3, TWIN))
        check(queries.float(), bank.float())

    def test_near_duplicates_far_from_the_origin(self, simd_level: str) -> None:
        """Differences of 1e-3 at a distance of 1e3: products know squares to 1e-1 only."""
        queries, bank = operands(50, 2500, 16)
        check(1e3 + 1e-3 * queries, 1e3 + 1e-3 * bank)

    def test_reduced_precision_products_change_nothing(self) -> None:
        queries, bank = operands(64, 2500, 256)
        bank[:64] = queries + 1e-3 * bank[:64]
        expected = ops.nearest_distance(queries, bank)
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        try:
            actual = ops.nearest_distance(queries, bank)
        finally:
            torch.backends.mkldnn.matmul.fp32_precision = "none"
        assert_close(actual, expected, rtol=0, atol=0)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_what_is_not_finite(self, simd_level: str, dtype: torch.dtype) -> None:
        nan, inf = float("nan"), float("inf")
        for place, value in product((0, 700, 1499), (inf, -inf, nan)):
            queries, bank = operands(70, 1500, 5, dtype)
            bank[place, 2] = value
            check(queries, bank)
            queries, bank = operands(70, 1500, 5, dtype)
            queries[3, 1] = value
            check(queries, bank)
        queries, bank = operands(70, 3, 5, dtype)
        check(queries, torch.full_like(bank, nan))
        check(torch.full_like(queries, inf), torch.full_like(bank, inf))
        check(queries, torch.full_like(bank, inf))

    def test_norms_decide_what_is_looked_at(self) -> None:
        """Norms that rule out what is nearest show that they are used: they must be right."""
        queries, bank = torch.zeros(1, 4), torch.cat([torch.zeros(1024, 4), torch.ones(1024, 4)])
        wrong = torch.cat([torch.full((1024,), 100.0), torch.full((1024,), 2.0)])
        assert ops.nearest_distance(queries, bank)[0] == 0
        assert ops.nearest_distance(queries, bank, bank_norms=wrong)[0] == 2

    @settings(max_examples=60, deadline=None)
    @given(
        queries=st.integers(0, 130),
        rows=st.one_of(st.integers(1, 50), st.integers(1000, 2100)),
        columns=st.integers(0, 40),
        low=st.sampled_from([-12, -2, 0]),
        seed=st.integers(0, 2**16),
    )
    def test_any_shape(self, queries: int, rows: int, columns: int, low: float, seed: int) -> None:
        q, b = decades(queries, columns, low, 0, seed), decades(rows, columns, low, 0, seed + 1)
        check(q.float(), b.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_again_and_with_two_threads(torch_threads: None, dtype: torch.dtype) -> None:
    numbers = operands(300, 2500, 33, dtype)
    before = [one.clone() for one in numbers]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        first = ops.nearest_distance(*numbers)
        assert_close(ops.nearest_distance(*numbers), first, rtol=0, atol=0)
        check(*numbers)
    assert_close(list(numbers), before, rtol=0, atol=0)


class TestMemory:
    """The most that torch's allocator held at once, above what it held at the start."""

    @staticmethod
    def _peak(call: Callable[[], object], folder: Path) -> int:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            call()
        profile.export_chrome_trace(str(folder / "trace.json"))
        trace = json.loads((folder / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
        changes = [(e["ts"], e["args"]["Bytes"]) for e in trace if e["name"] == "[memory]"]
        held = peak = 0
        for _, change in sorted(changes, key=lambda pair: pair[0]):
            held += change
            peak = max(peak, held)
        return peak

    def test_temporaries_do_not_grow_with_the_bank(self, tmp_path: Path) -> None:
        peaks = {}
        for rows in (2**13, 2**15):
            queries, bank = operands(300, rows, 4)
            norms = bank.norm(dim=1)
            call = partial(ops.nearest_distance, queries, bank, bank_norms=norms)
            peaks[rows] = self._peak(call, tmp_path)
        assert peaks[2**15] == peaks[2**13]
        whole = self._peak(partial(torch.cdist, queries, bank), tmp_path)
        assert whole >= 4 * 300 * 2**15 > 4 * peaks[2**15]


REFUSED = {
    "one dimension": ({"queries": torch.zeros(5)}, "queries must have the shape (B, D)"),
    "columns": ({"queries": torch.zeros(3, 4)}, "must have the same number of columns, got 4"),
    "an empty bank": (
        {"bank": torch.zeros(0, 5), "bank_norms": torch.zeros(0)},
        "bank must have at least one row",
    ),
    "norms of others": ({"bank_norms": torch.zeros(3)}, "bank_norms must have the shape (N,)"),
    "integers": ({"queries": torch.zeros(3, 5, dtype=torch.int64)}, "queries must be"),
    "half-precision norms": (
        {"bank_norms": torch.zeros(2, dtype=torch.float16)},
        "bank_norms must be float32 or float64",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_refused(name: str) -> None:
    changes, message = REFUSED[name]
    right = {
        "queries": torch.zeros(3, 5), "bank": torch.ones(2, 5), "bank_norms": torch.ones(2)
    }  # fmt: skip
    ops.nearest_distance(**right)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ops.nearest_distance(**{**right, **changes})
    with pytest.raises(RuntimeError):  # in other words: on devices that have no kernel
        ops._nearest_distance_elsewhere(**{**right, **changes}, rounding=0.0)


class TestInPyTorch:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_opcheck(self, dtype: torch.dtype) -> None:
        for count in (0, 3):
            queries, bank = operands(count, 9, 4, dtype)
            norms = bank.to(TWIN if dtype == TWIN else torch.float32).norm(dim=1)
            torch.library.opcheck(OP.default, (queries, bank, norms, 0.0))

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compiled_in_one_graph(self, dynamic: bool) -> None:
        torch._dynamo.reset()

        def function(queries: Tensor, bank: Tensor) -> Tensor:
            return 2 * ops.nearest_distance(queries, bank)[0]

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for count in (3, 8):
            numbers = operands(count, 20, 7)
            assert_close(compiled(*numbers), function(*numbers), rtol=0, atol=0)

    def test_shapes_without_numbers(self) -> None:
        meta = ops.nearest_distance(*(one.to("meta") for one in operands(3, 4, 7)))
        with FakeTensorMode():
            fake = ops.nearest_distance(
                torch.empty(3, 7, device="cuda"), torch.empty(4, 7, device="cuda")
            )
        for results, device in ((meta, "meta"), (fake, "cuda")):
            for one, dtype in zip(results, (torch.float32, torch.int64), strict=True):
                assert (one.shape, one.dtype, one.device.type) == ((3,), dtype, device)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_twin_answers_for_devices_without_a_kernel(self, dtype: torch.dtype) -> None:
        for count in (0, 9):
            queries, bank = operands(count, 50, 7, dtype)
            norms = bank.to(TWIN if dtype == TWIN else torch.float32).norm(dim=1)
            actual = ops._nearest_distance_elsewhere(queries, bank, norms, 0.0)
            assert_close(actual, ops.nearest_distance(queries, bank), rtol=1e-5, atol=1e-7)
