"""One file for what was fitted: safetensors, with a versioned JSON header and a checksum.

Nothing in such a file is ever executed: it holds numbers and JSON. It is written beside its final
place and moved there when it is complete, so a crash or a full disk leaves the older file.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from grood_fast.errors import PersistenceError

_KEY = "grood_fast"  # of the header in safetensors' metadata


@contextmanager
def atomic_write(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``target`` that takes its place when the block ends without error.

    Readers never see half a file, and of two processes that write at once the last one wins.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as folder:
        temporary = Path(folder) / target.name
        yield temporary
        with temporary.open("r+b") as file:  # a full disk may only show here
            os.fsync(file.fileno())
        temporary.replace(target)


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write(
    path: str | os.PathLike[str],
    *,
    kind: str,
    version: int,
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Write tensors and a JSON header as one file.

    Args:
        path: where to; an existing file is replaced once the new one is complete.
        kind: what the file holds, checked by :func:`read`.
        version: of the header's layout, checked by :func:`read`.
        header: JSON-serialisable; NaN and infinities are kept.
        tensors: of any dtype and device; stored as they are, on the CPU.

    Raises:
        PersistenceError: the file cannot be written; an older one at the same place is untouched.
    """
    # A copy each: safetensors refuses tensors that share memory.
    stored = {
        n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()
    }
    record = {
        "kind": kind,
        "version": version,
        "header": dict(header),
        "tensors_sha256": tensors_sha256(stored),
    }
    record["header_sha256"] = _header_sha256(record)
    try:
        with atomic_write(path) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode  # as the user's umask says; safetensors' own is private
            save_file(stored, temporary, metadata={_KEY: json.dumps(record, sort_keys=True)})
            temporary.chmod(mode)
    except (OSError, SafetensorError) as error:
        raise PersistenceError(
            f"could not write {os.fspath(path)} ({error}): check the folder, its permissions and "
            "the free space. A file that was there before is unchanged."
        ) from error


def read(
    path: str | os.PathLike[str], *, kind: str, version: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors (on the CPU) of a file that :func:`write` has made.

    Raises:
        PersistenceError: there is no such file, or it is not one of ours, damaged, of another kind,
            or written by a newer version.
    """
    name = os.fspath(path)
    if not Path(path).is_file():
        raise PersistenceError(f"there is no file {name}.")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        record = None if text is None else json.loads(text)
    except (SafetensorError, OSError, ValueError) as error:
        raise PersistenceError(
            f"{name} is damaged or not a safetensors file ({error}): save it again, or get another "
            "copy."
        ) from error
    if not isinstance(record, dict) or not {"kind", "version", "header"} <= record.keys():
        raise PersistenceError(f"{name} was not written by grood-fast: it lacks our header.")
    if record["kind"] != kind:
        raise PersistenceError(f"{name} holds a {record['kind']}, expected a {kind}.")
    if record["version"] != version:
        raise PersistenceError(
            f"{name} has format version {record['version']}, this grood-fast reads {version}: "
            "use the version that wrote it, or fit and save again."
        )
    if record.pop("header_sha256", None) != _header_sha256(record) or record.get(
        "tensors_sha256"
    ) != tensors_sha256(tensors):
        raise PersistenceError(
            f"{name} is damaged: its checksum does not match. Save it again, or get another copy."
        )
    return record["header"], tensors


def _header_sha256(record: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in record.items() if k != "header_sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
