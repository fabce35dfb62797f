"""The compiled libraries: build facts, instruction sets, the kernels on NumPy arrays, linkage."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ops.helpers import hard_rows, random_logits

import grood_fast
from grood_fast import _kernels, ops
from grood_fast.errors import ExtensionError
from grood_fast.ops import _library

pytestmark = pytest.mark.cpu_kernels

PACKAGE = Path(grood_fast.__file__).parent
SUPPORTED = _kernels.build_facts()["simd_levels_supported"]


def _run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``code`` in a fresh interpreter that finds this package."""
    inherited = {key: value for key, value in os.environ.items() if key != "GROOD_FAST_SIMD"}
    paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**inherited, "PYTHONPATH": os.pathsep.join(paths), **environment},
    )


class TestBuildFacts:
    def test_keys(self) -> None:
        facts = _kernels.build_facts()
        assert set(facts) == {
            "version",
            "compiler",
            "torch",
            "cuda_architectures",
            "simd_levels_compiled",
            "simd_levels_supported",
            "simd_level_complaint",
            "objectives",
            "norms",
        }
        assert facts["version"].count(".") == 2
        assert facts["compiler"]
        assert tuple(int(part) for part in facts["torch"].split(".")[:2]) >= (2, 13)

    def test_levels(self) -> None:
        facts = _kernels.build_facts()
        assert facts["simd_levels_compiled"][0] == facts["simd_levels_supported"][0] == "baseline"
        assert set(facts["simd_levels_supported"]) <= set(facts["simd_levels_compiled"])
        assert ops.simd_level() in facts["simd_levels_supported"]

    def test_the_wrappers_know_what_was_compiled(self) -> None:
        assert tuple(_kernels.build_facts()["objectives"]) == ops.OBJECTIVES
        assert tuple(_kernels.build_facts()["norms"]) == ops.NORMS


class TestSimdLevel:
    def test_both_libraries_change(self, simd_level: str) -> None:
        assert ops.simd_level() == _kernels.simd_level() == simd_level

    def test_refused_levels_change_nothing(self) -> None:
        before = _kernels.simd_level()
        for level in ("mmx", "", "AVX2", "avx2,", "baselin"):
            assert not _kernels.set_simd_level(level)
            assert _kernels.simd_level() == before

    CODE = (
        "from grood_fast import _kernels, ops; import torch;"
        "print(ops.simd_level(), _kernels.simd_level(),"
        " ops.logit_gradient(torch.zeros(2, 4), 'energy').log_sum_exp[0].exp().round().item())"
    )

    @pytest.mark.parametrize("level", SUPPORTED)
    def test_the_environment_variable_is_obeyed(self, level: str) -> None:
        done = _run_python(self.CODE, GROOD_FAST_SIMD=level, PYTHONWARNINGS="error::RuntimeWarning")
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [level, level, "4.0"]

    @pytest.mark.parametrize("level", ["nonsense", "x" * 400])
    def test_nonsense_is_answered_with_a_warning_and_the_best_level(self, level: str) -> None:
        done = _run_python(self.CODE, GROOD_FAST_SIMD=level)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [SUPPORTED[-1], SUPPORTED[-1], "4.0"]
        assert "RuntimeWarning: GROOD_FAST_SIMD=" + level[:100] in done.stderr
        supported = ", ".join(SUPPORTED)
        assert f"is not one of this machine's levels ({supported}); using" in done.stderr

    def test_unset_or_empty_is_the_best_level_without_a_word(self) -> None:
        for environment in ({}, {"GROOD_FAST_SIMD": ""}):
            done = _run_python(self.CODE, **environment)
            assert done.returncode == 0, done.stderr
            assert done.stdout.split()[0] == SUPPORTED[-1]
            assert "GROOD_FAST_SIMD" not in done.stderr


