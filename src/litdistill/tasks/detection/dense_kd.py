"""Distillation of dense predictions: the teacher's sigmoids, boxes and centerness at each anchor are the student's targets.

    litdistill experiment=… method=dense_kd

The classes are compared by the quality focal loss (Li et al. 2020, GFL, arXiv 2006.04388) with the teacher's sigmoids as
targets; boxes and centerness count as the teacher is confident there. No label is read: every picture teaches.
"""

from __future__ import annotations

from torch import Tensor

from litdistill.methods.base import BOXES, Method, check_weights
from litdistill.tasks.detection.dense_losses import above, confidence, quality_focal, weighted_entropy, weighted_giou
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError


class DenseKD(Method):
    """`hard` · labels' loss + `soft` · QFL + `box` · Σ w (1 − GIoU) / Σ w + `centerness` · Σ w KL / Σ w.

    w is the teacher's confidence, the largest sigmoid of an anchor, where that is `least` or more: elsewhere its boxes were
    never trained. The centerness is compared where both networks have it.

    Args:
        hard: weight of the labels' loss.
        soft: weight of the classes' loss, `dense_losses.quality_focal`.
        box: weight of the boxes' loss, `dense_losses.weighted_giou`.
        centerness: weight of the centerness' loss, `dense_losses.weighted_entropy`.
        power: exponent of |p_t − p_s| in the classes' loss; 0 weighs all anchors alike.
        least: confidence of the teacher from which its boxes and centerness count.

    Raises `UserError` where both networks do not share their anchors and classes.
    """

    kinds = (BOXES,)

    def __init__(
        self,
        hard: float = 1.0,
        soft: float = 1.0,
        box: float = 1.0,
        centerness: float = 1.0,
        power: float = 2.0,
        least: float = 0.05,
    ):
        super().__init__(hard)
        self.terms = DenseTerms(soft, box, centerness, power, least)

    def build(self, student: Outputs, teacher: Outputs, targets: Tensor | None) -> None:
        check_anchors(student, teacher, "dense_kd")

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return self.terms(student, teacher)


class DenseTerms:
    """The weighted terms of `DenseKD` by name, of two networks' outputs.

    Args: as of `DenseKD`. Raises `UserError` for a weight below 0, an exponent without a gradient at agreement, or a confidence
    that is no probability.
    """

    def __init__(self, soft: float, box: float, centerness: float, power: float, least: float):
        check_weights(soft=soft, box=box, centerness=centerness)
        if not (power == 0 or power >= 1):
            raise UserError(
                f"power={power}: an exponent between 0 and 1 has no gradient where both agree. Use 0, or 1 to 4."
            )
        if not 0 <= least < 1:
            raise UserError(
                f"least={least} is a confidence of the teacher, from 0 to below 1. Common values are 0.05 to 0.3."
            )
        self.soft, self.box, self.centerness, self.power, self.least = soft, box, centerness, power, least

    def __call__(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        weight = above(confidence(teacher.logits), self.least)
        s, t = student.heads, teacher.heads
        terms = {}
        if self.soft:
            terms["soft"] = self.soft * quality_focal(s["logits"], t["logits"], self.power)
        if self.box and "boxes" in s:
            terms["soft_box"] = self.box * weighted_giou(s["boxes"], t["boxes"], weight)
        if self.centerness and "centerness" in s and "centerness" in t:
            terms["soft_centerness"] = self.centerness * weighted_entropy(s["centerness"], t["centerness"], weight)
        return terms


def check_anchors(student: Outputs, teacher: Outputs, method: str) -> None:
    """Raises `UserError` unless both networks predict for the same number of anchors and of classes."""
    for outputs, whose in ((student, "student"), (teacher, "teacher")):
        if "boxes" not in outputs.heads or outputs.logits.ndim != 3:
            raise UserError(
                f"{method} compares dense predictions, and this {whose} gives {', '.join(outputs.heads)}: use pkd, cwd or "
                "pseudo_boxes for a two-stage detector."
            )
    s, t = (tuple(outputs.logits.shape[1:]) for outputs in (student, teacher))
    if s != t:
        raise UserError(
            f"{method} compares predictions anchor by anchor: the student has {s[0]} anchors and {s[1]} classes, the teacher "
            f"{t[0]} and {t[1]}. Give both the same kind of head, strides and anchors, or use pkd, cwd or pseudo_boxes."
        )
