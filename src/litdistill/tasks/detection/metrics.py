"""COCO's mean average precision over all pictures of a split, by torchmetrics and faster-coco-eval.

A metric's states are the detections and the objects themselves, so that the figures are the same for any batches and any number
of processes.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.detection import MeanAveragePrecision
from torchmetrics.utilities import dim_zero_cat
from torchvision.ops import box_iou

from litdistill.tasks.base import overflowed
from litdistill.tasks.detection.boxes import CROWD, LABEL, present
from litdistill.tasks.detection.decode import CLASS, SCORE, above
from litdistill.types import Outputs, has_label
from litdistill.utils.errors import UserError
from litdistill.utils.units import MAPS

OVERLAP = 0.5  # the IoU from which an object counts as found, where one threshold is meant
# COCO's; torchmetrics' own are float32.
IOUS, RECALLS = np.linspace(0.5, 0.95, 10).tolist(), np.linspace(0, 1, 101).tolist()
SAMPLE = 300  # boxes of a split that constant predictions are made of
PICTURES = 300  # of a split that they are measured on


class Split(NamedTuple):
    """The detections and the objects of each picture of a split."""

    found: Sequence[Tensor]  # (K, 6) each: x1, y1, x2, y2, score, class; only those with a score
    truth: Sequence[Tensor]  # (M, 6) each: x1, y1, x2, y2, class, crowd; only rows that hold an object

    @classmethod
    def of(cls, found: Tensor, targets: Tensor) -> Split:
        """Takes detections (N, K, 6) and targets (N, M, 6); pictures without labels (NaN) are left out."""
        known = has_label(targets)
        found, targets = found[known], targets[known]
        return cls(
            [rows[rows[:, CLASS] >= 0] for rows in found],
            [rows[kept] for rows, kept in zip(targets, present(targets, crowds=True), strict=True)],
        )


def need_faster_coco_eval() -> None:
    """Raises `UserError` where mAP cannot be computed: before anything is trained."""
    if importlib.util.find_spec("faster_coco_eval") is None:
        raise UserError(
            "Detection is measured by COCO's mAP, which needs faster-coco-eval: pip install 'litdistill[detection]'."
        )


class MeanAP(Metric):
    """COCO's `map`, `map_50`, `map_75`, and `map_small`, `map_medium` and `map_large` where there are such objects.

    Args:
        keep: from outputs to those with a head `detections` (N, K, 6); `Detection.keep`.
        of_teacher: a score. `update` then takes the teacher's outputs in place of targets, and the detections from that score
            on are the objects; `compute` returns the one figure `agreement`, the mAP, and nothing where there is no object.

    Crowds are ignored as COCO does; pictures without labels are left out. Raises `UserError` without faster-coco-eval, and for
    scores that are not finite. Without any object all figures are NaN.
    """

    full_state_update = False
    found: list[Tensor]
    truth: list[Tensor]
    found_counts: list[Tensor]
    truth_counts: list[Tensor]

    def __init__(self, keep: Callable[[Outputs], Outputs], of_teacher: float | None = None):
        super().__init__()
        need_faster_coco_eval()
        self.keep, self.of_teacher = keep, of_teacher
        for name in ("found", "truth", "found_counts", "truth_counts"):  # flat: a process may have no picture
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, outputs: Outputs, targets: Any) -> None:
        if self.of_teacher is not None:
            targets = as_targets(self.keep(targets).heads["detections"], self.of_teacher)
        split = Split.of(self.keep(outputs).heads["detections"].detach().float(), targets)
        if not split.found:
            return
        for rows, state, counts in (
            (split.found, self.found, self.found_counts),
            (split.truth, self.truth, self.truth_counts),
        ):
            state.append(torch.cat([r.float() for r in rows]).flatten())
            counts.append(torch.tensor([float(len(r)) for r in rows], device=state[-1].device))

    def split(self) -> Split:
        """Returns what was gathered, by picture, on the CPU."""
        parts = []
        for state, counts in ((self.found, self.found_counts), (self.truth, self.truth_counts)):
            rows, sizes = (dim_zero_cat(x).cpu() if len(x) else torch.zeros(0) for x in (state, counts))
            parts.append(rows.view(-1, 6).split(sizes.long().tolist()) if len(sizes) else ())
        return Split(*parts)

    def compute(self) -> dict[str, Tensor]:
        found = mean_ap(self.split())
        if self.of_teacher is not None:
            found = {} if math.isnan(found["map"]) else {"agreement": found["map"]}
        return {k: torch.tensor(v, dtype=torch.float64) for k, v in found.items()}


def as_targets(found: Tensor, score: float) -> Tensor:
    """Returns the detections (N, K, 6) from a score on as targets (N, K, 6)."""
    found = above(found, score)
    return torch.cat([found[..., :4], found[..., CLASS, None], torch.zeros_like(found[..., :1])], -1)


def mean_ap(split: Split) -> dict[str, float]:
    """Returns COCO's figures by name; NaN without any object. Raises `UserError` for scores that are not finite."""
    check_scores(split)
    if not any(len(rows) and bool((rows[:, CROWD] == 0).any()) for rows in split.truth):
        return {"map": math.nan, "map_50": math.nan, "map_75": math.nan}
    found = coco(split).compute()
    return {name: value for name in MAPS if (value := float(found[name])) != -1}


