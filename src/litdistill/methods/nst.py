"""Neuron selectivity transfer (NST). Huang & Wang 2017 (arXiv 1707.01219), sections 3 and 4."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from litdistill.methods.base import MapMethod, same_size, summed


def mmd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of the channels' activation patterns, kernel (a · b)²; a scalar, the batch mean.

    Each channel of a map (N, C, H, W) is one sample: its activations over positions, of unit length. The numbers of
    channels may differ; the larger map is pooled. The teacher's own kernel is a constant, which makes the loss 0 for equal
    maps.
    """
    f_s, f_t = same_size(student.float(), teacher.float())
    s, t = F.normalize(f_s.flatten(2), dim=2), F.normalize(f_t.flatten(2), dim=2)
    with torch.autocast(s.device.type, enabled=False):
        kernel = lambda a, b: (a @ b.transpose(1, 2)).square().mean()  # noqa: E731
        return kernel(s, s) + kernel(t, t) - 2 * kernel(s, t)


class NST(MapMethod):
    """`hard` · labels' loss + `hint` · sum over stages of `mmd_loss`."""

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 50.0,
        student_taps: Sequence[str] | str = "stages",
        teacher_taps: Sequence[str] | str = "stages",
    ):
        super().__init__(hard, hint, student_taps, teacher_taps)

    def loss(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        return summed([mmd_loss(s, t) for s, t in pairs])
