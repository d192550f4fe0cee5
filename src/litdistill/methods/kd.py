"""Knowledge distillation with softened targets. Hinton, Vinyals & Dean 2015 (arXiv 1503.02531), section 2."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from litdistill.methods.base import CATEGORICAL, Method, check_temperature, check_weights
from litdistill.types import Batch, Outputs


def soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student) of both softmaxes at temperature T; a scalar, averaged over the batch (not over classes).

    The factor T² keeps the ratio of the soft and hard gradients when T changes (section 2).
    Both `(N, classes)`; computed in float32, also under autocast.
    """
    log_p = F.log_softmax(teacher.float() / temperature, dim=1)
    log_q = F.log_softmax(student.float() / temperature, dim=1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2


class KD(Method):
    """`hard` · labels' loss + `soft` · T² · KL(teacher_T ‖ student_T)."""

    kinds = (CATEGORICAL,)

    def __init__(self, hard: float = 0.1, soft: float = 0.9, temperature: float = 4.0):
        super().__init__(hard)
        check_weights(soft=soft)
        check_temperature(temperature)
        self.soft, self.temperature = soft, temperature

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"soft": self.soft * soft_loss(student.logits, teacher.logits, self.temperature)} if self.soft else {}
