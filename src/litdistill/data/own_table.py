"""A table of one's own: a CSV, TSV or Parquet file with the names of its columns (`litdistill.data.columns`).

    python scripts/train.py data=table data.root=patients.csv data.target=diagnosis net@student=mlp net@teacher=mlp

How columns become features (`litdistill.data.encoding`) is in an exported file's manifest, so that `predict` takes a table of
the same columns in any order.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from litdistill.data import encoding as enc
from litdistill.data.columns import Table, listed, numbers, read_table
from litdistill.data.folder import say
from litdistill.data.layout import split_name
from litdistill.data.tables import SHOWN, in_words
from litdistill.data.targets import Targets, read_targets
from litdistill.data.tensors import TensorData, TensorSource, TensorSplit, held_out_test
from litdistill.types import has_label
from litdistill.utils.distributed import is_first_rank
from litdistill.utils.errors import UserError
from litdistill.utils.modality import TABLE, Modality
from litdistill.utils.text import one_line
from litdistill.utils.units import quantity

log = logging.getLogger(__name__)


class Asked(NamedTuple):
    """What the user says of the columns of a table; see `table`."""

    target: list[str]
    split: str | None
    ignore: list[str]
    categorical: list[str]
    missing: str | None
    encode: str
    classes: Sequence[object] | None
    task: str | None


def table(
    root: str | Path | None,
    target: str | Sequence[str] | None,
    test: str | Path | None = None,
    split: str | None = None,
    ignore: Sequence[str] | None = None,
    categorical: Sequence[str] | None = None,
    missing: Literal["mean", "drop"] | None = None,
    encode: Literal["onehot", "ordinal"] = "onehot",
    classes: Sequence[object] | None = None,
    task: str | None = None,
    **options: Any,
) -> TensorData:
    """Returns a table of one's own: a CSV, TSV or Parquet file with the names of its columns.

    Args:
        root: the file to train on. target: its column of classes or numbers, or several of 0 and 1, or of numbers.
        test: a file of test rows. split: a column of train, val and test instead. Without either a fifth is drawn at random, of
            each class, the same for every seed.
        ignore: columns that are left out. categorical: columns of numbers that are categories, such as postal codes.
        missing: what to do about missing values: None refuses them, "mean" puts the training rows' mean, or most frequent
            category, in their place, "drop" leaves such rows out.
        encode: of a category: a feature of 0 or 1 for each ("onehot"), or its place in the list ("ordinal").
        classes: the labels, in the order of the network's outputs; those that occur unless given.
        task: classification, multilabel or regression, in place of what the targets look like.
        options: those of `TensorData`.

    A training row without a class is trained on without a label. Raises `UserError` for whatever does not fit.
    """
    if root is None or target is None:
        raise UserError("data=table needs a file and its column of labels: data.root=<table.csv> data.target=<column>.")
    if missing not in (None, "mean", "drop") or encode not in enc.ENCODINGS:
        raise UserError(
            f"data.missing={missing} must be null, mean or drop, and data.encode={encode} onehot or ordinal."
        )
    if test is not None and split is not None:
        raise UserError("data.test and data.split both give the test rows: set one of them, and the other to null.")
    named = [target] if isinstance(target, str) else list(target)
    asked = Asked(named, split, list(ignore or ()), list(categorical or ()), missing, encode, classes, task)
    source, found, standardize = _read(Path(root), None if test is None else Path(test), asked)
    return TensorData(functools.partial(_given, source), "table", found, standardize=standardize, **options)


def _given(source: TensorSource) -> TensorSource:
    return source


class Parts(NamedTuple):
    """The rows of a table by split."""

    train: Table  # validation rows included
    targets: Tensor
    test: Table
    test_targets: Tensor
    held: list[int]  # rows of `train` to validate on; none: drawn
    how: str  # who says which rows are the test set


def _read(root: Path, test: Path | None, asked: Asked) -> tuple[TensorSource, str, list[bool]]:
    """Returns the data set, its task, and which features are standardized: all but the codes of categories."""
    whole = read_table(root)
    names = _features(whole, asked)
    count = len(whole)
    whole = _without_gaps(whole, names, asked)
    for name in names:
        if name not in asked.categorical:
            numbers(whole, name)  # which refuses a text among numbers
    targets = read_targets(whole, asked.target, asked.task, asked.classes)
    parts = _parts(whole, targets, asked) if test is None else _two_files(whole, test, names, targets, asked)
    _refuse_without_label(parts, asked)
    encoding = enc.fit(parts.train, names, asked.categorical, asked.missing == "mean", asked.encode == "ordinal")
    remedy = "Fill them, or set data.missing=mean (the training rows' mean) or data.missing=drop (without those rows)."
    train, _ = enc.encode(encoding, parts.train, remedy)
    tested, unknown = enc.encode(encoding, parts.test, remedy)
    inputs = {"train": torch.from_numpy(train), "test": torch.from_numpy(tested)}
    _say(root, count - len(whole), parts, encoding, targets, asked)
    _warn(parts, inputs, encoding, [*enc.described(unknown, parts.test)])
    source = TensorSource(
        TensorSplit(inputs["train"], parts.targets),
        TensorSplit(inputs["test"], parts.test_targets),
        targets.names,
        Modality(TABLE, encoding.options()),
        torch.tensor(parts.held) if parts.held else None,
        {"categories": encoding.categories},
        in_words(inputs, encoding.features, {"train": parts.train, "test": parts.test}),
    )
    return source, targets.task, [codes == 0 for codes in encoding.categories]


def _features(table: Table, asked: Asked) -> list[str]:
    """Returns the columns that the network reads. Raises `UserError` for an option's column that is not there."""
    split = [] if asked.split is None else [asked.split]
    for option, given in (("target", asked.target), ("split", split), ("ignore", asked.ignore)):
        for name in given:
            table.column(name, f"data.{option}")
    left = [name for name in table.columns if name not in (*asked.target, *split, *asked.ignore)]
    for name in asked.categorical:
        table.column(name, "data.categorical")
        if name not in left:
            raise UserError(
                f"data.categorical={one_line(name)}: this column is a target, a split or ignored, and no feature."
            )
    if not left:
        raise UserError(
            f"{one_line(table.path)} has no column beside {listed(list(table.columns))}, which are no features."
        )
    return left


