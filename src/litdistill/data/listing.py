"""Which files of a folder are images that are read, or sounds, and what is left out and why."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from litdistill.data.decode import extensions
from litdistill.data.waves import EXTENSIONS as WAVES
from litdistill.utils.errors import UserError
from litdistill.utils.text import one_line

# What systems and tools put beside pictures, by name in lower case: thumbnails, copies, deleted files.
SERVICE_FOLDERS = {
    *("@eadir", "__macosx", ".ipynb_checkpoints", "lost+found", "$recycle.bin", "system volume information"),
    *("#recycle", "@recycle", "#snapshot", "__pycache__"),
}
SERVICE_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "folder.htt"}  # nobody needs to hear of these


class Kind(NamedTuple):
    """A kind of files of which a data set may consist."""

    noun: str
    extensions: Callable[[], frozenset[str]]  # in lower case, with their dot
    remedies: Mapping[str, str]  # what to do about files of other extensions


IMAGES = Kind("image", extensions, dict.fromkeys((".heic", ".heif", ".hif"), " (pip install pillow-heif)"))
SOUNDS = Kind(
    "sound",
    lambda: WAVES,
    dict.fromkeys((".mp3", ".flac", ".ogg", ".m4a", ".aac", ".opus", ".aiff", ".aif"), " (convert them to .wav)"),
)


class ImageFile(NamedTuple):
    """A file of an image, or of another kind, as it was when its folder was listed."""

    path: Path
    size: int  # bytes
    time_ns: int  # of its last modification


class Listing(NamedTuple):
    """The images of a folder and of those below it, sorted by path; and what is left out: how many files by reason."""

    files: list[ImageFile]
    skipped: Counter[str]


def list_images(folder: Path, kind: Kind = IMAGES) -> Listing:
    """Lists the images, or files of another kind, in and below a folder, through links to files and folders, each file once.

    Left out are other kinds of files, hidden files and folders (a name with a leading dot), service folders, broken links and
    whatever is no regular file. Raises `UserError` if the folder itself cannot be opened.
    """
    files: list[ImageFile] = []
    skipped: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()  # device and number of all that was met, so that links run in no circle
    links: list[tuple[Path, str]] = []
    waiting = [(folder, "")]  # folders, and why their images are left out
    while waiting or links:
        # Links come last: a file that lies here and is linked to as well is listed where it lies.
        path, reason = waiting.pop() if waiting else links.pop(0)
        linked = path.is_symlink() and path != folder
        try:
            found = path.stat()
        except OSError:  # it leads nowhere, or in a circle
            skipped["broken links"] += not reason
            continue
        if found.st_ino and (found.st_dev, found.st_ino) in seen:  # some file systems number all files 0
            skipped["links to what is read already"] += not reason and (
                linked or path.suffix.lower() in kind.extensions()
            )
            continue
        seen.add((found.st_dev, found.st_ino))
        if not stat.S_ISDIR(found.st_mode):
            _sort_in(path, found, reason, kind, files, skipped)
            continue
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            if path == folder:
                raise UserError(f"The folder {one_line(path)} cannot be opened: {error.strerror}.") from error
            skipped["folders that cannot be opened"] += 1
            continue
        for entry in reversed(entries):
            linked = entry.is_symlink()
            is_folder = (
                Path(entry.path).is_dir() if linked else entry.is_dir()
            )  # the latter raises for a link in a circle
            why = reason or (_hidden(entry.name) if is_folder else "")
            (links if linked else waiting).append((Path(entry.path), why))
    return Listing(sorted(files), skipped)


def contents_digest(folder: Path, annotations: Sequence[str] = ()) -> str:
    """Returns ten hex digits of the names and sizes of all images, or of all files where there are none (shards, texts), or of
    the content of a single file; "" for a path that cannot be read. They are the same where it is moved or copied.

    `annotations`: extensions of files that say what the images show, whose content counts too.
    """
    try:
        if folder.is_file():
            return hashlib.sha256(folder.read_bytes()).hexdigest()[:10]
        files = list_images(folder).files if folder.is_dir() else []
        named: list[tuple[str, object]] = [(os.path.relpath(file.path, folder), file.size) for file in files]
        if not files:
            named += sorted((os.path.relpath(p, folder), p.stat().st_size) for p in folder.rglob("*") if p.is_file())
        named += [
            (os.path.relpath(path, folder), digest)
            for path in sorted(p for kind in annotations for p in folder.rglob(f"*{kind}") if p.is_file())
            for digest in [hashlib.sha256(path.read_bytes()).hexdigest()]
        ]
    except (OSError, UserError):
        return ""
    found = hashlib.sha256()
    for name, size in named:
        found.update(os.fsencode(f"{name}\0{size}\n"))
    return found.hexdigest()[:10]


def _hidden(name: str) -> str:
    """Returns why the images in a folder of this name are left out; "" where they are read."""
    return f"in {one_line(name)}" if name.startswith(".") or name.lower() in SERVICE_FOLDERS else ""


def class_folders(folder: Path, kind: Kind = IMAGES) -> tuple[list[Path], Counter[str]]:
    """Returns the folders directly in `folder` that may be classes or splits, sorted, and what else lies there, by reason."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"The folder {one_line(folder)} cannot be opened: {error.strerror}.") from error
    skipped: Counter[str] = Counter()
    kept = []
    for entry in entries:
        path = Path(entry.path)
        if entry.is_symlink() and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(path)):
            skipped["links to the folder that they lie in"] += (
                1  # or to one above, which would be a class of all classes
            )
        elif entry.is_dir():
            if not (why := _hidden(entry.name)):
                kept.append(path)
            elif entry.name.lower() in SERVICE_FOLDERS:
                skipped[why] += len(list_images(path, kind).files)
        elif entry.is_symlink() and not path.exists():
            skipped["broken links"] += 1
        elif path.suffix.lower() in kind.extensions() and not entry.name.startswith("."):
            skipped[f"{kind.noun}s beside the class folders"] += 1
    return kept, skipped


