"""From the columns of a table to a network's features, (N, F) float32: numbers as they are, categories one-hot or as codes.

An `Encoding` is made of the training rows. Its plain values travel with an exported file, so that `predict` takes a user's own
table with columns in any order. It needs numpy alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from litdistill.data.columns import Table, distinct, listed, number, numbers
from litdistill.utils.errors import UserError
from litdistill.utils.text import one_line
from litdistill.utils.units import quantity

ENCODINGS = ("onehot", "ordinal")
LIKE_IDS = 0.5  # a column of texts is refused where more of its rows than this share have a text of their own ...
FEWEST = 20  # ... and these are more


class Column(NamedTuple):
    """A column that a network reads."""

    name: str
    categories: tuple[str, ...] | None = None  # None: a number
    fill: float | str | None = None  # stands in for a missing value; None: a missing value is refused


class Encoding(NamedTuple):
    """How the columns of a table become features, in this order."""

    columns: tuple[Column, ...]
    ordinal: bool = False  # a category is its place in the list, and not a feature of its own

    @property
    def features(self) -> list[str]:
        """Returns the names of the features."""
        return [name for column in self.columns for name in self._of(column)]

    def _of(self, column: Column) -> list[str]:
        if column.categories is None or self.ordinal:
            return [column.name]
        return [f"{column.name}={category}" for category in column.categories]

    @property
    def categories(self) -> list[int]:
        """Returns for each feature how many categories its codes are of; 0 for a number."""
        counts = [len(c.categories) if c.categories is not None and self.ordinal else 0 for c in self.columns]
        return counts if self.ordinal else [0] * len(self.features)

    def options(self) -> dict[str, Any]:
        """Returns plain values from which `from_options` makes the encoding again."""
        columns = []
        for column in self.columns:
            kept: dict[str, Any] = {"name": column.name}
            if column.categories is not None:
                kept["categories"] = list(column.categories)
            if column.fill is not None:
                kept["fill"] = column.fill
            columns.append(kept)
        return {"columns": columns, "encode": ENCODINGS[self.ordinal]}


def from_options(options: Mapping[str, Any]) -> Encoding:
    """Returns the encoding of `Encoding.options`. Raises `UserError` for anything else: a manifest may be anybody's."""
    try:
        columns = []
        for column in options["columns"]:
            name, categories, fill = str(column["name"]), column.get("categories"), column.get("fill")
            if fill is not None and (
                not isinstance(fill, str) if categories is not None else type(fill) not in (int, float)
            ):
                raise ValueError(f"fill of {one_line(name)}")
            columns.append(Column(name, None if categories is None else tuple(map(str, categories)), fill))
        return Encoding(tuple(columns), ENCODINGS.index(options["encode"]) == 1)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"The manifest's modality describes no table ({error}). Export the run again.") from error


def fit(
    table: Table, names: Sequence[str], categorical: Sequence[str] = (), fill: bool = False, ordinal: bool = False
) -> Encoding:
    """Returns the encoding of the columns `names` by these rows: those of texts, and `categorical`, are categories.

    `fill`: a missing number is the mean of the others, a missing category the most frequent.
    Raises `UserError` for a column without a value, and for texts of which nearly each row has its own.
    """
    columns = []
    for name in names:
        texts, shown = [text for text in table.columns[name] if text != ""], one_line(name)
        if not texts:
            raise UserError(f"{one_line(table.path)}: column {shown} is empty. Leave it out: data.ignore=[{shown}].")
        found = None if name in categorical else numbers(table, name)
        if found is not None:
            columns.append(Column(name, None, float(np.nanmean(found)) if fill else None))
            continue
        kinds = distinct(texts)
        if len(kinds) > max(FEWEST, LIKE_IDS * len(texts)) and name not in categorical:
            raise UserError(
                f"{one_line(table.path)}: column {shown} has {len(kinds):,} different texts in {len(texts):,} rows, as a name "
                f"or an id has. Leave it out, data.ignore=[{shown}], or force it: data.categorical=[{shown}]."
            )
        often = min(Counter(texts).items(), key=lambda item: (-item[1], item[0]))[0]
        columns.append(Column(name, tuple(kinds), often if fill else None))
    return Encoding(tuple(columns), ordinal)


