"""BCCD: 364 pictures of blood cells with 4,888 boxes of three classes.

    python scripts/train.py data=bccd task=detection net@student=fcos_slim net@teacher=fcos_slim

The official split: 205 to train on, 87 to validate, 72 to test. Many red cells carry no box, so that mAP has a ceiling.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from litdistill.data.archives import BLOOD_CELLS
from litdistill.data.fetch import archived
from litdistill.data.tensors import TensorData, TensorSource
from litdistill.tasks.detection.annotated import check_size
from litdistill.tasks.detection.voc import Tree, source_of


def bccd(
    root: str | Path = "data_files", size: Sequence[int] = (96, 128), download: bool = True, **options: Any
) -> TensorData:
    """Returns pictures of blood cells: platelets, red and white cells.

    Shenggan, BCCD Dataset, github.com/Shenggan/BCCD_Dataset (MIT), at the pinned commit.

    Args:
        root: the folder of its files, or a copy of the repository or of its archive (`archives.local_copy`).
        size: (height, width) in pixels; the pictures have 480 x 640. download: fetch files that are missing.
        options: those of `TensorData`.
    """
    read = functools.partial(_read, root, check_size(size), download)
    return TensorData(read, "bccd", "detection", standardize=True, **options)


def _read(root: str | Path, size: tuple[int, int], download: bool) -> TensorSource:
    files = archived("bccd", BLOOD_CELLS, root, download)
    by_folder: dict[str, dict[str, bytes]] = {}
    for path, content in files.items():
        folder, stem = path.partition("/")[0], PurePosixPath(path).stem
        by_folder.setdefault(folder, {})[stem] = content
    lists = {name: text.decode() for name, text in by_folder["ImageSets"].items()}
    tree = Tree(by_folder["Annotations"], by_folder["JPEGImages"], lists)
    return source_of("BCCD", tree, {}, [], None, size)
