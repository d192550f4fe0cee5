"""Copies: image files of the same bytes, found without reading more than it takes to tell files of one size apart."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor

from litdistill.data.listing import ImageFile

SAMPLE = (
    16 * 2**10
)  # bytes in the middle of a file: two pictures of one size differ there, whose heads and borders may not


def copies(files: Iterable[ImageFile]) -> list[list[ImageFile]]:
    """Returns the groups of two or more files with the same bytes, in the order of `files`.

    Files of equal size are compared by a sample of their bytes, and those whose samples are equal by all of them (SHA-256).
    Files that cannot be read count as no copies: who decodes them reports them.
    """
    groups = _grouped((file, file.size) for file in files)
    with ThreadPoolExecutor() as pool:
        for key in (_sample, _digest):
            groups = [part for group in groups for part in _grouped(zip(group, pool.map(key, group), strict=True))]
    return groups


def _grouped(keyed: Iterable[tuple[ImageFile, Hashable]]) -> list[list[ImageFile]]:
    found: dict[Hashable, list[ImageFile]] = defaultdict(list)
    for file, key in keyed:
        if key is not None:
            found[key].append(file)
    return [group for group in found.values() if len(group) > 1]


def _sample(file: ImageFile) -> bytes | None:
    try:
        with file.path.open("rb") as opened:
            opened.seek(max(0, (file.size - SAMPLE) // 2))
            return hashlib.sha256(opened.read(SAMPLE)).digest()
    except OSError:
        return None


def _digest(file: ImageFile) -> bytes | None:
    try:
        with file.path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").digest()
    except OSError:
        return None
