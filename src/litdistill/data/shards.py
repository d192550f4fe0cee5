"""Shards: images in few large files, which suit a network file system or an object store better than millions of small ones.

    python -m litdistill.data.shards <folder of images> <output folder>        the layout of data=folder
    python scripts/train.py data=shards data.root=<output folder> data.image_size=64

LitData (`pip install 'litdistill[stream]'`) reads and writes them, and downloads them in chunks where `data.root` is a
URL that it supports (s3://, gs://, azure://, hf://, r2://). It provides random access by index, so order, epochs and
resuming work as for any other data set.

Shards may be untrusted. A record is the bytes of one image file: the index of a LitData data set could request
unpickling of its records, and such an index is refused before it is used.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track

from litdistill.data.decode import decode
from litdistill.data.folder import Labeled, read_splits
from litdistill.data.streaming import Encoded
from litdistill.utils.errors import UserError
from litdistill.utils.text import one_line

FORMAT, SPEC = ["bytes"], '[1, {"type": null, "context": null, "children_spec": []}]'
CHUNK = 64 * 2**20  # bytes per file
BLOCK = 64  # images that are read at a time when shards are written


class Facts(NamedTuple):
    """What shards say of their images, by "train" and "test"."""

    classes: tuple[str, ...]
    labels: dict[str, list[int]]
    names: dict[str, list[str]]  # of the files that they were written from, for messages
    validation: int  # how many of the last training images are the validation set; 0: none was set aside


def write(folder: str | Path, out: str | Path, chunk_bytes: int = CHUNK) -> None:
    """Writes shards from a folder of images, whose files are copied unchanged.

    Raises `UserError`, and leaves no shards behind, where `out` exists or an image cannot be decoded.
    """
    writer = _litdata().streaming.writer.BinaryWriter
    folder, out = Path(folder), Path(out)
    if out.exists():
        raise UserError(f"{out} is there already. Remove it, or name another folder.")
    images = read_splits(folder)
    if images.task != "classification":
        raise UserError(
            f"{folder} has no class folders: shards are written of classes. Take data=folder, which needs none."
        )
    splits = {"train": images.train + images.val, "test": images.test}

    def put(name: str, records: Iterable[bytes]) -> None:
        written = writer(str(out / name), chunk_bytes=chunk_bytes)
        for number, record in enumerate(records):
            written[number] = record
        written.done()
        written.merge()

    try:
        for name, files in splits.items():
            put(name, _contents(files, name))
        facts = {
            "classes": images.classes,
            "labels": {name: [label for _, label in files] for name, files in splits.items()},
            "names": {
                name: [one_line(file.path.relative_to(folder).as_posix()) for file, _ in files]
                for name, files in splits.items()
            },
            "validation": len(images.val),
        }
        put("facts", [json.dumps(facts).encode()])
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise


def _contents(files: Labeled, name: str) -> Iterator[bytes]:
    """Yields the bytes of image files, each decoded once: what training could not read is not written."""

    def content(path: Path) -> bytes:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"The image {one_line(path)} cannot be read: {error.strerror}.") from error
        decode(io.BytesIO(data), path, 3, 8, 8)
        return data

    with ThreadPoolExecutor() as pool:
        for start in track(range(0, len(files), BLOCK), f"Writing {name}", console=Console(stderr=True)):
            yield from pool.map(content, [file.path for file, _ in files[start : start + BLOCK]])


def read_facts(root: str | Path) -> Facts:
    """Returns what shards say of their images. Raises `UserError` for damaged shards."""
    _, content = ShardFiles(root, "facts", ["facts"])[0]
    try:
        found = json.loads(content)
        facts = Facts(
            tuple(str(name) for name in found["classes"]),
            {name: [int(label) for label in found["labels"][name]] for name in ("train", "test")},
            {name: [str(file) for file in found["names"][name]] for name in ("train", "test")},
            int(found["validation"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{root}/facts is damaged ({error}). Write the shards again.") from error
    classes, labels = facts.classes, facts.labels
    if any(not 0 <= label < len(classes) for name in labels for label in labels[name]):
        raise UserError(f"{root}/facts has labels beyond its {len(classes)} classes. Write the shards again.")
    if any(len(labels[name]) != len(facts.names[name]) for name in labels) or not (
        0 <= facts.validation < len(labels["train"])
    ):
        raise UserError(f"{root}/facts is damaged (its counts differ). Write the shards again.")
    return facts


def encoded(root: str | Path, name: str, names: list[str], size: int, channels: int) -> Encoded:
    """Returns the images of a split, encoded. Their hash covers the index file of the shards."""
    files = ShardFiles(root, name, names)
    return Encoded(files, size, channels, hashlib.sha256(f"{size} {channels} {files.index}".encode()).hexdigest())


_READ_LOCK = threading.Lock()  # LitData's reader has a cache of the last chunk and is not thread-safe


class ShardFiles:
    """The records of one split; every process opens them itself. `names`: of the files that they were written from."""

    def __init__(self, root: str | Path, name: str, names: list[str]):
        self.place, self.name, self.names, self.count = f"{root}/{name}", name, names, len(names)
        if (
            "://" not in str(root)
            and not str(root).startswith("local:")
            and not Path(self.place, "index.json").is_file()
        ):
            raise UserError(
                f"There are no shards in {root} ({name}/index.json is missing). "
                "Write them: python -m litdistill.data.shards <folder of images> <data.root>."
            )
        self.index = self._checked(self._open())
        self._opened: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[str, bytes]:
        with _READ_LOCK:
            return self._read(index)

    def _read(self, index: int) -> tuple[str, bytes]:
        if self._opened is None or self._opened[0] != os.getpid():
            opened = self._open()
            self._checked(opened)
            self._opened = (os.getpid(), opened)
        name = f"{self.names[index]} of {self.place}"
        try:
            return name, bytes(self._opened[1][index])
        except UserError:
            raise
        except Exception as error:  # LitData's readers and the clients of stores raise many kinds
            reason = one_line(" ".join(str(error).split())[:200] or type(error).__name__)
            raise UserError(
                f"The image {name} cannot be read ({reason}). A file of the shards is missing or damaged: copy or write them "
                "again."
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def _open(self) -> Any:
        streaming = _litdata().streaming
        serializers = streaming.serializers
        allowed = {name: _RefusedSerializer() for name in serializers._SERIALIZERS} | {
            "bytes": serializers.BytesSerializer()
        }
        try:
            return streaming.StreamingDataset(self.place, serializers=allowed)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"{self.place}/index.json is damaged, or cannot be reached ({error}).") from error

    def _checked(self, opened: Any) -> str:
        """Returns the index as text, after only JSON parsing. Raises `UserError` unless its records are plain bytes."""
        text = Path(opened.input_dir.path, "index.json").read_text()
        try:
            index = json.loads(text)
            config, sizes = index["config"], [int(chunk["chunk_size"]) for chunk in index["chunks"]]
            names = [str(chunk["filename"]) for chunk in index["chunks"]]
            bytes_of = {str(chunk["filename"]): int(chunk["chunk_bytes"]) for chunk in index["chunks"]}
            wrong = config["data_format"] != FORMAT or config["data_spec"] != SPEC or config.get("encryption")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.place}/index.json is damaged ({error}). Write the shards again.") from error
        if wrong or config.get("item_loader") not in (None, "PyTreeLoader") or any(Path(n).name != n for n in names):
            raise UserError(
                f"{self.place} is refused: its records are {str(config['data_format'])[:60]} and must be plain bytes, in "
                "files beside the index. Write shards with python -m litdistill.data.shards."
            )
        if sum(sizes) != self.count:
            raise UserError(f"{self.place} holds {sum(sizes)} records, and should hold {self.count}. Write it again.")
        if Path(self.place).is_dir():  # else the files lie in a store, and are fetched when they are needed
            for name, size in bytes_of.items():
                _check_file(Path(self.place, name), size)
        return text


def _check_file(path: Path, size: int) -> None:
    """Raises `UserError` for a file of shards that is missing or shorter than its `size` in the index."""
    found = path.stat().st_size if path.is_file() else None
    if found is None or found < size:
        state = "is missing" if found is None else f"has {found:,} bytes of {size:,}"
        raise UserError(f"{one_line(path)} {state}: the shards are incomplete. Copy them again, or write them again.")


class _RefusedSerializer:
    """Serializer for every record format other than plain bytes; it raises `UserError`."""

    def deserialize(self, data: bytes) -> Any:
        raise UserError("A shard has records other than plain bytes, which are never read.")

    def setup(self, metadata: Any) -> None:
        """Called by LitData for every format in an index."""


def _litdata() -> Any:
    try:
        import litdata
        import litdata.streaming.serializers
        import litdata.streaming.writer
    except ImportError as error:
        raise UserError("Shards are read and written by LitData: pip install 'litdistill[stream]'.") from error
    return litdata


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m litdistill.data.shards", description="Shards from a folder of images."
    )
    parser.add_argument("folder", help="holds train/<class>/* and test/<class>/*, or <class>/* alone")
    parser.add_argument("out", help="output folder, which must not exist")
    options = parser.parse_args(arguments)
    try:
        write(options.folder, options.out)
    except UserError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
