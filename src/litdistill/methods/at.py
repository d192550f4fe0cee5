"""Attention transfer. Zagoruyko & Komodakis 2017 (arXiv 1612.03928), section 3.1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from litdistill.methods.base import Method, check_weights, hard_loss, maps, pair, same_size
from litdistill.types import Outputs, Taps


def attention(f: Tensor) -> Tensor:
    """Where a map (N, C, H, W) is active: squares summed over channels, flattened, of unit length. (N, H·W) float32."""
    return F.normalize(f.float().square().mean(1).flatten(1))


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two attention maps; the larger map is pooled first. Both (N, C, H, W); a scalar.

    The paper's equation 2 has the L2 norm of the difference; the authors' code, which gave its tables, has the mean
    of the squares, as here, and β = 1000 belongs to the latter.
    """
    f_s, f_t = same_size(student.float(), teacher.float())
    return F.mse_loss(attention(f_s), attention(f_t))


class AT(Method):
    """`hard` · CE(student, labels) + `hint` · sum over stages of `attention_loss`."""

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 1000.0,
        student_taps: Sequence[str] | str = "stages",
        teacher_taps: Sequence[str] | str = "stages",
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
            maps(student.features, "at"), maps(teacher.features, "at")

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor) -> dict[str, Tensor]:
        terms = {}
        if self.hard:
            terms["hard"] = self.hard * hard_loss(student.logits, target)
        if self.hint:
            assert teacher is not None
            pairs = pair(maps(student.features, "at"), maps(teacher.features, "at"))
            terms["hint"] = self.hint * torch.stack([attention_loss(s, t) for s, t in pairs]).sum()
        return terms
