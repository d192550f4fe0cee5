"""Regression of the teacher's logits. Ba & Caruana 2014 (arXiv 1312.6184), section 2, equation 1."""

from __future__ import annotations

from torch import Tensor

from litdistill.losses import half_squared
from litdistill.methods.base import Method, check_weights
from litdistill.types import Batch, Outputs


class LogitMSE(Method):
    """`hard` · labels' loss + `soft` · ½ ‖student − teacher‖² of the logits, summed over classes and averaged over the batch.

    `centered` first subtracts each sample's mean over the classes from its logits, to which the softmax is invariant.
    This is the limit of KD at high temperature, times the number of classes (Hinton et al. 2015, section 2.1). The paper's
    own loss is not centered.
    """

    takes_places = True

    def __init__(self, hard: float = 0.0, soft: float = 1.0, centered: bool = False):
        super().__init__(hard)
        check_weights(soft=soft)
        self.soft, self.centered = soft, centered

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        if not self.soft:
            return {}
        return {"soft": self.soft * half_squared(student.logits, teacher.logits, self.centered)}
