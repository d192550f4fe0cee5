"""Metrics of masks, all of one confusion matrix of pixels: exact for any batches and number of processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from litdistill.tasks.base import overflowed
from litdistill.types import Outputs
from litdistill.utils.errors import UserError

IGNORED = 255  # the class of a pixel that counts for nothing, as in PASCAL VOC and Cityscapes
MOST = 255  # classes at most: masks are files of 8 bits


class PixelMetrics(Metric):
    """`miou` and `pixel_accuracy` over all pixels of a split that have a class.

    Its state is the confusion matrix, (255, 255) int64: sums of whole numbers, which are the same in any order.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, ignored: int = IGNORED):
        super().__init__()
        self.ignored = ignored
        self.add_state("counts", torch.zeros(MOST, MOST, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, outputs: Outputs, targets: Tensor) -> None:
        """Takes pictures, logits (N, P, C) or labels (N, P) and masks (N, H, W); or pixels, (P, C) and (P,)."""
        self.counts += confusion(labels_of(outputs), targets, MOST, self.ignored)

    def compute(self) -> dict[str, Tensor]:
        """Returns the metrics as float64; NaN where no pixel has a class."""
        return {
            "miou": class_iou(self.counts).nanmean(),
            "pixel_accuracy": self.counts.diagonal().sum() / self.counts.sum().double(),
        }


def labels_of(outputs: Outputs) -> Tensor:
    """Returns the most probable class of each pixel, int64: logits (…, C) as (…); kept labels as they are.

    Raises `UserError` for logits that are not finite.
    """
    if "label" in outputs.heads:
        return outputs.heads["label"].long()
    logits = outputs.logits
    if not bool(logits.isfinite().all()):
        raise overflowed("The logits of some pixels")
    return logits.argmax(-1)


def confusion(labels: Tensor, targets: Tensor, classes: int, ignored: int = IGNORED) -> Tensor:
    """Returns the confusion matrix of pixels, counts (classes, classes) int64: rows are truth, columns are predictions.

    Both hold as many pixels in the same order. A target of `ignored`, and one below 0 (without a label), counts for nothing.
    Raises `UserError` for a class beyond the matrix.
    """
    labels, targets = labels.reshape(-1), targets.reshape(-1).long()
    counted = (targets >= 0) & (targets != ignored)
    labels, targets = labels[counted], targets[counted]
    if len(targets) and max(int(targets.max()), int(labels.max())) >= classes:
        raise UserError(f"Masks hold the class {int(targets.max())}, and there are {classes}, which count from 0.")
    return torch.bincount(targets * classes + labels, minlength=classes**2).view(classes, classes)


def class_iou(counts: Tensor) -> Tensor:
    """Returns the intersection over union of each class, float64, NaN for one that is neither there nor predicted.

    `counts`: `confusion`. Of a class: its pixels that are predicted, over those that are it or are predicted as it
    (Everingham et al. 2015, PASCAL VOC, section 2.2).
    """
    hits = counts.diagonal().double()
    return hits / (counts.sum(0) + counts.sum(1) - hits)
