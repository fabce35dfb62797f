"""The machine code in the library: what instructions it uses, and that nothing spills."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
from devices import ARCHITECTURES, ROOT

import grood_fast

sys.path.insert(0, str(ROOT / "tools"))
import cuda_cases
import cuda_report
import cuda_toolkit

# The instructions without which a kernel would not do what it was written for.
EXPECTED = {
    r"logit_gradient_kernel<\w+, \d+, \d+>": ["LDG.E.128", "STG.E.128", "SHFL"],
    r"row_norm_kernel<.*": ["LDG.E.128", "SHFL"],
    r"dual_project_kernel<float>": ["LDGSTS", "HMMA.1688.F32.TF32", "BAR"],
    r"dual_project_kernel<Bfloat16>": ["LDGSTS", "HMMA.16816.F32.BF16", "LDSM.16.M88.4"],
    r"dual_project_kernel<Float16>": ["LDGSTS", "HMMA.16816.F32", "LDSM.16.M88.4"],
    r"dual_project_kernel<double>": ["LDGSTS", "DMMA"],
    r"nearest_in_share_kernel<.*": ["LDGSTS", "LDS.128"],
    r"prototype_distance_kernel<.*": ["LDGSTS", "LDS.128"],
    r"form_gradient_kernel<float>": ["LDGSTS", "HMMA.1688.F32.TF32"],
    r"pair_positions_kernel<float>": ["LDGSTS", "HMMA.1688.F32.TF32"],
    r"pair_positions_kernel<double>": ["LDGSTS", "DMMA"],
    r"positions_of_channel_kernel<.*": ["LDG.E.128"],
}
FORBIDDEN = ("LDL", "STL")  # local memory: registers that spilled, or arrays that are not in them


def _cuobjdump() -> str | None:
    site = Path(sysconfig.get_paths()["purelib"])
    packaged = [str(path) for path in sorted(site.glob("nvidia/cu*/bin/cuobjdump"))]
    beside = []
    with contextlib.suppress(cuda_toolkit.NoToolkit):
        beside = [str(cuda_toolkit.find().nvcc.parent / "cuobjdump")]
    found = [name for name in packaged + beside if Path(name).is_file()]
    return found[0] if found else shutil.which("cuobjdump")


needs_kernels = pytest.mark.skipif(
    not ARCHITECTURES, reason="compiled without nvcc, for the CPU only"
)


@pytest.fixture(scope="module")
def opcodes() -> dict[str, dict[str, Counter[str]]]:
    """How often each instruction stands in the code, by architecture and kernel."""
    if (program := _cuobjdump()) is None:
        pytest.skip("needs cuobjdump (pip install nvidia-cuda-cuobjdump)")
    library = Path(grood_fast.__file__).parent / "_ops.so"
    dumped = subprocess.run(
        [program, "-sass", str(library)], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, dict[str, Counter[str]]] = {}
    architecture, counter = "", Counter[str]()
    for line in dumped.splitlines():
        if named := re.search(r"arch = (sm_\d+)", line):
            architecture = named[1]
        elif named := re.search(r"Function : (\w+)", line):
            counter = found.setdefault(architecture, {}).setdefault(named[1], Counter())
        elif code := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line):
            counter[code[1]] += 1
    readable = cuda_toolkit.demangled(sorted({name for by in found.values() for name in by}))
    return {
        arch: {readable[name]: codes for name, codes in kernels.items()}
        for arch, kernels in found.items()
    }


@needs_kernels
class TestMachineCode:
    def test_all_architectures_and_kernels_are_there(
        self, opcodes: dict[str, dict[str, Counter[str]]]
    ) -> None:
        kernels = {kernel for kernel, _ in cuda_toolkit.read_budgets()}
        assert set(opcodes) == set(cuda_toolkit.ARCHITECTURES)
        for found in opcodes.values():
            assert set(found) == kernels

    @pytest.mark.parametrize("architecture", cuda_toolkit.ARCHITECTURES)
    def test_the_instructions_they_were_written_for(
        self, opcodes: dict[str, dict[str, Counter[str]]], architecture: str
    ) -> None:
        for pattern, expected in EXPECTED.items():
            matching = [k for k in opcodes[architecture] if re.fullmatch(pattern, k)]
            assert matching, pattern
            for kernel in matching:
                present = opcodes[architecture][kernel]
                for wanted in expected:
                    assert any(code.startswith(wanted) for code in present), (kernel, wanted)

    @pytest.mark.parametrize("architecture", cuda_toolkit.ARCHITECTURES)
    def test_nothing_spills(
        self, opcodes: dict[str, dict[str, Counter[str]]], architecture: str
    ) -> None:
        for kernel, present in opcodes[architecture].items():
            spilled = [code for code in present if code.startswith(FORBIDDEN)]
            assert not spilled, (kernel, spilled)


class TestBudgets:
    FOUND = (
        "ptxas info    : Compiling entry function '_ZN10grood_fast4cuda17add_shares_kernelIfEE"
        "vPKT_llPS2_' for 'sm_90'\n"
        "ptxas info    : Function properties for it\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used {} registers, used 0 barriers, {} bytes smem\n"
    )

    def test_every_kernel_has_one_for_each_architecture(self) -> None:
        kernels = {kernel for kernel, _ in cuda_toolkit.read_budgets()}
        names = " ".join(
            path.read_text(encoding="utf-8") for path in ROOT.glob("csrc/kernels/cuda/*.cu*")
        )
        for kernel in set(re.findall(r"(\w+_kernel)\(", names)):
            assert any(one.startswith(kernel) for one in kernels), kernel

    def test_more_than_the_budget_is_told(self) -> None:
        kernel, arch = "add_shares_kernel<float>", "sm_90"
        budget = cuda_toolkit.read_budgets()[kernel, arch]
        for registers, shared, expected in [
            (budget.registers, budget.shared, False),
            (budget.registers + 1, budget.shared, True),
            (budget.registers, budget.shared + 1, True),
        ]:
            found = cuda_toolkit.resources([self.FOUND.format(registers, shared)])
            assert found == {(kernel, arch): cuda_toolkit.Resources(registers, shared)}
            told = [one for one in cuda_toolkit.over_budget(found) if "is no more" not in one]
            assert bool(told) == expected

    def test_a_kernel_without_a_budget_is_told(self) -> None:
        found = {("new_kernel", "sm_80"): cuda_toolkit.Resources(1, 1)}
        assert "new_kernel for sm_80 is not in" in cuda_toolkit.over_budget(found)[0]


class TestReport:
    def test_occupancy_by_hand(self) -> None:
        a100 = cuda_report.GPUS[0]
        used = cuda_toolkit.Resources
        assert cuda_report.occupancy(a100, used(32, 0), 256) == 1.0
        # 255 registers: 8,192 for a warp (by 256), so eight warps, two blocks of four.
        assert cuda_report.occupancy(a100, used(255, 0), 128) == 256 / 2048
        # 36 KiB and one for the system: four blocks in 164 KiB.
        assert cuda_report.occupancy(a100, used(32, 36 << 10), 128) == 512 / 2048

    def test_it_says_that_it_is_a_prediction(self) -> None:
        text = cuda_report.report()
        assert "a prediction, nothing was run" in text
        for case in cuda_cases.cases():
            assert case.title in text
            assert (case.kernel, "sm_90") in cuda_toolkit.read_budgets(), case.kernel


@needs_kernels
def test_no_cuda_library_is_needed_to_load() -> None:
    """One library for every torch: the CUDA runtime is a part of it."""
    if (readelf := shutil.which("readelf")) is None:
        pytest.skip("needs readelf")
    path = str(Path(grood_fast.__file__).parent / "_ops.so")
    listed = subprocess.run([readelf, "-d", path], capture_output=True, text=True, check=True)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", listed.stdout)
    assert needed
    assert not [name for name in needed if "cuda" in name or "nv" in name]
