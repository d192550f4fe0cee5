"""Reads a file of outputs: what some network, of any library, gave for each sample of a data set.

    file = read_outputs("teacher.safetensors")       .npz, .npy, .parquet and .csv too

docs/teachers.md describes what a file holds. Tensors of .safetensors and .npy files are mapped into memory: the processes of a
machine share them, and a file may be larger than memory. Nothing is unpickled.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from litdistill.utils.errors import UserError
from litdistill.utils.hashing import file_sha256

SUFFIXES = (".safetensors", ".npz", ".npy", ".parquet", ".csv")
KINDS = ("logits", "probabilities", "values", "embedding")
SPLITS = ("train", "val", "test")  # "train" is of all samples of the training files, those of the validation set too
WORDS = {  # other names of these that files have
    **dict.fromkeys(("probs", "proba", "prob", "predictions"), "probabilities"),
    **dict.fromkeys(("embeddings", "features"), "embedding"),
    **dict.fromkeys(("id", "index", "sample", ""), "ids"),
    **dict.fromkeys(("name", "file", "files", "filename", "file_name", "path", "image"), "names"),
    **dict.fromkeys(("logit",), "logits"),
    **dict.fromkeys(("value",), "values"),
}
PARTS = ("ids", "names", "indices", "rest", "classes")
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
}
MANIFEST = "litdistill"  # the key of the metadata under which `litdistill outputs` says how a file was made
DIGEST = "sha256"  # and that of the SHA-256 of all that follows the header
CHUNK = 2**24  # bytes that are checked at a time


class Table(NamedTuple):
    """The outputs of n samples of a split by one head."""

    values: Tensor  # (n, ..., width), or (n, views, ..., width); of the top k, width is k
    kind: str | None  # one of `KINDS`; None where the file does not say
    ids: Tensor | None = None  # (n,) int64; None: of samples 0 to n - 1, or by name
    names: Sequence[str] | None = None  # n file names
    indices: Tensor | None = None  # of the top k: their places among the classes, shaped as `values`
    rest: Tensor | None = None  # (n, ...): the logarithm of the sum of exp(logit) over all other classes


class OutputsFile(NamedTuple):
    """A file of outputs, as `read_outputs` reads it."""

    path: Path
    sha256: str
    tables: Mapping[str, Mapping[str, Table]]  # by split and head ("logits", "embedding")
    classes: tuple[str, ...] | None  # names of the outputs; None where the file has none
    manifest: Mapping[str, Any]  # of `litdistill outputs`: network, data, views, versions; empty for any other file
    rest: str | None = None  # what the classes outside of the top k get: "spread" or "drop"; None: not said


Found = tuple[dict[str, Tensor], dict[str, list[str]], dict[str, str]]  # numbers, lists of texts, single texts


@functools.lru_cache(maxsize=4)
def _read_at(path: Path, size: int, time_ns: int) -> OutputsFile:
    suffix = path.suffix.lower()
    try:
        numbers, texts, facts = _READERS[suffix](path)
    except UserError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        SafetensorError,
        zipfile.BadZipFile,
        RecursionError,
    ) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{path} is damaged, or no {suffix} file ({type(error).__name__}: {reason}). Fetch or write it anew."
        ) from error
    classes = texts.pop("classes", None)
    tables = _tables(path, numbers, texts)
    for split, heads in tables.items():
        for table in heads.values():
            _check_table(path, split, table)
    try:
        manifest = json.loads(facts.get(MANIFEST, "{}"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: its manifest is no JSON. Fetch or write it anew.") from error
    return OutputsFile(
        path, _digest(path, facts), tables, None if classes is None else tuple(classes), manifest, facts.get("rest")
    )


def read_outputs(path: str | Path) -> OutputsFile:
    """Returns the contents of a file of outputs.

    Raises `UserError` for a missing, damaged or empty file, one of another format, and for NaN.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(
            f"teacher.outputs={path} {what}: name a file of outputs, {', '.join(SUFFIXES)}, such as `litdistill outputs "
            "run=<run folder> to=<file>` writes."
        )
    if path.suffix.lower() not in _READERS:
        raise UserError(
            f"teacher.outputs={path}: a file of outputs is one of {', '.join(SUFFIXES)}, and docs/teachers.md has its format."
        )
    state = path.stat()
    return _read_at(path, state.st_size, state.st_mtime_ns)


# -- the formats -------------------------------------------------------------------------------------------------------


def _read_safetensors(path: Path) -> Found:
    with safe_open(path, "numpy"):
        pass  # raises for a header that does not fit its file
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    facts: dict[str, str] = header.pop("__metadata__", {})
    whole = np.memmap(path, np.uint8, "c") if path.stat().st_size > 8 + size else np.zeros(8 + size, np.uint8)
    numbers = {}
    for name, about in header.items():
        if about["dtype"] not in DTYPES:
            raise UserError(f"{path}: {name} is of type {about['dtype']}; give {', '.join(DTYPES)}.")
        start, end = about["data_offsets"]
        flat = torch.from_numpy(np.asarray(whole[8 + size + start : 8 + size + end]))
        numbers[name] = flat.view(DTYPES[about["dtype"]]).view(about["shape"])
    texts = {
        key: [str(name) for name in json.loads(value)]
        for key, value in facts.items()
        if key.rpartition(".")[2] in ("classes", "names")
    }
    return numbers, texts, facts