def _without_gaps(table: Table, names: Sequence[str], asked: Asked) -> Table:
    """Returns the table without the rows that lack a feature or a target, where such rows are to be dropped."""
    if asked.missing != "drop":
        return table
    needed = [table.columns[name] for name in (*names, *asked.target)]
    kept = [row for row in range(len(table)) if all(column[row] != "" for column in needed)]
    if not kept:
        raise UserError(
            f"{one_line(table.path)}: every row lacks a value, and data.missing=drop leaves none. Set data.missing=mean."
        )
    return table.take(kept)


def _two_files(table: Table, test: Path, names: Sequence[str], targets: Targets, asked: Asked) -> Parts:
    """Returns the rows of the file to train on and of the test file, which has the same columns."""
    tested = read_table(test, "data.test")
    lacking = [name for name in (*names, *asked.target) if name not in tested.columns]
    if lacking:
        raise UserError(
            f"data.test={one_line(test)} lacks {quantity(len(lacking), 'column')} of {one_line(table.path)}: {listed(lacking)}."
        )
    tested = _without_gaps(tested, names, asked)
    classes = targets.names if targets.task == "classification" else None
    found = read_targets(tested, asked.target, targets.task, classes, alone=False)
    values, test_values = torch.from_numpy(targets.values), torch.from_numpy(found.values)
    return Parts(table, values, tested, test_values, [], f"the test set is {one_line(test)}")


def _parts(table: Table, targets: Targets, asked: Asked) -> Parts:
    """Returns the rows by the column of splits, or with a fifth of them as a test set at random."""
    values = torch.from_numpy(targets.values)
    held: list[int] = []
    if asked.split is None:
        tested, rest = (ids.tolist() for ids in held_out_test(values))
        how = "the test set is a fifth, drawn at random; data.test or data.split name another"
    else:
        by_name: dict[str, list[int]] = {"train": [], "val": [], "test": []}
        for row, text in enumerate(table.columns[asked.split]):
            name = split_name(text)
            if name is None:
                raise UserError(
                    f"{table.where(row)}: {one_line(asked.split)} is '{one_line(text)}', and must be train, val or test."
                )
            by_name[name].append(row)
        tested, rest = by_name["test"], sorted(by_name["train"] + by_name["val"])
        if not by_name["train"] or not tested:
            raise UserError(
                f"data.split={one_line(asked.split)} needs rows of train and of test, and one of them has none."
            )
        place = {row: i for i, row in enumerate(rest)}
        held, how = [place[row] for row in by_name["val"]], f"by column {one_line(asked.split)}"
    return Parts(table.take(rest), values[rest], table.take(tested), values[tested], held, how)


