"""Localization distillation. Zheng et al. 2022, LD (arXiv 2102.12252), section 3: written from the paper's formulas alone.

    litdistill experiment=… method=ld student.bins=8 teacher.bins=8

The student learns the teacher's distribution of each side of a box, which says how sure the teacher is of that edge.
"""

from __future__ import annotations

from torch import Tensor

from litdistill.methods.base import BOXES, Method, check_temperature, check_weights
from litdistill.tasks.detection.dense_kd import check_anchors
from litdistill.tasks.detection.dense_losses import above, confidence, weighted_sides
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError


class LD(Method):
    """`hard` · labels' loss + `soft` · LD(main region) + `valuable` · LD(valuable region), LD = Σ w T² KL / Σ w over anchors.

    w is the teacher's confidence, the largest sigmoid of an anchor. Own choice beside the paper's, which needs labels and IoUs:
    the main region is where w is `least` or more, the valuable region where it is `near` or more and below `least`. So pictures
    without labels teach, too. The classes are compared by `dense_kd`, if at all.

    Args:
        hard: weight of the labels' loss.
        soft: weight of the main region.
        valuable: weight of the valuable region; 0 leaves it out.
        temperature: T of both softmaxes; 10 as in MMDetection's configs of it.
        least, near: confidences of the teacher from which an anchor is of the main, of the valuable region.

    Raises `UserError` where a network has no distributions of sides, or both have not the same anchors and values.
    """

    kinds = (BOXES,)

    def __init__(
        self,
        hard: float = 1.0,
        soft: float = 0.25,
        valuable: float = 0.0,
        temperature: float = 10.0,
        least: float = 0.3,
        near: float = 0.05,
    ):
        super().__init__(hard)
        check_weights(soft=soft, valuable=valuable)
        check_temperature(temperature)
        if not 0 <= near <= least < 1:
            raise UserError(
                f"near={near} and least={least} are confidences of the teacher, 0 ≤ near ≤ least < 1: 0.05, 0.3."
            )
        self.soft, self.valuable, self.temperature, self.least, self.near = soft, valuable, temperature, least, near

    def build(self, student: Outputs, teacher: Outputs, targets: Tensor | None) -> None:
        check_anchors(student, teacher, "ld")
        bins = [o.heads["sides"].shape[3] - 1 if "sides" in o.heads else 0 for o in (student, teacher)]
        if bins[0] != bins[1] or not bins[0]:
            raise UserError(
                f"ld compares distributions of sides: the student has bins={bins[0]}, the teacher bins={bins[1]}. Train both "
                "with the same, student.bins=8 teacher.bins=8 of net=fcos_slim, or use dense_kd."
            )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        sure = confidence(teacher.logits)
        main, wider = above(sure, self.least), above(sure, self.near)
        regions = {"soft": (self.soft, main), "valuable": (self.valuable, wider - main)}
        s, t = student.heads["sides"], teacher.heads["sides"]
        return {
            name: factor * weighted_sides(s, t, weight, self.temperature)
            for name, (factor, weight) in regions.items()
            if factor
        }
