"""Hashes against SplitMix64 on Python's integers, and the equalities they promise."""

from __future__ import annotations

import pytest
import torch

from grood_fast.batches import parse_batch
from grood_fast.hashing import FINGERPRINT_VALUES, hash_indices, hash_rows

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(state: int) -> int:
    """The published generator's output function, on unsigned integers of any length."""
    state &= MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def test_splitmix_reference_gives_its_published_first_outputs() -> None:
    """Seed 1234567, as printed with the reference implementation."""
    outputs = [splitmix64(1234567 + GOLDEN * n) for n in (1, 2, 3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("seed", [0, 1, 12345, -1, 2**70])
def test_indices_are_hashed_by_splitmix64(seed: int) -> None:
    indices = [0, 1, 2, 255, 10**6, 2**40, 2**63 - 1, -1, -(2**63)]
    expected = [signed(splitmix64(index + GOLDEN * (seed + 1))) for index in indices]
    assert hash_indices(torch.tensor(indices), seed).tolist() == expected


def test_indices_never_tie_and_spread() -> None:
    hashes = hash_indices(torch.arange(100_000))
    assert len(hashes.unique()) == 100_000
    assert not torch.equal(hashes, hash_indices(torch.arange(100_000), seed=1))
    counts = torch.bincount((hashes >> 60) + 8, minlength=16)
    assert (counts - 6250).abs().max() < 5 * 6250**0.5
    assert hash_indices(torch.arange(0)).shape == (0,)


def rows(count: int = 50, width: int = 12) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0))


def test_equal_samples_have_equal_hashes_whatever_holds_them() -> None:
    x = rows().bfloat16().float()
    whole = hash_rows(x)
    assert whole.dtype == torch.int64
    assert whole.shape == (50,)
    assert torch.equal(torch.cat([hash_rows(part) for part in x.split(7)]), whole)
    assert torch.equal(hash_rows(x.flip(0)), whole.flip(0))
    for same in (x.bfloat16(), x.double(), x.T.contiguous().T, x.view(50, 3, 4), x.clone()):
        assert torch.equal(hash_rows(same), whole)
    assert torch.equal(hash_rows(x.requires_grad_()), whole)


def test_different_samples_have_different_hashes() -> None:
    x = rows()
    whole = hash_rows(x)
    assert len(whole.unique()) == 50
    for column in range(12):
        changed = x.clone()
        changed[:, column] = torch.nextafter(x[:, column], torch.tensor(torch.inf))
        assert not (hash_rows(changed) == whole).any()
    assert not (hash_rows(x.roll(1, dims=1)) == whole).any()
    assert not (hash_rows(x[:, :11]) == whole).any()
    assert len(hash_rows(torch.arange(10_000)[:, None]).unique()) == 10_000
    assert len(hash_rows(torch.tensor([[0.0], [torch.nan], [torch.inf], [-1.0]])).unique()) == 4


def test_hashes_are_spread_evenly() -> None:
    hashes = hash_rows(torch.arange(64_000).view(-1, 2))
    counts = torch.bincount((hashes >> 60) + 8, minlength=16)
    assert (counts - 2000).abs().max() < 5 * 2000**0.5


def test_of_large_samples_evenly_spaced_values_count() -> None:
    width = 10 * FINGERPRINT_VALUES
    x = torch.zeros(2, width)
    before = hash_rows(x)
    x[0, 1], x[1, width - 10] = 1, 1
    after = hash_rows(x)
    assert after[0] == before[0]
    assert after[1] != before[1]


@pytest.mark.parametrize("shape", [(0, 4), (0,), (0, 3, 2), (5, 0)])
def test_nothing_to_hash(shape: tuple[int, ...]) -> None:
    assert hash_rows(torch.zeros(shape)).shape == (shape[0],)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.float16])
def test_any_dtype(dtype: torch.dtype) -> None:
    x = torch.tensor([[1, 0], [0, 1]]).to(dtype)
    assert torch.equal(hash_rows(x), hash_rows(x.float()))
    assert hash_rows(x[:, 0]).shape == (2,)


def test_fingerprints_of_batches_tell_inputs_apart_and_nothing_else() -> None:
    x, mask = rows(), torch.ones(50, 3)
    whole = parse_batch((x, torch.zeros(50).long())).fingerprints()
    assert whole.shape == (50,)
    assert len(whole.unique()) == 50
    for same in (x, (x, torch.arange(50)), {"data": x, "label": torch.arange(50)}, {"x": x}):
        assert torch.equal(parse_batch(same).fingerprints(), whole)
    parts = [parse_batch(part).fingerprints() for part in x.split(7)]
    assert torch.equal(torch.cat(parts), whole)
    both = {"x": x, "mask": mask, "position": torch.arange(3), "interpolate": True}
    marked = parse_batch(both).fingerprints()
    assert not (marked == whole).any()
    assert torch.equal(parse_batch({**both, "interpolate": False}).fingerprints(), marked)
    mask[4, 1] = 0
    changed = parse_batch(both).fingerprints() != marked
    assert changed.nonzero().tolist() == [[4]]
    assert parse_batch(x[:0]).fingerprints().shape == (0,)
