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
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
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


def pareto(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Returns the indices of the Pareto front: points without another of at most their cost and at least their value.

    Sorted by cost. Equal points are all on the front, or none is.
    """
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -values[i]))
    front: list[int] = []
    for i in order:
        best = front[-1] if front else None
        if best is None or values[i] > values[best] or (costs[i], values[i]) == (costs[best], values[best]):
            front.append(i)
    return front


# -- the figures -------------------------------------------------------------------------------------------------------


def over_cost(
    looks: Sequence[Style],
    costs: Sequence[float],
    values: Sequence[Sequence[float]],
    xlabel: str,
    ylabel: str,
    less_is_better: bool = False,
) -> str:
    """Returns an SVG: the mean metric over a cost (log axis), the range over seeds as a bar, and the Pareto front."""
    with _figure(5.4, 3.5 + _legend_height(looks)) as (figure, axes, drawn):
        _draw_over_cost(axes, looks, costs, values, xlabel, ylabel, less_is_better)
        _legend_below(figure, axes)
    return drawn[0]


def main_picture(
    looks: Sequence[Style],
    costs: Sequence[tuple[str, Sequence[float]]],
    values: Sequence[Sequence[float]],
    ylabel: str,
    path: Path,
    less_is_better: bool = False,
) -> None:
    """Writes `over_cost` of several costs side by side as a PNG with a white background."""
    from litdistill.tasks.figures import new_figure

    with _styled():
        figure = new_figure(5.0 * len(costs), 3.9 + 0.19 * len(looks) / 3)
        both = figure.subplots(1, len(costs), sharey=True)
        for axes, (xlabel, cost) in zip(both, costs, strict=True):
            _draw_over_cost(axes, looks, cost, values, xlabel, ylabel if axes is both[0] else "", less_is_better)
        handles, labels = both[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def _draw_over_cost(
    axes: Axes,
    looks: Sequence[Style],
    costs: Sequence[float],
    values: Sequence[Sequence[float]],
    xlabel: str,
    ylabel: str,
    less_is_better: bool,
) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    means = [statistics.mean(v) for v in values]
    front = pareto(costs, [-m for m in means] if less_is_better else means)
    axes.step(
        [costs[i] for i in front] + [max(costs) * 1.6], [means[i] for i in front] + [means[front[-1]]],
        where="post", color=INK, alpha=0.45, linewidth=1.2, label="Pareto front of the means", zorder=1,
    )  # fmt: skip
    for look, cost, mean, each in zip(looks, costs, means, values, strict=True):
        axes.errorbar(
            cost, mean, [[mean - min(each)], [max(each) - mean]], **_point(look), markersize=8,
            elinewidth=1, capsize=2, label=look.name,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel=xlabel, ylabel=ylabel)
    # A control at chance level would compress the range of all other rows.
    best = means[front[-1]]
    far = [i for i, mean in enumerate(means) if (mean > 2 * best if less_is_better else mean < best / 2)]
    if far:
        low, high = min(min(v) for i, v in enumerate(values) if i not in far), max(map(max, values))
        if high > low:
            axes.set_ylim(low - 0.12 * (high - low), high + 0.08 * (high - low))
        words = ", ".join(f"{looks[i].number} at {means[i]:.4g}" for i in far)
        where, place = ("above", (0.02, 0.95)) if less_is_better else ("below", (0.02, 0.02))
        axes.annotate(f"{where}: {words}", place, xycoords="axes fraction", fontsize=9, color=INK)
    axes.get_xlim(), axes.get_ylim()  # applies autoscaling, so that transData is final
    for near in _together(axes.transData.transform(list(zip(costs, means, strict=True)))):
        if near[0] in far:
            continue
        numbers = ", ".join(str(looks[i].number) for i in near)
        point = (costs[near[0]], means[near[0]])
        axes.annotate(numbers, point, (6, 5), textcoords="offset points", fontsize=9, color=INK)


def _together(places: np.ndarray, distance: float = 14) -> list[list[int]]:
    """Returns groups of indices of points (N, 2) whose labels would overlap: closer than `distance` to the group's first."""
    groups: list[list[int]] = []
    for i, place in enumerate(places):
        near = next((g for g in groups if np.hypot(*(places[g[0]] - place)) < distance), None)
        if near is None:
            groups.append([i])
        else:
            near.append(i)
    return groups


def dots(
    looks: Sequence[Style],
    values: Sequence[Sequence[float]],
    xlabel: str,
    line: float | None = None,
    form: str = ".1f",
) -> str:
    """Returns an SVG: one row per model, one dot per seed, the mean as a bar and a number; `line`: the teacher's value."""
    with _figure(5.4, 1.0 + 0.42 * len(looks)) as (_, axes, drawn):
        for row, (look, each) in enumerate(zip(looks, values, strict=True)):
            mean = statistics.mean(each)
            axes.plot(each, [row] * len(each), **_point(look), markersize=6, alpha=0.7)
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
    with _figure(5.4, 3.3 + _legend_height(looks)) as (figure, axes, drawn):
        for look, y in zip(looks, values, strict=True):
            axes.plot(x, y, **look.look, markersize=5, linewidth=1.5, label=look.name)
        axes.set_xticks(list(x))
        axes.set(xlabel=xlabel, ylabel=ylabel)
        _legend_below(figure, axes)
    return drawn[0]


def reliability(before: Sequence[Any], after: Sequence[Any], title: str) -> str:
    """Returns an SVG: accuracy over confidence before and after temperature scaling, from (confidence, accuracy, count)."""
    with _figure(3.4, 3.3) as (_, axes, drawn):
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":", label="as sure as right")
        for bins, label, color, line in (
            (before, "as trained", COLORS[1], "s--"),
            (after, "scaled", COLORS[0], "o-"),
        ):
            confidence, accuracy, count = (np.asarray(b) for b in bins)
            full = count > 0
            axes.plot(confidence[full], accuracy[full], line, color=color, markersize=4, linewidth=1.2, label=label)
        axes.set(title=title, xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.03))
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return drawn[0]


