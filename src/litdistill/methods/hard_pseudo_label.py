"""The teacher's decision as a second label. Touvron et al. 2021, DeiT (arXiv 2012.12877), section 4."""

from __future__ import annotations

from torch import Tensor

from litdistill.methods.base import Method, check_weights, hard_loss
from litdistill.types import Outputs


class HardPseudoLabel(Method):
    """`hard` · CE(student, labels) + `pseudo` · CE(student, argmax of the teacher). It has no temperature."""

    def __init__(self, hard: float = 0.5, pseudo: float = 0.5):
        super().__init__()
        check_weights(hard=hard, pseudo=pseudo)
        self.hard, self.pseudo = hard, pseudo

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor) -> dict[str, Tensor]:
        terms = {}
        if self.hard:
            terms["hard"] = self.hard * hard_loss(student.logits, target)
        if self.pseudo:
            assert teacher is not None
            terms["pseudo"] = self.pseudo * hard_loss(student.logits, teacher.logits.argmax(dim=1))
        return terms
