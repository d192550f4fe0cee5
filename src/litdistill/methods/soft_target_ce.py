"""Cross-entropy with the teacher's softened probabilities. Hinton et al. 2015 (arXiv 1503.02531), section 2."""

from __future__ import annotations

from torch import Tensor

from litdistill.losses import members_cross_entropy, soft_cross_entropy
from litdistill.methods.base import CATEGORICAL, Method, check_temperature, check_weights
from litdistill.types import Batch, Outputs


class SoftTargetCE(Method):
    """`hard` · labels' loss + `soft` · T² · CE(student_T, teacher_T).

    CE = KL + the teacher's entropy, a constant: the gradients are those of `kd`, and only the values differ. Older papers
    and logs report these values, which do not go to 0 when the student equals the teacher. Of a teacher that knows only some of
    the classes, CE is taken among those (`litdistill.losses.members_cross_entropy`).
    """

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
            return {"soft": self.soft * members_cross_entropy(student.logits, members, self.temperature)}
        return {"soft": self.soft * soft_cross_entropy(student.logits, teacher.logits, self.temperature)}
