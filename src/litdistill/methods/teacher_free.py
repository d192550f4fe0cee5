"""A virtual teacher in place of a network. Yuan et al. 2020, Tf-KD_reg (arXiv 1909.11723), section 5."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from litdistill.methods.base import Method, check_temperature, check_weights, hard_loss
from litdistill.types import Outputs
from litdistill.utils.errors import UserError


def virtual_teacher(target: Tensor, classes: int, correct: float, temperature: float) -> Tensor:
    """softmax(p / T), `(N, classes)`, of p = `correct` for the label and (1 − `correct`) / (classes − 1) elsewhere.

    `target`: (N,) indices, or (N, classes) probabilities, by which p is mixed.
    """
    label = F.one_hot(target, classes).float() if target.ndim == 1 else target.float()
    p = label * correct + (1 - label) * (1 - correct) / (classes - 1)
    return F.softmax(p / temperature, dim=1)


class TeacherFree(Method):
    """`hard` · CE + `soft` · KL(virtual teacher ‖ student). A control for KD: it knows nothing of the image.

    The paper's formula softens the student as well; the code behind its tables does not, and neither does this. That
    code's `multiplier` (100 on CIFAR-100) undoes a mean over the classes, which is not taken here.
    """

    needs_teacher = False

    def __init__(self, hard: float = 0.9, soft: float = 0.1, correct: float = 0.99, temperature: float = 20.0):
        super().__init__()
        check_weights(hard=hard, soft=soft)
        check_temperature(temperature)
        if not 0 < correct <= 1:
            raise UserError(
                f"method.correct={correct} is the probability of the label: above 0, 1 at most. The paper's is 0.99."
            )
        self.hard, self.soft, self.correct, self.temperature = hard, soft, correct, temperature

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor) -> dict[str, Tensor]:
        terms = {}
        if self.hard:
            terms["hard"] = self.hard * hard_loss(student.logits, target)
        if self.soft:
            p = virtual_teacher(target, student.logits.shape[1], self.correct, self.temperature)
            log_q = F.log_softmax(student.logits.float(), dim=1)
            terms["soft"] = self.soft * F.kl_div(log_q, p, reduction="batchmean")
        return terms
