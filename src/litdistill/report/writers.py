"""Writes rows of `tables.records` or `pivot.pivot`: for the terminal, as Markdown, CSV or LaTeX."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from litdistill.report.blocks import plain
from litdistill.report.tables import LABELS, Cell
from litdistill.utils.errors import UserError
from litdistill.utils.text import markdown_table
from litdistill.utils.units import SHARES, Number, decimals, factor, heading

ADDED = "over labels alone"  # what a teacher adds: the difference from the control
LEFT = (*LABELS, "data")  # left-aligned columns
Rows = Sequence[dict[str, Cell]]


def table(rows: Rows, title: str = "") -> Table:
    """Returns the rows as a table for the terminal, with a line between groups."""
    shown = Table(title=Text(title, "bold") if title else None, title_justify="left")
    for column in rows[0]:
        shown.add_column(Text(_on_lines(column)), justify="left" if column in LEFT else "right", overflow="fold")
    ends = group_ends(rows)
    for i, row in enumerate(rows):
        shown.add_row(*(Text(str(cell)) for cell in row.values()), end_section=i in ends)  # Text parses no markup
    return shown


def _on_lines(column: str) -> str:
    """Returns the heading of a pair's column on three lines: teacher, student, figure."""
    return "\n".join(column.rsplit(", ", 1)).replace(" → ", "\n→ ") if _pair(column) else column


def _pair(column: str) -> str:
    """Returns the pair that a column of a pivot belongs to; empty for another column."""
    pair, _, figure = column.rpartition(", ")
    return pair if figure == ADDED or figure.startswith("test ") else ""


def group_ends(rows: Rows) -> set[int]:
    """Returns the indices of the rows that end a group: of teachers, or of one student or number of training samples."""
    key = "model" if "model" in rows[0] else "trained on"
    group = [(row["method"] == "teacher", str(row[key]) if row["method"] != "teacher" else "") for row in rows]
    return {i for i in range(len(rows) - 1) if group[i] != group[i + 1]}


def fitting(rows: Rows, console: Console) -> list[dict[str, Cell]]:
    """Returns the rows with as many columns as the console has room for, unbroken.

    Columns are left out from the right; what names a row and the first test metric stay.
    """
    kept, unlimited = [dict(row) for row in rows], console.options.update(width=10_000)
    stay = {*LABELS, next((name for name in rows[0] if "test " in name), "")}
    for column in reversed(list(rows[0])):
        if console.measure(table(kept), options=unlimited).maximum <= console.width:
            break
        if column not in stay:
            kept = [{name: cell for name, cell in row.items() if name != column} for row in kept]
    return kept


def ending(out: str | None) -> str:
    """Returns the ending of a file to write tables or the page to; empty for a folder. Raises `UserError` for another."""
    path = Path(out or "")
    if not path.suffix or str(out).endswith("/") or path.is_dir():
        return ""
    if path.suffix not in (*FORMATS, ".html"):
        raise UserError(
            f"out={out}: nothing is written with the ending {path.suffix}. Tables end in {', '.join(FORMATS)}; the page is "
            f"a file that ends in .html, or a folder: out={path.with_suffix('')}/."
        )
    return path.suffix


def markdown(rows: Rows) -> str:
    """Returns the rows as a Markdown table."""
    head = list(rows[0])
    return markdown_table(head, [list(row.values()) for row in rows], sum(name in LEFT for name in head)) + "\n"


# -- CSV ---------------------------------------------------------------------------------------------------------------


def csv_text(tables: Sequence[tuple[str, Rows]]) -> str:
    """Returns the rows of all tables, given with their titles, as one CSV table for programs.

    A standard deviation has a column of its own, figures have the digits of the other tables and no thousands separators.
    """
    short = [title.split(":")[0] for title, _ in tables]
    names = [name if short.count(name) == 1 else title for name, (title, _) in zip(short, tables, strict=True)]
    named: list[dict[str, Cell]] = [
        {"data": name, **row} for name, (_, rows) in zip(names, tables, strict=True) for row in rows
    ]
    columns: dict[str, None] = {}
    for row in named:
        for name, cell in row.items():
            columns |= dict.fromkeys(_values(name, cell))
    # A deviation stands behind its mean, also where the first table has none.
    order = [n for name in columns if not name.endswith(" sd") for n in (name, f"{name} sd") if n in columns]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(map(_inert, order))
    for row in named:
        values: dict[str, str] = {}
        for name, cell in row.items():
            values |= _values(name, cell)
        writer.writerow([values.get(name, "") for name in order])
    return file.getvalue()


def _values(name: str, cell: Cell) -> dict[str, str]:
    """Returns the columns of one cell, with their texts."""
    if not isinstance(cell, Number):
        return {"time, s" if name == "time" else name: _inert(cell)}
    values = {f"{name}, {cell.unit}" if cell.unit else name: f"{cell.mean:.{cell.digits}f}"}
    if cell.deviation is not None:
        values[f"{name} sd"] = f"{cell.deviation:.{cell.digits}f}"
    return values


