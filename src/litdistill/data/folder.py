"""Image folders with one subfolder per class: listing the files and reading their bytes."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from litdistill.data.streaming import Encoded
from litdistill.utils.errors import UserError

log = logging.getLogger(__name__)

Labeled = list[tuple[Path, int]]  # image files with their class index
TEST_SHARE = 0.2  # fraction of each class, for a folder without a test set


def train_and_test(root: Path) -> tuple[tuple[str, ...], Labeled, Labeled]:
    """Returns the class names and the files of both splits; `sources.read_folder` documents the layout. Raises `UserError`."""
    if not root.is_dir():
        raise UserError(f"There is no folder {root}. Set data.root to the folder that holds train/ or the classes.")
    train = root / "train" if (root / "train").is_dir() else root
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if test is not None and train == root:
        raise UserError(
            f"{root} has a folder {test.name} but none called train. Add it, or move the classes up to {root}."
        )
    unused = [
        name for name in ("val", "valid", "validation") if (root / name).is_dir() and root / name not in (train, test)
    ]
    if train != root and unused:
        log.warning(
            "%s is not read: validation images are a part of %s (data.val_size), and test images lie in %s.",
            *(root / unused[0], train, test or f"{root / 'test'}, or are a fifth of {train}"),
        )
    files = _by_class(train)
    classes = tuple(files)
    if test is not None:
        test_files = _by_class(test)
        if files.keys() != test_files.keys():
            raise UserError(
                f"The classes in {train} and {test} differ: only in {train.name} {_only(files, test_files)}, "
                f"only in {test.name} {_only(test_files, files)}. Make both hold the same class folders."
            )
        return classes, _flat(files), _flat(test_files)
    kept, held_out = {}, {}
    for name, paths in files.items():
        if len(paths) < 2:
            raise UserError(f"{train / name} holds one image; with no test folder a class needs two or more. Add some.")
        names = {path: os.fsencode(path.relative_to(train).as_posix()) for path in paths}
        ranked = sorted(paths, key=lambda path: hashlib.sha256(names[path]).digest())
        count = max(1, round(TEST_SHARE * len(paths)))
        held_out[name], kept[name] = sorted(ranked[:count]), sorted(ranked[count:])
    return classes, _flat(kept), _flat(held_out)


class FolderFiles:
    """The encoded files of one split, in order."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = [str(path) for path in paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, bytes]:
        try:
            return self.paths[index], Path(self.paths[index]).read_bytes()
        except OSError as error:
            raise UserError(f"The image {self.paths[index]} cannot be read: {error}") from error


def read_split(paths: Sequence[Path], size: int, channels: int) -> Tensor:
    """Decodes N image files to (N, `channels`, `size`, `size`) uint8."""
    return Encoded(FolderFiles(paths), size, channels, "").decode(range(len(paths)), progress=True)


def encoded(root: Path, files: Labeled, size: int, channels: int) -> Encoded:
    """Returns the images of one split, encoded. Their hash covers names, sizes in bytes and modification times."""
    digest = hashlib.sha256(f"{size} {channels}".encode())
    for path, _ in files:
        stat = path.stat()
        digest.update(os.fsencode(f"{path.relative_to(root).as_posix()} {stat.st_size} {stat.st_mtime_ns}\n"))
    return Encoded(FolderFiles([path for path, _ in files]), size, channels, digest.hexdigest())


def _by_class(folder: Path) -> dict[str, list[Path]]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(names) < 2:
        raise UserError(f"{folder} has {len(names)} class folders; it needs two or more, each named after its class.")
    files = {}
    for name in names:
        if name != os.fsencode(name).decode(errors="replace"):  # class names are printed, file names are not
            raise UserError(f"The name of the class folder {name!r} in {folder} is not UTF-8. Rename it.")
        files[name] = sorted(
            path
            for path in (folder / name).rglob("*")
            if path.suffix.lower() in IMG_EXTENSIONS and path.is_file() and not path.name.startswith(".")
        )
        if not files[name]:
            raise UserError(f"{folder / name} holds no image ({', '.join(IMG_EXTENSIONS)}). Add some, or remove it.")
    return files


def _flat(files: dict[str, list[Path]]) -> Labeled:
    return [(path, label) for label, paths in enumerate(files.values()) for path in paths]


def _only(one: dict[str, list[Path]], other: dict[str, list[Path]]) -> str:
    return ", ".join(sorted(one.keys() - other.keys())) or "none"
