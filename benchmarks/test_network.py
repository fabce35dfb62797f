"""Gradients of all of a network's parameters: in forward passes, and against vmap(grad).

"Forward" is the eager float32 forward pass under inference mode, "floor" forward and backward of
the activations alone, parameters frozen, in plain PyTorch. What a reading costs beyond the floor
is what is to be judged, so it is filed as (ours − floor) / forward.

Run as a program it prints the memory that one of the things compared needs: one process, one
measurement.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparisons import Comparison
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from grood_fast import ops
from grood_fast.batches import parse_batch
from grood_fast.classifier import Classifier
from grood_fast.evaluation.networks import efficientnet_lite0, resnet18
from grood_fast.network import LayerGradient, NetworkNeed, NetworkPass
from grood_fast.network.directions import Coordinates, DirectionSketch
from grood_fast.network.gradients import Convolution, Geometry, arranged

BEYOND = "Network gradients beyond the floor, (ours - floor) / forward"
RATIO = "Coordinates of all parameters"
OP = "layer_gradient_sqnorm, against unfold + bmm"
OP_MEMORY = "layer_gradient_sqnorm: peak memory above the operands, against unfold + bmm"
K = 64
ROUNDS = 7

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-18, 32 px, batch 32": (resnet18, (32, 3, 32, 32)),
    "ResNet-18, 32 px, batch 8": (resnet18, (8, 3, 32, 32)),
    "EfficientNet-lite0, 224 px, batch 8": (efficientnet_lite0, (8, 3, 224, 224)),
}
SHAPES = [  # of ResNet-18 at 32 px: (channels in, channels out, side, kernel, stride)
    (3, 64, 32, 3, 1),
    (64, 64, 32, 3, 1),
    (64, 128, 32, 3, 2),
    (128, 128, 16, 3, 1),
    (128, 256, 16, 3, 2),
    (256, 256, 8, 3, 1),
    (256, 512, 8, 3, 2),
    (512, 512, 4, 3, 1),
    (256, 512, 8, 1, 2),
]


class Readings:
    """A network, a batch, and what can be asked of its gradients."""

    def __init__(self, network: str, precision: Any = None) -> None:
        make, shape = NETWORKS[network]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = make().eval().to(memory_format=torch.channels_last)
            x = torch.randn(shape)
        self.x = x.contiguous(memory_format=torch.channels_last)
        self.batch = parse_batch(self.x)
        self.classifier = Classifier(self.model, precision=precision)
        self.recording = NetworkPass(self.classifier, [NetworkNeed(memory_budget=1 << 40)])
        sketches: dict[str, DirectionSketch] = {}

        def sketch(name: str, gradient: LayerGradient) -> None:
            sketches[name] = DirectionSketch(name, gradient, 192, 16, seed=0)

        self.read(sketch)
        self.directions = {name: made.finish() for name, made in sorted(sketches.items())}

    def forward(self) -> None:
        with torch.inference_mode():
            self.model(self.x)

    def floor(self) -> None:
        flags = [p.requires_grad for p in self.model.parameters()]
        self.model.requires_grad_(False)
        x = self.x.detach().requires_grad_()
        logits = self.model(x)
        torch.autograd.grad(logits, x, torch.softmax(logits.detach(), dim=1))
        for p, flag in zip(self.model.parameters(), flags, strict=True):
            p.requires_grad_(flag)

    def read(self, reader: Callable[[str, LayerGradient], Any]) -> Tensor:
        with self.classifier.session(features=False):
            (piece,) = self.recording.pieces(self.batch)
            logits, _, gradients = self.recording.forward(piece)
            gradients.read(torch.softmax(logits, dim=1), reader)
        return logits

    def coordinates(self) -> None:
        reader = Coordinates(self.directions)
        reader.finish(self.read(reader))

    def squared_norms(self) -> None:
        self.read(lambda _, gradient: gradient.squared_norm())

    def dense(self) -> Callable[[], None]:
        bases = {
            name: arranged(torch.randn(K, *p.shape)) for name, p in self.model.named_parameters()
        }

        def run() -> None:
            self.read(lambda name, gradient: gradient.projected(bases[name]))

        return run

    def vmap_grad(self) -> None:
        """Every sample's gradient, formed, as torch.func does it."""
        parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        buffers = dict(self.model.named_buffers())

        def energy(values: dict[str, Tensor], one: Tensor) -> Tensor:
            return functional_call(self.model, (values, buffers), one.unsqueeze(0)).logsumexp(1)[0]

        vmap(grad(energy), (None, 0))(parameters, self.x)


