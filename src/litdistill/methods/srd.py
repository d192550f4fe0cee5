"""A simple recipe for distillation (SRD). Miles & Mikolajczyk 2024, Understanding the Role of the Projector in Knowledge
Distillation (arXiv 2303.11098), section 3.

A linear projector, BatchNorm of both vectors, and the logarithm of a high power of their difference. The method of
Yang et al. 2021, at times abbreviated SRD as well, is `srrl`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from litdistill.losses import kl, log_power
from litdistill.methods.base import CATEGORICAL, VectorMethod, check_temperature, check_weights
from litdistill.methods.layers import BatchNorm
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError


def pooled(outputs: Outputs) -> Tensor:
    """Returns the last feature as vectors (N, C) in float32: a map's mean over positions, or the mean of tokens."""
    f = list(outputs.features.values())[-1].float()
    return f.mean((2, 3)) if f.ndim == 4 else f.mean(1) if f.ndim == 3 else f


class SRD(VectorMethod):
    """`hard` · labels' loss + `hint` · log Σ |BN(student's vector W) − BN(teacher's vector)|^exponent + `soft` · KL.

    As in the authors' ImageNet code: the vectors are the classifiers' inputs, W is learned, both BatchNorms have no affine
    part and an ε of 1e-4, and the sum is over batch and channels, which adds only a constant to the logarithm of a mean:
    the hint may be negative, and its gradient is that of the mean. KL is `kd`'s at `temperature`. W has no bias, which
    BatchNorm would cancel. A batch of one is normalized by the running statistics.
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
        super().__init__(hard, hint, student_taps, teacher_taps)
        check_weights(soft=soft)
        check_temperature(temperature)
        if not exponent >= 1:
            raise UserError(f"exponent={exponent} must be 1 or more. The authors use 4.")
        self.soft, self.temperature, self.exponent = soft, temperature, exponent
        if soft:
            self.kinds, self.some_classes = (CATEGORICAL,), False

    def pairs(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        """Returns the last feature of either network as vectors (N, C)."""
        return [(pooled(student), pooled(teacher))]

    def build_pairs(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        s, t = pairs[0]
        self.projector = nn.Linear(s.shape[1], t.shape[1], bias=False, device=s.device)
        self.norm_student = BatchNorm(t.shape[1], eps=1e-4, affine=False, device=s.device)
        self.norm_teacher = BatchNorm(t.shape[1], eps=1e-4, affine=False, device=t.device)

    def loss(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        s = self.norm_student(self.projector(pairs[0][0])[:, :, None, None])
        return log_power(s, self.norm_teacher(pairs[0][1][:, :, None, None]), self.exponent)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        terms = super().forward(student, teacher, batch)
        if self.soft:
            terms["soft"] = self.soft * kl(student.logits, teacher.logits, self.temperature)
        return terms
