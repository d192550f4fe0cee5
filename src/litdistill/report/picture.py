"""The picture of a table: the test metric of every run as a dot, and each mean as the table has it, in its own words."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from litdistill.evaluation.controls import is_distilled, is_measured
from litdistill.report.tables import by_data, data_title, kinds, label, tell_apart
from litdistill.utils.units import axis, factor, measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABEL = 36  # characters on a line of a label: beside it stands the mean
INK, QUIET = "#1d2127", "#6b7280"  # of what is not distilled


class Line(NamedTuple):
    """A row of the picture: its label, the metric of each run, its mean as text, and what it is of."""

    label: str
    values: Sequence[float]
    text: str
    kind: str  # "teacher", "control" or "distilled"


def lines(found: Sequence[dict[str, Any]]) -> list[Line]:
    """Returns the rows of the picture of one table's summaries: teachers first, then each kind of student."""
    metric = found[0]["metric"]["name"]
    by, grouped = factor(metric), kinds(found)
    teachers = {r["teacher"]["sha256"]: r["teacher"] for r in found if is_measured(r["teacher"])}
    own = {run["student"]["sha256"] for run in found}
    made = [(f"teacher {t['name']}", [t["test"][metric]], "teacher") for sha, t in teachers.items() if sha not in own]
    names = tell_apart([label(k[0], grouped) for k in grouped], [k[0]["student"]["name"] for k in grouped])
    for name, runs in zip(names, grouped, strict=True):
        values = [run["student"]["test"][metric]["best"] for run in runs]
        made.append((name, values, "distilled" if is_distilled(runs[0]) else "control"))
    return [Line(name, [by * v for v in values], str(measured(metric, values)), kind) for name, values, kind in made]


def picture(found: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Writes the picture of these summaries as a PNG. Its description, a text in the file, is what it shows as JSON."""
    from litdistill.tasks.figures import save_figure

    tables = by_data(found)
    shown = {data_title(runs): {line.label: line.text for line in lines(runs)} for runs in tables}
    save_figure(draw(tables), path, dpi=200, metadata={"Description": json.dumps(shown)})


def draw(tables: Sequence[Sequence[dict[str, Any]]]) -> Figure:
    """Returns the figure, a panel for each table. Its text is legible on a screen of 390 pixels."""
    from litdistill.tasks.figures import new_figure

    rows = [lines(runs) for runs in tables]
    heights = [0.75 + 0.46 * _places(panel)[-1] + 0.46 + (0.3 if len(tables) > 1 else 0) for panel in rows]
    figure = new_figure(4.8, sum(heights))
    panels = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, runs, panel in zip(panels, tables, rows, strict=True):
        _panel(axes, panel)
        metric = runs[0]["metric"]
        better = ", less is better" if metric["direction"] == "min" else ""
        axes.set_xlabel(f"test {axis(metric['name'])}{better}; a dot a run, a bar the mean", fontsize=9)
        if len(tables) > 1:
            axes.set_title(str(runs[0]["data"].get("name") or "data"), fontsize=10, loc="left", parse_math=False)
    return figure


def _wrapped(label: str) -> str:
    return "\n".join(textwrap.wrap(label, LABEL)) or label


def _places(rows: Sequence[Line]) -> list[float]:
    """Returns the height of each row's dots, from 0 downwards; a label of several lines needs more room."""
    more = [0.42 * _wrapped(row.label).count("\n") for row in rows]
    return [i + sum(more[: i + 1]) for i in range(len(rows))]


def _panel(axes: Axes, rows: Sequence[Line]) -> None:
    from litdistill.tasks.figures import STUDENT_COLOR, TEACHER_COLOR

    colors = {"teacher": TEACHER_COLOR, "control": QUIET, "distilled": STUDENT_COLOR}
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # a line behind the words does not cross them
    places = _places(rows)
    for y, row in zip(places, rows, strict=True):
        values, color = [v for v in row.values if math.isfinite(v)], colors[row.kind]
        if row.kind == "teacher":
            axes.plot(values, [y] * len(values), "*", color=color, markersize=11, zorder=3)
            for value in values:
                axes.axvline(value, color=color, linestyle="--", linewidth=1, zorder=1)
        elif values:
            mean = sum(values) / len(values)
            axes.plot(values, [y] * len(values), "o", color=color, alpha=0.6, markersize=6, zorder=3)
            axes.plot([mean, mean], [y - 0.17, y + 0.17], color=color, linewidth=3, zorder=4)
        bold: dict[str, Any] = {"fontsize": 10, "va": "bottom", "bbox": paper, "parse_math": False, "zorder": 5}
        bold |= {"color": color, "weight": "bold"} if row.kind == "distilled" else {"color": INK}
        axes.text(0.0, y - 0.24, _wrapped(row.label), ha="left", transform=axes.get_yaxis_transform(), **bold)
        axes.text(1.0, y - 0.24, row.text, ha="right", transform=axes.get_yaxis_transform(), **bold)
    finite = [v for row in rows for v in row.values if math.isfinite(v)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_xlim(low - margin, high + margin)
    axes.set_ylim(places[-1] + 0.4, places[0] - 0.42 * _wrapped(rows[0].label).count("\n") - 0.75)
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
