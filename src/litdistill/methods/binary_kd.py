"""KD for multi-label classification. Yang et al. 2023, Multi-Label Knowledge Distillation (arXiv 2308.06453), section 3.1.

The paper's multi-label logits distillation (MLD): each label is a binary problem, and the student learns the teacher's
probability of that label.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from litdistill.methods.base import BERNOULLI, Method, check_temperature, check_weights
from litdistill.types import Batch, Outputs


def binary_soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · Σ over labels of KL(teacher ‖ student) between Bernoulli distributions of sigmoid(z / T), averaged over the batch.

    Both (N, labels); a scalar, in float32 also under autocast. Log-probabilities are computed from logits (logsigmoid); the
    authors' code clamps probabilities to 1e-8 from 0 and 1, beyond which a student gets no gradient.
    """
    z_s, z_t = student.float() / temperature, teacher.float() / temperature
    divergence = z_t.sigmoid() * (F.logsigmoid(z_t) - F.logsigmoid(z_s))
    divergence = divergence + (-z_t).sigmoid() * (F.logsigmoid(-z_t) - F.logsigmoid(-z_s))
    return divergence.sum() / len(z_s) * temperature**2


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
        return {"soft": self.soft * binary_soft_loss(student.logits, teacher.logits, self.temperature)}
