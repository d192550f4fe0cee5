"""Figures of a detector: the pictures of which it misses most, and precision over recall.

Boxes are those from a score of 0.5 on; an object is found by a box of its class with an IoU of 0.5 at least.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from litdistill.tasks.base import Samples
from litdistill.tasks.detection.boxes import LABEL
from litdistill.tasks.detection.decode import CLASS, SCORE
from litdistill.tasks.detection.matching import Matched, matched, missed, names_of
from litdistill.tasks.detection.metrics import Curves, Split, curves
from litdistill.tasks.figures import STUDENT_COLOR, TEACHER_COLOR, draw_input, new_figure, shorter
from litdistill.types import has_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURES = 6  # of which the student misses most
CLASSES = 12  # curves at most: those of the lowest average precision
TRUTH_COLOR, MISSED_COLOR = "#009E73", "#D55E00"  # of Okabe & Ito's palette, as those of student and teacher


def detection_figures(samples: Samples) -> dict[str, Figure]:
    """Returns the figures by name; outputs have the head `detections`."""
    known = has_label(samples.targets).nonzero()[:, 0].tolist()
    student, teacher = (
        None if outputs is None else Split.of(outputs.heads["detections"], samples.targets)
        for outputs in (samples.student, samples.teacher)
    )
    assert student is not None
    both = [("student", student), *([("teacher", teacher)] if teacher is not None else [])]
    drawn = {"worst misses": worst_misses(samples, known, student, teacher)}
    found = [(name, curves(split)) for name, split in both]
    return drawn | ({"precision and recall": precision_recall(found, samples.names)} if found[0][1].classes else {})


def worst_misses(samples: Samples, known: Sequence[int], student: Split, teacher: Split | None) -> Figure:
    """Returns the pictures of which the student misses most, worst first: objects, what its teacher finds, what it finds.

    `known`: the place among the samples of each picture of the splits.
    """
    worst = missed(student, teacher)[:PICTURES]
    panels = 3 if teacher is not None else 2
    figure = new_figure(13 if teacher is not None else 9, 2.5 * max(1, -(-len(worst) // 2)))
    if not worst:
        figure.text(0.5, 0.5, "no object of the validation set is missed", ha="center", va="center", fontsize=14)
        return figure
    cells = figure.subfigures(-(-len(worst) // 2), 2, squeeze=False).ravel()
    for cell, (i, lost, only) in zip(cells, worst, strict=False):
        axes = cell.subplots(1, panels, squeeze=False)[0]
        image, truth = samples.inputs(known[i]), student.truth[i]
        own = matched(student.found[i], truth)
        drawn = [("objects", own, None), ("student", own, STUDENT_COLOR)]
        if teacher is not None:
            drawn.insert(1, ("teacher", matched(teacher.found[i], truth), TEACHER_COLOR))
        for panel, (name, pairs, color) in zip(axes, drawn, strict=True):
            draw_input(panel, image, None)
            draw_boxes(panel, pairs, color, samples.names)
            panel.set_title(name, fontsize=8)
        of_teacher = f", {only} of them found by the teacher" if teacher is not None else ""
        cell.suptitle(f"{lost} of {len(own.hit)} missed{of_teacher}", fontsize=9)
    return figure


def draw_boxes(axes: Axes, pairs: Matched, color: str | None, names: Sequence[str]) -> None:
    """Draws what a network finds in its color, dashed where it is wrong; without a color the objects, those that are missed in
    another one."""
    if color is None:
        words = names_of(pairs.objects, LABEL, names)
        colors = [TRUTH_COLOR if hit else MISSED_COLOR for hit in pairs.hit.tolist()]
        for box, word, edge in zip(pairs.objects[:, :4].tolist(), words, colors, strict=True):
            _box(axes, box, shorter(word), edge, "-")
        return
    scores = pairs.found[:, SCORE].tolist()
    words = [f"{shorter(n)} {s:.2f}" for n, s in zip(names_of(pairs.found, CLASS, names), scores, strict=True)]
    for box, word, right in zip(pairs.found[:, :4].tolist(), words, pairs.right.tolist(), strict=True):
        _box(axes, box, word, color, "-" if right else "--")


def _box(axes: Axes, box: Sequence[float], word: str, color: str, line: str) -> None:
    from matplotlib.patches import Rectangle

    x1, y1, x2, y2 = (v - 0.5 for v in box)  # of edges; a pixel is drawn around its number
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linestyle=line, linewidth=1.6))
    axes.text(x1, y1, word, fontsize=6, color="white", va="bottom", clip_on=True,
              bbox={"facecolor": color, "edgecolor": "none", "pad": 0.8})  # fmt: skip


def precision_recall(models: Sequence[tuple[str, Curves]], names: Sequence[str]) -> Figure:
    """Returns precision over recall at an IoU of 0.5: the mean over classes of each network, and each class of the first."""
    import matplotlib as mpl

    figure = new_figure(9.5, 4.2)
    left, right = figure.subplots(1, 2, sharey=True)
    for name, curve in models:
        there = ~curve.average.isnan()
        color = STUDENT_COLOR if name == "student" else TEACHER_COLOR
        label = f"{name}: mAP50 {_percent(curve.average_50[there].mean())}, mAP {_percent(curve.average[there].mean())}"
        left.plot(curve.recall, curve.precision[there].mean(0), color=color, label=label)
    left.set_title("mean over the classes", fontsize=10)
    curve = models[0][1]
    order = [i for i in curve.average_50.nan_to_num(2.0).argsort().tolist() if not curve.average[i].isnan()][:CLASSES]
    colors = mpl.colormaps["viridis"](torch.linspace(0, 0.95, max(1, len(order))).numpy())
    for i, color in zip(order, colors, strict=True):
        name = names[curve.classes[i]] if curve.classes[i] < len(names) else str(curve.classes[i])
        right.plot(curve.recall, curve.precision[i], color=color, linewidth=1.1,
                   label=f"{shorter(name)} {_percent(curve.average_50[i])}")  # fmt: skip
    right.set_title(
        "each class of the student, lowest first" + (f" ({CLASSES} of them)" if len(order) == CLASSES else ""),
        fontsize=10,
    )
    for axes in (left, right):
        axes.set(xlabel="recall", xlim=(0, 1), ylim=(0, 1.02))
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("precision at an IoU of 0.5")
    left.legend(frameon=False, fontsize=8, loc="best")
    right.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _percent(value: Tensor) -> str:
    return f"{100 * float(value):.1f} %"
