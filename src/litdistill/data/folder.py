"""Reads folders of images, one subfolder a class, into one uint8 tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from litdistill.errors import UserError

Labelled = list[tuple[Path, int]]  # images with the index of their class
TEST_SHARE = 0.2  # of each class, where the folder has no test set of its own


def train_and_test(root: Path) -> tuple[tuple[str, ...], Labelled, Labelled]:
    """Names of classes, and the files of either split; `sources.read_folder` says how a folder is laid out."""
    if not root.is_dir():
        raise UserError(f"There is no folder {root}. Set data.root to the folder that holds train/ or the classes.")
    train = root / "train" if (root / "train").is_dir() else root
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if test is not None and train == root:
        raise UserError(
            f"{root} has a folder {test.name} but none called train. Add it, or move the classes up to {root}."
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
        ranked = sorted(paths, key=lambda path: hashlib.sha256(path.relative_to(train).as_posix().encode()).digest())
        count = max(1, round(TEST_SHARE * len(paths)))
        held_out[name], kept[name] = sorted(ranked[:count]), sorted(ranked[count:])
    return classes, _flat(kept), _flat(held_out)


def read_split(paths: Sequence[Path], size: int, channels: int) -> Tensor:
    """(N, `channels`, `size`, `size`) uint8 from N image files, decoded by several threads, with a progress bar."""
    images = np.empty((len(paths), channels, size, size), np.uint8)

    def decode(index: int) -> None:
        try:
            with Image.open(paths[index]) as image:
                images[index] = _square(image.convert("RGB" if channels == 3 else "L"), size)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # PIL raises all of these
            raise UserError(
                f"The image {paths[index]} cannot be read ({error}). Replace or remove it, and start again."
            ) from error

    console = Console(stderr=True)
    pool = ThreadPoolExecutor()
    try:
        done = pool.map(decode, range(len(paths)))
        for _ in track(done, "Reading images", len(paths), console=console, disable=not console.is_terminal):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    return torch.from_numpy(images)


def _square(image: Image.Image, size: int) -> np.ndarray:
    """(C, size, size): the shorter side resized, the centre cropped, both as torchvision's Resize and CenterCrop do."""
    width, height = (size * side // min(image.size) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _by_class(folder: Path) -> dict[str, list[Path]]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(names) < 2:
        raise UserError(f"{folder} has {len(names)} class folders; it needs two or more, each named after its class.")
    files = {}
    for name in names:
        files[name] = sorted(
            path
            for path in (folder / name).rglob("*")
            if path.suffix.lower() in IMG_EXTENSIONS and path.is_file() and not path.name.startswith(".")
        )
        if not files[name]:
            raise UserError(f"{folder / name} holds no image ({', '.join(IMG_EXTENSIONS)}). Add some, or remove it.")
    return files


def _flat(files: dict[str, list[Path]]) -> Labelled:
    return [(path, label) for label, paths in enumerate(files.values()) for path in paths]


def _only(one: dict[str, list[Path]], other: dict[str, list[Path]]) -> str:
    return ", ".join(sorted(one.keys() - other.keys())) or "none"
