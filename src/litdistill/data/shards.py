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
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

from litdistill.data.folder import Labeled, train_and_test
from litdistill.data.streaming import Encoded
from litdistill.utils.errors import UserError

FORMAT, SPEC = ["bytes"], '[1, {"type": null, "context": null, "children_spec": []}]'
CHUNK = 64 * 2**20  # bytes per file


def write(folder: str | Path, out: str | Path, chunk_bytes: int = CHUNK) -> None:
    """Writes shards from a folder of images, whose files are copied unchanged. Raises `UserError` where `out` exists."""
    writer = _litdata().streaming.writer.BinaryWriter
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} is there already. Remove it, or name another folder.")
    classes, train, test = train_and_test(Path(folder))

    def put(name: str, records: Any) -> None:
        written = writer(str(out / name), chunk_bytes=chunk_bytes)
        for number, record in enumerate(records):
            written[number] = record
        written.done()
        written.merge()

    def contents(files: Labeled, name: str) -> Any:
        return (path.read_bytes() for path, _ in track(files, f"Writing {name}"))

    put("train", contents(train, "train"))
    put("test", contents(test, "test"))
    labels = {name: [label for _, label in files] for name, files in (("train", train), ("test", test))}
    put("facts", [json.dumps({"classes": classes, **labels}).encode()])


def read_labels(root: str | Path) -> tuple[tuple[str, ...], dict[str, list[int]]]:
    """Returns the class names, and the labels of "train" and "test". Raises `UserError` for damaged shards."""
    _, content = ShardFiles(root, "facts", 1)[0]
    try:
        found = json.loads(content)
        classes = tuple(str(name) for name in found["classes"])
        labels = {name: [int(label) for label in found[name]] for name in ("train", "test")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{root}/facts is damaged ({error}). Write the shards again.") from error
    if any(not 0 <= label < len(classes) for name in labels for label in labels[name]):
        raise UserError(f"{root}/facts has labels beyond its {len(classes)} classes. Write the shards again.")
    return classes, labels


def encoded(root: str | Path, name: str, count: int, size: int, channels: int) -> Encoded:
    """Returns the images of a split, encoded. Their hash covers the index file of the shards."""
    files = ShardFiles(root, name, count)
    return Encoded(files, size, channels, hashlib.sha256(f"{size} {channels} {files.index}".encode()).hexdigest())


_READ_LOCK = threading.Lock()  # LitData's reader has a cache of the last chunk and is not thread-safe


class ShardFiles:
    """The records of one split; every process opens them itself."""

    def __init__(self, root: str | Path, name: str, count: int):
        self.place, self.name, self.count = f"{root}/{name}", name, count
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
        return f"{index} of {self.place}", bytes(self._opened[1][index])

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
        return text


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
