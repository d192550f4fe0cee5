"""Transformed teacher matching (TTM, WTTM). Zheng & Yang 2024 (arXiv 2402.11148)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from litdistill.methods.base import CATEGORICAL, Method, check_weights
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError


def transformed_matching(student: Tensor, teacher: Tensor, gamma: float, weighted: bool) -> Tensor:
    """Mean over the batch of U · KL(p^γ / U ‖ q), with U = Σ p^γ over the classes, or 1 if not `weighted`.

    p, q: the softmaxes of teacher and student, both at temperature 1; p^γ / U is the teacher softened with T = 1/γ. The
    student is not softened, and samples with an uncertain teacher (large U) have more weight. Logits `(N, classes)`;
    float32.
    """
    log_power = gamma * F.log_softmax(teacher.float(), dim=1)
    log_u = log_power.logsumexp(dim=1, keepdim=True)
    log_q = F.log_softmax(student.float(), dim=1)
    divergence = F.kl_div(log_q, log_power - log_u, reduction="none", log_target=True).sum(dim=1)
    return (log_u.squeeze(1).exp() * divergence).mean() if weighted else divergence.mean()


class WTTM(Method):
    """`hard` · labels' loss + `soft` · weighted KL from the power-transformed teacher; without `weighted` the paper's TTM."""

    kinds = (CATEGORICAL,)

    def __init__(self, hard: float = 1.0, soft: float = 4.0, gamma: float = 0.2, weighted: bool = True):
        super().__init__(hard)
        check_weights(soft=soft)
        if not gamma > 0:
            raise UserError(
                f"gamma={gamma} must be above 0: it is 1 / temperature. The authors' examples are 0.1 and 0.2."
            )
        self.soft, self.gamma, self.weighted = soft, gamma, weighted

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        if not self.soft:
            return {}
        return {"soft": self.soft * transformed_matching(student.logits, teacher.logits, self.gamma, self.weighted)}
