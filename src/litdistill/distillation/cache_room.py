"""Room for the caches of teachers' outputs in a folder, where the least recently used make way."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from pathlib import Path

from filelock import FileLock

log = logging.getLogger(__name__)


def prepare(folder: Path, needed: int, limit: int) -> None:
    """Creates the folder of a cache and makes room for it, or updates its time of use; one process at a time.

    On an `OSError` nothing is raised: `TeacherCache` then stores rows in memory and logs a warning.
    """
    with contextlib.suppress(OSError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / ".room.lock"):
            make_room(folder, needed, limit)
            folder.mkdir(exist_ok=True)
            os.utime(folder)


def allocated(file: Path) -> int:
    """Returns the bytes that a file takes on the disk, which are fewer than its size where it has holes."""
    found = file.stat()
    return min(found.st_size, 512 * found.st_blocks) if hasattr(found, "st_blocks") else found.st_size


def make_room(folder: Path, needed: int, limit: int) -> None:
    """Removes the least recently used caches beside `folder` until all fit in `limit` bytes, with `needed` for `folder`.

    `folder` itself is never removed. Processes that have a removed cache open can go on: a mapped file exists until unmapped.
    """
    caches = sorted((p for p in folder.parent.glob("*") if any(p.glob("*.rows"))), key=lambda p: p.stat().st_mtime)
    sizes = {p: sum(allocated(f) for f in p.iterdir()) for p in caches}
    total = sum(sizes.values()) + max(0, needed - sizes.pop(folder, 0))
    for cache, size in sizes.items():
        if total <= limit:
            return
        log.info("Removing %s to make room.", cache)
        shutil.rmtree(cache, ignore_errors=True)
        total -= size
