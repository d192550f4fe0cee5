"""Figures of masks: picture, truth, teacher and student side by side, the worst first; IoU of each class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from litdistill.tasks.base import Samples
from litdistill.tasks.figures import STUDENT_COLOR, TEACHER_COLOR, draw_input, new_figure, shorter
from litdistill.tasks.segmentation.metrics import class_iou, confusion, labels_of
from litdistill.utils.palette import palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMED = 24  # classes at most in a legend
DRAWN = 60  # classes at most that have bars
VOID = (224, 224, 224)  # the color of pixels that do not count


def mask_figures(samples: Samples, ignored: int, count: int = 8) -> dict[str, Figure]:
    """Returns the figures by name: the masks of the pictures with the lowest IoU, and the IoU of each class."""
    student = labels_of(samples.student)
    teacher = None if samples.teacher is None else labels_of(samples.teacher)
    both = [("student", student), *([("teacher", teacher)] if teacher is not None else [])]
    matrices = [(name, confusion(labels, samples.targets, len(samples.names), ignored)) for name, labels in both]
    return {
        "masks, worst first": worst_masks(samples, student, teacher, ignored, count),
        "IoU of classes": class_bars([(name, class_iou(counts)) for name, counts in matrices], samples.names),
    }


def colored(labels: Tensor, classes: int, counted: Tensor | None = None) -> np.ndarray:
    """Returns labels (H, W) in the colors of their classes, (H, W, 3) uint8; `counted` (H, W): the others are gray."""
    found = np.array(palette(classes), np.uint8)[labels.clamp(0, classes - 1).numpy()]
    if counted is not None:
        found[~counted.numpy()] = VOID
    return found


def picture_iou(labels: Tensor, targets: Tensor, classes: int, ignored: int) -> Tensor:
    """Returns the mean IoU of each picture's own classes, (N,) float64; NaN where no pixel counts. Both (N, …)."""
    pairs = zip(labels, targets, strict=True)
    return torch.stack([class_iou(confusion(a, b, classes, ignored)).nanmean() for a, b in pairs])


def worst_masks(samples: Samples, student: Tensor, teacher: Tensor | None, ignored: int, count: int) -> Figure:
    """Returns a figure of pictures, one a row: as it is, its true mask, and those of the networks."""
    classes, targets = len(samples.names), samples.targets
    each = picture_iou(student, targets, classes, ignored)
    theirs = None if teacher is None else picture_iou(teacher, targets, classes, ignored)
    chosen = each.nan_to_num(2).argsort(stable=True)[:count].tolist()
    columns = 3 if teacher is None else 4
    figure = new_figure(2.2 * columns, 2.3 * len(chosen) + 0.6)
    seen: set[int] = set()
    for cells, i in zip(figure.subplots(len(chosen), columns, squeeze=False), chosen, strict=True):
        mask = targets[i]
        counted = (mask >= 0) & (mask != ignored)
        draw_input(cells[0], samples.inputs(i), samples.words(i))
        drawn: list[tuple[str, Tensor, Tensor | None]] = [("truth", mask, None)]
        drawn += [] if teacher is None or theirs is None else [("teacher", teacher[i].view_as(mask), theirs[i])]
        drawn += [("student", student[i].view_as(mask), each[i])]
        for axes, (name, labels, iou) in zip(cells[1:], drawn, strict=True):
            axes.imshow(colored(labels, classes, counted), interpolation="nearest")
            axes.set_title(name if iou is None else f"{name}: IoU {float(iou):.2f}", fontsize=9)
            axes.set_axis_off()
            seen |= set(labels[counted].unique().tolist())
    _legend(figure, samples, sorted(seen)[:NAMED])
    return figure


def _legend(figure: Figure, samples: Samples, classes: list[int]) -> None:
    from matplotlib.patches import Patch

    colors = palette(len(samples.names))
    patches = [
        Patch(facecolor="#{:02x}{:02x}{:02x}".format(*colors[c]), label=shorter(samples.names[c])) for c in classes
    ]
    figure.legend(
        handles=patches, loc="outside lower center", ncols=min(8, max(1, len(patches))), frameon=False, fontsize=8
    )


def class_bars(models: list[tuple[str, Tensor]], names: Sequence[str]) -> Figure:
    """Returns bars of the IoU (classes,) of each class, one a model; a class that does not occur has none."""
    shown = [c for c in range(len(names)) if any(not bool(iou[c].isnan()) for _, iou in models)][:DRAWN]
    figure = new_figure(6.4, 0.9 + 0.34 * max(1, len(shown)))
    axes = figure.subplots()
    height = 0.8 / len(models)
    for i, (name, iou) in enumerate(models):
        places = [row + (i + 0.5) * height - 0.4 for row in range(len(shown))]
        color = STUDENT_COLOR if name == "student" else TEACHER_COLOR
        label = f"{name}: mean {float(iou.nanmean()):.3f}"
        axes.barh(places, [float(iou[c].nan_to_num(0)) for c in shown], height, color=color, label=label)
    axes.set_yticks(range(len(shown)), [shorter(names[c]) for c in shown], fontsize=8)
    axes.set(xlim=(0, 1), xlabel="intersection over union")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return figure
