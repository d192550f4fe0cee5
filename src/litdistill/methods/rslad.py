"""Robust soft label adversarial distillation (RSLAD). Zi, Zhao, Ma & Jiang 2021 (arXiv 2108.07969)."""

from __future__ import annotations

from torch import Tensor

from litdistill.losses import kl
from litdistill.methods.base import CATEGORICAL, Method, adversarial_logits, check_weights
from litdistill.types import Batch, Outputs


class RSLAD(Method):
    """`hard` · labels' loss at x + `adversarial` · KL(teacher(x) ‖ student(x')) + `soft` · KL(teacher(x) ‖ student(x)).

    x' is where KL(teacher(x) ‖ student(x')) is highest: the labels are replaced by the robust teacher's probabilities in the
    attack too, so that none is needed. It needs the teacher's outputs at the inputs x and the student's at x and at x'
    (`adversarial=pgd`). The weights are those of the authors' code, 5/6 and 1/6. It averages the divergences over the classes,
    too; here they are sums, as in the paper.
    """

    kinds = (CATEGORICAL,)
    reads_adversarial = True

    def __init__(self, hard: float = 0.0, adversarial: float = 5 / 6, soft: float = 1 / 6):
        super().__init__(hard)
        check_weights(adversarial=adversarial, soft=soft)
        self.adversarial, self.soft = adversarial, soft

    def attacked_loss(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return kl(student.logits, teacher.logits, 1.0)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        terms = {}
        if self.adversarial:
            terms["adversarial"] = self.adversarial * kl(adversarial_logits(student), teacher.logits, 1.0)
        if self.soft:
            terms["soft"] = self.soft * kl(student.logits, teacher.logits, 1.0)
        return terms
