"""The page's figures as SVG: text remains text, and has the text color of the page, in light and dark mode.

Rows differ in color (Okabe & Ito's palette without yellow, which is hardly visible on white), in marker and in number, so
that figures are readable without colors.
"""

from __future__ import annotations

import hashlib
import io
import re
import statistics
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX<>"  # with six colors, all pairs differ for 18 rows
LINES = ("-", "--", "-.", ":")
INK = "#010203"  # replaced by currentColor in the SVG; no other element has this color
TEACHER = {"color": INK, "marker": "*", "linestyle": "--"}


class Style(NamedTuple):
    number: int
    label: str
    look: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.number} {self.label}"


def styles(labels: Sequence[str], teachers: Sequence[bool]) -> list[Style]:
    """Returns the style of each row, the same in all figures."""
    found, i = [], 0
    for number, (label, teacher) in enumerate(zip(labels, teachers, strict=True), 1):
        look = TEACHER
        if not teacher:
            look = {"color": COLORS[i % 6], "marker": MARKERS[i % 9], "linestyle": LINES[i % 4]}
            i += 1
        found.append(Style(number, label, look))
    return found


# -- the figures -------------------------------------------------------------------------------------------------------


def dots(
    looks: Sequence[Style],
    values: Sequence[Sequence[float]],
    xlabel: str,
    line: float | None = None,
    form: str = ".1f",
) -> str:
    """Returns an SVG: one row per model, one dot per seed, the mean as a bar and a number; `line`: the teacher's value."""
    with figure_as_svg(5.4, 1.0 + 0.42 * len(looks)) as (_, axes, drawn):
        for row, (look, each) in enumerate(zip(looks, values, strict=True)):
            mean = statistics.mean(each)
            axes.plot(each, [row] * len(each), **point(look), markersize=6, alpha=0.7)
            axes.plot([mean, mean], [row - 0.26, row + 0.26], color=look.look["color"], linewidth=2.5)
            axes.annotate(
                f"{mean:{form}}", (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=9, color=INK
            )
        if line is not None:
            axes.axvline(line, color=INK, linestyle="--", linewidth=1, alpha=0.6)
        axes.set_yticks(range(len(looks)), [_wrapped(look.name) for look in looks], fontsize=9)
        axes.set_ylim(len(looks) - 0.5, -0.5)
        axes.set_xlabel(xlabel)
        axes.grid(axis="y", visible=False)
    return drawn[0]


def lines(
    looks: Sequence[Style], x: Sequence[float], values: Sequence[Sequence[float]], xlabel: str, ylabel: str
) -> str:
    """Returns an SVG with one line per row over common x values."""
    with figure_as_svg(5.4, 3.3 + legend_height(looks)) as (figure, axes, drawn):
        for look, y in zip(looks, values, strict=True):
            axes.plot(x, y, **look.look, markersize=5, linewidth=1.5, label=look.name)
        axes.set_xticks(list(x))
        axes.set(xlabel=xlabel, ylabel=ylabel)
        legend_below(figure, axes)
    return drawn[0]


def reliability(before: Sequence[Any], after: Sequence[Any], title: str) -> str:
    """Returns an SVG: accuracy over confidence before and after temperature scaling, from (confidence, accuracy, count)."""
    with figure_as_svg(3.4, 3.3) as (_, axes, drawn):
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":", label="as sure as right")
        for bins, label, color, line in (
            (before, "as trained", COLORS[1], "s--"),
            (after, "scaled", COLORS[0], "o-"),
        ):
            confidence, accuracy, count = (np.asarray(b) for b in bins)
            full = count > 0
            axes.plot(confidence[full], accuracy[full], line, color=color, markersize=4, linewidth=1.2, label=label)
        axes.set(title=_wrapped(title, TITLE), xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.03))
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return drawn[0]


def scatter(x: Sequence[float], y: Sequence[float], title: str, limits: tuple[float, float], look: Style) -> str:
    """Returns an SVG: predictions `y` over true values `x`, both axes within `limits`, and the line of equal ones."""
    with figure_as_svg(3.4, 3.3) as (_, axes, drawn):
        axes.plot(limits, limits, color=INK, linewidth=0.8, linestyle=":")
        axes.plot(x, y, "o", color=look.look["color"], markersize=3.5, alpha=0.5, markeredgewidth=0)
        axes.set(
            title=_wrapped(title, TITLE), xlabel="true", ylabel="predicted", xlim=limits, ylim=limits, aspect="equal"
        )
    return drawn[0]


def histogram(values: Sequence[float], edges: Sequence[float], title: str, xlabel: str, top: float, look: Style) -> str:
    """Returns an SVG: how many values there are between `edges`; `top`: of the y axis."""
    with figure_as_svg(3.4, 2.6) as (_, axes, drawn):
        axes.hist(values, edges, color=look.look["color"], alpha=0.75)
        axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
        axes.set(
            title=_wrapped(title, TITLE), xlabel=xlabel, ylabel="samples", xlim=(edges[0], edges[-1]), ylim=(0, top)
        )
    return drawn[0]


