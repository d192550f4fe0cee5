"""Knowledge distillation with softened targets. Hinton, Vinyals & Dean 2015 (arXiv 1503.02531), section 2.

Of a teacher that knows only some of the classes: Vongkulbhisal et al. 2019 (arXiv 1904.06062).
"""

from __future__ import annotations

from torch import Tensor

from litdistill.losses import kl, members_kl
from litdistill.methods.base import CATEGORICAL, Method, check_temperature, check_weights
from litdistill.types import Batch, Outputs


class KD(Method):
    """`hard` · labels' loss + `soft` · T² · KL(teacher_T ‖ student_T); of a teacher that knows only some of the classes, among
    those that it knows (`litdistill.losses.members_kl`)."""

    kinds = (CATEGORICAL,)
    takes_places = some_classes = True

    def __init__(self, hard: float = 0.1, soft: float = 0.9, temperature: float = 4.0):
        super().__init__(hard)
        check_weights(soft=soft)
        check_temperature(temperature)
        self.soft, self.temperature = soft, temperature

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        if not self.soft:
            return {}
        if (members := teacher.heads.get("members")) is not None:
            return {"soft": self.soft * members_kl(student.logits, members, self.temperature)}
        return {"soft": self.soft * kl(student.logits, teacher.logits, self.temperature)}
