"""Similarity-preserving distillation (SP). Tung & Mori 2019 (arXiv 1907.09682), section 3.1."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from litdistill.losses import similarity
from litdistill.methods.base import VectorMethod, summed


class SP(VectorMethod):
    """`hard` · labels' loss + `hint` · ‖G_student − G_teacher‖² / N², summed over the pairs of features (equation 4)."""

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 3000.0,
        student_taps: Sequence[str] | str = "last",
        teacher_taps: Sequence[str] | str = "last",
    ):
        super().__init__(hard, hint, student_taps, teacher_taps)

    def loss(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        return summed([similarity(s, t) for s, t in pairs])
