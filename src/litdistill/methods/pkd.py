"""Distillation by the Pearson correlation of maps (PKD). Cao et al. 2022 (arXiv 2207.02039), section 3."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litdistill.methods.base import Method, check_weights, hard_loss, maps, pair, same_size
from litdistill.types import Outputs, Taps


def normalize(x: Tensor) -> Tensor:
    """Each channel to mean 0 and variance 1 over batch and positions, in float32: (N, C, H, W) -> (N, C, H, W).

    A channel that is constant (a dead one, or a single value) correlates with nothing: it becomes 0, with no gradient,
    where the authors' code divides by 1e-6 and passes back gradients a million times as large.
    """
    x = x.float()
    var, mean = torch.var_mean(x, dim=(0, 2, 3), keepdim=True, correction=0)
    return (x - mean) * torch.where(var > 1e-12, var, torch.inf).rsqrt()


def pearson_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Half the mean squared error of the normalised maps, which is 1 − r, the mean over channels; a scalar.

    Both (N, C, H, W). The variance is the biased one, by which the identity with the paper's 1 − r is exact; the
    authors' code takes the unbiased one, and so gives (n − 1)/n of this, with n = N·H·W.
    """
    return F.mse_loss(normalize(student), normalize(teacher)) / 2


class PKD(Method):
    """`hard` · CE(student, labels) + `hint` · Σ (1 − Pearson correlation), stage by stage.

    A student with other channels than the teacher's goes through a 1x1 convolution first (the paper's detectors all
    have 256 channels and need none).
    """

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 10.0,
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
        if not self.hint:
            return
        assert teacher is not None
        pairs = pair(maps(student.features, "pkd"), maps(teacher.features, "pkd"))
        self.projectors = nn.ModuleList(
            nn.Identity() if s.shape[1] == t.shape[1] else nn.Conv2d(s.shape[1], t.shape[1], 1, bias=False)
            for s, t in pairs
        )

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor) -> dict[str, Tensor]:
        terms = {}
        if self.hard:
            terms["hard"] = self.hard * hard_loss(student.logits, target)
        if self.hint:
            assert teacher is not None
            losses = []
            pairs = pair(maps(student.features, "pkd"), maps(teacher.features, "pkd"))
            for (s, t), project in zip(pairs, self.projectors, strict=True):
                s, t = same_size(s, t)
                losses.append(pearson_loss(project(s), t))
            terms["hint"] = self.hint * torch.stack(losses).sum()
        return terms
