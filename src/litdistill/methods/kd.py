"""Knowledge distillation with softened targets. Hinton, Vinyals & Dean 2015 (arXiv 1503.02531), section 2."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from litdistill.methods.base import Method, check_temperature, check_weights, hard_loss
from litdistill.types import Outputs


def soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student) of both softmaxes at temperature T; a scalar, the mean over the batch (not over classes).

    The factor T² keeps the gradient of the soft term at the size of the hard one's when T changes (section 2).
    Both `(N, classes)`; computed in float32 whatever the autocast.
    """
    log_p = F.log_softmax(teacher.float() / temperature, dim=1)
    log_q = F.log_softmax(student.float() / temperature, dim=1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2


class KD(Method):
    """`hard` · CE(student, labels) + `soft` · T² · KL(teacher_T ‖ student_T)."""

    def __init__(self, hard: float = 0.1, soft: float = 0.9, temperature: float = 4.0, label_smoothing: float = 0.0):
        super().__init__()
        check_weights(hard=hard, soft=soft)
        check_temperature(temperature)
        self.hard, self.soft, self.temperature, self.label_smoothing = hard, soft, temperature, label_smoothing

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor) -> dict[str, Tensor]:
        terms = {}
        if self.hard:
            terms["hard"] = self.hard * hard_loss(student.logits, target, self.label_smoothing)
        if self.soft:
            assert teacher is not None
            terms["soft"] = self.soft * soft_loss(student.logits, teacher.logits, self.temperature)
        return terms
