"""Transformed teacher matching (TTM, WTTM). Zheng & Yang 2024 (arXiv 2402.11148)."""

from __future__ import annotations

from torch import Tensor

from litdistill.losses import transformed_kl
from litdistill.methods.base import CATEGORICAL, Method, check_weights
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError


class WTTM(Method):
    """`hard` · labels' loss + `soft` · weighted KL from the power-transformed teacher; without `weighted` the paper's TTM."""

    kinds = (CATEGORICAL,)
    takes_places = True

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
        return {"soft": self.soft * transformed_kl(student.logits, teacher.logits, self.gamma, self.weighted)}
