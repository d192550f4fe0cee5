"""Boxes of a batch of pictures as one padded tensor (N, M, 6).

Columns: x1, y1, x2, y2 in pixels of the network's input, on pixel edges (the whole picture is 0, 0, W, H); the class, from 0
and without a background class, −1 where a row holds no object; and 1 for a crowd (COCO's `iscrowd`, VOC's `difficult`), which
is not trained on and neither found nor missed. A picture without labels is all NaN (`litdistill.types.has_label`); one without
objects has labels: none of its rows holds an object.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COLUMNS = 6
LABEL, CROWD = 4, 5


def padded(pictures: Sequence[Tensor], rows: int | None = None) -> Tensor:
    """Returns the boxes (n, 6) of each picture as one tensor (N, M, 6) float32. `rows`: M; the largest n, 1 at least, unless
    given."""
    rows = rows or max([1, *(len(boxes) for boxes in pictures)])
    found = torch.zeros(len(pictures), rows, COLUMNS)
    found[..., LABEL] = -1
    for picture, boxes in zip(found, pictures, strict=True):
        picture[: len(boxes)] = boxes
    return found


def present(targets: Tensor, crowds: bool = False) -> Tensor:
    """Returns which rows of targets (N, M, 6) hold an object of some area, (N, M) bool; with `crowds` also those of crowds."""
    solid = (targets[..., 2] > targets[..., 0]) & (targets[..., 3] > targets[..., 1])
    return (targets[..., LABEL] >= 0) & solid & (crowds | (targets[..., CROWD] == 0))


def as_dicts(targets: Tensor, crowds: bool = False) -> list[dict[str, Tensor]]:
    """Returns the objects of each picture as torchvision's detectors and torchmetrics take them: `boxes` (n, 4), `labels` (n,)
    int64, and `iscrowd` (n,) int64."""
    found = []
    for picture, kept in zip(targets, present(targets, crowds), strict=True):
        rows = picture[kept]
        found.append({"boxes": rows[:, :4], "labels": rows[:, LABEL].long(), "iscrowd": rows[:, CROWD].long()})
    return found
