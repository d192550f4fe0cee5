"""Softmax regression representation learning (SRRL). Yang et al. 2021 (ICLR; openreview ZzwDy_wiWv), section 3.

The student's last features, projected to the teacher's channels, should equal the teacher's features, and should give
the teacher's logits under the teacher's own classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litdistill.losses import mse
from litdistill.methods.base import Method, check_weights, maps
from litdistill.methods.layers import connector, reusable_classifier
from litdistill.types import Batch, Outputs, Taps


class SRRL(Method):
    """`hard` · labels' loss + `hint` · MSE(features) + `soft` · MSE(logits by the teacher's classifier).

    As in the authors' code both distances are means over their elements, both weights are 1, the connector (1x1
    convolution, BatchNorm, ReLU) reads the student's last map, and features are its means over positions.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 1.0,
        soft: float = 1.0,
        student_taps: Sequence[str] | str = "last",
        teacher_taps: Sequence[str] | str = "last",
    ):
        super().__init__(hard)
        check_weights(hint=hint, soft=soft)
        self.hint, self.soft, self.read = hint, soft, Taps(student_taps, teacher_taps)

    def taps(self) -> Taps:
        return self.read if self.hint or self.soft else Taps()

    def prepare(self, student: nn.Module, teacher: nn.Module, example: Any) -> nn.Module:
        """Copies the teacher's classifier; the student is unchanged."""
        if self.soft:
            classifier = reusable_classifier(teacher, example, self.read.teacher, "srrl")
            self.register_buffer("weight", classifier.weight.detach())
            self.register_buffer("bias", None if classifier.bias is None else classifier.bias.detach())
        return student

    def build(self, student: Outputs, teacher: Outputs, targets: Tensor | None) -> None:
        if self.hint or self.soft:
            s, t = maps(student.features, "srrl")[-1], maps(teacher.features, "srrl")[-1]
            self.connector = nn.Sequential(connector(s.shape[1], t.shape[1]), nn.ReLU())

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        if not (self.hint or self.soft):
            return {}
        terms = {}
        connected = self.connector(maps(student.features, "srrl")[-1]).float().mean((2, 3))
        if self.hint:
            expected = maps(teacher.features, "srrl")[-1].float().mean((2, 3))
            terms["hint"] = self.hint * mse(connected, expected)
        if self.soft:
            with torch.autocast(connected.device.type, enabled=False):
                logits = F.linear(connected, self.weight, self.bias)
            terms["soft"] = self.soft * mse(logits, teacher.logits)
        return terms