def _read_npy(path: Path) -> Found:
    return {"": _numbers(path, "it", np.load(path, "c", allow_pickle=False))}, {}, {}


def _read_npz(path: Path) -> Found:
    numbers: dict[str, Tensor] = {}
    texts: dict[str, list[str]] = {}
    facts: dict[str, str] = {}
    with np.load(path, allow_pickle=False) as file:
        for key in file.files:
            array = file[key]
            if array.dtype.kind in "US":
                words = [w.decode() if isinstance(w, bytes) else str(w) for w in array.reshape(-1).tolist()]
                if array.ndim == 0:
                    facts[key] = words[0]
                else:
                    texts[key] = words
            else:
                numbers["" if key == "arr_0" else key] = _numbers(path, key, array)
    return numbers, texts, facts


def _numbers(path: Path, name: str, array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "fiu" or array.dtype.itemsize > 8:
        raise UserError(f"{path}: {name} holds {array.dtype}, and outputs are numbers, float32 or float16.")
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)
    if not array.dtype.isnative or any(stride < 0 for stride in array.strides):
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(array)


def _read_csv(path: Path) -> Found:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file)
        header = next(rows, None)
        if header is None:
            raise UserError(f"{path} is empty: its first line names the columns, id or name and the classes.")
        columns: list[list[str]] = [[] for _ in header]
        for number, row in enumerate(rows, 2):
            if not row:
                continue
            if len(row) != len(header):
                raise UserError(
                    f"{path}, line {number}: {len(row)} values, and the header names {len(header)} columns."
                )
            for column, value in zip(columns, row, strict=True):
                column.append(value)
    return _of_columns(path, dict(zip(header, columns, strict=True)))


def _read_parquet(path: Path) -> Found:
    if find_spec("pyarrow") is None:
        raise UserError(f"{path}: Parquet files are read by pyarrow, which is not installed: pip install pyarrow.")
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.read_table(path)
    except ArrowException as error:
        raise ValueError(str(error)) from error
    return _of_columns(path, {name: table.column(name).to_pylist() for name in table.column_names})


def _of_columns(path: Path, columns: dict[str, list[Any]]) -> Found:
    """Returns what a table says: ids or names, a column of splits, and one column for each class or one of lists."""
    known = {WORDS.get(name.lower(), name.lower()): name for name in columns}
    ids, names = columns.pop(known.get("ids", "\0"), None), columns.pop(known.get("names", "\0"), None)
    splits = columns.pop(known.get("split", "\0"), None)
    lists = {name: column for name, column in columns.items() if column and isinstance(column[0], (list, tuple))}
    texts: dict[str, list[str]] = {}
    if lists:
        matrices = {
            _word(name): [[_number(path, name, i, v) for v in row] for i, row in enumerate(c)]
            for name, c in lists.items()
        }
    else:
        if not columns:
            raise UserError(f"{path} has no column of outputs beside its ids: give one for each class, with its name.")
        texts["classes"] = list(columns)
        numbers = [
            [_number(path, name, i, value) for i, value in enumerate(column)] for name, column in columns.items()
        ]
        matrices = {"": [list(row) for row in zip(*numbers, strict=True)]}
    count = len(next(iter(matrices.values())))
    of_split = ["train"] * count if splits is None else [_split(path, i, word) for i, word in enumerate(splits)]
    found: dict[str, Tensor] = {}
    for split in dict.fromkeys(of_split):
        rows = [i for i, word in enumerate(of_split) if word == split]
        for name, matrix in matrices.items():
            found[f"{split}.{name}"] = torch.tensor([matrix[i] for i in rows], dtype=torch.float64)
        if ids is not None:
            found[f"{split}.ids"] = torch.tensor([int(_number(path, "id", i, ids[i])) for i in rows])
        elif names is not None:
            texts[f"{split}.names"] = [str(names[i]) for i in rows]
    return found, texts, {}


def _number(path: Path, name: str, row: int, value: Any) -> float:
    try:
        return float("nan" if value is None else value)
    except (TypeError, ValueError):
        raise UserError(
            f"{path}, sample {row + 1}: {name} is {str(value)[:40]!r}, and no number. Ids are named id, file names name, and "
            "every other column is a class."
        ) from None


def _split(path: Path, row: int, word: Any) -> str:
    if word not in SPLITS:
        raise UserError(f"{path}, sample {row + 1}: its split is {str(word)[:40]!r}; choose train, val or test.")
    return str(word)


_READERS = dict(zip(SUFFIXES, (_read_safetensors, _read_npz, _read_npy, _read_parquet, _read_csv), strict=True))


# -- tables of them ----------------------------------------------------------------------------------------------------


def _word(name: str) -> str:
    return WORDS.get(name.lower(), name.lower())


