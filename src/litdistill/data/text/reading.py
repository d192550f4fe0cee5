"""Reads texts and their labels from files: .txt, .tsv, .csv and .jsonl. It needs nothing but the standard library.

    read_file("reviews.tsv", text="review", label="stars")
    read_file("reviews.txt", label=None)             # one text a line

A .tsv file has a header, and one text a line without quotes; a .csv file a header, and quotes as RFC 4180 has them; a .jsonl
(.ndjson) file one object a line.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from litdistill.utils.errors import UserError
from litdistill.utils.text import one_line

TABLES = (".tsv", ".csv", ".jsonl", ".ndjson")
LONGEST = 2**27  # characters of a field of a .csv file


class Text(NamedTuple):
    """A text as it stands in a file."""

    words: str  # without white space at its ends
    label: str | None  # None: it has none
    place: str  # its file and, in a table, its line


def read_file(
    path: str | Path,
    text: str = "text",
    label: str | None = "label",
    encoding: str = "utf-8",
    remedy: str = "data.encoding=<its encoding>",
    columns: tuple[str, str] = ("data.text", "data.label"),
) -> list[Text]:
    """Returns the texts of a file in order, empty ones included.

    Args:
        text, label: columns of a table, or keys of a .jsonl file. `label=None`: labels are not read, and a .txt file holds one
            text a line, of which empty lines are left out.
        encoding: of the file; a byte order mark is left out.
        remedy, columns: how the user says another encoding, and names other columns, for messages.

    Raises `UserError` for a file that cannot be read or decoded, for a missing column, and for lines that do not fit it.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (*TABLES, ".txt") or (kind == ".txt" and label is not None):
        raise UserError(
            f"{one_line(path)}: {'texts with labels' if label is not None else 'texts'} are read from .tsv, .csv and .jsonl "
            f"files{'' if label is not None else ', and from .txt files with one text a line'}."
        )
    content = read_text(path, encoding, remedy)
    if kind == ".txt":
        lines = content.splitlines()
        return [Text(s, None, f"{path}:{i}") for i, line in enumerate(lines, 1) if (s := line.strip())]
    rows = _objects(content, path) if kind in (".jsonl", ".ndjson") else _cells(content, path, kind == ".tsv")
    found = []
    for line, row in rows:
        for name, option in zip((text, label), columns, strict=True):
            if name is not None and name not in row:
                raise UserError(_missing(path, name, option, list(row), line if kind[1] in "jn" else None))
        words = row[text]
        if not isinstance(words, str):
            raise UserError(f"{one_line(path)}, line {line}: {text} is {json.dumps(words)[:40]} and no text.")
        named = None if label is None or row[label] is None else str(row[label]).strip()
        found.append(Text(words.strip(), named or None, f"{path}:{line}"))
    return found


def read_text(path: Path, encoding: str = "utf-8", remedy: str = "data.encoding=<its encoding>") -> str:
    """Returns the content of a file. Raises `UserError` that names file and line where it is not in this encoding."""
    try:
        known = codecs.lookup(encoding).name
    except LookupError:
        names = ("utf-8", "utf-16", "latin-1", "cp1252", "cp1251", "shift_jis", "euc_jp", "gb18030", "big5", "euc_kr")
        near = difflib.get_close_matches(encoding, names, 3, 0.4) or names[:4]
        raise UserError(f"encoding={encoding} is none that Python knows. Did you mean {', '.join(near)}?") from None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{one_line(path)} cannot be read: {error.strerror}.") from error
    try:
        # With "utf-8-sig" a byte order mark, which Windows' editors write, is no part of the first text.
        return content.decode("utf-8-sig" if known == "utf-8" else known)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        marks = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16", codecs.BOM_UTF8: "utf-8"}
        marked = next((name for mark, name in marks.items() if content.startswith(mark)), None)
        hint = (
            f"; it begins as {marked} does" if marked else "; cp1252 is common on Windows" if known == "utf-8" else ""
        )
        raise UserError(
            f"{one_line(path)}, line {line} is not {known}, in which it is read: say which it is by {remedy}{hint}."
        ) from error


def _cells(content: str, path: Path, tabs: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the line and the cells by column of each row of a table. Raises `UserError` for a row of another length."""
    csv.field_size_limit(LONGEST)
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    reader = csv.reader(io.StringIO(content, newline=""), **options)
    try:
        header = next(reader, None)
        if header is None:
            raise UserError(f"{one_line(path)} is empty: its first line should name the columns.")
        names = [name.strip() for name in header]
        for row in reader:
            if not row:
                continue
            if len(row) != len(names):
                why = " (quotes mean nothing in a .tsv file, and a text holds no tab)" if tabs else ""
                raise UserError(
                    f"{one_line(path)}, line {reader.line_num} has {len(row)} fields, and the first line names {len(names)} "
                    f"columns{why}: mend that line."
                )
            yield reader.line_num, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise UserError(
            f"{one_line(path)}, line {reader.line_num} is not as a .csv file should be: {error}."
        ) from error


def _objects(content: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the line and the object of each line that is not blank. Raises `UserError` for anything but objects."""
    for line, one in enumerate(content.split("\n"), 1):
        if not one.strip():
            continue
        try:
            row = json.loads(one)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{one_line(path)}, line {line} is no JSON: each line should hold one object.") from error
        if not isinstance(row, dict):
            raise UserError(f'{one_line(path)}, line {line} holds no object with keys, such as {{"text": "…"}}.')
        yield line, row


def _missing(path: Path, name: str, option: str, columns: Sequence[str], line: int | None) -> str:
    near = difflib.get_close_matches(name, columns, 1)
    shown = ", ".join(one_line(column)[:40] for column in columns[:8])
    where = f"{one_line(path)}{'' if line is None else f', line {line}'}"
    meant = f" Did you mean {option}={one_line(near[0])}?" if near else f" Name it by {option}=<column>."
    return f"{where} has no {name!r}; it has {shown}.{meant}"
