"""Data sources: scikit-learn's digits, the published data sets, or a user's folder or shards of images.

`load` returns a whole data set as uint8 tensors, with a fixed train/test split that depends on no seed.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import FashionMNIST

from litdistill.data import shards
from litdistill.data.fetch import IMAGES, obtain
from litdistill.data.folder import FolderFiles, Labeled, encoded, read_splits
from litdistill.data.labels import read_labeled
from litdistill.data.listing import ImageFile
from litdistill.data.streaming import Encoded, reading_bar
from litdistill.data.unlabelled import appended, read_unlabelled
from litdistill.utils.errors import UserError

STREAMED = ("folder", "shards")  # sources that may be larger than memory
NAMES = ("digits", *IMAGES, *STREAMED)
TEST_PER_DIGIT = 50

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""
CIFAR100 = tuple(_CIFAR100.split())
DIGITS = tuple("0123456789")


class Split(NamedTuple):
    """N labelled images."""

    images: Tensor | Encoded  # (N, C, H, W) uint8
    targets: Tensor  # (N,) int64; (N, outputs) float32 for labels of 0 and 1, or numbers


class Source(NamedTuple):
    """A data set: both splits and the class names."""

    train: Split
    test: Split
    classes: tuple[str, ...]  # names of classes, in order of index; of labels, or of values
    validation: int = 0  # how many of the last labelled training images the user set aside to validate on; 0: none
    unlabelled: int = 0  # how many of the last training images have no label: their targets are -1, or NaN
    names: Mapping[str, tuple[str, ...]] = {}  # of the image files, by "train" and "test"; empty where there are none
    task: str = "classification"  # or multilabel, or regression


def load(
    name: str,
    root: str | Path | None,
    image_size: int | None = None,
    download: bool = True,
    channels: int = 3,
    memory: float = math.inf,
    unlabelled: str | Path | None = None,
    scaled: bool = False,
    table: tuple[str | Path, Sequence[str] | None, str | None] | None = None,
) -> Source:
    """Returns the data set `name` (one of `NAMES`), whose verified files are in, or are downloaded to, `root/name`.

    For `folder` and `shards`, `root` is the data set's own path, images are resized to `image_size` (pixels) and converted
    to `channels`, and if they take more than `memory` bytes they are decoded on access (`streaming.Encoded`). Every other
    data set has a fixed image size, and is read into memory. The images of the folder `unlabelled`, of the same size, are the
    last of the training split. `scaled`: the JPEGs of the training split are decoded at a fraction of their size (`decode`).
    `table`: the file of the labels of a folder, its columns and the task (`labels.read_labeled`).
    Raises `UserError` for an unknown name, unavailable files, or a damaged image.
    """
    if name in STREAMED:
        if root is None:
            alone = ": images with labels are validated and tested on; data.labelled=false trains on the others alone"
            raise UserError(f"data={name} needs a folder: data.root=<folder>{alone if unlabelled else ''}.")
        if image_size is None:
            raise UserError(
                f"data={name} needs a size that all images are resized to: set data.image_size, for example 64."
            )
        options = (root, image_size, channels, memory, unlabelled, scaled)
        return read_folder(*options, table) if name == "folder" else read_shards(*options)
    if name not in NAMES:
        raise UserError(f"data.name={name} is unknown. Choose one of {', '.join(NAMES)}.")
    source = _digits() if name == "digits" else _READERS[name](obtain(name, root or "data_files", download).content)
    size = source.train.images.shape[-1]
    if image_size not in (None, size):
        raise UserError(
            f"data={name} has images of {size}x{size} and data.image_size={image_size} cannot change that. "
            "Leave data.image_size out; only data=folder and data=shards read it."
        )
    return _with_unlabelled(source, unlabelled)


def fingerprint(split: Split) -> str:
    """Returns the SHA-256 in hexadecimal over shape, dtype and bytes of images and targets, independent of the device."""
    sha = hashlib.sha256()
    for tensor in split:
        if isinstance(tensor, Encoded):
            sha.update(tensor.sha256.encode())
            continue
        array = tensor.detach().cpu().contiguous().numpy()
        sha.update(f"{array.dtype.str} {array.shape};".encode())
        sha.update(array.data)
    return sha.hexdigest()


def read_folder(
    root: str | Path,
    image_size: int,
    channels: int = 3,
    memory: float = math.inf,
    unlabelled: str | Path | None = None,
    scaled: bool = False,
    table: tuple[str | Path, Sequence[str] | None, str | None] | None = None,
) -> Source:
    """Reads a user's images: `root/train/<class>/…`, `root/test/<class>/…` and, where there is one, `root/val/<class>/…`.

    Splits are known in any case and as "training_set", "valid" and the like (`layout.find_splits`). Without a test folder, 20 %
    of each class of `train`, or of `root/<class>/…`, are the test set: those whose relative names have the lowest SHA-256, so
    that a file added later moves at most one other. The images of `val` are the last of the training split. The shorter side is
    resized to `image_size` pixels and the image center-cropped; `channels`: 3 for RGB, 1 for gray. Files are sorted by name.
    `table`: their labels stand in a file (`labels.read_labeled`), and folders are of no account.
    Raises `UserError` for a missing folder, classes that differ between splits, or an image that cannot be read.
    """
    _check_shape(image_size, channels)
    root = Path(root)
    images = read_splits(root) if table is None else read_labeled(root, *table)

    def split(files: Labeled) -> Split:
        return Split(encoded(root, files, image_size, channels), torch.tensor([label for _, label in files]))

    files = {"train": images.train + images.val, "test": images.test}
    names = {name: tuple(file.path.relative_to(root).as_posix() for file, _ in of) for name, of in files.items()}
    both = (split(files["train"]), split(files["test"]))
    source = Source(*both, images.classes, len(images.val), names=names, task=images.task)
    known = [file for file, _ in images.train + images.val + images.test]
    return _in_memory(_with_unlabelled(_scaled(source, scaled), unlabelled, known), memory)


def read_shards(
    root: str | Path,
    image_size: int,
    channels: int = 3,
    memory: float = math.inf,
    unlabelled: str | Path | None = None,
    scaled: bool = False,
) -> Source:
    """Reads shards that `litdistill.data.shards` wrote; arguments as of `read_folder`."""
    _check_shape(image_size, channels)
    facts = shards.read_facts(root)
    train, test = (
        Split(shards.encoded(root, name, facts.names[name], image_size, channels), torch.tensor(facts.labels[name]))
        for name in ("train", "test")
    )
    names = {name: tuple(of) for name, of in facts.names.items()}
    source = Source(train, test, facts.classes, facts.validation, names=names)
    return _in_memory(_with_unlabelled(_scaled(source, scaled), unlabelled), memory)


def _scaled(source: Source, scaled: bool) -> Source:
    """Returns a source whose training files are decoded at a fraction of their size; those of the test never are."""
    images = source.train.images
    if not scaled or isinstance(images, Tensor):
        return source
    images = Encoded(images.files, images.size, images.channels, images.sha256, scaled=True)
    return source._replace(train=Split(images, source.train.targets))


def _with_unlabelled(source: Source, folder: str | Path | None, known: Sequence[ImageFile] = ()) -> Source:
    """Appends the images of a folder to the training split; `known`: labelled images, whose copies are left out."""
    if folder is None:
        return source
    images, targets = source.train
    more = read_unlabelled(folder, known, images.shape[-1], images.shape[1])
    none = targets.new_full((len(more), *targets.shape[1:]), -1 if targets.ndim == 1 else math.nan)
    train = Split(appended(images, more), torch.cat([targets, none]))
    names = dict(source.names)
    if names and isinstance(more.files, FolderFiles):
        names["train"] += tuple(Path(path).relative_to(folder).as_posix() for path in more.files.paths)
    return source._replace(train=train, unlabelled=len(more), names=names)


def _check_shape(image_size: int, channels: int) -> None:
    if channels not in (1, 3) or image_size < 1:
        raise UserError(f"data.image_size={image_size} must be at least 1, and channels={channels} either 1 or 3.")


def _in_memory(source: Source, memory: float) -> Source:
    """Decodes the source's images if they take at most `memory` bytes, else returns it unchanged."""
    if sum(split.images.shape.numel() for split in source[:2]) > memory:
        return source
    files = [split.images for split in source[:2] if isinstance(split.images, Encoded)]
    count = sum(len(images) for images in files if images.sha256 not in _DECODED)
    with reading_bar(count) if count else contextlib.nullcontext(lambda: None) as advance:
        train, test = (Split(_decoded(split.images, advance), split.targets) for split in source[:2])
    return source._replace(train=train, test=test)


