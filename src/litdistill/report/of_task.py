"""The sections of several labels a sample (average precision of each), of masks (IoU of each class) and of numbers (predicted
over true, and errors)."""

from __future__ import annotations

import math
import statistics

import numpy as np
import torch
from torch import Tensor

from litdistill.evaluation.predictions import spread_out
from litdistill.report import plots
from litdistill.report.blocks import Block, Fold, Grid, Picture, Section, Table
from litdistill.report.collect import Group, Row, Seed
from litdistill.report.of_boxes import of_boxes
from litdistill.report.sections import MEASURED, class_names, looks, of_each
from litdistill.tasks import Detection, MultiLabel, Regression, Segmentation
from litdistill.tasks.multilabel import average_precision
from litdistill.tasks.segmentation.metrics import class_iou, confusion, labels_of

POINTS = 1000  # of a figure at most, evenly spaced among all samples
VALUES = 6  # values of a regression at most that have figures


def of_task(group: Group, key: str) -> list[Section]:
    """Returns the sections that only this group's task has; empty for classification, and for a task of one's own."""
    tasks = [seed.task for row in group.rows for seed in row.seeds]
    if all(isinstance(task, MultiLabel) for task in tasks):
        return [per_label(group, key)]
    if all(isinstance(task, Detection) for task in tasks):
        return of_boxes(group, key)
    if all(isinstance(task, Segmentation) for task in tasks):
        return [per_class(group, key)]
    return [errors(group, key)] if all(isinstance(task, Regression) for task in tasks) else []


def per_label(group: Group, key: str) -> Section:
    """Returns the section of the average precision of each label, in a table and as bars."""
    about = (
        f"In per cent of the test {group.things}, the mean over seeds: the area under the curve of precision over recall. "
        "A label that no sample of the test set has is left empty. Rare labels have low values by chance alone."
    )
    return of_each(group, key, [_precisions(row) for row in group.rows], "average precision", about, "label")


def per_class(group: Group, key: str) -> Section:
    """Returns the section of the intersection over union of each class of masks, in a table and as bars."""
    about = (
        f"In per cent of all pixels of the test {group.things}, the mean over seeds: the pixels of a class that are found, "
        "over those that are it or are taken for it. A class that is neither there nor found is left empty."
    )
    means = [_overlaps(row, len(class_names(group))) for row in group.rows]
    return of_each(group, key, means, "intersection over union", about)


def _overlaps(row: Row, classes: int) -> list[float]:
    """Returns the IoU in per cent of each class, averaged over seeds; NaN for a class that is neither there nor found."""
    found = [class_iou(confusion(labels_of(s.test), s.test_targets, classes, s.task.ignored)) for s in row.seeds]  # type: ignore[attr-defined]
    return (100 * torch.stack(found).nanmean(0)).tolist()


def _precisions(row: Row) -> list[float]:
    """Returns the average precision in per cent of each label, averaged over seeds; NaN for a label that does not occur."""
    found = []
    for seed in row.seeds:
        truth = seed.test_targets.round().bool()
        pairs = zip(seed.test.logits.T, truth.T, strict=True)
        found.append([100 * average_precision(s, t) if t.any() else math.nan for s, t in pairs])
    return [statistics.fmean(column) for column in zip(*found, strict=True)]


def errors(group: Group, key: str) -> Section:
    """Returns the section of a regression: predicted over true values, and the errors, of each row and value."""
    pairs = [(style, *_values(row)) for style, row in zip(looks(group), group.rows, strict=True)]
    names, table = class_names(group), []
    for style, predicted, true in pairs:
        quartiles = np.quantile((predicted - true).numpy(), (0.05, 0.25, 0.5, 0.75, 0.95), axis=0)
        for name, column in zip(names, quartiles.T, strict=True):
            table.append(
                [style.name, *([name] if len(names) > 1 else []), *(f"{v:.4g}".replace("-", "−") for v in column)]
            )
    head = ["model", *(["value"] if len(names) > 1 else []), "error: 5th percentile", "25th", "median", "75th", "95th"]
    about = (
        f"Error: predicted less true, in the units of the targets, of the test {group.things} of all seeds. A median far "
        "from 0 is a bias. In the figures all models have the same axes; "
        "predictions beyond them stand at the edge. A cloud flatter than the dotted line: predictions too near to the mean."
    )
    blocks: list[Block] = [Table(f"{key}error", head, table), Fold(MEASURED, [about])]
    for i, name in enumerate(names[:VALUES]):
        blocks.append(
            Grid(_figures([(s, p[:, i], t[:, i]) for s, p, t in pairs], name if len(names) > 1 else "", f"{key}{i}"))
        )
    return Section(f"{key}errors", "Predicted and true values", blocks)


def _values(row: Row) -> tuple[Tensor, Tensor]:
    """Returns predictions and targets (samples of all seeds, values), float64, in the units of the targets."""
    shaped = lambda t: (t[:, None] if t.ndim == 1 else t).double()  # noqa: E731
    return torch.cat([_predicted(s) for s in row.seeds]), torch.cat([shaped(s.test_targets) for s in row.seeds])


def _predicted(seed: Seed) -> Tensor:
    assert isinstance(seed.task, Regression)
    return seed.task.values(seed.test)


def _figures(pairs: list[tuple[plots.Style, Tensor, Tensor]], value: str, key: str) -> list[Picture]:
    """Returns two pictures a row, on common axes, which the true values and nearly all predictions are within."""
    true = torch.cat([t for _, _, t in pairs])
    most = np.quantile(torch.cat([p for _, p, _ in pairs]).numpy(), (0.005, 0.995))
    low, high = min(float(true.min()), float(most[0])), max(float(true.max()), float(most[1]))
    room = 0.04 * (high - low) or 1.0
    limits = (low - room, high + room)
    wrong = [p - t for _, p, t in pairs]
    far = float(np.quantile(torch.cat(wrong).abs().numpy(), 0.995)) or 1.0
    edges = np.linspace(-far, far, 26).tolist()
    top = 1.08 * max(np.histogram(w.clamp(-far, far).numpy(), edges)[0].max() for w in wrong)
    found = []
    for (style, predicted, target), error in zip(pairs, wrong, strict=True):
        title = f"{style.name}, {value}" if value else style.name
        some = spread_out(POINTS, len(target))
        over = plots.scatter(target[some].tolist(), predicted[some].clamp(low, high).tolist(), title, limits, style)
        spread = plots.histogram(error.clamp(-far, far).tolist(), edges, title, "error (predicted − true)", top, style)
        middle = float(error.median())
        found += [
            Picture(f"{key}predicted-{style.number}", over, f"Predicted over true values of {title}."),
            Picture(f"{key}error-{style.number}", spread, f"Errors of {title}; their median is {middle:.4g}."),
        ]
    return found
