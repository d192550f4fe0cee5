"""Corrective distillation for few labels (MFT, minifinetuning). Belcak et al. 2025 (arXiv 2506.15702).

The student learns the teacher's probabilities, moved to the label until the label leads by a margin. The paper's teacher is the
student itself before it was fine-tuned.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from litdistill.losses.values import wide
from litdistill.methods.base import CATEGORICAL, Method, check_temperature, check_weights
from litdistill.types import Batch, Outputs, class_of
from litdistill.utils.errors import UserError


def corrected(p: Tensor, target: Tensor, margin: float) -> Tensor:
    """(1 − m) · p + m · onehot(target), (N, classes), with m so large in each sample that the target leads by `margin`.

    Where the target is not the largest of p, it becomes larger than the largest other by `margin`. Where it is, it grows by
    `margin`, to 1 at most. The formula is that of NVIDIA's Model-Optimizer (`MFTLoss`), which names the paper.
    """
    label = p.gather(1, target[:, None])
    largest = p.amax(dim=1, keepdim=True)
    wrong = p.argmax(dim=1, keepdim=True) != target[:, None]
    share = torch.where(
        wrong,
        (largest - label + margin) / (1 + largest - label),
        ((label + margin).clamp(max=1) - label) / (1 - label).clamp(min=1e-12),
    )
    is_target = target[:, None] == torch.arange(p.shape[1], device=p.device)  # F.one_hot reads values on a CPU
    return (1 - share) * p + share * is_target


class MFT(Method):
    """`hard` · labels' loss + `soft` · T² · KL(corrected teacher_T ‖ student_T)."""

    reads_targets = True
    kinds = (CATEGORICAL,)
    takes_places = True

    def __init__(self, hard: float = 0.0, soft: float = 1.0, temperature: float = 1.0, margin: float = 0.2):
        super().__init__(hard)
        check_weights(soft=soft)
        check_temperature(temperature)
        if not 0 <= margin <= 1:
            raise UserError(f"margin={margin} is a difference of probabilities: from 0 to 1.")
        self.soft, self.temperature, self.margin = soft, temperature, margin

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        if not self.soft:
            return {}
        labels = class_of(batch.targets)
        p = corrected(F.softmax(wide(teacher.logits) / self.temperature, dim=1), labels, self.margin)
        log_q = F.log_softmax(wide(student.logits) / self.temperature, dim=1)
        return {"soft": self.soft * F.kl_div(log_q, p, reduction="batchmean") * self.temperature**2}
