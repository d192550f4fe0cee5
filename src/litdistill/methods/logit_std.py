"""KD on standardized logits. Sun et al. 2024, "Logit Standardization" (arXiv 2403.01427), section 4."""

from __future__ import annotations

import torch
from torch import Tensor

from litdistill.methods.base import CATEGORICAL, Method, check_temperature, check_weights
from litdistill.methods.kd import soft_loss
from litdistill.types import Batch, Outputs


def standardize(logits: Tensor) -> Tensor:
    """(z − mean) / (10⁻⁷ + std) over the classes of each sample, `(N, classes)`; float32, also under autocast.

    The standard deviation divides by classes − 1, as in the authors' code. Equal logits (a classifier whose weights start
    at zero) have no deviation: they become 0, with a finite gradient.
    """
    z = logits.float()
    z = z - z.mean(dim=1, keepdim=True)
    scale = z.detach().abs().amax(dim=1, keepdim=True).clamp(min=1e-20)  # so that no square underflows or overflows
    variance = (z / scale).square().sum(dim=1, keepdim=True) / max(z.shape[1] - 1, 1)
    std = torch.where(variance > 0, variance, torch.ones_like(variance)).sqrt() * scale
    return z / (1e-7 + std)


class LogitStdKD(Method):
    """`hard` · labels' loss + `soft` · T² · KL(teacher ‖ student) of softmaxes of standardized logits at temperature T."""

    kinds = (CATEGORICAL,)

    def __init__(self, hard: float = 0.1, soft: float = 9.0, temperature: float = 2.0):
        super().__init__(hard)
        check_weights(soft=soft)
        check_temperature(temperature)
        self.soft, self.temperature = soft, temperature

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        if not self.soft:
            return {}
        q, p = standardize(student.logits), standardize(teacher.logits)
        return {"soft": self.soft * soft_loss(q, p, self.temperature)}