def levels(
    looks: Sequence[Style], values: Sequence[Sequence[float]], labels: Sequence[str], xlabel: str, ends: Sequence[float]
) -> str:
    """Returns an SVG: a group of bars for each label, one bar per model, `values[model][label]`; `ends`: of the x axis."""
    height = 0.8 / len(looks)
    with figure_as_svg(7.2, 1.2 + len(labels) * max(0.3, 0.09 * len(looks)) + legend_height(looks)) as (
        figure,
        axes,
        drawn,
    ):
        for i, (look, each) in enumerate(zip(looks, values, strict=True)):
            places = [row + (i + 0.5) * height - 0.4 for row in range(len(labels))]
            axes.barh(places, np.nan_to_num(np.asarray(each)), height, color=look.look["color"], label=look.name)
        axes.set_yticks(range(len(labels)), map(_wrapped, labels), fontsize=9)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_xlim(ends[0], ends[-1])
        axes.set_xlabel(xlabel)
        axes.grid(axis="y", visible=False)
        legend_below(figure, axes)
    return drawn[0]


def curves(
    series: Sequence[tuple[Sequence[int], Sequence[float]]],
    line: float | None,
    title: str,
    ylabel: str,
    limits: tuple[float, float] | None = None,
) -> str:
    """Returns an SVG: a metric over steps, one line per seed; `line`: the teacher's value; `limits`: of the y axis."""
    with figure_as_svg(3.4, 2.9) as (_, axes, drawn):
        for i, (steps, values) in enumerate(series):
            axes.plot(steps, values, color=COLORS[i % 6], linestyle=LINES[i % 4], linewidth=1.3)
        if line is not None:
            axes.axhline(line, color=INK, linestyle=":", linewidth=1)
        axes.set(title=_wrapped(title, TITLE), xlabel="step", ylabel=ylabel, ylim=limits)
    return drawn[0]


def bars(labels: Sequence[str], parts: Sequence[tuple[str, Sequence[float]]], xlabel: str) -> str:
    """Returns an SVG with one stacked bar per row."""
    with figure_as_svg(5.4, 1.5 + 0.36 * len(labels)) as (figure, axes, drawn):
        left = np.zeros(len(labels))
        for i, (name, values) in enumerate(parts):
            axes.barh(
                range(len(labels)), values, 0.7, left=left, label=name, color=COLORS[i], edgecolor=INK,
                linewidth=0.4, hatch=("", "///", "...")[i],
            )  # fmt: skip
            left += np.asarray(values)
        axes.set_yticks(range(len(labels)), map(_wrapped, labels), fontsize=9)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_xlabel(xlabel)
        axes.grid(axis="y", visible=False)
        legend_below(figure, axes)
    return drawn[0]


# -- from a figure to SVG ----------------------------------------------------------------------------------------------


LEGEND, TITLE = 64, 40  # characters of a line in a legend, and above a small figure


def _wrapped(label: str, width: int = 24) -> str:
    return "\n".join(textwrap.wrap(label, width))


def point(look: Style) -> dict[str, Any]:
    return {**look.look, "linestyle": "none"}


def _legend_columns(labels: Sequence[str]) -> int:
    return 2 if max(map(len, labels)) <= 28 else 1


def legend_height(looks: Sequence[Style]) -> float:
    """Returns the height of the legend in inches."""
    names = [look.name for look in looks]
    return 0.2 + 0.19 * sum(len(textwrap.wrap(name, LEGEND)) for name in names) / _legend_columns(names)


def legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    wrapped = [_wrapped(label, LEGEND) for label in labels]
    figure.legend(
        handles, wrapped, loc="outside lower left", ncols=_legend_columns(labels), frameon=False, fontsize=8.5,
        labelcolor=INK, columnspacing=1, handletextpad=0.4,
    )  # fmt: skip


@contextmanager
def figure_as_svg(width: float, height: float) -> Iterator[tuple[Figure, Axes, list[str]]]:
    """Yields a figure (size in inches), its axes, and a list that receives its SVG on exit."""
    from litdistill.tasks.figures import new_figure

    drawn: list[str] = []
    with styled():
        figure = new_figure(width, height)
        axes = figure.subplots()
        yield figure, axes, drawn
        drawn.append(_svg(figure))


@contextmanager
def styled() -> Iterator[None]:
    """Sets what all figures share; the browser has glyphs that matplotlib's font lacks, so that is no warning."""
    import matplotlib as mpl

    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    options: Any = {
        **dict.fromkeys(ink, INK),
        **{"svg.fonttype": "none", "font.size": 10, "axes.titlesize": 10, "grid.color": INK, "grid.alpha": 0.15},
        **{"axes.grid": True, "axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.5},
        **{"font.family": "sans-serif", "text.parse_math": False},
    }
    with mpl.rc_context(options), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def _svg(figure: Figure) -> str:
    """Returns the <svg> element without a background, with ids that are unique on the page."""
    import matplotlib as mpl

    file = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "litdistill"}):  # equal figures give equal files
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    own = hashlib.sha256(text.encode()).hexdigest()[:8]
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[\w.]+_\d+"', "<g", text)  # figure_1, axes_1, line2d_1, …
    text = re.sub(r'(id="|#)([a-z][0-9a-f]{10})\b', rf"\1\2-{own}", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace(INK, "currentColor").strip()
