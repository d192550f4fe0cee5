"""Figures of several labels a sample, and of numbers: the worst samples, the quality of each label, predictions over values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from litdistill.tasks.base import Samples, as_matrix
from litdistill.tasks.figures import NAMED, STUDENT_COLOR, TEACHER_COLOR, any_names, draw_input, new_figure, shorter
from litdistill.tasks.multilabel import average_precision

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WORST = 12  # samples that are drawn
BARS = 4  # labels of each
VALUES = 6  # values whose predictions are drawn


def multilabel_figures(samples: Samples) -> dict[str, Figure]:
    """Returns the worst samples and the average precision of each label, for the student and, if there is one, the teacher."""
    with any_names():
        return {"worst mistakes": worst_labels(samples), "average precision": precision_by_label(samples)}


def regression_figures(samples: Samples, values: Callable[[Tensor], Tensor]) -> dict[str, Figure]:
    """Returns predictions over the truth, and the samples with the largest errors.

    `values`: from logits (N, values) to predictions in the units of the targets.
    """
    with any_names():
        return {"predictions": predictions(samples, values), "worst errors": worst_errors(samples, values)}


def worst_labels(samples: Samples) -> Figure:
    """Returns the samples with the largest binary cross-entropy, each with its labels and the probabilities furthest off."""
    truth, logits = samples.targets.double(), samples.student.logits.double()
    loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    p, q = logits.sigmoid(), _teacher(samples, torch.sigmoid)

    def title(i: int) -> str:
        named = [shorter(samples.names[c]) for c in (truth[i] > 0.5).nonzero().flatten().tolist()]
        return f"has {', '.join(named[:3])}{' …' if len(named) > 3 else ''}" if named else "has no label"

    def beside(axes: Axes, i: int) -> None:
        chosen = loss[i].topk(min(BARS, loss.shape[1])).indices.tolist()
        _bars(axes, [shorter(samples.names[c]) for c in chosen], p[i, chosen], None if q is None else q[i, chosen])
        axes.set_xlim(0, 1)

    return _cells(samples, loss.sum(1), title, beside)


def worst_errors(samples: Samples, values: Callable[[Tensor], Tensor]) -> Figure:
    """Returns the samples whose errors are largest, relative to the deviation of each value."""
    truth, found = as_matrix(samples.targets).double(), values(samples.student.logits)
    expected = _teacher(samples, values)
    error = ((found - truth).abs() / truth.std(0, correction=0).clamp(min=1e-12)).nan_to_num(0)

    def title(i: int) -> str:
        worst = int(error[i].argmax())
        return f"{shorter(samples.names[worst])} is {truth[i, worst]:.4g}"

    def beside(axes: Axes, i: int) -> None:
        worst = int(error[i].argmax())
        both = [found[i, worst], *([] if expected is None else [expected[i, worst]])]
        names = ["student", "teacher"][: len(both)]
        axes.barh(names, [float(v) for v in both], color=[STUDENT_COLOR, TEACHER_COLOR][: len(both)], height=0.5)
        axes.axvline(float(truth[i, worst]), color="0.2", linestyle="--", label="target")
        axes.invert_yaxis()
        axes.tick_params(labelsize=7)

    return _cells(samples, error.sum(1), title, beside)


def precision_by_label(samples: Samples) -> Figure:
    """Returns bars of the average precision of each label that occurs, those with the lowest first."""
    truth = samples.targets > 0.5
    occurring = truth.any(0).nonzero().flatten().tolist()
    nets = [samples.student, *([samples.teacher] if samples.teacher is not None else [])]
    found = torch.tensor([[average_precision(net.logits[:, c], truth[:, c]) for c in occurring] for net in nets])
    order = found[0].argsort()[:NAMED].tolist()
    figure = new_figure(7, max(2.0, 0.35 * len(order) + 1))
    axes = figure.subplots()
    names = [f"{shorter(samples.names[occurring[i]])} ({int(truth[:, occurring[i]].sum())})" for i in order]
    _bars(axes, names, found[0][order], found[1][order] if len(nets) > 1 else None)
    axes.set(xlim=(0, 1), xlabel="average precision (in brackets: how often the label occurs)")
    if len(nets) > 1:
        axes.legend(frameon=False, fontsize=8)
    return figure


def predictions(samples: Samples, values: Callable[[Tensor], Tensor]) -> Figure:
    """Returns a panel for each value: predictions of both networks over the targets."""
    truth, found = as_matrix(samples.targets).double(), values(samples.student.logits)
    expected = _teacher(samples, values)
    count = min(truth.shape[1], VALUES)
    figure = new_figure(4 * count, 4)
    for value, axes in enumerate(figure.subplots(1, count, squeeze=False)[0]):
        ends = [float(truth[:, value].min()), float(truth[:, value].max())]
        axes.plot(ends, ends, color="0.6", linestyle="--")
        if expected is not None:
            axes.scatter(truth[:, value], expected[:, value], s=12, color=TEACHER_COLOR, alpha=0.6, label="teacher")
        axes.scatter(truth[:, value], found[:, value], s=12, color=STUDENT_COLOR, alpha=0.6, label="student")
        axes.set(title=shorter(samples.names[value]), xlabel="target", ylabel="prediction")
        axes.legend(frameon=False, fontsize=8)
    return figure


def _cells(
    samples: Samples, badness: Tensor, title: Callable[[int], str], beside: Callable[[Axes, int], None]
) -> Figure:
    """Returns a figure of the samples with the largest `badness` (N,): each with its input, its title and a panel beside."""
    chosen = badness.argsort(descending=True, stable=True)[:WORST].tolist()
    rows = -(-len(chosen) // 4)
    figure = new_figure(12, 2.9 * rows)
    for cell, i in zip(figure.subfigures(rows, 4, squeeze=False).ravel(), chosen, strict=False):
        left, right = cell.subplots(1, 2, width_ratios=[1, 1.3])
        draw_input(left, samples.inputs(i), samples.words(i))
        left.set_title(title(i), fontsize=9, loc="left")
        beside(right, i)
        right.spines[["top", "right"]].set_visible(False)
    if samples.teacher is not None:
        figure.legend(*right.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def _bars(axes: Axes, names: Sequence[str], student: Tensor, teacher: Tensor | None) -> None:
    rows = range(len(names))
    shift = 0.2 if teacher is not None else 0.0
    axes.barh([r - shift for r in rows], student.tolist(), height=0.36, color=STUDENT_COLOR, label="student")
    if teacher is not None:
        axes.barh([r + shift for r in rows], teacher.tolist(), height=0.36, color=TEACHER_COLOR, label="teacher")
    axes.set_yticks(list(rows), names, fontsize=8)
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelsize=7)


def _teacher(samples: Samples, function: Callable[[Tensor], Tensor]) -> Tensor | None:
    return None if samples.teacher is None else function(samples.teacher.logits.double())
