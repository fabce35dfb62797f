"""Build facts, instruction-set control and the CPU kernels on NumPy arrays; needs no torch."""

from typing import Any

from numpy.typing import NDArray

def build_facts() -> dict[str, Any]: ...
def simd_level() -> str: ...
def set_simd_level(level: str) -> bool: ...
def logit_gradient(
    logits: NDArray[Any],
    objective: str,
    *,
    temperature: float = 1.0,
    target: NDArray[Any] | None = None,
) -> dict[str, NDArray[Any]]: ...
def head_gradient_norm(
    logits: NDArray[Any],
    features: NDArray[Any],
    objective: str,
    *,
    temperature: float = 1.0,
    target: NDArray[Any] | None = None,
    norm: str = "l1",
    bias: bool = False,
) -> NDArray[Any]: ...