def _sort_in(
    path: Path, found: os.stat_result, reason: str, kind: Kind, files: list[ImageFile], skipped: Counter[str]
) -> None:
    """Adds a file to `files`, or counts it in `skipped`."""
    extension = path.suffix.lower()
    is_image = extension in kind.extensions()
    if path.name.startswith("."):
        reason = reason or "hidden"
        if not is_image:  # .DS_Store and its like
            return
    if reason:
        skipped[reason] += is_image  # of a hidden folder, the images count alone
    elif path.name.lower() in SERVICE_FILES:
        return
    elif not stat.S_ISREG(found.st_mode):
        skipped["neither files nor folders"] += 1
    elif is_image:
        files.append(ImageFile(path, found.st_size, found.st_mtime_ns))
    else:
        skipped[one_line(extension) or "without an extension"] += 1


def describe_skipped(skipped: Counter[str], most: int = 8, kind: Kind = IMAGES) -> str:
    """Returns "80 files are skipped: 80 .txt", reasons in descending order of their counts; "" where nothing is."""
    counted = [(reason, count) for reason, count in skipped.most_common() if count > 0]
    if not counted:
        return ""
    total = sum(count for _, count in counted)
    parts = [f"{count:,} {reason}{kind.remedies.get(reason, '')}" for reason, count in counted[:most]]
    if len(counted) > most:
        parts.append(f"{sum(count for _, count in counted[most:]):,} of {len(counted) - most} other kinds")
    return f"{total:,} {'file is' if total == 1 else 'files are'} skipped: {', '.join(parts)}"


def describe_kinds(files: Iterable[ImageFile]) -> str:
    """Returns "200 .jpg, 30 .png"."""
    kinds = Counter(file.path.suffix.lower() for file in files)
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
