"""Files of a published archive in memory, verified by what they hold and not by how the archive was packed.

A host may compress an archive in another way each time. The files are put into an uncompressed tar file that has the same bytes
everywhere, and its SHA-256 is the published one.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping


def unpacked(archive: bytes, wanted: Callable[[str], str | None], largest: int, count: int) -> dict[str, bytes]:
    """Returns files of an archive (a tar file, compressed or not) by name. Nothing is written to disk.

    `wanted`: the name of a file that is returned, by its path in the archive; None for the others. Raises `ValueError` for more
    than `count` of them, for one of more than `largest` bytes, and for one that is no regular file.
    """
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            name = wanted(member.name)
            if name is None:
                continue
            if not member.isreg() or member.size > largest or len(found) >= count:
                raise ValueError(f"{member.name} in the archive is not a file of a plausible size and number")
            file = tar.extractfile(member)
            assert file is not None
            found[name] = file.read()
    return found


def to_tar(files: Mapping[str, bytes], folder: str) -> bytes:
    """Returns an uncompressed tar file of these contents in a folder: the same bytes for the same contents."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in sorted(files):
            about = tarfile.TarInfo(f"{folder}/{name}")  # of time 0, and nobody's
            about.size = len(files[name])
            tar.addfile(about, io.BytesIO(files[name]))
    return made.getvalue()
