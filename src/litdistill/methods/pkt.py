"""Probabilistic knowledge transfer. Passalis & Tefas 2018 (arXiv 1803.10837), section 3."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from litdistill.methods.base import Method, check_weights, hard_loss
from litdistill.types import Outputs, Taps
from litdistill.utils.errors import UserError

EPS = 1e-7


def neighbours(f: Tensor) -> Tensor:
    """How likely each sample of a batch is picked as the neighbour of each other one: (N, N), rows sum to 1.

    `f`: (N, ...), flattened. Kernel (1 + cosine) / 2. As in the authors' code, samples count as
    neighbours of themselves; the paper's formula leaves them out.
    """
    f = F.normalize(f.float().flatten(1), eps=EPS)
    with torch.autocast(f.device.type, enabled=False):
        kernel = (f @ f.T + 1) / 2
    return kernel / kernel.sum(1, keepdim=True)


def pkt_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) of both batches' `neighbours`, a mean over all N² pairs as in the authors' code; a scalar.

    (N, ...) each; widths may differ. The paper's sum is N² times as large.
    """
    q, p = neighbours(student), neighbours(teacher)
    return (p * torch.log((p + EPS) / (q + EPS))).mean()


class PKT(Method):
    """`hard` · CE(student, labels) + `hint` · sum over taps of `pkt_loss`, by default on the classifiers' inputs.

    With several taps they are taken in pairs, and their numbers must agree.
    """

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 30000.0,
        student_taps: Sequence[str] | str = "pooled",
        teacher_taps: Sequence[str] | str = "pooled",
    ):
        super().__init__()
        check_weights(hard=hard, hint=hint)
        self.hard, self.hint = hard, hint
        self.student_taps, self.teacher_taps = student_taps, teacher_taps

    def taps(self) -> Taps:
        return Taps(self.student_taps, self.teacher_taps) if self.hint else Taps()

    def build(self, student: Outputs, teacher: Outputs | None, targets: Tensor) -> None:
        if self.hint:
            assert teacher is not None
            n_s, n_t = len(student.features), len(teacher.features)
            if n_s != n_t:
                raise UserError(f"method=pkt pairs its taps: {n_s} of the student, {n_t} of the teacher. Name as many.")

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor) -> dict[str, Tensor]:
        terms = {}
        if self.hard:
            terms["hard"] = self.hard * hard_loss(student.logits, target)
        if self.hint:
            assert teacher is not None
            pairs = zip(student.features.values(), teacher.features.values(), strict=True)
            terms["hint"] = self.hint * torch.stack([pkt_loss(s, t) for s, t in pairs]).sum()
        return terms
