"""Distillation methods of this project."""

from __future__ import annotations

import torch.nn.functional as F
from litdistill import Batch, Method, Outputs
from torch import Tensor


class Margin(Method):
    """`hard` · labels' loss + `soft` · mean squared difference of the logits, each centered over the classes."""

    kinds = ("categorical",)

    def __init__(self, hard: float = 1.0, soft: float = 0.1):
        super().__init__(hard)
        self.soft = soft

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        ours, theirs = (logits - logits.mean(1, keepdim=True) for logits in (student.logits, teacher.logits))
        return {"soft": self.soft * F.mse_loss(ours, theirs)}
