"""Hints from the teacher's middle stage. Romero et al. 2015 (FitNets, arXiv 1412.6550), section 2.2."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from litdistill.methods.base import Method, check_weights, hard_loss, maps, pair, same_size
from litdistill.types import Outputs, Taps
from litdistill.utils.errors import UserError


def regressor(student: Tensor, teacher: Tensor, relu: bool) -> nn.Sequential:
    """Convolution, BatchNorm and, if wanted, ReLU from a student's map (N, C, H, W) to a teacher's channels and size.

    The layers behind the published table: a strided 3x3 where the student's map is twice as large on each side, a
    transposed 4x4 where it is half as large, else a 1x1, behind which sizes may still differ.
    """
    (c_s, *size_s), (c_t, *size_t) = student.shape[1:], teacher.shape[1:]
    conv: nn.Module
    if size_s == [2 * n for n in size_t]:
        conv = nn.Conv2d(c_s, c_t, 3, stride=2, padding=1)
    elif [2 * n for n in size_s] == size_t:
        conv = nn.ConvTranspose2d(c_s, c_t, 4, stride=2, padding=1)
    else:
        conv = nn.Conv2d(c_s, c_t, 1)
    layers = [conv, nn.BatchNorm2d(c_t), *([nn.ReLU()] if relu else [])]
    return nn.Sequential(*layers).to(student.device)


class FitNet(Method):
    """`hard` · CE(student, labels) + `hint` · mean (regressor(student's map) − teacher's map)².

    `stage`: which of the pairs of stages, None for the middle one (the later of two). Pairs are counted from the last
    stage; where sizes still differ the larger map is pooled. The paper sums squares and trains hints first; the mean,
    trained jointly, is what the published table used.
    """

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 100.0,
        stage: int | None = None,
        student_taps: Sequence[str] | str = "stages",
        teacher_taps: Sequence[str] | str = "stages",
    ):
        super().__init__()
        check_weights(hard=hard, hint=hint)
        self.hard, self.hint, self.stage = hard, hint, stage
        self.student_taps, self.teacher_taps = student_taps, teacher_taps

    def taps(self) -> Taps:
        return Taps(self.student_taps, self.teacher_taps) if self.hint else Taps()

    def build(self, student: Outputs, teacher: Outputs | None, targets: Tensor) -> None:
        if self.hint:
            assert teacher is not None
            self.regressor = regressor(*self._stage(student, teacher), relu=True)

    def _stage(self, student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
        pairs = pair(maps(student.features, "fitnet"), maps(teacher.features, "fitnet"))
        index = len(pairs) // 2 if self.stage is None else self.stage
        if not -len(pairs) <= index < len(pairs):
            raise UserError(f"method.stage={index}, and this pair has {len(pairs)} stages. Use 0 to {len(pairs) - 1}.")
        return pairs[index]

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor) -> dict[str, Tensor]:
        terms = {}
        if self.hard:
            terms["hard"] = self.hard * hard_loss(student.logits, target)
        if self.hint:
            assert teacher is not None
            f_s, f_t = self._stage(student, teacher)
            f_s, f_t = same_size(self.regressor(f_s), f_t)
            terms["hint"] = self.hint * F.mse_loss(f_s.float(), f_t.float())
        return terms
