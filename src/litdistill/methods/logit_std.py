"""KD on standardized logits. Sun et al. 2024, "Logit Standardization" (arXiv 2403.01427), section 4."""

from __future__ import annotations

from torch import Tensor

from litdistill.losses import standardized_kl
from litdistill.methods.base import CATEGORICAL, Method, check_temperature, check_weights
from litdistill.types import Batch, Outputs


class LogitStdKD(Method):
    """`hard` · labels' loss + `soft` · T² · KL(teacher ‖ student) of softmaxes of standardized logits at temperature T."""

    kinds = (CATEGORICAL,)
    takes_places = True
    fewest_classes = 3

    def __init__(self, hard: float = 0.1, soft: float = 9.0, temperature: float = 2.0):
        super().__init__(hard)
        check_weights(soft=soft)
        check_temperature(temperature)
        self.soft, self.temperature = soft, temperature

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        if not self.soft:
            return {}
        return {"soft": self.soft * standardized_kl(student.logits, teacher.logits, self.temperature)}
