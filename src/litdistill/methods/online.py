"""Self-distillation from the student's weight average. Tarvainen & Valpola 2017 (arXiv 1703.01780), section 2."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from litdistill.losses import kl
from litdistill.methods.base import CATEGORICAL, Method, check_temperature, check_weights
from litdistill.types import Batch, Outputs, Taps
from litdistill.utils.errors import UserError


class WithAverage(nn.Module):
    """A student and the exponential moving average of its weights; returns the student's output.

    Each forward in train mode first updates the average with the student's current weights. The average is in eval mode
    with the student's BatchNorm statistics, and gets no gradient.
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
    def _update_average(self) -> None:
        update = get_ema_multi_avg_fn(self.decay)
        update(list(self.average.parameters()), list(self.student.parameters()), 0)
        for average, buffer in zip(self.average.buffers(), self.student.buffers(), strict=True):
            average.copy_(buffer)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if self.training:
            self._update_average()
        with torch.no_grad():
            self.average(*inputs, **named)  # its output is read by a tap
        return self.student(*inputs, **named)


class Online(Method):
    """`hard` · labels' loss + `soft` · T² · KL(average ‖ student); the teacher is the student's own moving average.

    The paper's consistency loss is the mean squared error of probabilities; here it is the KL of distillation. The student
    is deployed, not its average.
    """

    needs_teacher = False
    kinds = (CATEGORICAL,)
    takes_places = True

    def __init__(self, hard: float = 1.0, soft: float = 1.0, temperature: float = 4.0, decay: float = 0.99):
        super().__init__(hard)
        check_weights(soft=soft)
        check_temperature(temperature)
        if not 0 <= decay < 1:
            raise UserError(f"decay={decay} must be at least 0 and below 1; 0.99 is a good start.")
        self.soft, self.temperature, self.decay = soft, temperature, decay

    def prepare(self, student: nn.Module, teacher: Any, example: Any) -> nn.Module:
        return WithAverage(student, self.decay)

    def taps(self) -> Taps:
        return Taps(student=["average"]) if self.soft else Taps()

    def ship(self, student: nn.Module) -> nn.Module:
        assert isinstance(student, WithAverage)
        return student.student

    def forward(self, student: Outputs, teacher: Any, batch: Batch) -> dict[str, Tensor]:
        if not self.soft:
            return {}
        return {"soft": self.soft * kl(student.logits, student.features["average"], self.temperature)}
