"""Tables in files, CSV, TSV or Parquet, as columns by name, and what a column holds; with the standard library and numpy.

A CSV file has a line of names first. Its separator is found: a comma, a semicolon (with decimal commas), a tab or a bar.
Parquet needs pyarrow (`pip install 'litdistill[tables]'`).
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import io
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from litdistill.utils.errors import UserError
from litdistill.utils.text import one_line

MISSING = {"", "na", "n/a", "nan", "null", "<na>", "?", "#n/a"}  # in lower case: a value that is not there
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
SUFFIXES = (".csv", ".tsv", ".txt", ".parquet")
FEW = 8  # names in a message
CLASSES = 20  # different whole numbers at most that are taken for classes


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows of a file as texts by column; a missing value is ""."""

    path: Path
    columns: dict[str, list[str]]
    lines: Sequence[int]  # of each row in the file, counted from 1
    separator: str = ""  # "" for Parquet

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, row: int) -> str:
        """Returns where a row stands in the file, for messages."""
        return f"{'line' if self.separator else 'row'} {self.lines[row]}"

    def where(self, row: int) -> str:
        """Returns the file and the place of a row."""
        return f"{one_line(self.path)}, {self.place(row)}"

    def take(self, rows: Sequence[int]) -> Table:
        """Returns some of the rows."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return Table(self.path, columns, [self.lines[row] for row in rows], self.separator)

    def column(self, name: str, option: str) -> list[str]:
        """Returns a column. Raises `UserError`, with the nearest name, for one that is not there; `option` asked for it."""
        if name not in self.columns:
            raise UserError(f"{option}={name}: {one_line(self.path)} has no such column; {meant(name, self.columns)}")
        return self.columns[name]


def meant(name: str, known: Sequence[str] | dict[str, list[str]]) -> str:
    """Returns "did you mean age?", or the names that there are."""
    lower = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), lower, 1)
    return f"did you mean {one_line(lower[near[0]])}?" if near else f"there are {listed(list(known))}."


def listed(names: Sequence[str]) -> str:
    """Returns the first names, and how many more there are."""
    shown = ", ".join(one_line(name) for name in names[:FEW])
    return shown + (f" and {len(names) - FEW:,} more" if len(names) > FEW else "")


# -- files -------------------------------------------------------------------------------------------------------------


def read_table(path: str | Path, option: str = "data.root") -> Table:
    """Reads a file of rows. `option`: who names it, for messages.

    Raises `UserError` for a missing or empty file, one of another kind or encoding, without a line of names, with a name twice
    or with lines of different lengths.
    """
    path = Path(path)
    if not path.is_file():
        beside = [file.name for file in path.parent.glob("*") if file.suffix.lower() in SUFFIXES]
        near = difflib.get_close_matches(path.name, beside, 1)
        hint = f" Did you mean {one_line(path.parent / near[0])}?" if near else ""
        raise UserError(f"{option}={one_line(path)}: there is no such file.{hint}")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"{option}={one_line(path)}: a table is a .csv, .tsv or .parquet file, with the names of its columns."
        )
    table = _parquet(path) if path.suffix.lower() == ".parquet" else _csv(path)
    if not len(table):
        raise UserError(f"{one_line(path)} has no row of values. Fill it, or name another file.")
    return table


def _csv(path: Path) -> Table:
    text = _decoded(path)
    first = next((line for line in text.splitlines() if line.strip()), "")
    if not first:
        raise UserError(f"{one_line(path)} is empty. Fill it, or name another file.")
    separator = "\t" if path.suffix.lower() == ".tsv" else max(SEPARATORS, key=lambda s: len(_split(first, s)))
    names: list[str] = []
    rows, lines = [], []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    try:
        for fields in reader:
            if not any(field.strip() for field in fields):
                continue
            if not names:
                names = _names([field.strip() for field in fields], path, separator)
                continue
            if len(fields) != len(names):
                raise UserError(
                    f"{one_line(path)}, line {reader.line_num}: {len(fields)} values for {len(names)} columns, separated by "
                    f"{SEPARATORS[separator]}. Mend that line; a value with a separator in it stands in quotes."
                )
            rows.append(["" if (value := field.strip()).lower() in MISSING else value for field in fields])
            lines.append(reader.line_num)
    except csv.Error as error:
        raise UserError(f"{one_line(path)}, line {reader.line_num}: {error}. Save it as CSV again.") from error
    columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    return Table(path, columns, lines, separator)


def _split(line: str, separator: str) -> list[str]:
    return next(csv.reader([line], delimiter=separator), [])


def _decoded(path: Path) -> str:
    """Returns a file's text: UTF-8, or UTF-16 with its mark. Raises `UserError` for another encoding, which cannot be known."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{one_line(path)} cannot be read: {error.strerror}.") from error
    try:
        return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        name = one_line(path.name)
        raise UserError(
            f"{one_line(path)}, line {line}: byte {content[error.start]:#x} is no UTF-8. Save it as UTF-8; from Windows, "
            f"iconv -f WINDOWS-1252 -t UTF-8 {name} > utf8_{name}"
        ) from error


