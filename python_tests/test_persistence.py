"""Files come back as they were, and anything else than a whole file of ours is refused."""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from grood_fast import persistence
from grood_fast.errors import PersistenceError

TENSORS = {
    "float32": torch.tensor([[1.5, -0.0], [math.inf, math.nan]]),
    "float64": torch.tensor([math.pi, 5e-324], dtype=torch.float64),
    "bfloat16": torch.tensor([1.0, 3e38], dtype=torch.bfloat16),
    "float16": torch.arange(3, dtype=torch.float16),
    "int64": torch.tensor([2**63 - 1, -(2**63)]),
    "bool": torch.tensor([True, False, True]),
    "uint8": torch.arange(5, dtype=torch.uint8),
    "scalar": torch.tensor(7.0),
    "empty": torch.empty(0, 4),
    "strided": torch.arange(12.0).view(3, 4).T[::2],
}
HEADER = {"a": [1, 2.5, None, True], "b": {"c": "é"}, "infinite": math.inf, "tiny": 5e-324}


def write(path: Path, version: int = 3, kind: str = "detector", **tensors: Any) -> Path:
    persistence.write(path, kind=kind, version=version, header=HEADER, tensors=tensors or TENSORS)
    return path


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return persistence.read(path, kind="detector", version=3)


def assert_refused(path: Path, message: str) -> None:
    with pytest.raises(PersistenceError, match=message) as error:
        read(path)
    assert path.name in str(error.value)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    header, tensors = read(write(tmp_path / "new" / "folder" / "file.safetensors"))
    assert header == HEADER
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert tensors[name].shape == tensor.shape
        expected = tensor.contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(tensors[name].reshape(-1).view(torch.uint8), expected), name


def test_shared_memory_and_gradients_do_not_matter(tmp_path: Path) -> None:
    x = torch.arange(6.0, requires_grad=True)
    _, tensors = read(write(tmp_path / "f", x=x, view=x[2:], again=x))
    assert torch.equal(tensors["x"], x.detach())
    assert torch.equal(tensors["view"], x[2:].detach())
    assert not tensors["again"].requires_grad


def test_the_file_is_safetensors_with_a_json_header(tmp_path: Path) -> None:
    """Read by hand: eight bytes of length, JSON, then the numbers."""
    data = write(tmp_path / "f", x=torch.arange(3.0)).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    description = json.loads(data[8 : 8 + length])
    record = json.loads(description["__metadata__"]["grood_fast"])
    assert record["kind"] == "detector"
    assert record["version"] == 3
    assert record["header"] == HEADER
    start, end = description["x"]["data_offsets"]
    assert np.frombuffer(data[8 + length :][start:end], "<f4").tolist() == [0, 1, 2]


def test_equal_contents_are_equal_files(tmp_path: Path) -> None:
    assert write(tmp_path / "a").read_bytes() == write(tmp_path / "b").read_bytes()


@pytest.mark.parametrize("mask", [0x01, 0x10, 0x80])
def test_one_flipped_bit_anywhere_is_noticed(tmp_path: Path, mask: int) -> None:
    path = tmp_path / "f"
    header, tensors = {"a": [1, 2.5, "é"]}, {"x": torch.arange(3.0), "y": torch.arange(2)}
    persistence.write(path, kind="detector", version=3, header=header, tensors=tensors)
    whole = path.read_bytes()
    for offset in range(len(whole)):
        damaged = bytearray(whole)
        damaged[offset] ^= mask
        path.write_bytes(bytes(damaged))
        with pytest.raises(PersistenceError):
            read(path)
    path.write_bytes(whole)
    assert read(path)[0] == header
    assert torch.equal(read(path)[1]["x"], tensors["x"])


def test_truncated_and_extended_files_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "f")
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert_refused(path, "damaged or not a safetensors file")
    path.write_bytes(whole + b"\0")
    assert_refused(path, "damaged or not a safetensors file")


def test_missing_files_and_folders(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere", "there is no file")
    assert_refused(tmp_path, "there is no file")


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["BOMB"],)


def test_nothing_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    path = tmp_path / "f"
    path.write_bytes(pickle.dumps(Bomb()))
    assert_refused(path, "not a safetensors file")
    torch.save({"x": torch.ones(3), "bomb": Bomb()}, path)
    assert_refused(path, "not a safetensors file")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "metadata",
    [None, {"format": "pt"}, {"grood_fast": "[]"}, {"grood_fast": "7"}, {"grood_fast": "{}"}],
)
def test_foreign_files_are_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"x": torch.ones(3)}, tmp_path / "f", metadata=metadata)
    assert_refused(tmp_path / "f", "was not written by grood-fast")


