"""What columns of a table teach: one class a row, several labels a row, or numbers; found from their values, and said."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from litdistill.data.columns import CLASSES, FEW, Table, distinct, listed, numbers
from litdistill.utils.errors import UserError
from litdistill.utils.text import one_line
from litdistill.utils.units import quantity

TASKS = ("classification", "multilabel", "regression")
TRUTH = {"1": 1.0, "1.0": 1.0, "true": 1.0, "yes": 1.0, "0": 0.0, "0.0": 0.0, "false": 0.0, "no": 0.0}


class Targets(NamedTuple):
    """The targets of N rows."""

    task: str  # one of `TASKS`
    names: tuple[str, ...]  # of classes, labels or values
    values: np.ndarray  # (N,) int64, -1 where a row has none; or (N, outputs) float32, NaN where it has none
    said: tuple[str, ...]  # lines for the log: what was found


def find_task(table: Table, columns: Sequence[str], asked: str | None = None) -> tuple[str, str]:
    """Returns the task of these columns, and a line that says it: several columns of 0 and 1 are labels, texts and at most
    `CLASSES` different whole numbers are classes, other numbers are values.

    Raises `UserError` for columns that suit no task or not the one that is asked for.
    """
    if asked is not None and asked not in TASKS:
        near = difflib.get_close_matches(str(asked), TASKS, 1)
        raise UserError(f"data.task={asked}: one of {', '.join(TASKS)}.{f' Did you mean {near[0]}?' if near else ''}")
    many, shown = len(columns) > 1, listed(columns)
    kinds = [_kind(table, name) for name in columns]
    of_truth = all(kind == "truth" for kind in kinds)
    if many and not of_truth and "text" in kinds:
        name = columns[kinds.index("text")]
        raise UserError(
            f"data.target=[{', '.join(columns)}]: {one_line(name)} holds texts, and several columns are labels of 0 and 1, or "
            f"numbers. Name one column of classes, or leave {one_line(name)} out."
        )
    found = (
        ("multilabel" if of_truth else "regression")
        if many
        else "regression"
        if kinds[0] == "real"
        else "classification"
    )
    task = asked or found
    if (task == "classification" and many) or (task == "multilabel" and not of_truth):
        needs = "one column" if task == "classification" else "columns of 0 and 1"
        raise UserError(
            f"data.task={task} needs {needs}, and data.target=[{', '.join(columns)}] are {_described(kinds)}."
        )
    if task == "regression" and "text" in kinds:
        name = columns[kinds.index("text")]
        raise UserError(f"data.task=regression needs numbers, and {one_line(name)} holds texts.")
    other = (
        " (data.task=regression takes them as numbers)"
        if found == task == "classification" and kinds[0] != "text"
        else ""
    )
    what = {
        "classification": "one class a row" + other,
        "multilabel": f"{quantity(len(columns), 'label')} of 0 and 1 a row",
        "regression": f"{quantity(len(columns), 'number')} a row",
    }[task]
    return task, f"Target {shown}: {what}, task={task}."


def _kind(table: Table, name: str) -> str:
    """Returns what a column holds: "text", "truth" (0 and 1), "whole" (few whole numbers) or "real"."""
    given = [value for value in table.columns[name] if value != ""]
    if given and all(value.lower() in TRUTH for value in given):
        return "truth"
    found = numbers(table, name)
    if found is None:
        return "text"
    known = found[~np.isnan(found)]
    return "whole" if (known == np.round(known)).all() and len(np.unique(known)) <= CLASSES else "real"


def _described(kinds: Sequence[str]) -> str:
    words = {"text": "of texts", "truth": "of 0 and 1", "whole": "of whole numbers", "real": "of numbers"}
    return f"{len(kinds)}, " + ", ".join(f"{count} {words[kind]}" for kind, count in Counter(kinds).items())


def read_targets(
    table: Table,
    columns: Sequence[str],
    asked: str | None = None,
    classes: Sequence[object] | None = None,
    alone: bool = True,
) -> Targets:
    """Returns the targets of these columns, of the task that is `asked` for or found (`find_task`).

    `classes`: the labels in the order of the outputs; those that occur unless given. `alone`: whether the rows
    are all there are, and must hold two classes. Raises `UserError` for a label that is
    not in `classes`, for one class alone, and for a column without a value.
    """
    for name in columns:
        if not any(table.columns[name]):
            raise UserError(
                f"data.target={one_line(name)}: this column of {one_line(table.path)} is empty. Name another."
            )
    task, line = find_task(table, columns, asked)
    if task == "classification":
        return _classes(table, columns[0], classes, line, alone)
    if task == "multilabel":
        read = [[TRUTH.get(value.lower(), math.nan) for value in table.columns[name]] for name in columns]
        if wrong := [
            (name, row, value)
            for name in columns
            for row, value in enumerate(table.columns[name])
            if value != "" and value.lower() not in TRUTH
        ]:
            name, row, value = wrong[0]
            raise UserError(f"{table.where(row)}: {one_line(name)} is '{one_line(value)}', and a label is 0 or 1.")
    else:
        given = [numbers(table, name) for name in columns]
        if any(column is None for column in given):
            raise UserError(f"{one_line(table.path)}: {listed(columns)} must hold numbers, and one holds texts.")
        read = [column.tolist() for column in given if column is not None]
    return Targets(task, tuple(columns), np.array(read, dtype=np.float32).T.copy(), (line,))


def _classes(table: Table, name: str, classes: Sequence[object] | None, line: str, alone: bool) -> Targets:
    column = table.columns[name]
    names = [str(c) for c in classes] if classes is not None else distinct(column)
    place = {text: i for i, text in enumerate(names)}
    outside = [row for row, value in enumerate(column) if value != "" and value not in place]
    if outside:
        value = column[outside[0]]
        near = difflib.get_close_matches(value, names, 1)
        raise UserError(
            f"{table.where(outside[0])}: {one_line(name)} is '{one_line(value)}', which is none of the classes {listed(names)} "
            f"({len(outside):,} of {len(column):,} rows are of none){f'; did you mean {one_line(near[0])}?' if near else '.'} "
            "Mend the file, or name all classes: data.classes=[…]."
        )
    counts = Counter(value for value in column if value != "")
    if len(names) < 2 or (alone and len(counts) < 2):
        only = next(iter(counts), "")
        raise UserError(
            f"{one_line(table.path)}: every row's {one_line(name)} is '{one_line(only)}', and a classifier needs two classes. "
            "Name another column, data.target=…, or add rows of other classes."
        )
    shown = ", ".join(f"{one_line(c)} {counts[c]:,}" for c in names[:FEW])
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    values = np.array([place.get(value, -1) for value in column], dtype=np.int64)
    return Targets("classification", tuple(names), values, (line, f"{quantity(len(names), 'class')}: {shown}{more}."))