def _tables(path: Path, numbers: Mapping[str, Tensor], texts: Mapping[str, list[str]]) -> dict[str, dict[str, Table]]:
    """Returns tables by split and head of entries by their names: `test.logits`, or `logits` for `train.logits`."""
    parts: dict[str, dict[str, Any]] = {}
    for name, value in (*numbers.items(), *texts.items()):
        before, _, last = name.rpartition(".")
        split, word = before or "train", _word(last) if last else ""
        if split not in SPLITS or word not in ("", *KINDS, *PARTS):
            raise UserError(
                f"{path} has {name!r}, which no file of outputs has: name arrays logits, probabilities, values or embedding, "
                "with ids or names, and those of test samples test.logits, test.ids."
            )
        parts.setdefault(split, {})[word] = value
    found = {}
    for split, entries in parts.items():
        given = [kind for kind in (*KINDS, "") if kind in entries]
        logits = [kind for kind in given if kind != "embedding"]
        if not given or len(logits) > 1:
            has = ", ".join(filter(None, entries)) or "nothing"
            raise UserError(f"{path} holds {has} of the {split} samples: give one of logits, probabilities and values.")
        tables = {}
        for kind in given:
            top = (entries.get("indices"), entries.get("rest")) if kind != "embedding" else (None, None)
            head = "embedding" if kind == "embedding" else "logits"
            tables[head] = Table(entries[kind], kind or None, entries.get("ids"), entries.get("names"), *top)
        found[split] = tables
    if not found:
        raise UserError(f"{path} is empty: it holds no outputs. Write it anew.")
    return found


def chunks(*tensors: Tensor | None) -> Iterator[tuple[int, list[Tensor]]]:
    """Yields the first row and the rows of tensors of as many, some 16 MiB of the first at a time."""
    given = [t for t in tensors if t is not None]
    rows = max(1, CHUNK // max(1, math.prod(given[0].shape[1:]) * given[0].dtype.itemsize))
    for start in range(0, len(given[0]), rows):
        yield start, [t[start : start + rows] for t in given]


def _check_table(path: Path, split: str, table: Table) -> None:
    """Raises `UserError` for shapes that do not belong together, and for a number that no network means."""
    values, n = table.values, len(table.values)
    if values.ndim < 2 or not values.numel():
        raise UserError(
            f"{path}: outputs are a row for each sample, (samples, classes), and those of its {split} samples are "
            f"{tuple(values.shape)}."
        )
    for name, other in (("ids", table.ids), ("names", table.names), ("indices", table.indices), ("rest", table.rest)):
        if other is not None and len(other) != n:
            raise UserError(f"{path} has {n} rows of {split} samples and {len(other)} {name}: give one for each row.")
    if table.ids is not None:
        if table.ids.is_floating_point() or table.ids.ndim != 1:
            raise UserError(f"{path}: the ids of its {split} samples are whole numbers, (samples,).")
        _refuse_twice(path, split, table.ids.tolist())
    elif table.names is not None:
        _refuse_twice(path, split, table.names)
    if table.indices is not None and (table.indices.is_floating_point() or table.indices.shape != values.shape):
        raise UserError(f"{path}: indices are whole numbers, one for each value, {tuple(values.shape)}.")
    for start, (part,) in chunks(values):
        bad = (part.isnan() | (part == math.inf)).flatten(1).any(1)
        if bad.any():
            row = start + int(bad.nonzero()[0, 0])
            raise UserError(
                f"{path} holds a number that is NaN or infinite, first for {_said(table, row)} of its {split} samples. Write "
                "it anew without them, or leave these samples out of the training."
            )
        if table.kind == "probabilities" and not ((part >= 0) & (part <= 1 + 1e-3)).all():
            row = start + int(((part < 0) | (part > 1 + 1e-3)).flatten(1).any(1).nonzero()[0, 0])
            raise UserError(
                f"{path} calls its numbers probabilities, and {_said(table, row)} has one outside of 0 to 1: call them logits."
            )


def _said(table: Table, row: int) -> str:
    if table.names is not None:
        return f"{table.names[row]!r}"
    return f"id {row if table.ids is None else int(table.ids[row])}"


def _refuse_twice(path: Path, split: str, keys: Sequence[Any]) -> None:
    seen: set[Any] = set()
    twice = next((key for key in keys if key in seen or seen.add(key)), None)  # type: ignore[func-returns-value]
    if twice is not None:
        raise UserError(f"{path}: {twice!r} stands twice among its {split} samples: leave one of the rows out.")


# -- the digest --------------------------------------------------------------------------------------------------------


def data_sha256(path: Path) -> str:
    """Returns the SHA-256 in hexadecimal of all that follows the header of a safetensors file."""
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(path: Path, facts: Mapping[str, str]) -> str:
    """Returns the SHA-256 of the file. Raises `UserError` where its contents differ from the digest that it brings."""
    if DIGEST in facts and MANIFEST in facts and facts[DIGEST] != (now := data_sha256(path)):
        raise UserError(
            f"{path} is damaged: the SHA-256 of its contents was {facts[DIGEST][:12]}…, and is {now[:12]}…. Fetch it anew, or "
            "write it again."
        )
    return file_sha256(path)
