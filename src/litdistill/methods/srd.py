"""A simple recipe for distillation (SRD). Miles & Mikolajczyk 2024, Understanding the Role of the Projector in Knowledge
Distillation (arXiv 2303.11098), section 3.

A linear projector, BatchNorm of what is compared, and the logarithm of a high power of the difference. The method of
Yang et al. 2021, at times called by the same letters, is `srrl`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from litdistill.methods.base import Method, check_temperature, check_weights, hard_loss
from litdistill.methods.kd import soft_loss
from litdistill.methods.ofd import BatchNorm
from litdistill.types import Outputs, Taps
from litdistill.utils.errors import UserError


def pooled(features: Outputs) -> Tensor:
    """The last feature as vectors (N, C): a map's mean over positions, or the mean of tokens; in float32."""
    f = list(features.features.values())[-1].float()
    return f.mean((2, 3)) if f.ndim == 4 else f.mean(1) if f.ndim == 3 else f


def log_sum(student: Tensor, teacher: Tensor, exponent: float) -> Tensor:
    """log Σ |student − teacher|^exponent over all samples and channels of the batch, (N, C) each; a scalar.

    Of equal ones it is the logarithm of the smallest normal number, with no gradient, and not −∞.
    """
    total = (student - teacher).abs().pow(exponent).sum()
    return total.clamp(min=torch.finfo(total.dtype).tiny).log()


class SRD(Method):
    """`hard` · CE(student, labels) + `hint` · log Σ |BN(student's vector W) − BN(teacher's vector)|^exponent + `soft` · KL.

    As in the authors' ImageNet code: vectors are those that the classifiers read, W is learnt, both BatchNorms have no
    affine part and an ε of 1e-4, and the sum is over batch and channels, which adds only a constant to the logarithm of
    a mean: the hint may be negative, and its gradient is that of the mean. KL is `kd`'s at `temperature`. W has no
    bias, which BatchNorm would take away. A batch of one is normalised by the running statistics.
    """

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 2.0,
        soft: float = 1.0,
        temperature: float = 1.0,
        exponent: float = 4.0,
        student_taps: Sequence[str] | str = "pooled",
        teacher_taps: Sequence[str] | str = "pooled",
    ):
        super().__init__()
        check_weights(hard=hard, hint=hint, soft=soft)
        check_temperature(temperature)
        if not exponent >= 1:
            raise UserError(f"method.exponent={exponent} must be 1 or more. The authors use 4.")
        self.hard, self.hint, self.soft, self.temperature, self.exponent = hard, hint, soft, temperature, exponent
        self.student_taps, self.teacher_taps = student_taps, teacher_taps

    def taps(self) -> Taps:
        return Taps(self.student_taps, self.teacher_taps) if self.hint else Taps()

    def build(self, student: Outputs, teacher: Outputs | None, targets: Tensor) -> None:
        if not self.hint:
            return
        assert teacher is not None
        s, t = pooled(student), pooled(teacher)
        self.projector = nn.Linear(s.shape[1], t.shape[1], bias=False, device=s.device)
        self.norm_student = BatchNorm(t.shape[1], eps=1e-4, affine=False, device=s.device)
        self.norm_teacher = BatchNorm(t.shape[1], eps=1e-4, affine=False, device=t.device)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor) -> dict[str, Tensor]:
        terms = {}
        if self.hard:
            terms["hard"] = self.hard * hard_loss(student.logits, target)
        if self.hint:
            assert teacher is not None
            with torch.autocast(student.logits.device.type, enabled=False):
                s = self.norm_student(self.projector(pooled(student))[:, :, None, None])
                t = self.norm_teacher(pooled(teacher)[:, :, None, None])
                terms["hint"] = self.hint * log_sum(s, t, self.exponent)
        if self.soft:
            assert teacher is not None
            terms["soft"] = self.soft * soft_loss(student.logits, teacher.logits, self.temperature)
        return terms
