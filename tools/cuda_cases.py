"""What each op is measured and predicted on: arguments, plain PyTorch, and what must be moved and
computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One op on one shape.

    Attributes:
        op: its name.
        dtype: the operands' dtype, by torch's name.
        sizes: the shape, by name.
        kernel: the compiled kernel that does most of the work.
        megabytes: that must be read or written at least once.
        work: operations (a multiply-add counts as two), by the unit that does them: ``float32``,
            ``tf32``, ``bfloat16`` or ``float64``.
    """

    op: str
    dtype: str
    sizes: dict[str, int]
    kernel: str
    megabytes: float
    work: dict[str, float]

    @property
    def title(self) -> str:
        """In one line."""
        return f"{self.op}, {self.dtype}, " + ", ".join(f"{k}={v}" for k, v in self.sizes.items())


def cases(scale: int = 1) -> list[Case]:
    """All of them; ``scale`` divides every size, for a dry run."""

    def size(**sizes: int) -> dict[str, int]:
        return {name: max(2, value // scale) for name, value in sizes.items()}

    found = []
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        s = size(B=4096, C=1000)
        b, c = s["B"], s["C"]
        found.append(
            Case(
                "logit_gradient", dtype, s, f"logit_gradient_kernel<{_type(dtype)}, 32, "
                f"{32 * width // 16}>", b * c * (width + 4) / 1e6, {"float32": 20.0 * b * c},
            )
        )  # fmt: skip
        s = size(B=4096, C=1000, D=2048)
        b, c, d = s["B"], s["C"], s["D"]
        found.append(
            Case(
                "head_gradient_norm", dtype, s, f"row_norm_kernel<{_type(dtype)}, 32>",
                b * (c + d) * width / 1e6, {"float32": 20.0 * b * c + 4.0 * b * d},
            )
        )  # fmt: skip
        s = size(B=256, C=1000, D=2048, N=8192, K=128)
        b, c, d, n, k = s.values()
        operands = 2.0 * b * n * (c + d)
        # In float32 each product is three in TensorFloat-32.
        work = {"tf32": 3 * 2.0 * b * n * k}
        unit = "tf32" if dtype == "float32" else "bfloat16"
        work[unit] = work.get(unit, 0) + (3 * operands if unit == "tf32" else operands)
        found.append(
            Case(
                "dual_project", dtype, s, f"dual_project_kernel<{_type(dtype)}>",
                ((b + n) * (c + d) * width + 4 * (n * k + b * k)) / 1e6, work,
            )
        )  # fmt: skip
        s = size(B=256, D=512, N=50000)
        b, d, n = s.values()
        found.append(
            Case(
                "nearest_distance", dtype, s, f"nearest_in_share_kernel<{_type(dtype)}>",
                (b + n) * d * width / 1e6,
                # A subtraction and a multiply-add an element: two issue slots, four operations.
                {"float32": 4.0 * b * n * d},
            )
        )  # fmt: skip
    s = size(B=256, D=2048, C=1000)
    b, d, c = s.values()
    found.append(
        Case(
            "prototype_gradient", "float32", s, "prototype_distance_kernel<float>",
            4 * (2 * b * d + c * d + 2 * b * c) / 1e6, {"float32": 4.0 * b * c * d},
        )
    )  # fmt: skip
    s = size(B=256, D=2048, C=1000, k=200)
    b, d, c, k = s.values()
    found.append(
        Case(
            "short_circuit_logits", "float32", s, "short_circuit_kernel<float>",
            4 * (b * d + d * c + 2 * b * c) / 1e6, {"float32": 2.0 * b * k * c},
        )
    )  # fmt: skip
    s = size(N=1_000_000, K=1000)
    n, k = s.values()
    found.append(
        Case(
            "cluster_extremes", "float32", s, "extreme_energies_kernel<float>",
            2 * 12 * n / 1e6, {},
        )
    )  # fmt: skip
    s = size(B=64, R=196, M=256, N=256)
    b, r, m, n = s.values()
    found.append(
        Case(
            "layer_gradient_sqnorm", "float32", s, "form_gradient_kernel<float>",
            4 * b * r * (m + n) / 1e6, {"tf32": 3 * 2.0 * b * r * min(m * n, r * (m + n) / 2)},
        )
    )  # fmt: skip
    s = size(B=64, C=256, P=784)
    b, c, p = s.values()
    found.append(
        Case(
            "channel_affine_backward", "float32", s, "positions_of_channel_kernel<float>",
            4 * 3 * b * c * p / 1e6, {"float32": 5.0 * b * c * p},
        )
    )  # fmt: skip
    return found


def _type(dtype: str) -> str:
    return {"float32": "float", "bfloat16": "Bfloat16", "float64": "double"}[dtype]


@dataclass(frozen=True)
class Call:
    """A case's arguments, the op on them, and the same in plain PyTorch."""

    arguments: tuple[Any, ...]
    op: Callable[..., Any]
    reference: Callable[..., Any]


def call(case: Case, device: str) -> Call:
    """Everything on ``device``, from one seed."""
    import torch

    from grood_fast.ops import reference

    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)
    s = case.sizes

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def whole(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator).to(device)

    op = getattr(torch.ops.grood_fast, case.op)
    name = case.op
    plain: Callable[..., Any]
    if name == "logit_gradient":
        arguments: tuple[Any, ...] = (normal(s["B"], s["C"]), 1, 1.0, None, 0b10001001)

        def plain_1(logits: Tensor, *_: Any) -> Any:
            delta = reference.logit_gradient(logits.float(), "uniform")
            return reference.energy(logits.float()), reference.row_norm(delta, "l1"), delta

        plain = plain_1
    elif name == "head_gradient_norm":
        arguments = (normal(s["B"], s["C"]), normal(s["B"], s["D"]), 1, 1.0, None, 0, False)

        def plain_2(logits: Tensor, features: Tensor, *_: Any) -> Any:
            return reference.head_gradient_norm(logits.float(), features.float(), "uniform")

        plain = plain_2
    elif name == "dual_project":
        b, c, d, n, k = s.values()
        arguments = (
            normal(b, c), normal(b, d), normal(n, c), normal(n, d),
            normal(n, k, dtype=torch.float32), 1.0,
        )  # fmt: skip

        def plain_3(*operands: Any) -> Any:
            d, h, da, ha, a = (one.float() for one in operands[:5])
            return reference.dual_project(d, h, da, ha, a, operands[5])

        plain = plain_3
    elif name == "nearest_distance":
        bank = normal(s["N"], s["D"])
        arguments = (normal(s["B"], s["D"]), bank, bank.float().norm(dim=1), 0.0)

        def plain_4(queries: Tensor, bank: Tensor, *_: Any) -> Any:
            return torch.cdist(queries.float(), bank.float()).min(dim=1)

        plain = plain_4
    elif name == "prototype_gradient":
        offsets = normal(s["C"], s["D"])
        arguments = (
            normal(s["B"], s["D"]), normal(s["D"]), offsets, offsets.norm(dim=1), 1.0, False, 1.0,
        )  # fmt: skip

        def plain_5(features: Tensor, point: Tensor, offsets: Tensor, *_: Any) -> Any:
            return reference.prototype_gradient(features, point, offsets)

        plain = plain_5
    elif name == "short_circuit_logits":
        b, d, c, k = s.values()
        arguments = (normal(b, c), normal(b, d), normal(d, c), whole(d, b, k))
        plain = getattr(reference, name, op)
    elif name == "cluster_extremes":
        arguments = (whole(s["K"], s["N"]), normal(s["N"]), s["K"])
        plain = getattr(reference, name, op)
    elif name == "layer_gradient_sqnorm":
        b, r, m, n = s.values()
        arguments = (normal(b, r, n), normal(b, r, m), [0])
        plain = getattr(reference, name, op)
    elif name == "channel_affine_backward":
        b, c, p = s.values()
        arguments = (normal(b, c, p), normal(b, c, p), normal(c))
        plain = getattr(reference, name, op)
    else:
        raise ValueError(f"no arguments for {name}")
    return Call(arguments, op, plain)
