"""Activation boundaries. Heo et al. 2019 (arXiv 1811.03233), sections 3.1 to 3.3."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from litdistill.methods.base import Method, check_weights, hard_loss, maps, pair, same_size
from litdistill.methods.fitnet import regressor
from litdistill.types import Outputs, Taps
from litdistill.utils.errors import UserError


def boundary_loss(student: Tensor, teacher: Tensor, margin: float) -> Tensor:
    """Squared hinge that puts student and teacher on the same side of every neuron's boundary; a scalar.

    Pre-activations of one shape (N, ...). Where the teacher is above 0 the student is pulled up to `margin`, elsewhere
    down to −`margin`, and beyond it costs nothing. Summed over neurons, the mean over the batch.
    """
    student, teacher = student.float(), teacher.float()
    missing = torch.where(teacher > 0, margin - student, margin + student).clamp(min=0)
    return missing.square().sum() / len(student)


class AB(Method):
    """Two phases: for `init_epochs` epochs `hint` · boundaries alone, then `hard` · CE(student, labels) alone.

    Boundaries: sum over stages of `boundary_loss` · 0.003 · 2^−(stages after it), the authors' scale for CIFAR. A
    student's stage whose shape differs from the teacher's goes through a convolution and BatchNorm; maps whose sizes
    differ still are pooled. In the first phase the student's classifier gets no gradient, in the second the connectors
    get none. A boundary lies at 0 before an activation: name taps where `stages:pre` finds none.
    """

    phases = needs_hard = True

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 1.0,
        margin: float = 1.0,
        init_epochs: int = 30,
        student_taps: Sequence[str] | str = "stages:pre",
        teacher_taps: Sequence[str] | str = "stages:pre",
    ):
        super().__init__()
        check_weights(hard=hard, hint=hint, margin=margin)
        if not (hard and hint and init_epochs > 0):
            raise UserError("method=ab trains in two phases: hard, hint and init_epochs must be above 0.")
        self.hard, self.hint, self.margin, self.init_epochs = hard, hint, margin, init_epochs
        self.student_taps, self.teacher_taps = student_taps, teacher_taps

    def taps(self) -> Taps:
        return Taps(self.student_taps, self.teacher_taps)

    def build(self, student: Outputs, teacher: Outputs | None, targets: Tensor) -> None:
        assert teacher is not None
        pairs = pair(maps(student.features, "ab"), maps(teacher.features, "ab"))
        same = [s.shape[1:] == t.shape[1:] for s, t in pairs]
        self.connectors = nn.ModuleList(
            nn.Identity() if equal else regressor(s, t, relu=False) for equal, (s, t) in zip(same, pairs, strict=True)
        )

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor) -> dict[str, Tensor]:
        if self.epoch >= self.init_epochs:
            return {"hard": self.hard * hard_loss(student.logits, target)}
        assert teacher is not None
        pairs = pair(maps(student.features, "ab"), maps(teacher.features, "ab"))
        losses = []
        for after, (connect, (s, t)) in enumerate(zip(reversed(self.connectors), reversed(pairs), strict=True)):
            s, t = same_size(connect(s), t)
            losses.append(boundary_loss(s, t, self.margin) * 0.003 / 2**after)
        return {"hint": self.hint * torch.stack(losses).sum()}
