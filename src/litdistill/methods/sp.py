"""Similarity-preserving distillation. Tung & Mori 2019 (arXiv 1907.09682), section 3.1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from litdistill.methods.base import Method, check_weights, hard_loss, pair
from litdistill.types import Outputs, Taps


def similarity(x: Tensor) -> Tensor:
    """How alike the samples of a batch are: the inner products `(N, N)` of their features, each row of unit length.

    `x`: (N, …), flattened. A sample whose features are all 0 is like none: its row is 0, without a gradient.
    """
    x = x.float().flatten(1)
    x = x / x.detach().abs().max().clamp(min=1e-20)  # cancels in each row; keeps fourth powers inside float32
    gram = x @ x.T
    norm = gram.norm(dim=1, keepdim=True)
    return gram * torch.where(norm > 0, 1 / norm.clamp(min=1e-20), torch.zeros_like(norm))


class SP(Method):
    """`hard` · CE + `hint` · ‖G_student − G_teacher‖² / N², summed over the pairs of features (equation 4)."""

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 3000.0,
        student_taps: Sequence[str] | str = "last",
        teacher_taps: Sequence[str] | str = "last",
    ):
        super().__init__()
        check_weights(hard=hard, hint=hint)
        self.hard, self.hint = hard, hint
        self.read = Taps(student_taps, teacher_taps)

    def taps(self) -> Taps:
        return self.read

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor) -> dict[str, Tensor]:
        terms = {}
        if self.hard:
            terms["hard"] = self.hard * hard_loss(student.logits, target)
        if self.hint:
            assert teacher is not None
            pairs = pair(list(student.features.values()), list(teacher.features.values()))
            with torch.autocast(student.logits.device.type, enabled=False):
                losses = [(similarity(s) - similarity(t)).square().mean() for s, t in pairs]
            terms["hint"] = self.hint * torch.stack(losses).sum()
        return terms
