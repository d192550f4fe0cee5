"""Variational information distillation (VID). Ahn et al. 2019 (arXiv 1904.05835), sections 2 and 3."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litdistill.losses import same_size
from litdistill.methods.base import MapMethod, summed


class Gaussian(nn.Module):
    """q(teacher's map | student's map): its mean from three 1x1 convolutions, and one learned variance per channel.

    The variance is softplus(a) + `eps`, initially `variance`.
    """

    def __init__(self, student_channels: int, teacher_channels: int, variance: float = 5.0, eps: float = 1e-5):
        super().__init__()
        widths = [student_channels, teacher_channels, teacher_channels, teacher_channels]
        convs = [nn.Conv2d(a, b, 1, bias=False) for a, b in pairwise(widths)]
        self.mean = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])
        self.scale = nn.Parameter(torch.full((teacher_channels,), math.log(math.expm1(variance - eps))))
        self.eps = eps

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns −log q without its constant, averaged over elements; a scalar. Both (N, C, H, W); the larger is pooled."""
        f_s, f_t = same_size(student, teacher)
        variance = (F.softplus(self.scale.float()) + self.eps).view(1, -1, 1, 1)
        return 0.5 * ((self.mean(f_s).float() - f_t.float()).square() / variance + variance.log()).mean()


class VID(MapMethod):
    """`hard` · labels' loss + `hint` · sum over stages of −log q(teacher | student), which may be negative."""

    def build_pairs(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.stages = nn.ModuleList(Gaussian(s.shape[1], t.shape[1]).to(s.device) for s, t in pairs)

    def loss(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        return summed([q(s, t) for q, (s, t) in zip(self.stages, pairs, strict=True)])
