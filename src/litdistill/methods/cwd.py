"""Channel-wise distillation (CWD). Shu et al. 2021 (arXiv 2011.13256), section 3."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litdistill.methods.base import Method, check_temperature, check_weights, hard_loss, maps, pair, same_size
from litdistill.types import Outputs, Taps
from litdistill.utils.errors import UserError


def channel_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student) of each channel's softmax over positions, the mean over channels and batch; a scalar.

    Both (N, C, H, W); computed in float32 whatever the autocast.
    """
    log_p = F.log_softmax(teacher.float().flatten(2) / temperature, dim=2)
    log_q = F.log_softmax(student.float().flatten(2) / temperature, dim=2)
    n, channels = student.shape[:2]
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) * temperature**2 / (n * channels)


class CWD(Method):
    """`hard` · CE(student, labels) + `hint` · Σ T² · KL over positions, channel by channel.

    A student with other channels than the teacher's goes through a 1x1 convolution first, as in the paper.
    """

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 50.0,
        temperature: float = 4.0,
        student_taps: Sequence[str] | str = "last",
        teacher_taps: Sequence[str] | str = "last",
    ):
        super().__init__()
        check_weights(hard=hard, hint=hint)
        check_temperature(temperature)
        self.hard, self.hint, self.temperature = hard, hint, temperature
        self.student_taps, self.teacher_taps = student_taps, teacher_taps

    def taps(self) -> Taps:
        return Taps(self.student_taps, self.teacher_taps) if self.hint else Taps()

    def build(self, student: Outputs, teacher: Outputs | None, targets: Tensor) -> None:
        if not self.hint:
            return
        assert teacher is not None
        pairs = [same_size(*p) for p in pair(maps(student.features, "cwd"), maps(teacher.features, "cwd"))]
        if all(s.shape[2:].numel() == 1 for s, _ in pairs):
            raise UserError(
                "method=cwd compares the positions of a map, and the maps it reads have one (1x1), so that its loss is "
                "always 0. Read earlier maps (method.student_taps=stages method.teacher_taps=stages) or larger images."
            )
        self.projectors = nn.ModuleList(
            nn.Identity() if s.shape[1] == t.shape[1] else nn.Conv2d(s.shape[1], t.shape[1], 1) for s, t in pairs
        )

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor) -> dict[str, Tensor]:
        terms = {}
        if self.hard:
            terms["hard"] = self.hard * hard_loss(student.logits, target)
        if self.hint:
            assert teacher is not None
            losses = []
            pairs = pair(maps(student.features, "cwd"), maps(teacher.features, "cwd"))
            for (s, t), project in zip(pairs, self.projectors, strict=True):
                s, t = same_size(s, t)
                losses.append(channel_loss(project(s), t, self.temperature))
            terms["hint"] = self.hint * torch.stack(losses).sum()
        return terms
