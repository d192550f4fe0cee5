"""KD on standardised logits. Sun et al. 2024, "Logit Standardization" (arXiv 2403.01427), section 4."""

from __future__ import annotations

import torch
from torch import Tensor

from litdistill.methods.base import Method, check_temperature, check_weights, hard_loss
from litdistill.methods.kd import soft_loss
from litdistill.types import Outputs


def standardize(logits: Tensor) -> Tensor:
    """(z − mean) / (10⁻⁷ + std) over the classes of each sample, `(N, classes)`; float32 whatever the autocast.

    The standard deviation has classes − 1 in its denominator, as in the authors' code. Logits that are all the same
    (a classifier whose weights start at zero) have none: they stay 0, and their gradient stays finite.
    """
    z = logits.float()
    z = z - z.mean(dim=1, keepdim=True)
    scale = z.detach().abs().amax(dim=1, keepdim=True).clamp(min=1e-20)  # so that no square underflows or overflows
    variance = (z / scale).square().sum(dim=1, keepdim=True) / max(z.shape[1] - 1, 1)
    std = torch.where(variance > 0, variance, torch.ones_like(variance)).sqrt() * scale
    return z / (1e-7 + std)


class LogitStdKD(Method):
    """`hard` · CE + `soft` · T² · KL(teacher ‖ student), both softmaxes of standardised logits at temperature T."""

    def __init__(self, hard: float = 0.1, soft: float = 9.0, temperature: float = 2.0):
        super().__init__()
        check_weights(hard=hard, soft=soft)
        check_temperature(temperature)
        self.hard, self.soft, self.temperature = hard, soft, temperature

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor) -> dict[str, Tensor]:
        terms = {}
        if self.hard:
            terms["hard"] = self.hard * hard_loss(student.logits, target)
        if self.soft:
            assert teacher is not None
            soft = soft_loss(standardize(student.logits), standardize(teacher.logits), self.temperature)
            terms["soft"] = self.soft * soft
        return terms