def _inert(text: str) -> str:
    """Returns a text that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


# -- LaTeX -------------------------------------------------------------------------------------------------------------

ESCAPES = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}"},
    **{"±": r"$\pm$", "→": r"$\rightarrow$", "−": "$-$", "²": r"$^2$", "×": r"$\times$"},
}


def escape_latex(text: str) -> str:
    """Returns the text as LaTeX prints it, with UTF-8 input and T1 fonts."""
    return re.sub("[" + re.escape("".join(ESCAPES)) + "]", lambda found: ESCAPES[found[0]], " ".join(text.split()))


def latex(rows: Rows, title: str = "") -> str:
    r"""Returns the rows as a table environment of LaTeX with booktabs rules; `\usepackage[T1]{fontenc}` and `{booktabs}`."""
    head, ends = list(rows[0]), group_ends(rows)
    line = lambda cells: " & ".join(escape_latex(str(cell)) for cell in cells) + r" \\"  # noqa: E731
    body = [text for i, row in enumerate(rows) for text in (line(row.values()), *([r"\midrule"] if i in ends else []))]
    lines = [
        r"\begin{table}",
        r"\centering",
        *([rf"\caption{{{escape_latex(title)}}}"] if title else []),
        r"\begin{tabular}{" + "".join("l" if name in LEFT else "r" for name in head) + "}",
        *(r"\toprule", *_pairs(head), line([_figure(name) for name in head]), r"\midrule", *body, r"\bottomrule"),
        *(r"\end{tabular}", r"\end{table}"),
    ]
    return "\n".join(lines) + "\n"


def _figure(column: str) -> str:
    return column.rpartition(", ")[2] if _pair(column) else column


def _pairs(head: Sequence[str]) -> list[str]:
    """Returns the lines above a pivot's headings: each pair over its columns, and a rule below each; else none."""
    groups = [(pair, len(list(same))) for pair, same in itertools.groupby(head, _pair)]
    if not any(pair for pair, _ in groups):
        return []
    cells, rules, first = [], [], 1
    for pair, count in groups:
        cells += [rf"\multicolumn{{{count}}}{{c}}{{{escape_latex(pair)}}}"] if pair else [""] * count
        rules += [rf"\cmidrule(lr){{{first}-{first + count - 1}}}"] if pair else []
        first += count
    return [" & ".join(cells) + r" \\", " ".join(rules)]


FORMATS: dict[str, Callable[[Sequence[tuple[str, Rows]]], str]] = {  # by the ending of a file, from titles and rows
    ".md": lambda tables: "\n".join(f"**{plain(title)}**\n\n{markdown(rows)}" for title, rows in tables),
    ".csv": csv_text,
    ".tex": lambda tables: "\n".join(latex(rows, title) for title, rows in tables),
}

# -- evaluate ----------------------------------------------------------------------------------------------------------


def evaluation_table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns head and rows of the result of `evaluate`: a row for each metric, a column for each model."""
    measured = list(found["student"])
    follows = [name for name in found.get("agreement", {}) if name not in measured]
    titles = {"teacher": "teacher", "student": "student,\nbest epoch\non validation", "last": "student,\nlast epoch"}
    models = [key for key in titles if key in found]
    rows = [[heading(k), *(_precise(k, found[key].get(k)) for key in models)] for k in measured]
    for k in follows:
        rows.append([heading(k), *(_precise(k, found["agreement"][k]) if key == "student" else "" for key in models)])
    return ["on the test set", *(titles[key] for key in models)], rows


CLASSES = 20  # that the terminal shows of `by_class`


def class_table(by_class: dict[str, dict[str, dict[str, float]]]) -> tuple[list[str], list[list[str]]]:
    """Returns head and rows of what `Task.by_class` says of teacher and student: a row for each class, at most `CLASSES`, those
    that the student is worst at; the first measure of each. Empty rows without any class."""
    own, its = by_class.get("student", {}), by_class.get("teacher", {})
    if not own:
        return [], []
    name = next(key for key in next(iter(own.values())) if key != "count")
    worst = sorted(own, key=lambda c: own[c][name])[:CLASSES]
    left = f", {len(worst)}\nworst of {len(own)}" if len(worst) < len(own) else ""
    head = [
        f"class{left}",
        "in the\ntest set",
        *([f"{heading(name)},\nteacher"] if its else []),
        f"{heading(name)},\nstudent",
    ]
    models = [its, own] if its else [own]
    rows = [
        [c, f"{int(own[c]['count']):,}", *(_precise(name, one.get(c, {}).get(name)) for one in models)] for c in worst
    ]
    return head, rows


def attack_table(found: dict[str, dict[str, float]], eps: float) -> tuple[list[str], list[list[str]]]:
    """Returns head and rows of what `evaluate` finds under attack: a row for each attack, a column for each model."""
    rows = [[name, *(f"{100 * scores[name]:.2f}" for scores in found.values())] for name in found["student"]]
    return [f"accuracy %, attacked by eps = {eps:g}", *found], rows


def _precise(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{factor(name) * value:.{2 if name in SHARES else max(4, decimals(name, value))}f}"