def medians(calls: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Times of every call, the calls taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for turn in range(ROUNDS):
        for name in calls if turn % 2 else reversed(calls):
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    return times


@pytest.mark.parametrize("network", NETWORKS)
def test_beyond_the_floor(benchmark: Any, comparisons: Any, network: str) -> None:
    torch.set_num_threads(2)
    readings = Readings(network)
    calls = {
        "forward": readings.forward,
        "floor": readings.floor,
        "coordinates": readings.coordinates,
        "squared norms": readings.squared_norms,
    }
    bars = {"coordinates": 0.15, "squared norms": 1.2, f"dense projection, K = {K}": 2.8}
    if network == next(iter(NETWORKS)):
        calls[f"dense projection, K = {K}"] = readings.dense()
    times = medians(calls)
    benchmark.pedantic(lambda: None, rounds=1)
    forward = statistics.median(times["forward"])
    floors = [f / forward for f in times["floor"]]
    comparisons.add(
        benchmark,
        Comparison(
            BEYOND, network, "the floor itself, in forwards", statistics.median(floors),
            (min(floors), max(floors)), None, lower=True, ours=forward,
        ),
    )  # fmt: skip
    for what, bar in bars.items():
        if what not in times:
            continue
        beyond = [
            (mine - floor) / forward
            for mine, floor in zip(times[what], times["floor"], strict=True)
        ]
        comparisons.add(
            benchmark,
            Comparison(
                BEYOND, network, what, statistics.median(beyond), (min(beyond), max(beyond)),
                bar if "batch 32" in network else None, lower=True,
                ours=statistics.median(times[what]),
            ),
        )  # fmt: skip


def test_against_vmap(benchmark: Any, comparisons: Any) -> None:
    torch.set_num_threads(2)
    readings = Readings("ResNet-18, 32 px, batch 8")
    comparisons.timed(
        benchmark,
        RATIO,
        "ResNet-18, 32 px, batch 8, 2 threads",
        readings.coordinates,
        {"vmap(grad), gradients formed and nothing more": readings.vmap_grad},
        bar=5.0,
        seconds=20,
    )


def unfolded(activation: Tensor, delta: Tensor, kernel: int, stride: int) -> Tensor:
    patches = F.unfold(activation, kernel, padding=kernel // 2, stride=stride)
    return torch.bmm(delta.flatten(2), patches.mT).square().sum(dim=(1, 2))


def operands(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Geometry]:
    inputs, outputs, side, kernel, stride = shape
    generator = torch.Generator().manual_seed(0)
    activation = torch.randn(32, inputs, side, side, generator=generator)
    out = (side - 1) // stride + 1
    delta = torch.randn(32, outputs, out, out, generator=generator)
    pad = kernel // 2
    geometry = Geometry((kernel,) * 2, (stride,) * 2, ((pad, pad),) * 2, (1, 1))
    return activation, delta, geometry


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_gradient_sqnorm(benchmark: Any, comparisons: Any, shape: tuple[int, ...]) -> None:
    torch.set_num_threads(2)
    activation, delta, geometry = operands(shape)
    # Either in the layout it is fastest in: unfold makes contiguous patches of both.
    ours = [t.contiguous(memory_format=torch.channels_last) for t in (activation, delta)]
    expected = unfolded(activation, delta, *shape[3:])
    found = Convolution(*ours, geometry).squared_norm()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    comparisons.timed(
        benchmark,
        OP,
        f"(in, out, side, kernel, stride) = {shape}, batch 32, 2 threads",
        lambda: Convolution(*ours, geometry).squared_norm(),
        {"unfold + bmm": lambda: unfolded(activation, delta, *shape[3:])},
        seconds=3,
    )
    lines = [line for line in comparisons.lines if line.table == OP and "in," in line.what]
    if len(lines) == len(SHAPES):
        mean = math.exp(statistics.fmean(math.log(line.value) for line in lines))
        comparisons.add(
            benchmark,
            Comparison(OP, "geometric mean", "unfold + bmm", mean, (mean, mean), 1.5, lower=False),
        )


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key)))


def peak_kilobytes(name: str, shape: tuple[int, ...]) -> int:
    """The peak of one call above what the process has with the operands in it."""
    result = subprocess.run(
        [sys.executable, __file__, name, *map(str, shape)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(result.stdout)


@pytest.mark.parametrize("shape", SHAPES[1:8:2], ids=str)
def test_op_memory(benchmark: Any, comparisons: Any, shape: tuple[int, ...]) -> None:
    ours, theirs = (
        statistics.median(peak_kilobytes(name, shape) for _ in range(3)) for name in CALLS
    )
    benchmark.pedantic(lambda: None, rounds=1)
    comparisons.add(
        benchmark,
        Comparison(
            OP_MEMORY,
            f"{shape}: {ours / 1024:.1f} MiB",
            f"unfold + bmm: {theirs / 1024:.1f} MiB",
            ours / theirs,
            (ours / theirs, ours / theirs),
            1 / 3,
            lower=True,
        ),
    )


CALLS: dict[str, Callable[[tuple[int, ...]], Callable[[], Tensor]]] = {
    "ours": lambda shape: (lambda a, d, g: lambda: Convolution(a, d, g).squared_norm())(
        *(t.contiguous(memory_format=torch.channels_last) for t in operands(shape)[:2]),
        operands(shape)[2],
    ),
    "unfold + bmm": lambda shape: (lambda a, d, _: lambda: unfolded(a, d, *shape[3:]))(
        *operands(shape)
    ),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    size = tuple(int(number) for number in sys.argv[2:])
    ops.layer_gradient_sqnorm(torch.ones(1, 2, 2), torch.ones(1, 2, 2), [0])  # loads the library
    call = CALLS[sys.argv[1]](size)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
    before = status("VmRSS")
    call()
    print(status("VmHWM") - before)
