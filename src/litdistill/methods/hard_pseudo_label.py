"""The teacher's predicted class as a second label. Touvron et al. 2021, DeiT (arXiv 2012.12877), section 4."""

from __future__ import annotations

from torch import Tensor

from litdistill.losses import pseudo_label
from litdistill.methods.base import CATEGORICAL, Method, check_weights
from litdistill.types import Batch, Outputs


class HardPseudoLabel(Method):
    """`hard` · labels' loss + `pseudo` · cross-entropy(student, argmax of the teacher). There is no temperature."""

    kinds = (CATEGORICAL,)
    takes_places = True

    def __init__(self, hard: float = 0.5, pseudo: float = 0.5):
        super().__init__(hard)
        check_weights(pseudo=pseudo)
        self.pseudo = pseudo

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        if not self.pseudo:
            return {}
        return {"pseudo": self.pseudo * pseudo_label(student.logits, teacher.logits)}
