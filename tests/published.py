"""Tiny data sets in the formats of the published ones, and how a test has them published."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import torch

from litdistill.data import fetch

RNG = np.random.default_rng(0)
IMAGES = {"train": RNG.integers(0, 256, (6, 5, 4), np.uint8), "t10k": RNG.integers(0, 256, (3, 5, 4), np.uint8)}
LABELS = {"train": np.array([3, 1, 4, 1, 5, 9], np.uint8), "t10k": np.array([2, 6, 5], np.uint8)}


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


TINY = {f"{s}-images-idx3-ubyte": idx(IMAGES[s]) for s in IMAGES} | {
    f"{s}-labels-idx1-ubyte": idx(LABELS[s]) for s in LABELS
}


def digests(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def publish(monkeypatch, name, files, **downloaders):
    """Makes `files` the published ones of data set `name`."""
    monkeypatch.setitem(
        fetch.DATASETS, name, fetch.DATASETS[name]._replace(digests=digests(files), downloaders=downloaders)
    )


def put(folder: Path, files: dict[str, bytes], zipped=False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(data) if zipped else data)


def check_tiny(source):
    for split, key in ((source.train, "train"), (source.test, "t10k")):
        assert split.images.dtype == torch.uint8
        assert split.targets.dtype == torch.int64
        assert split.images.tolist() == IMAGES[key][:, None].tolist()
        assert split.targets.tolist() == LABELS[key].tolist()


def cifar_record(labels, image):
    """Label bytes, then red, green and blue, pixel by pixel, of an (H, W, RGB) image."""
    return bytes(labels) + bytes(image[y][x][c] for c in range(3) for y in range(32) for x in range(32))
