"""Self-distillation from a running average of the student. Tarvainen & Valpola 2017 (arXiv 1703.01780), section 2."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from litdistill.methods.base import Method, check_temperature, check_weights, hard_loss
from litdistill.methods.kd import soft_loss
from litdistill.types import Outputs, Taps
from litdistill.utils.errors import UserError


class WithAverage(nn.Module):
    """A student and the exponential moving average of its weights; gives the student's logits (N, classes).

    Each forward in train mode first moves the average towards the student as its last step left it. The average is in
    eval mode with the student's own BatchNorm statistics, and no gradient reaches it.
    """

    def __init__(self, student: nn.Module, decay: float):
        super().__init__()
        self.student, self.decay = student, decay
        self.average = copy.deepcopy(student).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> WithAverage:
        super().train(mode)
        self.average.eval()
        return self

    @torch.no_grad()
    def _follow(self) -> None:
        torch._foreach_lerp_(list(self.average.parameters()), list(self.student.parameters()), 1 - self.decay)
        for average, buffer in zip(self.average.buffers(), self.student.buffers(), strict=True):
            average.copy_(buffer)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self._follow()
        with torch.no_grad():
            self.average(images)  # read by tap
        return self.student(images)


class Online(Method):
    """`hard` · CE(labels) + `soft` · T² · KL(average ‖ student), the teacher being the student's own moving average.

    The paper's consistency loss is a mean squared error of probabilities; here it is the KL of distillation. The student
    is shipped, not its average.
    """

    needs_teacher = False

    def __init__(self, hard: float = 1.0, soft: float = 1.0, temperature: float = 4.0, decay: float = 0.99):
        super().__init__()
        check_weights(hard=hard, soft=soft)
        check_temperature(temperature)
        if not 0 <= decay < 1:
            raise UserError(f"method.decay={decay} must be at least 0 and below 1; 0.99 is a good start.")
        self.hard, self.soft, self.temperature, self.decay = hard, soft, temperature, decay

    def prepare(self, student: nn.Module, teacher: nn.Module | None, example: Tensor) -> nn.Module:
        return WithAverage(student, self.decay)

    def taps(self) -> Taps:
        return Taps(student=["average"])

    def ship(self, student: nn.Module) -> nn.Module:
        assert isinstance(student, WithAverage)
        return student.student

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor) -> dict[str, Tensor]:
        terms = {}
        if self.hard:
            terms["hard"] = self.hard * hard_loss(student.logits, target)
        if self.soft:
            terms["soft"] = self.soft * soft_loss(student.logits, student.features["average"], self.temperature)
        return terms
