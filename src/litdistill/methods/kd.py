"""Knowledge distillation with softened targets. Hinton, Vinyals & Dean 2015 (arXiv 1503.02531), section 2.

Of a teacher that knows only some of the classes: Vongkulbhisal et al. 2019 (arXiv 1904.06062). Options of its softening, with
their sources: `litdistill.methods.softening`.
"""

from __future__ import annotations

from torch import Tensor

from litdistill.losses import kl, members_kl
from litdistill.methods.base import CATEGORICAL, Method, check_weights
from litdistill.methods.softening import Softening, use_softening
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError


class KD(Method):
    """`hard` · labels' loss + `soft` · T² · KL(teacher_T ‖ student_T); of a teacher that knows only some of the classes, among
    those that it knows (`litdistill.losses.members_kl`). `standardized`, `learnt`: see `Softening`."""

    kinds = (CATEGORICAL,)
    takes_places = some_classes = True

    def __init__(
        self,
        hard: float = 0.1,
        soft: float = 0.9,
        temperature: float = 4.0,
        standardized: bool = False,
        learnt: int = 0,
    ):
        super().__init__(hard)
        check_weights(soft=soft)
        self.soft, self.temperature = soft, temperature
        self.softening = use_softening(self, Softening([temperature], standardized, learnt if soft else 0))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        if not self.soft:
            return {}
        temperature = self.softening.temperatures(self.epoch)[0]
        if (members := teacher.heads.get("members")) is None:
            return {"soft": self.soft * kl(*self.softening.logits(student.logits, teacher.logits), temperature)}
        if self.softening.standardized:
            raise UserError(
                "Standardized logits are not defined for a teacher that knows only some of the classes. "
                "Use method.standardized=false."
            )
        return {"soft": self.soft * members_kl(student.logits, members, temperature)}

    def watched(self) -> dict[str, Tensor]:
        return self.softening.watched()
