"""Knowledge distillation with softened targets. Hinton, Vinyals & Dean 2015 (arXiv 1503.02531), section 2."""

from __future__ import annotations

from torch import Tensor

from litdistill.losses import kl
from litdistill.methods.base import CATEGORICAL, Method, check_temperature, check_weights
from litdistill.types import Batch, Outputs


class KD(Method):
    """`hard` · labels' loss + `soft` · T² · KL(teacher_T ‖ student_T)."""

    kinds = (CATEGORICAL,)
    takes_places = True

    def __init__(self, hard: float = 0.1, soft: float = 0.9, temperature: float = 4.0):
        super().__init__(hard)
        check_weights(soft=soft)
        check_temperature(temperature)
        self.soft, self.temperature = soft, temperature

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"soft": self.soft * kl(student.logits, teacher.logits, self.temperature)} if self.soft else {}
