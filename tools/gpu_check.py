"""Finishes on a GPU what can only be prepared without one, and writes one report.

    python tools/gpu_check.py [--device cuda] [--report gpu-report.md]
    python tools/gpu_check.py --device emulated    # a dry run: that this script itself works

Runs the tests through the CUDA kernels, compares every op with the CPU, times it against plain
PyTorch eager and compiled and against a backward pass a sample, captures it in a CUDA graph, runs
it on streams, and sets the times beside the predictions. Exit code 1 if something disagrees. On the
emulated device sizes are small, and no time is taken.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "python_tests"), str(ROOT / "tools")]

import cuda_cases  # noqa: E402
import cuda_report  # noqa: E402
import torch  # noqa: E402
from devices import ARCHITECTURES, OPS, kernels_of  # noqa: E402
from torch import Tensor  # noqa: E402

from grood_fast import ops  # noqa: E402

DRY_RUN_SCALE = 64
# Of the largest number of a result: what float32, and TensorFloat-32 thrice, may be off.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-5}


def tensors(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [*results]


class Cuda:
    """The current GPU."""

    name = "cuda"
    device = "cuda"
    scale = 1

    def kernels(self) -> AbstractContextManager[None]:
        return nullcontext()

    def describe(self) -> str:
        properties = torch.cuda.get_device_properties(0)
        return (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, torch "
            f"{torch.__version__}, CUDA {torch.version.cuda}"
        )

    def milliseconds(self, function: Callable[[], Any]) -> float:
        """Median of 50 calls after 10, each after the second-level cache was overwritten."""
        flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
        for _ in range(10):
            function()
        times = []
        for _ in range(50):
            flush.zero_()
            start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            stop = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            start.record()
            function()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        return float(statistics.median(times))

    def replay(self, function: Callable[[], Any], change: Callable[[], None]) -> Any:
        """What a captured graph of ``function`` gives after its inputs were changed."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = function()
        change()
        graph.replay()
        torch.cuda.synchronize()
        return results

    def on_stream(self, function: Callable[[], Any], change: Callable[[], None]) -> Any:
        """What ``function`` gives on another stream, right behind a slow change of its inputs."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]
            change()
            results = function()
        side.synchronize()
        return results

    def finish(self) -> None:
        torch.cuda.synchronize()


class Emulated(Cuda):
    """The emulated device: everything happens at once and on CPU tensors."""

    name = "emulated"
    device = "cpu"
    scale = DRY_RUN_SCALE

    def kernels(self) -> AbstractContextManager[None]:
        running: AbstractContextManager[None] = kernels_of("emulated")
        return running

    def describe(self) -> str:
        return f"the emulated device (a dry run, no GPU), torch {torch.__version__}"

    def milliseconds(self, function: Callable[[], Any]) -> float:
        function()
        return float("nan")

    def replay(self, function: Callable[[], Any], change: Callable[[], None]) -> Any:
        change()
        return function()

    on_stream = replay

    def finish(self) -> None:
        pass


class Report:
    """Lines of Markdown, and whether everything agreed so far."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.failures: list[str] = []

    def section(self, title: str, *header: str) -> None:
        self.lines += ["", f"## {title}", ""]
        if header:
            self.row(*header)
            self.row(*["---"] * len(header))

    def row(self, *cells: str) -> None:
        self.lines.append("| " + " | ".join(cells) + " |")

    def expect(self, condition: bool, what: str) -> str:
        if not condition:
            self.failures.append(what)
        return "ok" if condition else "FAILED"


def run_tests(device: Cuda, report: Report, everything: bool) -> None:
    report.section("Tests, through the CUDA kernels")
    chosen = [str(ROOT / "python_tests")]
    if not everything:
        chosen = [str(ROOT / "python_tests" / "ops" / "test_reference.py")]
        chosen += [str(ROOT / "python_tests" / "ops" / "test_arguments.py")]
    command = [sys.executable, "-m", "pytest", "-q", "--kernels", device.name, *chosen]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    last = (done.stdout.strip().splitlines() or ["nothing was printed"])[-1]
    verdict = report.expect(done.returncode == 0, f"tests: {last}")
    report.lines.append(f"`{' '.join(command[1:5])} ...`: {verdict}, {last}")
    if done.returncode:
        report.lines += ["```", *done.stdout.splitlines()[-60:], "```"]


def difference(results: Any, expected: Any) -> float:
    """The largest, relative to the largest number; whole numbers count as equal or not."""
    worst = 0.0
    for one, other in zip(tensors(results), tensors(expected), strict=True):
        if not one.is_floating_point():
            continue  # which of two equals is named may differ; distances and values tell
        wide, want = one.cpu().double(), other.cpu().double()
        if wide.numel():
            worst = max(worst, ((wide - want).abs().max() / want.abs().max()).item())
    return worst