def _refuse_without_label(parts: Parts, asked: Asked) -> None:
    """Raises `UserError` for rows without a target, but of training rows without a class."""
    for table, targets, allowed in (
        (parts.train, parts.targets, not parts.held),
        (parts.test, parts.test_targets, False),
    ):
        without = (~has_label(targets)).nonzero().flatten().tolist()
        if without and not (allowed and targets.ndim == 1):
            name = next(name for name in asked.target if table.columns[name][without[0]] == "")
            raise UserError(
                enc.missing_values(table, name, without, "Fill them, remove these rows, or set data.missing=drop.")
            )


# -- what is said ------------------------------------------------------------------------------------------------------


def _say(root: Path, dropped: int, parts: Parts, encoding: enc.Encoding, targets: Targets, asked: Asked) -> None:
    """Logs what was read, the targets, and how rows were split."""
    of_texts = [column for column in encoding.columns if column.categories is not None]
    kinds = [quantity(len(encoding.columns) - len(of_texts), "number")]
    if of_texts:
        shown = ", ".join(f"{one_line(c.name)} {len(c.categories or ())}" for c in of_texts[:SHOWN])
        kinds.append(f"{quantity(len(of_texts), 'category')} ({shown}), {asked.encode}")
    total = len(parts.train) + (len(parts.test) if parts.test.path == parts.train.path else 0)
    lines = [f"Read {one_line(root)}: {total:,} rows of {' and '.join(kinds)}."]
    if asked.ignore:
        lines.append(f"Left out: {listed(asked.ignore)} (data.ignore).")
    if dropped:
        lines.append(
            f"{quantity(dropped, 'row')} with a missing value {'is' if dropped == 1 else 'are'} left out (data.missing=drop)."
        )
    gaps = {
        c.name: parts.train.columns[c.name].count("") + parts.test.columns[c.name].count("") for c in encoding.columns
    }
    if filled := [f"{one_line(name)} {count:,}" for name, count in gaps.items() if count]:
        lines.append(
            f"Missing values that get the training rows' mean, or most frequent category: {', '.join(filled[:SHOWN])}."
        )
    lines += targets.said
    if without := int((~has_label(parts.targets)).sum()):
        lines.append(
            f"{quantity(without, 'training row')} without a class: only the teacher says what they are (data.only_labelled)."
        )
    validated = f", {len(parts.held):,} of them to validate" if parts.held else " and validate (data.val_size)"
    lines.append(f"Splits: {len(parts.train):,} to train on{validated}, {len(parts.test):,} to test ({parts.how}).")
    say(lines, "")


_WARNED: set[str] = set()


def _warn(parts: Parts, inputs: dict[str, Tensor], encoding: enc.Encoding, lines: list[str]) -> None:
    """Warns, once in a process, of columns that teach nothing or too much, and of test rows that are training rows."""
    train = inputs["train"]
    constant = [name for name, column in zip(encoding.features, train.T, strict=True) if (column == column[0]).all()]
    if constant:
        lines.append(
            f"Of one value in every training row, and so without use: {listed(constant)}. data.ignore=[…] leaves columns out."
        )
    for column, values in zip(encoding.features, train.T, strict=True):
        ordered = values.sort().values
        if (
            len(ordered) > SHOWN
            and (ordered == ordered.round()).all()
            and (ordered.diff() > 0).all()
            and "id" in column.lower()
        ):
            lines.append(
                f"{one_line(column)} has another whole number in every row, as an id has: data.ignore=[{one_line(column)}]."
            )
    seen = {row.tobytes(): i for i, row in enumerate(train.numpy())}
    shared = [(i, seen[row.tobytes()]) for i, row in enumerate(inputs["test"].numpy()) if row.tobytes() in seen]
    if shared:
        i, j = shared[0]
        lines.append(
            f"{len(shared):,} of {len(parts.test):,} test rows have the same features as a training row, such as "
            f"{parts.test.where(i)}, and {parts.train.where(j)}. What is measured on them is too good to be true: remove them "
            "from one of the two."
        )
    for line in lines:
        if line not in _WARNED and is_first_rank():
            log.warning("%s", line)
        _WARNED.add(line)
