"""The files of the Free Spoken Digit Dataset: its archive from GitHub, and copies of it on this machine.

The content is verified, not the archive, which may be compressed in another way each time: the recordings are put into an
uncompressed tar file that has the same bytes everywhere, and its SHA-256 is the published one (`fetch.DATASETS`).
"""

from __future__ import annotations

import io
import logging
import lzma
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path

from litdistill.data.download import FAILURES, digest, download

log = logging.getLogger(__name__)

COMMIT = "26eb9aaf76e81b692f806f9140c2d2777410d7a1"
URL = f"https://codeload.github.com/Jakobovski/free-spoken-digit-dataset/tar.gz/{COMMIT}"
SHA256 = "9cbd40a399fee10d4611dc8ffe6de219695fd804a62dfb43373f183715b43877"  # of `to_tar` of the 3,000 recordings
NAME = re.compile(r"([0-9])_([a-z]+)_([0-9]{1,2})\.wav")
LARGEST = 2**20  # bytes of a recording; the longest is 2.3 s
COUNT = 3000


def github(folder: Path) -> dict[str, bytes]:
    """Downloads the archive of the pinned commit; see `fetch.Downloader`."""
    return {"recordings.tar": to_tar(unpacked(download(URL)))}


def unpacked(archive: bytes) -> dict[str, bytes]:
    """Returns the recordings of an archive (a tar file, compressed or not) by name. Nothing is written to disk.

    Raises `ValueError` where there are none, or more or larger ones than the set has.
    """
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            *_, folder, name = ("", *member.name.split("/"))
            if folder != "recordings" or not NAME.fullmatch(name):
                continue
            if not member.isreg() or member.size > LARGEST or len(found) >= COUNT:
                raise ValueError(f"{member.name} in the archive is not a recording of a plausible size")
            file = tar.extractfile(member)
            assert file is not None
            found[name] = file.read()
    if not found:
        raise ValueError("the archive holds no recordings/<digit>_<speaker>_<number>.wav")
    return found


def to_tar(files: Mapping[str, bytes]) -> bytes:
    """Returns an uncompressed tar file of these contents: the same bytes for the same contents."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in sorted(files):
            about = tarfile.TarInfo(f"recordings/{name}")  # of time 0, and nobody's
            about.size = len(files[name])
            tar.addfile(about, io.BytesIO(files[name]))
    return made.getvalue()


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