def _names(names: list[str], path: Path, separator: str) -> list[str]:
    if all(_is_number(name) for name in names):
        raise UserError(
            f"{one_line(path)} starts with numbers: its first line must hold the names of the columns, separated by "
            f"{SEPARATORS[separator]}."
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(
            f"{one_line(path)} has {Counter(names)[twice[0]]} columns called '{one_line(twice[0])}'. Rename them."
        )
    if "" in names:
        names = [name or f"column {i + 1}" for i, name in enumerate(names)]  # as pandas writes an index
    return names


def _parquet(path: Path) -> Table:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{one_line(path)}: Parquet is read by pyarrow: pip install 'litdistill[tables]'. Or save it as CSV."
        ) from error
    try:
        found = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{one_line(path)} is damaged, or no Parquet file: {str(error).splitlines()[0]}") from error
    columns = {}
    for name, column in zip(found.column_names, found.columns, strict=True):
        if pyarrow.types.is_nested(column.type):
            raise UserError(
                f"{one_line(path)}: column {one_line(name)} holds {column.type}; a value is a number or a text."
            )
        columns[str(name)] = [_text(value) for value in column.to_pylist()]
    return Table(path, columns, range(1, found.num_rows + 1))


def _text(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    text = str(int(value)) if isinstance(value, bool) else str(value)
    return "" if text.strip().lower() in MISSING else text


# -- what a column holds -----------------------------------------------------------------------------------------------


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text


def number(text: str, separator: str = "") -> float:
    """Returns the number of a text, NaN for "". In a file with semicolons a comma may be the decimal point."""
    if text == "":
        return math.nan
    if separator == ";" and "," in text and "." not in text:
        text = text.replace(",", ".")
    if "_" in text:
        raise ValueError(text)
    return float(text)


def numbers(table: Table, name: str) -> np.ndarray | None:
    """Returns a column as (N,) float64, NaN where a value is missing; None for a column of texts.

    Raises `UserError` for a column most of whose values are numbers and some are texts, and for an infinite number.
    """
    found, texts, shown = np.full(len(table), math.nan), [], one_line(name)
    for row, text in enumerate(table.columns[name]):
        try:
            found[row] = number(text, table.separator)
        except ValueError:
            texts.append(row)
    if (wrong := np.isinf(found)).any():
        row = int(wrong.argmax())
        raise UserError(
            f"{table.where(row)}: {shown} is {one_line(table.columns[name][row])}, and no finite number. Mend it, or leave it "
            "empty as a missing value."
        )
    given = len(table) - sum(text == "" for text in table.columns[name])
    if len(texts) * 2 > given:
        return None
    if texts:
        raise UserError(
            f"{table.where(texts[0])}: {shown} is '{one_line(table.columns[name][texts[0]])}', and {given - len(texts):,} of "
            f"its {given:,} values are numbers ({len(texts):,} are not). Mend "
            f"{'it' if len(texts) == 1 else 'them'}, or read the column as categories: data.categorical=[{shown}]."
        )
    return found


def distinct(values: Sequence[str]) -> list[str]:
    """Returns the different texts that are not missing, numbers by size and texts by alphabet."""
    found = {value for value in values if value != ""}
    if all(_is_number(value) for value in found):
        return sorted(found, key=lambda value: (float(value), value))
    return sorted(found)
