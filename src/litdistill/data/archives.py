"""Data sets whose host packs an archive: their files from it, and from copies of it on this machine, in memory.

A host may compress an archive in another way each time. So the files are verified by what they hold: they are put into an
uncompressed tar file that has the same bytes everywhere, and its SHA-256 is the published one.
"""

from __future__ import annotations

import io
import logging
import lzma
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from litdistill.data.download import FAILURES, digest, download

log = logging.getLogger(__name__)

LARGEST = 2**20  # bytes of a file


class Archive(NamedTuple):
    """A data set of many small files, and where copies of it are looked for."""

    url: str
    sha256: str  # of `to_tar` of its files
    number: int  # of files
    folder: str  # which they lie in
    file: re.Pattern[str]  # of the path of a file behind that folder
    globs: tuple[str, ...]  # that find these
    places: tuple[str, ...]  # of that folder, below a folder that the user names
    word: str  # in the name of an archive, in lower case
    called: str  # what messages call its files
    remedy: str = ""


# Jackson et al., Free Spoken Digit Dataset (CC BY-SA 4.0): <digit>_<speaker>_<number>.wav, of at most 2.3 s.
RECORDING = re.compile(r"([0-9])_([a-z]+)_([0-9]{1,2})\.wav")
SPOKEN_DIGITS = Archive(
    "https://codeload.github.com/Jakobovski/free-spoken-digit-dataset/tar.gz/26eb9aaf76e81b692f806f9140c2d2777410d7a1",
    "9cbd40a399fee10d4611dc8ffe6de219695fd804a62dfb43373f183715b43877",
    3000,
    "recordings",
    RECORDING,
    ("*.wav",),
    (".", "recordings", "free-spoken-digit-dataset/recordings"),
    "digit",
    "recordings of spoken digits",
)
# Shenggan, BCCD Dataset (MIT): 364 JPEGs of 640x480 with an XML file each, and the official lists of train, val and test.
BLOOD_CELLS = Archive(
    "https://codeload.github.com/Shenggan/BCCD_Dataset/tar.gz/d272fb14cdff6e473fafeeeba32aba5f560e9e43",
    "85cf9aadb2d45c227c61fc20b5bbef18865f46c577dd8189894cbc0f7d0d9c3f",
    2 * 364 + 4,
    "BCCD",
    re.compile(r"(Annotations/\w+\.xml|JPEGImages/\w+\.jpg|ImageSets/Main/(?:train|val|trainval|test)\.txt)"),
    ("Annotations/*", "JPEGImages/*", "ImageSets/Main/*"),
    (".", "BCCD", "BCCD_Dataset/BCCD"),
    "bccd",
    "files of BCCD",
    " data=voc reads any such folder.",
)


def fetched(known: Archive, folder: Path) -> dict[str, bytes]:
    """Downloads the archive of the pinned commit; see `fetch.Downloader`."""
    return {tar_of(known): to_tar(unpacked(known, download(known.url)), known.folder)}


def tar_of(known: Archive) -> str:
    """Returns the name of the file that keeps it."""
    return f"{known.folder.lower()}.tar"


def unpacked(known: Archive, content: bytes) -> dict[str, bytes]:
    """Returns the files of an archive (a tar file, compressed or not) by their path in its folder. Nothing is written to disk.

    Raises `ValueError` where there are none, more or larger ones than the set has, and one that is no regular file.
    """
    found: dict[str, bytes] = {}
    path = re.compile(rf"(?:.*/)?{known.folder}/(?P<path>{known.file.pattern})")
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for member in tar:
            if (match := path.fullmatch(member.name)) is None:
                continue
            if not member.isreg() or member.size > LARGEST or len(found) >= known.number:
                raise ValueError(f"{member.name} in the archive is not a file of a plausible size and number")
            file = tar.extractfile(member)
            assert file is not None
            found[match["path"]] = file.read()
    if not found:
        raise ValueError(f"the archive holds no {known.called} in a folder {known.folder}")
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


def local_copy(known: Archive, root: Path) -> dict[str, bytes] | None:
    """Returns the files of a copy in `root`, unless they are altered or incomplete, which is logged; None without one.

    A copy is the folder of the repository that holds them, one of the folders above it, or an archive of it (.tar.gz, .tar.xz).
    """
    for place in (root / name for name in known.places):
        paths = (p for pattern in known.globs for p in place.glob(pattern))
        named = {p.relative_to(place).as_posix(): p for p in paths if p.is_file() and p.stat().st_size <= LARGEST}
        found = {name: path.read_bytes() for name, path in named.items() if known.file.fullmatch(name)}
        if found and _is_published(known, found, place):
            return found
    for archive in [root] if root.is_file() else sorted(p for p in root.glob("*.tar*") if known.word in p.name.lower()):
        try:
            found = unpacked(known, archive.read_bytes())
        except (*FAILURES, lzma.LZMAError) as error:
            log.warning("%s cannot be read as an archive of %s (%s).", archive, known.called, error)
            continue
        if _is_published(known, found, archive):
            return found
    return None


def _is_published(known: Archive, files: Mapping[str, bytes], place: Path) -> bool:
    if digest(to_tar(files, known.folder)) == known.sha256:
        return True
    log.warning(
        "%s holds %d %s, which are not the %d of the published set (altered, incomplete or of another version): they are not "
        "used.%s",
        *(place, len(files), known.called, known.number, known.remedy),
    )
    return False
