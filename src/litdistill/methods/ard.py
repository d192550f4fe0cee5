"""Adversarially robust distillation (ARD). Goldblum, Fowl, Feizi & Goldstein 2020 (arXiv 1905.09747)."""

from __future__ import annotations

from torch import Tensor

from litdistill.losses import kl
from litdistill.methods.base import CATEGORICAL, Method, adversarial_logits, check_temperature, check_weights
from litdistill.types import Batch, Outputs


class ARD(Method):
    """`hard` · labels' loss at x + `soft` · T² · KL(teacher_T(x) ‖ student_T(x')), with x' where the labels' loss is highest.

    It needs the teacher's outputs at the inputs x, a teacher that is robust itself, and the student's at x and at the attacked
    inputs x' (`adversarial=pgd`). The defaults are those of the authors' code. It averages the divergence over the classes,
    too; here it is their sum, as in the paper.
    """

    kinds = (CATEGORICAL,)
    reads_adversarial = True

    def __init__(self, hard: float = 0.0, soft: float = 1.0, temperature: float = 30.0):
        super().__init__(hard)
        check_weights(soft=soft)
        check_temperature(temperature)
        self.soft, self.temperature = soft, temperature

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        if not self.soft:
            return {}
        return {"soft": self.soft * kl(adversarial_logits(student), teacher.logits, self.temperature)}
