"""Probabilistic knowledge transfer (PKT). Passalis & Tefas 2018 (arXiv 1803.10837), section 3."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from litdistill.losses import neighbors
from litdistill.methods.base import VectorMethod, summed
from litdistill.types import Outputs
from litdistill.utils.errors import UserError


class PKT(VectorMethod):
    """`hard` · labels' loss + `hint` · sum over taps of `neighbors`, by default on the classifiers' inputs.

    Several taps are compared in pairs; both networks need the same number of them.
    """

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 30000.0,
        student_taps: Sequence[str] | str = "pooled",
        teacher_taps: Sequence[str] | str = "pooled",
    ):
        super().__init__(hard, hint, student_taps, teacher_taps)

    def pairs(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        n_s, n_t = len(student.features), len(teacher.features)
        if n_s != n_t:
            raise UserError(f"pkt pairs its taps: {n_s} of the student, {n_t} of the teacher. Name as many.")
        return super().pairs(student, teacher)

    def loss(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        return summed([neighbors(s, t) for s, t in pairs])
