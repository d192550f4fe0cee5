"""Neuron selectivity transfer. Huang & Wang 2017 (arXiv 1707.01219), sections 3 and 4."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from litdistill.methods.base import Method, check_weights, hard_loss, maps, pair, same_size
from litdistill.types import Outputs, Taps


def mmd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of the channels' patterns; kernel (a · b)²; a scalar, the mean over the batch.

    Each channel of a map (N, C, H, W) is one sample: its activations over places, of unit length. The
    channels may differ in number; the larger map is pooled. The teacher's own kernel is a constant: it is kept so that
    the term is 0 for equal maps.
    """
    f_s, f_t = same_size(student.float(), teacher.float())
    s, t = F.normalize(f_s.flatten(2), dim=2), F.normalize(f_t.flatten(2), dim=2)
    with torch.autocast(s.device.type, enabled=False):
        kernel = lambda a, b: (a @ b.transpose(1, 2)).square().mean()  # noqa: E731
        return kernel(s, s) + kernel(t, t) - 2 * kernel(s, t)


class NST(Method):
    """`hard` · CE(student, labels) + `hint` · sum over stages of `mmd_loss`."""

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 50.0,
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
            maps(student.features, "nst"), maps(teacher.features, "nst")

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor) -> dict[str, Tensor]:
        terms = {}
        if self.hard:
            terms["hard"] = self.hard * hard_loss(student.logits, target)
        if self.hint:
            assert teacher is not None
            pairs = pair(maps(student.features, "nst"), maps(teacher.features, "nst"))
            terms["hint"] = self.hint * torch.stack([mmd_loss(s, t) for s, t in pairs]).sum()
        return terms