def curves(
    series: Sequence[tuple[Sequence[int], Sequence[float]]],
    line: float | None,
    title: str,
    ylabel: str,
    limits: tuple[float, float] | None = None,
) -> str:
    """Returns an SVG: a metric over steps, one line per seed; `line`: the teacher's value; `limits`: of the y axis."""
    with _figure(3.4, 2.9) as (_, axes, drawn):
        for i, (steps, values) in enumerate(series):
            axes.plot(steps, values, color=COLORS[i % 6], linestyle=LINES[i % 4], linewidth=1.3)
        if line is not None:
            axes.axhline(line, color=INK, linestyle=":", linewidth=1)
        axes.set(title=title, xlabel="step", ylabel=ylabel, ylim=limits)
    return drawn[0]


def bars(labels: Sequence[str], parts: Sequence[tuple[str, Sequence[float]]], xlabel: str) -> str:
    """Returns an SVG with one stacked bar per row."""
    with _figure(5.4, 1.5 + 0.36 * len(labels)) as (figure, axes, drawn):
        left = np.zeros(len(labels))
        for i, (name, values) in enumerate(parts):
            axes.barh(
                range(len(labels)), values, 0.7, left=left, label=name, color=COLORS[i], edgecolor=INK,
                linewidth=0.4, hatch=("", "///", "...")[i],
            )  # fmt: skip
            left += np.asarray(values)
        axes.set_yticks(range(len(labels)), map(_wrapped, labels), fontsize=9)
        axes.invert_yaxis()
        axes.set_xlabel(xlabel)
        axes.grid(axis="y", visible=False)
        _legend_below(figure, axes)
    return drawn[0]


# -- from a figure to SVG ----------------------------------------------------------------------------------------------


def _wrapped(label: str) -> str:
    return "\n".join(textwrap.wrap(label, 24))


def _point(look: Style) -> dict[str, Any]:
    return {**look.look, "linestyle": "none"}


def _legend_columns(labels: Sequence[str]) -> int:
    return 2 if max(map(len, labels)) <= 28 else 1


def _legend_height(looks: Sequence[Style]) -> float:
    """Returns the height of the legend in inches."""
    return 0.2 + 0.19 * len(looks) / _legend_columns([look.name for look in looks])


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower left", ncols=_legend_columns(labels), frameon=False, fontsize=8.5,
        labelcolor=INK, columnspacing=1, handletextpad=0.4,
    )  # fmt: skip


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Figure, Axes, list[str]]]:
    """Yields a figure (size in inches), its axes, and a list that receives its SVG on exit."""
    from litdistill.tasks.figures import new_figure

    drawn: list[str] = []
    with _styled():
        figure = new_figure(width, height)
        axes = figure.subplots()
        yield figure, axes, drawn
        drawn.append(_svg(figure))


def _styled() -> AbstractContextManager[None]:
    """Returns the context of matplotlib settings that all figures share."""
    import matplotlib as mpl

    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    options: Any = {
        **dict.fromkeys(ink, INK),
        **{"svg.fonttype": "none", "font.size": 10, "axes.titlesize": 10, "grid.color": INK, "grid.alpha": 0.15},
        **{"axes.grid": True, "axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.5},
        **{"font.family": "sans-serif", "text.parse_math": False},
    }
    return mpl.rc_context(options)


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
