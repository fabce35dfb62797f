"""64-bit hashes on tensors: of sample indices, and of the samples themselves."""

from __future__ import annotations

import torch
from torch import Tensor

FINGERPRINT_VALUES = 512
"""Of samples with more numbers than this, so many or fewer, evenly spaced, are hashed."""


def hash_indices(indices: Tensor, seed: int = 0) -> Tensor:
    """64-bit hash of (index, seed).

    A bijection for a given seed, so different indices never tie.

    Args:
        indices: (B,) int64.
        seed: any integer.

    Returns:
        (B,) int64, to be compared as signed numbers.
    """
    return _mix(indices + _signed(_GOLDEN * (seed + 1)))


def hash_rows(rows: Tensor) -> Tensor:
    """64-bit hash of each sample's values: equal samples have equal hashes, whatever their batch.

    Args:
        rows: (B, ...) of any dtype and device. As float64 numbers, so that float32 and bfloat16
            hold the same value alike.

    Returns:
        (B,) int64, on the CPU.
    """
    flat = rows.detach().reshape(len(rows), rows[:1].numel() if len(rows) else 1)
    flat = flat[:, :: max(1, -(-flat.shape[1] // FINGERPRINT_VALUES))]
    bits = flat.to("cpu", torch.float64).contiguous().view(torch.int64)
    positions = torch.arange(1, bits.shape[1] + 1)
    return _mix(_mix(bits + positions * _signed(_GOLDEN)).sum(dim=1))


_GOLDEN = 0x9E3779B97F4A7C15


def _mix(state: Tensor) -> Tensor:
    """SplitMix64's output function (Steele, Lea and Flood 2014), on int64."""
    state = (state ^ _shift_right(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shift_right(state, 27)) * _signed(0x94D049BB133111EB)
    return state ^ _shift_right(state, 31)


def _signed(value: int) -> int:
    """The 64 low bits of a number, read as a signed integer."""
    return (value + 2**63) % 2**64 - 2**63


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own copies the sign bit of int64."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
