"""How the detections of an exported file are compared with those of its network."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou

from litdistill.tasks.detection.decode import CLASS, SCORE

SAME_IOU = 0.9  # from which on two boxes are the same
SAME_PLACE = (
    0.01  # pixels that all sides of two boxes differ by at most, of whatever IoU: a sliver has none worth the name
)
SAME_SCORE = 0.1  # up to which two boxes that differ in their scores are the same


def compared(exported: Tensor, own: Tensor) -> tuple[float, float, float]:
    """Returns the largest difference of the scores of the same box, the largest score of `own`, and the share of the boxes of
    both that are the same: 2 · pairs / (boxes of `exported` + boxes of `own`); 1 where neither has any.

    `exported`, `own`: detections (N, K, 6) of the same pictures; those without area are left out. Two boxes of a picture are a
    pair if they are of one class, each is the other's closest, and their IoU is at least `SAME_IOU`; they are the same if their
    scores differ by up to `SAME_SCORE`. A score that is no number is a difference that is none.
    """
    if not bool(exported.isfinite().all()):
        return float("nan"), float(own[..., SCORE].max()), 0.0
    count, same, difference = 0, 0, 0.0
    for a, b in zip(exported.double(), own.double(), strict=True):
        a, b = with_area(a), with_area(b)
        count += len(a) + len(b)
        if not len(a) or not len(b):
            continue
        near = (a[:, None, :4] - b[None, :, :4]).abs().amax(2) <= SAME_PLACE
        iou = box_iou(a[:, :4], b[:, :4]).masked_fill(near, 1.0)
        iou = iou.masked_fill(a[:, None, CLASS] != b[None, :, CLASS], -1.0)
        (best, to), back = iou.max(1), iou.argmax(0)
        pair = (best >= SAME_IOU) & (back[to] == torch.arange(len(a), device=a.device))
        apart = (a[pair, SCORE] - b[to[pair], SCORE]).abs()
        difference = max(difference, float(apart.max()) if len(apart) else 0.0)
        same += 2 * int((apart <= SAME_SCORE).sum())
    return difference, float(own[..., SCORE].max()), same / count if count else 1.0


def with_area(rows: Tensor) -> Tensor:
    """Returns the detections (K, 6) that hold a box of some area."""
    return rows[(rows[:, CLASS] >= 0) & (rows[:, 2] > rows[:, 0]) & (rows[:, 3] > rows[:, 1])]