# Decoded images in use, by their hash: a teacher that is trained for a run sees the images of its student.
_DECODED: WeakValueDictionary[str, Tensor] = WeakValueDictionary()


def _decoded(images: Tensor | Encoded, advance: Callable[[], object]) -> Tensor:
    if isinstance(images, Tensor):
        return images
    found = _DECODED.get(images.sha256)
    if found is None:
        found = _DECODED[images.sha256] = images.decode(range(len(images)), advance)
    return found


def _digits() -> Source:
    """scikit-learn's 1,797 handwritten digits, 8x8, gray values 0..16 scaled to 0..255.

    500 of them are the test set: of the n images of each class, in the set's order, those at ⌊(i + ½) n / 50⌋, i = 0..49.
    They are spread evenly, since consecutive images are by the same few writers.
    """
    from sklearn.datasets import load_digits  # which takes half a second to import

    bundled = load_digits()
    images = torch.from_numpy(np.rint(bundled.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    targets = torch.from_numpy(bundled.target.astype(np.int64))
    is_test = torch.zeros(len(targets), dtype=torch.bool)
    for digit in range(10):
        members = (targets == digit).nonzero().flatten()
        numbers = (2 * torch.arange(TEST_PER_DIGIT) + 1) * len(members) // (2 * TEST_PER_DIGIT)
        is_test[members[numbers]] = True
    return Source(Split(images[~is_test], targets[~is_test]), Split(images[is_test], targets[is_test]), DIGITS)


def read_idx(data: bytes) -> np.ndarray:
    """Parses an IDX file of unsigned bytes (two zeros, type 8, rank, big-endian sizes, values). Raises `ValueError`."""
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError("not an IDX file of unsigned bytes")
    shape = tuple(np.frombuffer(data, ">u4", data[3], 4).tolist())
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def _split(images: np.ndarray, labels: np.ndarray) -> Split:
    return Split(torch.from_numpy(np.require(images, requirements="W")), torch.from_numpy(labels.astype(np.int64)))


def _idx_source(files: Mapping[str, bytes], classes: tuple[str, ...]) -> Source:
    def split(prefix: str) -> Split:
        images, labels = (read_idx(files[f"{prefix}-{kind}"]) for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
        return _split(images[:, None], labels)

    return Source(split("train"), split("t10k"), classes)


def _records_source(files: Mapping[str, bytes], classes: tuple[str, ...], label_bytes: int) -> Source:
    """CIFAR's binary version: records of one label (CIFAR-10) or a coarse and a fine one, then 3 planes of 32x32."""

    def split(names: list[str]) -> Split:
        records = [np.frombuffer(files[name], np.uint8).reshape(-1, label_bytes + 3072) for name in names]
        images = np.concatenate([r[:, label_bytes:] for r in records])  # the only copy of the pixels
        return _split(images.reshape(-1, 3, 32, 32), np.concatenate([r[:, label_bytes - 1] for r in records]))

    test = [name for name in files if name.startswith("test")]
    return Source(split(sorted(files.keys() - test)), split(test), classes)


_READERS = {
    "mnist": lambda files: _idx_source(files, DIGITS),
    "fashion_mnist": lambda files: _idx_source(files, tuple(FashionMNIST.classes)),
    "cifar10": lambda files: _records_source(files, CIFAR10, 1),
    "cifar100": lambda files: _records_source(files, CIFAR100, 2),
}