def coco(split: Split, **options: Any) -> MeanAveragePrecision:
    """Returns torchmetrics' metric, updated with a split."""
    logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)  # it logs a table of each evaluation
    metric = MeanAveragePrecision(
        iou_thresholds=IOUS, rec_thresholds=RECALLS, backend="faster_coco_eval", sync_on_compute=False, **options
    )
    metric.warn_on_many_detections = False  # COCO counts the best 100 of a class
    metric.update([as_found(rows) for rows in split.found], [as_truth(rows) for rows in split.truth])
    return metric


def as_found(rows: Tensor) -> dict[str, Tensor]:
    """Returns detections (K, 6) in torchvision's form."""
    return {"boxes": rows[:, :4], "scores": rows[:, SCORE], "labels": rows[:, CLASS].long()}


def as_truth(rows: Tensor) -> dict[str, Tensor]:
    """Returns objects (M, 6) in torchmetrics' form."""
    return {"boxes": rows[:, :4], "labels": rows[:, LABEL].long(), "iscrowd": rows[:, CROWD].long()}


def check_scores(split: Split) -> None:
    """Raises `UserError` for detections that are not finite."""
    if bad := sum(not bool(torch.isfinite(rows).all()) for rows in split.found):
        raise overflowed(f"The outputs for {bad} of {len(split.found)} pictures")


class Curves(NamedTuple):
    """Precision over recall of each class, and the average precisions that are their means."""

    classes: list[int]
    recall: Tensor  # (R,) COCO's 101 recalls
    precision: Tensor  # (classes, R) at an IoU of 0.5; -1 for a class without an object
    average: Tensor  # (classes,) over COCO's ten IoUs; NaN for a class without an object
    average_50: Tensor  # (classes,) at an IoU of 0.5


def curves(split: Split) -> Curves:
    """Returns the curves of a split, by class in ascending order; of no class where nothing was found and nothing is there."""
    check_scores(split)
    recall = torch.tensor(RECALLS, dtype=torch.float64)
    rows = [r[:, column] for part, column in ((split.found, CLASS), (split.truth, LABEL)) for r in part]
    classes = sorted({int(c) for r in rows for c in r.unique()})
    if not classes:
        none = torch.zeros(0, dtype=torch.float64)
        return Curves([], recall, none.view(0, 101), none, none)
    precision = coco(split, extended_summary=True).compute()["precision"][..., 0, -1].double()  # (IoUs, R, classes)
    empty = precision[0, 0] < 0
    average, average_50 = (p.masked_fill(empty, math.nan) for p in (precision.mean((0, 1)), precision[0].mean(0)))
    return Curves(classes, recall, precision[0].T, average, average_50)


def constant_map(truth: Sequence[Tensor]) -> float | None:
    """Returns the mAP of detections that are the same for all pictures: chance level. None without any object.

    They are boxes of the objects themselves, of which each scores the share of pictures with an object of its class that it
    overlaps by an IoU of 0.5: boxes that are good guesses wherever the picture. Of a large split some pictures and some boxes,
    evenly spaced, are taken.
    """
    pictures = [rows[rows[:, CROWD] == 0].cpu() for rows in truth]
    pictures = [pictures[i] for i in spaced(len(pictures), PICTURES)]
    whole = torch.cat(pictures) if pictures else torch.zeros(0, 6)
    if not len(whole):
        return None
    guess = whole[spaced(len(whole), SAMPLE)]
    hit = (box_iou(guess[:, :4], whole[:, :4]) >= OVERLAP) & (guess[:, LABEL, None] == whole[:, LABEL])
    which = torch.repeat_interleave(torch.arange(len(pictures)), torch.tensor([len(p) for p in pictures]))
    share = torch.zeros(len(guess), len(pictures)).index_add(1, which, hit.float()).clamp(max=1).mean(1)
    order = share.argsort(descending=True, stable=True)
    found = torch.cat([guess[:, :4], share[:, None], guess[:, LABEL, None]], 1)[order]
    kept: list[int] = []
    overlap = (box_iou(found[:, :4], found[:, :4]) > 0.6) & (found[:, CLASS, None] == found[:, CLASS])
    for i in range(len(found)):
        if not bool(overlap[i, kept].any()):
            kept.append(i)
    return mean_ap(Split([found[kept[:100]]] * len(pictures), pictures))["map"]


def spaced(count: int, most: int) -> list[int]:
    """Returns at most `most` of `count` places, evenly spaced."""
    return list(range(count)) if count <= most else torch.linspace(0, count - 1, most).round().long().tolist()
