"""How the detections of an exported file are compared with those of its network."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou

from litdistill.tasks.detection.decode import CLASS, SCORE
from litdistill.tasks.detection.matching import SURE

SAME_IOU = 0.9  # from which on two boxes are the same
# Pixels that all sides of two boxes differ by at most, of whatever IoU: a sliver has none worth the name.
SAME_PLACE = 0.01
SAME_SCORE = 0.1  # up to which two boxes that differ in their scores are the same


def compared(exported: Tensor, own: Tensor, least: float = 0.0) -> tuple[float, float, float]:
    """Returns the largest difference of the scores of the same box, the largest score of `own`, and the share of the boxes of
    both that are the same: 2 · pairs / (boxes of `exported` + boxes of `own`); 1 where neither has any.

    `exported`, `own`: detections (N, K, 6) of the same pictures; those without area are left out. Two boxes of a picture are a
    pair if they are of one class, each is the other's closest, and their IoU is at least `SAME_IOU`; they are the same if their
    scores differ by up to `SAME_SCORE`. A score that is no number is a difference that is none.
    `least`: boxes of a lower score are not counted. One that is counted may be the same as one that is not: nothing is lost
    where a score falls from 0.51 to 0.49.
    """
    if not bool(exported.isfinite().all()):
        return float("nan"), float(own[..., SCORE].max()), 0.0
    count, same, difference = 0, 0, 0.0
    for a, b in zip(exported.double(), own.double(), strict=True):
        a, b = with_area(a), with_area(b)
        counts, counts_too = a[:, SCORE] >= least, b[:, SCORE] >= least
        count += int(counts.sum()) + int(counts_too.sum())
        if not len(a) or not len(b):
            continue
        near = (a[:, None, :4] - b[None, :, :4]).abs().amax(2) <= SAME_PLACE
        iou = box_iou(a[:, :4], b[:, :4]).masked_fill(near, 1.0)
        iou = iou.masked_fill(a[:, None, CLASS] != b[None, :, CLASS], -1.0)
        (best, to), back = iou.max(1), iou.argmax(0)
        pair = (best >= SAME_IOU) & (back[to] == torch.arange(len(a), device=a.device))
        apart = (a[:, SCORE] - b[to, SCORE]).abs()
        difference = max(difference, float(apart[pair].max()) if bool(pair.any()) else 0.0)
        pair &= apart <= SAME_SCORE
        same += int((pair & counts).sum()) + int((pair & counts_too[to]).sum())
    return difference, float(own[..., SCORE].max()), same / count if count else 1.0


def in_int8(exported: Tensor, own: Tensor) -> tuple[float, float, float]:
    """Returns `compared` of the boxes with a score from `SURE` on, which is what a detector decides; of all boxes where the
    network is never as sure.

    An int8 file is held to the network's decisions, as one of a classifier is. All boxes are another question: nearly every
    picture has 100, the most that are kept, of which one to three are objects. The others lie so close to each other and to
    the end of the list that rounding decides which of them suppression keeps. mAP sees all of them, and has a limit of its own.
    """
    sure = bool((own[..., SCORE] >= SURE).any())
    return compared(exported, own, SURE if sure else 0.0)


def with_area(rows: Tensor) -> Tensor:
    """Returns the detections (K, 6) that hold a box of some area."""
    return rows[(rows[:, CLASS] >= 0) & (rows[:, 2] > rows[:, 0]) & (rows[:, 3] > rows[:, 1])]