class TestNumPy:
    """One kernel behind both doors: bit for bit what the torch ops give."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("classes", [1, 7, 10, 64, 65, 131])
    def test_logit_gradient(self, simd_level: str, dtype: torch.dtype, classes: int) -> None:
        rows = torch.cat([random_logits(9, classes, dtype), hard_rows(classes, dtype)])
        for logits in (rows, rows[:0]):
            for objective in ops.OBJECTIVES:
                target, row = None, None
                if objective == "confounding":
                    target = torch.linspace(0, 1, classes, dtype=dtype)
                    row = target.numpy()[np.newaxis]
                temperature = 1.0 if target is not None else 2.5
                expected = ops.logit_gradient(
                    logits, objective, temperature=temperature, target=target
                )
                actual = _kernels.logit_gradient(
                    logits.numpy(), objective, temperature=temperature, target=row
                )
                assert set(actual) == set(ops.OUTPUTS)
                for name, array in actual.items():
                    tensor = getattr(expected, name)
                    assert array.dtype == tensor.numpy().dtype
                    np.testing.assert_array_equal(array, tensor.numpy(), err_msg=name)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("norm", ops.NORMS)
    @pytest.mark.parametrize("bias", [False, True])
    def test_head_gradient_norm(
        self, simd_level: str, dtype: torch.dtype, norm: str, bias: bool
    ) -> None:
        logits = torch.cat([random_logits(9, 10, dtype), hard_rows(10, dtype)])
        features = random_logits(len(logits), 37, dtype, seed=1)
        for objective in ops.OBJECTIVES:
            expected = ops.head_gradient_norm(logits, features, objective, norm=norm, bias=bias)
            actual = _kernels.head_gradient_norm(
                logits.numpy(), features.numpy(), objective, norm=norm, bias=bias
            )
            assert actual.dtype == expected.numpy().dtype
            np.testing.assert_array_equal(actual, expected.numpy())

    def test_any_strides_byte_order_and_dtype(self) -> None:
        logits = random_logits(9, 10, torch.float64).numpy()
        expected = _kernels.logit_gradient(logits, "uniform")["l1"]
        for same in (np.asfortranarray(logits), np.repeat(logits, 2, 1)[:, ::2], logits[::-1]):
            actual = _kernels.logit_gradient(same, "uniform")["l1"]
            if same.strides[0] < 0:
                actual = actual[::-1]
            np.testing.assert_array_equal(actual, expected)
        swapped = _kernels.logit_gradient(logits.astype(logits.dtype.newbyteorder()), "uniform")
        np.testing.assert_array_equal(swapped["l1"], expected)
        for other in (np.float16, np.int8, np.int64):
            narrow = (logits * 3).astype(other)
            actual = _kernels.logit_gradient(narrow, "uniform")["l1"]
            assert actual.dtype == np.float32
            np.testing.assert_array_equal(
                actual, _kernels.logit_gradient(narrow.astype(np.float32), "uniform")["l1"]
            )

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"logits": np.zeros(3)}, "logits must have two dimensions"),
            ({"logits": np.zeros((3, 0))}, "logits must have at least one class"),
            ({"objective": "entropy"}, "unknown objective 'entropy'; known: energy, uniform"),
            ({"temperature": 0.0}, "temperature must be positive"),
            ({"temperature": float("nan")}, "temperature must be positive"),
            ({"target": np.ones((1, 5))}, "only the confounding objective takes a target"),
            (
                {"objective": "confounding", "target": np.ones((1, 4))},
                r"target must have the shape \(1, C\) and the dtype of the logits",
            ),
            (
                {"objective": "confounding", "target": np.ones((1, 5), dtype=np.float32)},
                r"target must have the shape \(1, C\) and the dtype of the logits",
            ),
        ],
    )
    def test_wrong_arguments(self, changes: dict[str, Any], message: str) -> None:
        arguments = {"logits": np.zeros((3, 5)), "objective": "energy", **changes}
        with pytest.raises(ValueError, match=message):
            _kernels.logit_gradient(**arguments)
        with pytest.raises(ValueError, match=message):
            _kernels.head_gradient_norm(features=np.zeros((3, 7)), **arguments)

    def test_wrong_arguments_of_head_gradient_norm(self) -> None:
        logits = np.zeros((3, 5))
        with pytest.raises(ValueError, match="must have the same number of rows"):
            _kernels.head_gradient_norm(logits, np.zeros((1, 7)), "energy")
        with pytest.raises(ValueError, match="features must have two dimensions"):
            _kernels.head_gradient_norm(logits, np.zeros(7), "energy")
        with pytest.raises(ValueError, match="unknown norm 'l3'; known: l1, l2, linf"):
            _kernels.head_gradient_norm(logits, np.zeros((3, 7)), "energy", norm="l3")

    def test_without_torch(self) -> None:
        done = _run_python(
            "import sys; sys.modules['torch'] = None\n"  # importing it raises ImportError
            "import numpy as np\n"
            "from grood_fast import _kernels\n"
            "result = _kernels.logit_gradient(np.zeros((2, 4)), 'energy')\n"
            "assert 'torch._C' not in sys.modules\n"
            "print(*np.exp(result['log_sum_exp']).round(9), *result['delta'][0])"
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["4.0", "4.0", "-0.25", "-0.25", "-0.25", "-0.25"]


class TestLoading:
    """What cannot work is said in a sentence that names the way out."""

    def test_an_old_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "__version__", "2.12.1+cpu")
        with pytest.raises(ExtensionError, match=r"torch >= 2\.13; installed is 2\.12\.1") as error:
            _library.load()
        assert isinstance(error.value, ImportError)

    def test_a_torch_the_ops_do_not_load_under(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(path: str) -> None:
            raise OSError("undefined symbol: torch_call_dispatcher")

        monkeypatch.setattr(torch.ops, "load_library", fail)
        with pytest.raises(ExtensionError, match=r"undefined symbol.*; reinstall"):
            _library.load()

    def test_nothing_compiled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(grood_fast, "_kernels")
        monkeypatch.setitem(sys.modules, "grood_fast._kernels", None)
        with pytest.raises(ExtensionError, match=r"are missing or do not fit.*reinstall"):
            _library.load()

    def test_a_refused_level_is_a_warning(self, monkeypatch: pytest.MonkeyPatch) -> None:
        facts = {**_kernels.build_facts(), "simd_level_complaint": "avx1024"}
        kernels = SimpleNamespace(build_facts=lambda: facts, simd_level=lambda: "baseline")
        monkeypatch.setattr(grood_fast, "_kernels", kernels)
        monkeypatch.setitem(sys.modules, "grood_fast._kernels", kernels)
        with pytest.warns(RuntimeWarning, match=r"GROOD_FAST_SIMD=avx1024.*using baseline"):
            _library.load()


def _undefined_symbols(library: Path) -> list[str]:
    if (nm := shutil.which("nm")) is None or sys.platform != "linux":
        pytest.skip("needs nm")
    listed = subprocess.run(
        [nm, "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    )
    names = [line.split()[-1].split("@")[0] for line in listed.stdout.splitlines() if line.strip()]
    assert names
    return names


class TestLinkage:
    def test_the_ops_use_nothing_of_torch_but_its_stable_c_functions(self) -> None:
        names = _undefined_symbols(PACKAGE / "_ops.so")
        of_torch = [name for name in names if re.search("torch|aten|c10|N2at", name)]
        assert "torch_call_dispatcher" in of_torch
        assert not [name for name in of_torch if not name.startswith(("aoti_torch_", "torch_"))]

    def test_the_numpy_side_uses_nothing_of_torch(self) -> None:
        names = _undefined_symbols(Path(_kernels.__file__))
        assert not [name for name in names if re.search("torch|aten|c10|N2at", name)]


def test_numpy_takes_a_target_as_the_op_does() -> None:
    logits = np.random.RandomState(0).randn(5, 3).astype(np.float32)
    target = np.array([1.0, 0.0, 0.5], np.float32)
    flat = _kernels.logit_gradient(logits, "confounding", target=target)
    row = _kernels.logit_gradient(logits, "confounding", target=target[None])
    np.testing.assert_array_equal(flat["delta"], row["delta"])
    expected = 1 / (1 + np.exp(-logits)) - target
    np.testing.assert_allclose(flat["delta"], expected, rtol=1e-5, atol=1e-6)
