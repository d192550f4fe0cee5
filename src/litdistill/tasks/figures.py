"""Figures of a classifier: its worst mistakes, confusion matrices, reliability diagrams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from litdistill.tasks import metrics
from litdistill.tasks.base import Samples

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def classification_figures(samples: Samples) -> dict[str, Figure]:
    """Returns the three figures by name, for the student and, if there is one, the teacher."""
    targets, logits = samples.targets, samples.student.logits
    teacher = samples.teacher.logits if samples.teacher is not None else None
    both = [("student", logits), *([("teacher", teacher)] if teacher is not None else [])]
    return {
        "worst mistakes": worst_mistakes(samples.inputs, targets, logits, teacher, samples.names),
        "confusion": confusion_matrices([(n, metrics.confusion(x, targets)) for n, x in both], samples.names),
        "reliability": reliability_diagrams([(n, *metrics.reliability(x, targets)) for n, x in both]),
    }


def new_figure(width: float, height: float) -> Figure:
    """Returns a figure of this size in inches, without a window and without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    return figure


def worst_mistakes(
    image: Callable[[int], Tensor | None],
    targets: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    names: Sequence[str],
    count: int = 12,
) -> Figure:
    """Returns a figure of the images that the student misclassifies with the highest confidence, with both predictions.

    `image(i)`: (C, H, W) uint8, or floats from 0 to 1; other inputs are not drawn. `targets` (N,), logits (N, classes).
    """
    p = student.double().softmax(1)
    confidence, predicted = p.max(1)
    wrong = torch.where(predicted != targets, confidence, -1.0)
    chosen = wrong.argsort(descending=True, stable=True)[: min(count, int((wrong >= 0).sum()))].tolist()
    q = teacher.double().softmax(1) if teacher is not None else None
    figure = new_figure(12, 2.9 * max(1, -(-len(chosen) // 4)))
    if not chosen:
        figure.text(0.5, 0.5, "no mistake on the validation set", ha="center", va="center", fontsize=14)
        return figure
    cells = figure.subfigures(-(-len(chosen) // 4), 4, squeeze=False).ravel()
    for cell, i in zip(cells, chosen, strict=False):
        left, right = cell.subplots(1, 2, width_ratios=[1, 1.3])
        picture = image(i)
        if picture is not None and picture.ndim == 3 and len(picture) in (1, 3):
            left.imshow(picture.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", interpolation="nearest")
        left.set_axis_off()
        left.set_title(f"is {names[int(targets[i])]}", fontsize=9)
        top = (p[i] + (q[i] if q is not None else 0)).topk(min(3, p.shape[1])).indices.tolist()
        rows = range(len(top))
        right.barh(
            [r - 0.2 for r in rows], [float(p[i, c]) for c in top], height=0.36, color=STUDENT_COLOR, label="student"
        )
        if q is not None:
            right.barh(
                [r + 0.2 for r in rows],
                [float(q[i, c]) for c in top],
                height=0.36,
                color=TEACHER_COLOR,
                label="teacher",
            )
        right.set_yticks(list(rows), [names[c][:10] for c in top], fontsize=8)
        right.set_xlim(0, 1)
        right.invert_yaxis()
        right.tick_params(axis="x", labelsize=7)
        right.spines[["top", "right"]].set_visible(False)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    return figure


STUDENT_COLOR, TEACHER_COLOR = "#0072B2", "#E69F00"  # of Okabe & Ito's palette for color blindness


def confusion_matrices(matrices: Sequence[tuple[str, Tensor]], names: Sequence[str]) -> Figure:
    """Returns a figure of counts (classes, classes), one panel per model; rows are labels. Only mistakes are shaded."""
    classes = len(names)
    side = min(max(3.4, 0.45 * classes), 14)
    figure = new_figure(side * len(matrices) + 0.6, side + 0.4)
    for axes, (name, matrix) in zip(figure.subplots(1, len(matrices), squeeze=False)[0], matrices, strict=True):
        wrong = matrix.clone().double()
        wrong.fill_diagonal_(0)
        axes.imshow(wrong, cmap="Blues", vmin=0, vmax=max(1.0, float(wrong.max())))
        axes.set_title(f"{name}: {int(matrix.trace()):,} of {int(matrix.sum()):,} right")
        axes.set_xlabel("predicted")
        axes.set_ylabel("label")
        if classes <= 20:
            axes.set_xticks(range(classes), names, rotation=45 if max(map(len, names)) > 2 else 0, fontsize=8)
            axes.set_yticks(range(classes), names, fontsize=8)
            for row in range(classes):
                for column in range(classes):
                    if matrix[row, column]:
                        dark = row != column and wrong[row, column] > 0.6 * wrong.max()
                        axes.text(
                            *(column, row, int(matrix[row, column])),
                            ha="center", va="center", fontsize=8, color="white" if dark else "black",
                        )  # fmt: skip
    return figure


def reliability_diagrams(models: Sequence[tuple[str, Tensor, Tensor, Tensor]]) -> Figure:
    """Returns a figure of accuracy over confidence, one panel per model: (name, confidence, accuracy, count), each (bins,)."""
    figure = new_figure(4.4 * len(models), 4.2)
    for axes, (name, confidence, accuracy, count) in zip(
        figure.subplots(1, len(models), squeeze=False)[0], models, strict=True
    ):
        full = count > 0
        axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="perfectly calibrated")
        axes.plot(
            confidence[full],
            accuracy[full],
            marker="o",
            color=STUDENT_COLOR if name == "student" else TEACHER_COLOR,
            label=name,
        )
        axes.bar(
            (torch.arange(len(count)) + 0.5) / len(count), count / count.sum(),
            width=1 / len(count), color="0.85", label="share of samples",
        )  # fmt: skip
        ece = float(((confidence - accuracy).abs() * count)[full].sum() / count.sum())
        axes.set(title=f"{name}: ECE {ece:.3f}", xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
        axes.legend(frameon=False, fontsize=8)
    return figure
