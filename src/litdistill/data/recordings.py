"""The files of the Free Spoken Digit Dataset: its archive from GitHub, and copies of it on this machine.

The content is verified, not the archive (`archives`, `fetch.DATASETS`).
"""

from __future__ import annotations

import logging
import lzma
import re
from collections.abc import Mapping
from pathlib import Path

from litdistill.data import archives
from litdistill.data.download import FAILURES, digest, download

log = logging.getLogger(__name__)

COMMIT = "26eb9aaf76e81b692f806f9140c2d2777410d7a1"
URL = f"https://codeload.github.com/Jakobovski/free-spoken-digit-dataset/tar.gz/{COMMIT}"
SHA256 = "9cbd40a399fee10d4611dc8ffe6de219695fd804a62dfb43373f183715b43877"  # of `to_tar` of the 3,000 recordings
NAME = re.compile(r"([0-9])_([a-z]+)_([0-9]{1,2})\.wav")
PATH = re.compile(rf"(?:.*/)?recordings/({NAME.pattern})")
LARGEST = 2**20  # bytes of a recording; the longest is 2.3 s
COUNT = 3000


def github(folder: Path) -> dict[str, bytes]:
    """Downloads the archive of the pinned commit; see `fetch.Downloader`."""
    return {"recordings.tar": to_tar(unpacked(download(URL)))}


def unpacked(archive: bytes) -> dict[str, bytes]:
    """Returns the recordings of an archive (a tar file, compressed or not) by name. Nothing is written to disk.

    Raises `ValueError` where there are none, or more or larger ones than the set has.
    """
    found = archives.unpacked(archive, lambda path: m[1] if (m := PATH.fullmatch(path)) else None, LARGEST, COUNT)
    if not found:
        raise ValueError("the archive holds no recordings/<digit>_<speaker>_<number>.wav")
    return found


def to_tar(files: Mapping[str, bytes]) -> bytes:
    """Returns these recordings as a tar file that has the same bytes everywhere."""
    return archives.to_tar(files, "recordings")


def from_tar(archive: bytes) -> dict[str, bytes]:
    """Returns the contents of a verified `to_tar` by name."""
    return unpacked(archive)


def local_copy(root: Path) -> dict[str, bytes] | None:
    """Returns the recordings of a copy in `root`, unless they are altered or incomplete, which is logged; None without one.

    A copy is the repository's folder `recordings` (or that folder itself), or an archive of it (.tar.gz, .tar.xz).
    """
    for place in (
        root / "recordings",
        root if root.name == "recordings" else root / "free-spoken-digit-dataset/recordings",
    ):
        if files := {p.name: p for p in place.glob("*.wav") if NAME.fullmatch(p.name)}:
            found = {name: path.read_bytes() for name, path in files.items()}
            if _are_published(found, place):
                return found
    archives = [root] if root.is_file() else sorted(p for p in root.glob("*.tar*") if "digit" in p.name)
    for archive in archives:
        try:
            found = unpacked(archive.read_bytes())
        except (*FAILURES, lzma.LZMAError) as error:
            log.warning("%s cannot be read as an archive of the spoken digits (%s).", archive, error)
            continue
        if _are_published(found, archive):
            return found
    return None


def _are_published(files: Mapping[str, bytes], place: Path) -> bool:
    if digest(to_tar(files)) == SHA256:
        return True
    log.warning(
        "%s holds %d recordings, which are not the %d of the published set (altered, incomplete or of another version): they "
        "are not used.",
        *(place, len(files), COUNT),
    )
    return False
