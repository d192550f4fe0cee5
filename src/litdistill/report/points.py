"""The main figure: the metric of each row over what it costs. Every row is in it, whatever its value, and so is its number."""

from __future__ import annotations

import json
import math
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from litdistill.report.plots import INK, Style, figure_as_svg, legend_below, legend_height, point, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

# Where a label may stand beside its point, in points, the best first.
PLACES = [(r * x, r * y) for r in (1, 1.7, 2.5, 3.5, 5) for x, y in
          ((7, 6), (7, -6), (-7, 6), (-7, -6), (0, 9), (0, -9), (10, 0), (-10, 0))]  # fmt: skip
SAME = 7  # pixels; points that are nearer to one another share a label


class Plane(NamedTuple):
    """What is drawn over a cost: a look, a cost and the metric of each seed for every row; `chosen`: the row to stand out."""

    looks: Sequence[Style]
    costs: Sequence[float]
    values: Sequence[Sequence[float]]
    less_is_better: bool = False
    chosen: int | None = None

    @property
    def means(self) -> list[float]:
        return [statistics.mean(v) for v in self.values]

    @property
    def drawn(self) -> list[int]:
        """Returns the rows that have a place: those whose cost and metric are finite."""
        return [i for i, (c, m) in enumerate(zip(self.costs, self.means, strict=True)) if c > 0 and _finite(c, m)]

    @property
    def front(self) -> list[int]:
        """Returns the rows of the Pareto front."""
        rows, sign = self.drawn, -1 if self.less_is_better else 1
        return [rows[i] for i in pareto([self.costs[i] for i in rows], [sign * self.means[i] for i in rows])]

    @property
    def far(self) -> list[int]:
        """Returns the rows that would compress the range of all others: a control at chance level. At least three remain."""
        means = self.means
        best = means[self.front[-1]] if self.front else 0.0
        found = [i for i in self.drawn if (means[i] > 2 * best if self.less_is_better else means[i] < best / 2)]
        return found if len(self.drawn) - len(found) >= 3 else []


def _finite(*values: float) -> bool:
    return all(map(math.isfinite, values))


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


def over_cost(plane: Plane, xlabel: str, ylabel: str) -> str:
    """Returns an SVG: the mean metric over a cost (log axis), the range over seeds as a bar, and the Pareto front."""
    with figure_as_svg(5.4, 3.5 + legend_height(plane.looks)) as (figure, axes, drawn):
        draw_points(axes, plane, xlabel, ylabel)
        legend_below(figure, axes)
        figure.draw_without_rendering()  # the layout, by which labels are placed
        place_labels(axes, plane)
    return drawn[0]


