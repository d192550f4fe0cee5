"""KD for multi-label classification. Yang et al. 2023, Multi-Label Knowledge Distillation (arXiv 2308.06453), section 3.1.

The paper's multi-label logits distillation (MLD): each label is a binary problem, and the student learns the teacher's
probability of that label.
"""

from __future__ import annotations

from torch import Tensor

from litdistill.losses import binary_kl
from litdistill.methods.base import BERNOULLI, Method, check_temperature, check_weights
from litdistill.types import Batch, Outputs


class BinaryKD(Method):
    """`hard` · labels' loss + `soft` · T² · Σ over labels of KL(teacher ‖ student), label by label.

    The paper has no temperature (1 is the default here); its two losses of label-wise embeddings are not implemented.
    Its weight 10 of this term belongs to a labels' loss that is summed over the batch (64 samples) and the labels.
    """

    kinds = (BERNOULLI,)

    def __init__(self, hard: float = 1.0, soft: float = 1.0, temperature: float = 1.0):
        super().__init__(hard)
        check_weights(soft=soft)
        check_temperature(temperature)
        self.soft, self.temperature = soft, temperature

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        if not self.soft:
            return {}
        return {"soft": self.soft * binary_kl(student.logits, teacher.logits, self.temperature)}
