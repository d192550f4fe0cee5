"""Images in few large files, which a network file system or an object store likes better than millions of small ones.

    python -m litdistill.data.shards <folder of images> <where to write>       as data=folder reads it
    python scripts/train.py data=shards data.root=<where that is> data.image_size=64

LitData (`pip install 'litdistill[stream]'`) reads and writes them, and fetches them piece by piece where `data.root` is a
URL that it knows (s3://, gs://, azure://, hf://, r2://). It gives any image by its number, so that order, epochs and
resuming are this project's own, the same as for any other data set.

Shards may come from a stranger. A record is the bytes of one image file and nothing else: LitData could be told by the
index of a data set to unpickle its records, and such an index is refused before anything of it is used.
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
CHUNK = 64 * 2**20  # bytes of a file


def write(folder: str | Path, out: str | Path, chunk_bytes: int = CHUNK) -> None:
    """Writes shards from a folder of images, whose files are taken as they are. Raises `UserError` where `out` exists."""
    writer = _litdata().streaming.writer.BinaryWriter
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} is there already. Remove it, or name another place.")
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


def facts(root: str | Path) -> tuple[tuple[str, ...], dict[str, list[int]]]:
    """The names of the classes, and the labels of "train" and "test"."""
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
    """The images of a split as they lie there, known by the index that they were written with."""
    files = ShardFiles(root, name, count)
    return Encoded(files, size, channels, hashlib.sha256(f"{size} {channels} {files.index}".encode()).hexdigest())


_READING = threading.Lock()  # LitData's reader keeps what it read last, and threads would get each other's


class ShardFiles:
    """The records of one split; every process that reads them opens them for itself."""

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
        with _READING:
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
        allowed = {name: _Refusing() for name in serializers._SERIALIZERS} | {"bytes": serializers.BytesSerializer()}
        try:
            return streaming.StreamingDataset(self.place, serializers=allowed)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"{self.place}/index.json is damaged, or cannot be reached ({error}).") from error

    def _checked(self, opened: Any) -> str:
        """The index, as text; raises `UserError` unless it describes plain bytes. So far it was read as JSON only."""
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


class _Refusing:
    """Stands for every form of record that is not plain bytes."""

    def deserialize(self, data: bytes) -> Any:
        raise UserError("A shard holds something else than plain bytes, which is never read.")

    def setup(self, metadata: Any) -> None:
        """LitData calls it for every form that an index names."""


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
    parser.add_argument("out", help="where to write")
    options = parser.parse_args(arguments)
    try:
        write(options.folder, options.out)
    except UserError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
