"""Inter-channel correlation (ICKD-C). Liu et al. 2021 (arXiv 2202.03680), section 3."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litdistill.methods.base import MapMethod, summed
from litdistill.methods.layers import BatchNorm


def correlation(x: Tensor) -> Tensor:
    """Inner products over positions of all pairs of channels, rows of unit length: (N, C, H, W) -> (N, C, C)."""
    flat = x.float().flatten(2)
    with torch.autocast(x.device.type, enabled=False):  # under autocast the product would be rounded to bfloat16
        return F.normalize(flat @ flat.transpose(1, 2), dim=2)


def correlation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of the correlation matrices divided by the channels, averaged over the batch; a scalar.

    Both (N, C, ·, ·); map sizes may differ, since positions are summed over. Rows are normalized, and the sum is divided
    by N·C, as in the authors' CIFAR code, to which the weight 2.5 belongs (the paper's formula divides by C² and does not
    normalize; the authors' ImageNet code divides by N twice).
    """
    n, channels = student.shape[:2]
    return (correlation(student) - correlation(teacher)).square().sum() / (n * channels)


class ICKD(MapMethod):
    """`hard` · labels' loss + `hint` · Σ distance of inter-channel correlations.

    The student always passes a 1x1 convolution with BatchNorm to the teacher's channels, as in the paper.
    """

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 2.5,
        student_taps: Sequence[str] | str = "last",
        teacher_taps: Sequence[str] | str = "last",
    ):
        super().__init__(hard, hint, student_taps, teacher_taps)

    def build_pairs(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.projectors = nn.ModuleList(
            nn.Sequential(nn.Conv2d(s.shape[1], t.shape[1], 1, bias=False), BatchNorm(t.shape[1])) for s, t in pairs
        )

    def loss(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        return summed([correlation_loss(p(s), t) for (s, t), p in zip(pairs, self.projectors, strict=True)])
