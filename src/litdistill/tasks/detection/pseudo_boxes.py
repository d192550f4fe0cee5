"""Pseudo boxes: what the teacher detects labels the pictures that have no labels.

    litdistill data=digit_scenes data.labels=250 method=pseudo_boxes

The oldest way to learn from unlabelled pictures: a teacher's detections above a threshold are taken as boxes of the training
set (STAC, Sohn et al. 2020, arXiv 2005.04757, section 3, without its strong augmentation; its threshold is 0.9 for a Faster
R-CNN). The labels' loss does the rest, so that any kind of teacher will do, also a two-stage detector.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from litdistill.methods.base import BOXES, Method
from litdistill.tasks.detection.boxes import LABEL, present
from litdistill.tasks.detection.decode import CLASS, SCORE, above, detections
from litdistill.types import Batch, Outputs, has_label
from litdistill.utils.errors import UserError

log = logging.getLogger(__name__)

CANDIDATES = 300  # of a picture that suppression sees: few are above the threshold


class PseudoBoxes(Method):
    """`hard` · labels' loss, with the teacher's detections as the labels of pictures without.

    A picture without labels in which the teacher finds nothing is background. `pseudo_share`, the share of pseudo boxes among
    the boxes that are trained on, is logged.

    Args:
        hard: weight of the labels' loss, over pictures with labels and with pseudo boxes alike.
        threshold: score from which a detection becomes a box.
        nms: of two boxes of a class with a higher IoU the better one is kept.
        top: how many boxes a picture gets at most.
    """

    kinds = (BOXES,)
    relabels = True
    needs_hard = True

    def __init__(self, hard: float = 1.0, threshold: float = 0.5, nms: float = 0.6, top: int = 100):
        super().__init__(hard)
        if not hard > 0:
            raise UserError("pseudo_boxes learns by the labels' loss alone: hard must be above 0.")
        if not (0 < threshold < 1 and 0 < nms <= 1 and top >= 1):
            raise UserError(
                f"threshold={threshold}, nms={nms}, top={top}: a score between 0 and 1, an IoU up to 1 and a number of boxes."
            )
        self.threshold, self.nms, self.top = threshold, nms, top
        self.seen = 0  # pictures that got boxes
        self.share: Tensor | None = None

    def relabel(self, teacher: Outputs, batch: Batch) -> Batch:
        """Returns the batch in which each picture without labels has the teacher's detections as targets (N, M, 6)."""
        known = has_label(batch.targets)
        missing = (~known).nonzero().flatten()
        found = batch.targets.new_zeros(0)
        targets = batch.targets
        if len(missing):
            size = _size(batch.inputs)
            found = pseudo_targets(teacher.rows(missing).heads, size, self.threshold, self.nms, self.top)
            targets = merged(targets, missing, found.to(targets))
            self.seen += len(missing)
        boxes = present(targets)
        self.share = (boxes.sum() - boxes[known].sum()) / boxes.sum().clamp(min=1)
        return batch._replace(targets=targets)

    def watched(self) -> dict[str, Tensor]:
        return {} if self.share is None else {"pseudo_share": self.share}

    def set_epoch(self, epoch: int) -> None:
        if epoch > self.epoch and not self.seen:
            log.warning("pseudo_boxes: all pictures have labels, so that nothing is learned from the teacher.")
            self.seen = 1  # said once
        super().set_epoch(epoch)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {}


@torch.no_grad()
def pseudo_targets(
    heads: Mapping[str, Tensor], image_size: tuple[int, int], threshold: float, nms: float, top: int
) -> Tensor:
    """Returns what is detected with a score of `threshold` or more as targets (N, M, 6): x1, y1, x2, y2, class, 0.

    `heads`: dense, or `detections` (N, K, 6), of which the suppression is done. M: the most boxes of a picture, 1 at least.
    """
    found = heads["detections"][:, :top] if "detections" in heads else None
    if found is None:
        found = detections(heads, image_size, threshold / 2, nms, top, max(CANDIDATES, top))
    found = above(found, threshold)
    rows = max(1, int((found[..., CLASS] >= 0).sum(1).amax())) if len(found) else 1
    found = found[:, :rows]
    return torch.cat([found[..., :SCORE], found[..., CLASS:], torch.zeros_like(found[..., :1])], 2)


def merged(targets: Tensor, index: Tensor, found: Tensor) -> Tensor:
    """Returns targets (N, M, 6) with the pictures `index` (n,) replaced by `found` (n, K, 6), all with max(M, K) rows."""
    rows = max(targets.shape[1], found.shape[1])
    return _rows(targets, rows).index_copy(0, index, _rows(found, rows))


def _rows(targets: Tensor, rows: int) -> Tensor:
    """Returns targets (N, M, 6) with M raised to `rows` by rows without an object."""
    empty = targets.new_zeros(len(targets), rows - targets.shape[1], targets.shape[2])
    empty[..., LABEL] = -1
    return torch.cat([targets, empty], 1)


def _size(inputs: Any) -> tuple[int, int]:
    """Returns height and width of pictures (N, C, H, W)."""
    if not isinstance(inputs, Tensor) or inputs.ndim != 4:
        raise UserError("pseudo_boxes labels pictures (N, C, H, W), and the inputs are none.")
    return inputs.shape[2], inputs.shape[3]