class Unknown(NamedTuple):
    """A category that the training rows do not have."""

    column: str
    category: str
    row: int  # the first with it
    rows: int  # how many there are


def encode(encoding: Encoding, table: Table, remedy: str) -> tuple[np.ndarray, list[Unknown]]:
    """Returns the features (N, F) float32 of a table's rows, and the categories that the encoding does not know.

    These have no feature one-hot, and as a code the number after the last. `remedy`: the end of a message on missing values.
    Raises `UserError` for missing columns and values, and for texts in a column of numbers.
    """
    place = _places(encoding, table)
    features, unknown = [], []
    for column in encoding.columns:
        texts = table.columns[place[column.name]]
        gaps = [row for row, text in enumerate(texts) if text == ""]
        if gaps and column.fill is None:
            raise UserError(missing_values(table, place[column.name], gaps, remedy))
        if column.categories is None:
            features.append(_numbers(table, place[column.name], column.fill)[:, None])
            continue
        code_of = {category: i for i, category in enumerate(column.categories)}
        last = len(column.categories)
        codes = np.array(
            [code_of.get(text if text != "" else str(column.fill), last) for text in texts], dtype=np.int64
        )
        features.append(codes[:, None] if encoding.ordinal else np.eye(last + 1)[codes, :last])
        new = Counter(text for text in texts if text != "" and text not in code_of)
        unknown += [Unknown(column.name, text, texts.index(text), count) for text, count in new.items()]
    with np.errstate(over="ignore"):
        found = np.concatenate(features, axis=1).astype(np.float32)
    if (wrong := ~np.isfinite(found)).any():
        row, feature = map(int, np.argwhere(wrong)[0])
        raise UserError(
            f"{table.where(row)}: {one_line(encoding.features[feature])} is beyond the numbers of float32. Mend it."
        )
    return found, unknown


def missing_values(table: Table, name: str, rows: Sequence[int], remedy: str) -> str:
    """Returns the message on a column's missing values."""
    verb = "is" if len(rows) == 1 else "are"
    return (
        f"{one_line(table.path)}: {quantity(len(rows), 'value')} of column {one_line(name)} {verb} missing, first in "
        f"{table.place(rows[0])}. {remedy}"
    )


def _numbers(table: Table, name: str, fill: float | str | None) -> np.ndarray:
    found = numbers(table, name)
    if found is None:
        row = next(row for row, text in enumerate(table.columns[name]) if text != "" and not _is_number(table, text))
        raise UserError(
            f"{table.where(row)}: {one_line(name)} is '{one_line(table.columns[name][row])}', and must be a number."
        )
    return found if fill is None else np.where(np.isnan(found), float(fill), found)


def _is_number(table: Table, text: str) -> bool:
    try:
        return math.isfinite(number(text, table.separator))
    except ValueError:
        return False


def _places(encoding: Encoding, table: Table) -> dict[str, str]:
    """Returns the table's name of each column: the same, or the only one that differs in its case.

    Raises `UserError` where a column lacks.
    """
    lower: dict[str, list[str]] = {}
    for name in table.columns:
        lower.setdefault(name.lower(), []).append(name)
    place, lacking = {}, []
    for column in encoding.columns:
        same = lower.get(column.name.lower(), [])
        if column.name in table.columns or len(same) == 1:
            place[column.name] = column.name if column.name in table.columns else same[0]
        else:
            lacking.append(column.name)
    if lacking:
        other = [name for name in table.columns if name not in place.values()]
        beside = f" It has {listed(other)} besides." if other else ""
        raise UserError(
            f"{one_line(table.path)} lacks {quantity(len(lacking), 'column')} of {len(encoding.columns)}: {listed(lacking)}."
            f"{beside}"
        )
    return place


def described(unknown: Sequence[Unknown], table: Table) -> Iterator[str]:
    """Yields a line for each column with unknown categories."""
    for name in dict.fromkeys(one.column for one in unknown):
        some = [one for one in unknown if one.column == name]
        count = sum(one.rows for one in some)
        yield (
            f"{one_line(table.path)}: {quantity(count, 'row')} with a {one_line(name)} that no training row has "
            f"({listed([one.category for one in some])}; first {table.place(some[0].row)}): what they mean is not known."
        )
