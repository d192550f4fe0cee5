"""Distillation by the Pearson correlation of maps (PKD). Cao et al. 2022 (arXiv 2207.02039), section 3."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from litdistill.methods.base import MapMethod, same_size, summed
from litdistill.methods.layers import projectors


def normalize(x: Tensor) -> Tensor:
    """Normalizes each channel to mean 0 and variance 1 over batch and positions, in float32: (N, C, H, W) -> (N, C, H, W).

    A constant channel (a dead one, or a single value) has no correlation: it becomes 0, without a gradient, where the
    authors' code divides by 1e-6 and returns gradients a million times as large.
    """
    x = x.float()
    var, mean = torch.var_mean(x, dim=(0, 2, 3), keepdim=True, correction=0)
    return (x - mean) * torch.where(var > 1e-12, var, torch.inf).rsqrt()


def pearson_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Half the mean squared error of the normalized maps, equal to 1 − r averaged over channels; a scalar.

    Both (N, C, H, W). The variance is the biased one, which makes the identity with the paper's 1 − r exact; the
    authors' code takes the unbiased one, which gives (n − 1)/n of this, with n = N·H·W.
    """
    return F.mse_loss(normalize(student), normalize(teacher)) / 2


class PKD(MapMethod):
    """`hard` · labels' loss + `hint` · Σ (1 − Pearson correlation), stage by stage.

    A student whose channels differ from the teacher's passes a 1x1 convolution first (the paper's detectors all have 256
    channels and need none).
    """

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 10.0,
        student_taps: Sequence[str] | str = "stages",
        teacher_taps: Sequence[str] | str = "stages",
    ):
        super().__init__(hard, hint, student_taps, teacher_taps)

    def build_pairs(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.projectors = projectors(pairs)

    def loss(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        losses = []
        for (s, t), project in zip(pairs, self.projectors, strict=True):
            s, t = same_size(s, t)
            losses.append(pearson_loss(project(s), t))
        return summed(losses)
