"""Distillation from a virtual teacher instead of a network. Yuan et al. 2020, Tf-KD_reg (arXiv 1909.11723), section 5."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from litdistill.methods.base import CATEGORICAL, Method, check_temperature, check_weights
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError


def virtual_teacher(target: Tensor, classes: int, correct: float, temperature: float) -> Tensor:
    """softmax(p / T), `(N, classes)`, of p = `correct` for the label and (1 − `correct`) / (classes − 1) elsewhere.

    `target`: (N,) indices, or (N, classes) probabilities, which mix p.
    """
    every = torch.arange(classes, device=target.device)
    label = (target[:, None] == every).float() if target.ndim == 1 else target.float()
    p = label * correct + (1 - label) * (1 - correct) / (classes - 1)
    return F.softmax(p / temperature, dim=1)


class TeacherFree(Method):
    """`hard` · labels' loss + `soft` · KL(virtual teacher ‖ student). A control for KD: the teacher does not see the image.

    The paper's formula softens the student as well; the code of its tables does not, and neither does this. That
    code's `multiplier` (100 on CIFAR-100) cancels a mean over the classes, which is not taken here.
    """

    needs_teacher = False
    reads_targets = True
    kinds = (CATEGORICAL,)
    takes_places = True

    def __init__(self, hard: float = 0.9, soft: float = 0.1, correct: float = 0.99, temperature: float = 20.0):
        super().__init__(hard)
        check_weights(soft=soft)
        check_temperature(temperature)
        if not 0 < correct <= 1:
            raise UserError(
                f"correct={correct} is the probability of the label: above 0, 1 at most. The paper's is 0.99."
            )
        self.soft, self.correct, self.temperature = soft, correct, temperature

    def forward(self, student: Outputs, teacher: Any, batch: Batch) -> dict[str, Tensor]:
        if not self.soft:
            return {}
        p = virtual_teacher(batch.targets, student.logits.shape[1], self.correct, self.temperature)
        log_q = F.log_softmax(student.logits.float(), dim=1)
        return {"soft": self.soft * F.kl_div(log_q, p, reduction="batchmean")}
