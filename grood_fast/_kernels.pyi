"""Build facts, instruction-set control and the CPU kernels on NumPy arrays; needs no torch."""

from typing import Any

from numpy.typing import ArrayLike, NDArray

def build_facts() -> dict[str, Any]: ...
def simd_level() -> str: ...
def set_simd_level(level: str) -> bool: ...
def logit_gradient(
    logits: ArrayLike,
    objective: str,
    *,
    temperature: float = 1.0,
    target: ArrayLike | None = None,
) -> dict[str, NDArray[Any]]: ...
def head_gradient_norm(
    logits: ArrayLike,
    features: ArrayLike,
    objective: str,
    *,
    temperature: float = 1.0,
    target: ArrayLike | None = None,
    norm: str = "l1",
    bias: bool = False,
) -> NDArray[Any]: ...
