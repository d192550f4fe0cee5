"""The files of BCCD, pictures of blood cells with boxes: its archive from GitHub, and copies of it on this machine.

Shenggan, BCCD Dataset (MIT): 364 JPEGs of 640x480 with an XML file each, and the official lists of train, val and test.
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

COMMIT = "d272fb14cdff6e473fafeeeba32aba5f560e9e43"
URL = f"https://codeload.github.com/Shenggan/BCCD_Dataset/tar.gz/{COMMIT}"
SHA256 = "85cf9aadb2d45c227c61fc20b5bbef18865f46c577dd8189894cbc0f7d0d9c3f"  # of `to_tar` of its files
FILE = re.compile(
    r"(?:.*/)?BCCD/(Annotations/\w+\.xml|JPEGImages/\w+\.jpg|ImageSets/Main/(?:train|val|trainval|test)\.txt)"
)
LARGEST = 2**20  # bytes of a file
COUNT = 2 * 364 + 4


def github(folder: Path) -> dict[str, bytes]:
    """Downloads the archive of the pinned commit; see `fetch.Downloader`."""
    return {"bccd.tar": to_tar(unpacked(download(URL)))}


def unpacked(archive: bytes) -> dict[str, bytes]:
    """Returns the files of an archive by their path below `BCCD`. Raises `ValueError` where there are none."""
    found = archives.unpacked(archive, lambda path: m[1] if (m := FILE.fullmatch(path)) else None, LARGEST, COUNT)
    if not found:
        raise ValueError("the archive holds no BCCD/Annotations, JPEGImages and ImageSets/Main")
    return found


def to_tar(files: Mapping[str, bytes]) -> bytes:
    """Returns these files as a tar file that has the same bytes everywhere."""
    return archives.to_tar(files, "BCCD")


def local_copy(root: Path) -> dict[str, bytes] | None:
    """Returns the files of a copy in `root`, unless they are altered or incomplete, which is logged; None without one.

    A copy is the repository (its folder `BCCD`, or the folder above), or an archive of it (.tar.gz, .tar.xz).
    """
    for place in (root, root / "BCCD", root / "BCCD_Dataset/BCCD"):
        if (place / "Annotations").is_dir():
            paths = (p for p in place.glob("*/**/*") if p.is_file() and p.stat().st_size <= LARGEST)
            known = {f"BCCD/{p.relative_to(place).as_posix()}": p for p in paths}
            found = {m[1]: path.read_bytes() for name, path in known.items() if (m := FILE.fullmatch(name))}
            if _are_published(found, place):
                return found
    for archive in [root] if root.is_file() else sorted(p for p in root.glob("*.tar*") if "bccd" in p.name.lower()):
        try:
            found = unpacked(archive.read_bytes())
        except (*FAILURES, lzma.LZMAError) as error:
            log.warning("%s cannot be read as an archive of BCCD (%s).", archive, error)
            continue
        if _are_published(found, archive):
            return found
    return None


def _are_published(files: Mapping[str, bytes], place: Path) -> bool:
    if digest(to_tar(files)) == SHA256:
        return True
    log.warning(
        "%s holds %d files of BCCD, which are not the %d of the published set (altered, incomplete or of another version): "
        "they are not used. data=voc reads any such folder.",
        *(place, len(files), COUNT),
    )
    return False