def main_picture(planes: Sequence[tuple[str, Plane]], ylabel: str, path: Path) -> None:
    """Writes `over_cost` of several costs, one below the other, as a PNG with a white background, legible on 390 pixels.

    The file's description holds the mean of each row as JSON.
    """
    from litdistill.tasks.figures import new_figure, save_figure

    looks = planes[0][1].looks
    columns = 2 if max(len(look.name) for look in looks) <= 26 else 1
    shown_names = [textwrap.fill(look.name, 54) for look in looks]
    with styled():
        lines = (1 + sum(1 + name.count("\n") for name in shown_names)) / columns
        figure = new_figure(5.2, 3.5 * len(planes) + 0.4 + 0.2 * math.ceil(lines))
        panels = figure.subplots(len(planes), 1, squeeze=False)[:, 0]
        for axes, (xlabel, plane) in zip(panels, planes, strict=True):
            draw_points(axes, plane, xlabel, ylabel)
        handles, labels = panels[0].get_legend_handles_labels()
        wrapped = [textwrap.fill(label, 54) for label in labels]
        legend = figure.legend(handles, wrapped, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
        chosen = planes[0][1].chosen
        for text in legend.get_texts():
            text.set_fontweight("bold" if chosen is not None and text.get_text() == shown_names[chosen] else "normal")
        figure.draw_without_rendering()
        for axes, (_, plane) in zip(panels, planes, strict=True):
            place_labels(axes, plane)
        shown = {look.name: f"{mean:.2f}" for look, mean in zip(looks, planes[0][1].means, strict=True)}
        save_figure(figure, path, dpi=180, metadata={"Description": json.dumps(shown)})


def draw_points(axes: Axes, plane: Plane, xlabel: str, ylabel: str) -> None:
    """Draws the points, their bars and the front, within limits that hold all of them."""
    means, costs, front, far = plane.means, plane.costs, plane.front, plane.far
    axes.set_xscale("log")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if not plane.drawn:
        axes.text(0.5, 0.5, "no row has a finite value", ha="center", transform=axes.transAxes)
        return
    low, high = min(costs[i] for i in plane.drawn), max(costs[i] for i in plane.drawn)
    right = high * max(1.6, (high / low) ** 0.1)
    axes.set_xlim(low / max(1.3, (high / low) ** 0.06), right)
    axes.step(
        [costs[i] for i in front] + [right], [means[i] for i in front] + [means[front[-1]]],
        where="post", color=INK, alpha=0.45, linewidth=1.2, label="Pareto front of the means", zorder=1,
    )  # fmt: skip
    within = [v for i in plane.drawn if i not in far for v in plane.values[i] if math.isfinite(v)]
    bottom, top = min(within), max(within)
    room = (top - bottom) or 0.05 * abs(top) or 1.0
    below, above = (0.05, 0.3) if plane.less_is_better and far else (0.3, 0.1) if far else (0.12, 0.12)
    axes.set_ylim(bottom - below * room, top + above * room)
    for i in plane.drawn:
        look, each = plane.looks[i], plane.values[i]
        y = height(axes, plane, i)
        bars = [[0.0], [0.0]] if i in far else [[means[i] - min(each)], [max(each) - means[i]]]
        axes.errorbar(
            costs[i], y, bars, **point(look), markersize=8, elinewidth=1, capsize=2, label=look.name, zorder=3,
        )  # fmt: skip
        if i == plane.chosen:
            axes.plot(costs[i], y, "o", markersize=15, markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.4)
        if i in far:
            away = 14 if plane.less_is_better else -14
            axes.annotate(
                "", (costs[i], y), (0, away), textcoords="offset points",
                arrowprops={"arrowstyle": "<-", "color": look.look["color"]},
            )  # fmt: skip
    _tick(axes)
    if missing := [plane.looks[i].name for i in range(len(means)) if i not in plane.drawn]:
        axes.set_title(f"without a finite value: {', '.join(missing)}", fontsize=9)


def _tick(axes: Axes) -> None:
    """Sets from three to seven ticks on the log axis, however narrow its range is."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    low, high = axes.get_xlim()
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [d * 10.0**k for k in decades for d in digits if low <= d * 10.0**k <= high]
        if len(ticks) <= 7:
            break
    ticks = ticks[:: -(-len(ticks) // 7) or 1]
    if len(ticks) < 3:
        ticks = [t for t in MaxNLocator(5).tick_values(low, high) if low <= t <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.6g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def place_labels(axes: Axes, plane: Plane) -> list[Text]:
    """Writes the number of each point beside it, on no other label, point or bar where there is room; final layout only."""
    rows, means, far = plane.drawn, plane.means, plane.far
    y = {i: height(axes, plane, i) for i in rows}
    pixels = axes.transData.transform([(plane.costs[i], y[i]) for i in rows]) if rows else np.empty((0, 2))
    taken = [_around(x, y, 6) for x, y in pixels]
    taken += [_bar(axes, plane.costs[i], plane.values[i]) for i in rows if i not in far and len(plane.values[i]) > 1]
    made: list[Text] = []
    # Crowded points choose last: those with room take what is nearest to them.
    for near in sorted(_together(pixels), key=lambda near: -_distance(pixels, near[0])):
        found = [rows[k] for k in near]
        words = ", ".join(f"{plane.looks[i].number}" + (f" at {means[i]:.4g}" if i in far else "") for i in found)
        chosen = plane.chosen in found
        text = axes.annotate(
            words, (plane.costs[found[0]], y[found[0]]), PLACES[0], textcoords="offset points", fontsize=9, color=INK,
            va="center", weight="bold" if chosen else "normal", zorder=6,
        )  # fmt: skip
        text.set_in_layout(False)  # the layout is done, and labels have found their places in it
        _settle(text, taken, axes.get_window_extent())
        taken.append(text.get_window_extent())
        made.append(text)
    return made


def height(axes: Axes, plane: Plane, i: int) -> float:
    """Returns the y at which a row is drawn: its mean, or the edge."""
    if i not in plane.far:
        return plane.means[i]
    bottom, top = axes.get_ylim()
    return bottom + (0.91 if plane.less_is_better else 0.09) * (top - bottom)


def _settle(text: Any, taken: Sequence[Bbox], room: Bbox) -> None:
    """Moves a label to the place where it covers least."""
    costs = []
    for x, y in PLACES:
        text.set_ha("left" if x > 0 else "right" if x < 0 else "center")
        text.set_position((x, y))
        box = text.get_window_extent()
        outside = not (room.x0 <= box.x0 and box.x1 <= room.x1 + 12 and room.y0 <= box.y0 and box.y1 <= room.y1 + 12)
        costs.append(sum(_overlap(box, other) for other in taken) + 1e4 * outside)
        if not costs[-1]:
            break
    x, y = PLACES[costs.index(min(costs))]
    text.set_ha("left" if x > 0 else "right" if x < 0 else "center")
    text.set_position((x, y))


def _overlap(one: Bbox, other: Bbox) -> float:
    """Returns the common area of two boxes in square pixels."""
    return max(0.0, min(one.x1, other.x1) - max(one.x0, other.x0)) * max(
        0.0, min(one.y1, other.y1) - max(one.y0, other.y0)
    )


def _around(x: float, y: float, radius: float) -> Bbox:
    from matplotlib.transforms import Bbox

    return Bbox.from_extents(x - radius, y - radius, x + radius, y + radius)


def _bar(axes: Axes, cost: float, values: Iterable[float]) -> Bbox:
    from matplotlib.transforms import Bbox

    finite = [v for v in values if math.isfinite(v)]
    (x, low), (_, high) = axes.transData.transform([(cost, min(finite)), (cost, max(finite))])
    return Bbox.from_extents(x - 2, low, x + 2, high)


def _distance(places: np.ndarray, i: int) -> float:
    """Returns how far the nearest point is that does not share a label with point `i`."""
    gaps = np.hypot(*(places - places[i]).T)
    return float(min(gaps[gaps >= SAME], default=1e9))


def _together(places: np.ndarray) -> list[list[int]]:
    """Returns groups of indices of points (N, 2) that lie on one another: closer than `SAME` to the group's first."""
    groups: list[list[int]] = []
    for i, place in enumerate(places):
        near = next((g for g in groups if np.hypot(*(places[g[0]] - place)) < SAME), None)
        if near is None:
            groups.append([i])
        else:
            near.append(i)
    return groups