def test_a_header_that_is_no_json_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.ones(3)}, tmp_path / "f", metadata={"grood_fast": "{"})
    assert_refused(tmp_path / "f", "damaged")


def test_other_kinds_and_versions_are_refused(tmp_path: Path) -> None:
    assert_refused(write(tmp_path / "f", kind="subspace"), "holds a subspace, expected a detector")
    assert_refused(
        write(tmp_path / "f", version=4), "has format version 4, this grood-fast reads 3"
    )
    assert_refused(write(tmp_path / "f", version=2), "has format version 2")


@pytest.mark.parametrize("change", ["header", "tensor", "added", "removed", "renamed", "dtype"])
def test_whoever_edits_a_file_is_noticed(tmp_path: Path, change: str) -> None:
    """A well-formed file whose contents are not those the checksums were taken of."""
    path = write(tmp_path / "f", x=torch.arange(3.0), y=torch.zeros(2))
    with persistence.safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["grood_fast"])
        tensors = {key: file.get_tensor(key) for key in ("x", "y")}
    if change == "header":
        record["header"]["b"]["c"] = "e"
    elif change == "tensor":
        tensors["x"][1] = 1.0000001
    elif change == "added":
        tensors["z"] = torch.ones(1)
    elif change == "removed":
        del tensors["y"]
    elif change == "renamed":
        tensors["z"] = tensors.pop("y")
    else:
        tensors["y"] = tensors["y"].int()
    save_file(tensors, path, metadata={"grood_fast": json.dumps(record)})
    assert_refused(path, "checksum does not match")


def fail_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(*_: Any) -> None:
        raise OSError("cannot be moved")

    monkeypatch.setattr(os, "replace", replace)


def fail_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)


def fail_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(_tensors: Any, path: Path, **_options: Any) -> None:
        path.write_bytes(b"half a file")
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(persistence, "save_file", save)


@pytest.mark.parametrize("failure", [fail_replace, fail_sync, fail_half_way])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Any, existing: bool
) -> None:
    path = tmp_path / "f"
    if existing:
        write(path, x=torch.ones(2))
    with monkeypatch.context() as patched:
        failure(patched)
        with pytest.raises(PersistenceError, match=r"could not write .*unchanged"):
            write(path, x=torch.zeros(2))
    assert list(tmp_path.iterdir()) == ([path] if existing else [])
    if existing:
        assert torch.equal(read(path)[1]["x"], torch.ones(2))


def test_an_interruption_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "f", x=torch.ones(2))
    with monkeypatch.context() as patched:
        patched.setattr(persistence, "save_file", lambda *_, **__: (_ for _ in ()).throw(_Stop()))
        with pytest.raises(KeyboardInterrupt):
            write(path, x=torch.zeros(2))
    assert list(tmp_path.iterdir()) == [path]
    assert torch.equal(read(path)[1]["x"], torch.ones(2))


class _Stop(KeyboardInterrupt):
    pass


def test_places_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for path in (tmp_path / "file" / "f", tmp_path):
        with pytest.raises(PersistenceError, match="could not write"):
            write(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_replacing_leaves_no_temporary_files(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        write(tmp_path / "f", x=torch.tensor([value]))
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]
    assert read(tmp_path / "f")[1]["x"].item() == 2.0


def test_the_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    expected = (tmp_path / "any").stat().st_mode
    for _ in range(2):
        assert write(tmp_path / "f").stat().st_mode == expected


def test_checksums_tell_names_dtypes_shapes_and_values_apart() -> None:
    x = torch.arange(4.0)
    sums = [
        persistence.tensors_sha256(tensors)
        for tensors in (
            {"x": x},
            {"y": x},
            {"x": x.view(2, 2)},
            {"x": x.view(torch.int32)},
            {"x": x.double()},
            {"x": -x},
            {"x": x, "y": x},
            {},
        )
    ]
    assert len(set(sums)) == len(sums)
    assert {len(bytes.fromhex(text)) for text in sums} == {32}
    assert persistence.tensors_sha256({"b": x, "a": -x}) == persistence.tensors_sha256(
        {"a": -x, "b": x}
    )
    assert persistence.tensors_sha256({"x": x.repeat(2)[::2]}) == persistence.tensors_sha256(
        {"x": torch.tensor([0.0, 2, 0, 2])}
    )
