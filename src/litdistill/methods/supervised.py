"""Training with labels alone: teachers, and the controls that a distilled student is compared with."""

from __future__ import annotations

from torch import Tensor

from litdistill.methods.base import Method, check_weights, hard_loss
from litdistill.types import Outputs


class Supervised(Method):
    """`hard` · CE(student, labels). The teacher, if there is one, is only compared with."""

    needs_teacher = False

    def __init__(self, hard: float = 1.0, label_smoothing: float = 0.0):
        super().__init__()
        check_weights(hard=hard)
        self.hard, self.label_smoothing = hard, label_smoothing

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor) -> dict[str, Tensor]:
        return {"hard": self.hard * hard_loss(student.logits, target, self.label_smoothing)}
