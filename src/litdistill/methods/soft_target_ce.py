"""Cross-entropy with the teacher's softened probabilities. Hinton et al. 2015 (arXiv 1503.02531), section 2."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from litdistill.methods.base import Method, check_temperature, check_weights, hard_loss
from litdistill.types import Outputs


class SoftTargetCE(Method):
    """`hard` · CE(student, labels) + `soft` · T² · CE(student_T, teacher_T).

    CE = KL + the teacher's entropy, which no student changes: the gradients are those of `kd`, and only the values
    differ. They are what older papers and logs report, and do not go to 0 when the student equals the teacher.
    """

    def __init__(self, hard: float = 0.1, soft: float = 0.9, temperature: float = 4.0):
        super().__init__()
        check_weights(hard=hard, soft=soft)
        check_temperature(temperature)
        self.hard, self.soft, self.temperature = hard, soft, temperature

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor) -> dict[str, Tensor]:
        terms = {}
        if self.hard:
            terms["hard"] = self.hard * hard_loss(student.logits, target)
        if self.soft:
            assert teacher is not None
            p = F.softmax(teacher.logits.float() / self.temperature, dim=1)
            soft = F.cross_entropy(student.logits.float() / self.temperature, p)
            terms["soft"] = self.soft * self.temperature**2 * soft
        return terms
