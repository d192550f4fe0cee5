"""Which objects of a picture a network finds, and which of its detections are right: at one IoU and from one score on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_iou

from litdistill.tasks.detection.boxes import CROWD, LABEL
from litdistill.tasks.detection.decode import CLASS, SCORE
from litdistill.tasks.detection.metrics import OVERLAP, Split

SURE = 0.5  # the score from which a detection is drawn and counted


class Matched(NamedTuple):
    """One picture."""

    objects: Tensor  # (M, 6) without crowds: x1, y1, x2, y2, class, 0
    hit: Tensor  # (M,) bool: which of them are found
    found: Tensor  # (K, 6) from the score on: x1, y1, x2, y2, score, class; best first
    right: Tensor  # (K,) bool: which of them are an object; those on a crowd are neither right nor wrong, and left out


def matched(found: Tensor, truth: Tensor, score: float = SURE, overlap: float = OVERLAP) -> Matched:
    """Returns which objects are found: each detection, the best first, takes the object of its class that it overlaps most
    among those that are left, by an IoU of `overlap` at least, as COCO has it.

    `found` (K, 6), best first, and `truth` (M, 6) of one picture.
    """
    found, crowd = found[found[:, SCORE] >= score], truth[:, CROWD] > 0
    objects, crowds = truth[~crowd], truth[crowd]
    iou = box_iou(found[:, :4], objects[:, :4]).masked_fill(found[:, CLASS, None] != objects[:, LABEL], -1.0)
    hit, right = (torch.zeros(len(x), dtype=torch.bool) for x in (objects, found))
    for i in range(len(found) if len(objects) else 0):
        best = int(iou[i].masked_fill(hit, -1.0).argmax())
        if not hit[best] and iou[i, best] >= overlap:
            hit[best] = right[i] = True
    inside = _shares(found[:, :4], crowds[:, :4]).masked_fill(found[:, CLASS, None] != crowds[:, LABEL], 0.0)
    kept = right | ~(inside >= overlap).any(1)
    return Matched(objects, hit, found[kept], right[kept])


def _shares(boxes: Tensor, crowds: Tensor) -> Tensor:
    """Returns the share of each box (K, 4) that lies in each crowd (C, 4), (K, C)."""
    low, high = torch.maximum(boxes[:, None, :2], crowds[:, :2]), torch.minimum(boxes[:, None, 2:], crowds[:, 2:])
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1).clamp(min=1e-9)
    return (high - low).clamp(min=0).prod(2) / area[:, None]


def missed(student: Split, teacher: Split | None, score: float = SURE) -> list[tuple[int, int, int]]:
    """Returns the pictures of which the student misses something, the worst first: place, how many objects it misses, and how
    many of these its teacher finds.

    Worst are those with the most that only the teacher finds, then those with the largest share missed.
    """
    rows = []
    for i, truth in enumerate(student.truth):
        own = matched(student.found[i], truth, score)
        lost = ~own.hit
        by_teacher = lost & matched(teacher.found[i], truth, score).hit if teacher is not None else lost
        if bool(lost.any()):
            rows.append((int(by_teacher.sum()), float(lost.float().mean()), i, int(lost.sum())))
    rows.sort(key=lambda row: (-row[0], -row[1], row[2]))
    return [(i, count, only) for only, _, i, count in rows]


def counted(split: Split, score: float = SURE) -> tuple[int, int, int]:
    """Returns over all pictures how many objects there are, how many of them are found, and how many detections are wrong."""
    pairs = [matched(found, truth, score) for found, truth in zip(split.found, split.truth, strict=True)]
    return (
        sum(len(p.hit) for p in pairs),
        sum(int(p.hit.sum()) for p in pairs),
        sum(int((~p.right).sum()) for p in pairs),
    )


def names_of(rows: Tensor, column: int, names: Sequence[str]) -> list[str]:
    """Returns the names of the classes in a column of rows; numbers where there are none."""
    return [names[c] if c < len(names) else str(c) for c in rows[:, column].long().tolist()]