def compare(device: Cuda, report: Report, cases: list[cuda_cases.Case]) -> None:
    report.section("Against the CPU kernels", "op", "largest difference", "verdict")
    for case in cases:
        expected_call = cuda_cases.call(case, "cpu")
        expected = expected_call.op(*expected_call.arguments)
        with device.kernels():
            mine = cuda_cases.call(case, device.device)
            worst = difference(mine.op(*mine.arguments), expected)
        verdict = report.expect(worst <= TOLERANCE[case.dtype], f"{case.title}: {worst:.1e} off")
        report.row(case.title, f"{worst:.1e}", verdict)


def check_graphs_and_streams(device: Cuda, report: Report, cases: list[cuda_cases.Case]) -> None:
    report.section("CUDA graphs and streams", "op", "replayed graph", "other stream")
    for case in cases:
        verdicts = []
        for what in (device.replay, device.on_stream):
            with device.kernels():
                mine = cuda_cases.call(case, device.device)
                first = mine.arguments[0] if mine.arguments[0].is_floating_point() else None
                first = mine.arguments[1] if first is None else first

                def change(tensor: Tensor = first) -> None:
                    tensor.mul_(0.5)

                results = what(partial(mine.op, *mine.arguments), change)
                device.finish()
                expected = mine.op(*mine.arguments)
                device.finish()
            same = all(
                torch.equal(one, other)
                for one, other in zip(tensors(results), tensors(expected), strict=True)
            )
            verdicts.append(report.expect(same, f"{case.title}: {what.__name__}"))
        report.row(case.title, *verdicts)


def backward_a_sample(logits: Tensor, features: Tensor, *_: Any) -> Tensor:
    """GradNorm as it is published: a backward pass for every sample, here of the head alone."""
    weight = torch.zeros(
        logits.shape[1], features.shape[1], device=logits.device, requires_grad=True
    )
    norms = []
    for row, h in zip(logits.float(), features.float(), strict=True):
        loss = -torch.log_softmax(row + weight @ h, dim=0).sum()
        norms.append(torch.autograd.grad(loss, weight)[0].abs().sum())
    return torch.stack(norms)


def measure(device: Cuda, report: Report, cases: list[cuda_cases.Case]) -> None:
    gpu = next(
        (one for one in cuda_report.GPUS if device.name == "cuda"
         and one.architecture == "sm_{}{}".format(*torch.cuda.get_device_capability())),
        None,
    )  # fmt: skip
    report.section(
        f"Times in ms (prediction: roofline of {gpu.name if gpu else 'no known GPU'})",
        "op", "ours", "eager", "torch.compile", "a backward a sample", "prediction", "ours / it",
    )  # fmt: skip
    backend = "inductor" if device.name == "cuda" else "eager"
    for case in cases:
        with device.kernels():
            mine = cuda_cases.call(case, device.device)
            torch._dynamo.reset()
            compiled = torch.compile(mine.reference, backend=backend)
            calls = [mine.op, mine.reference, compiled]
            times = [device.milliseconds(partial(one, *mine.arguments)) for one in calls]
            loop = ""
            if case.op == "head_gradient_norm":
                start = time.perf_counter()
                backward_a_sample(*(one[:64] for one in mine.arguments[:2]))
                device.finish()
                seconds = (time.perf_counter() - start) / min(64, case.sizes["B"])
                if device.name == "cuda":
                    loop = f"{seconds * 1e3 * case.sizes['B']:.1f}"
        predicted = cuda_report.microseconds(case, gpu)[0] / 1e3 if gpu else float("nan")
        report.row(
            case.title, *(f"{one:.4f}" for one in times), loop, f"{predicted:.4f}",
            f"{times[0] / predicted:.2f}",
        )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "emulated"), default="cuda")
    parser.add_argument("--report", type=Path, default=ROOT / "build" / "gpu-report.md")
    parser.add_argument("--no-tests", action="store_true", help="leave the test suite out")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here: --device emulated is a dry run.", file=sys.stderr)
        return 2
    device = Cuda() if options.device == "cuda" else Emulated()
    if options.device == "cuda" and not ARCHITECTURES:
        print("This build has no CUDA kernels: build again with nvcc.", file=sys.stderr)
        return 2

    report = Report()
    report.lines += ["# CUDA kernels on " + device.describe(), ""]
    report.lines += [f"Compiled for {', '.join(ARCHITECTURES) or 'the CPU only'}; ops: {len(OPS)}."]
    cases = [case for case in cuda_cases.cases(device.scale) if case.op in OPS]
    assert ops
    compare(device, report, cases)
    check_graphs_and_streams(device, report, cases)
    measure(device, report, cases)
    if not options.no_tests:
        run_tests(device, report, everything=device.name == "cuda")
    report.lines += ["", "## Verdict", ""]
    report.lines += [f"- FAILED: {failure}" for failure in report.failures] or [
        "Everything agreed."
    ]
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text("\n".join(report.lines) + "\n", encoding="utf-8")
    print(f"{options.report}: {report.lines[-1]}")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
