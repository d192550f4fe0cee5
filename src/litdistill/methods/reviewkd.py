"""Knowledge review (ReviewKD). Chen et al. 2021 (arXiv 2104.09044), section 3.

Each teacher stage supervises the student's stages of the same and greater depth: from deep to shallow, attention (ABF)
fuses the student's maps one into the next, and each is compared with the teacher's at a pyramid of sizes (HCL).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litdistill.losses import pyramid
from litdistill.methods.base import MapMethod, maps, pair, summed
from litdistill.methods.layers import BatchNorm
from litdistill.types import Outputs

MAX_CHANNELS = 512  # maximum width of the fused maps, as in the authors' code


class ABF(nn.Module):
    """Attention-based fusion: (map of this stage, fused map of the next deeper one) -> (map for the loss, fused map).

    `fuse=False` at the deepest stage, which has no deeper map: no attention is created.
    """

    def __init__(self, channels: int, mid: int, out: int, fuse: bool):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(channels, mid, 1, bias=False), BatchNorm(mid))
        self.conv2 = nn.Sequential(nn.Conv2d(mid, out, 3, padding=1, bias=False), BatchNorm(out))
        self.attention = nn.Sequential(nn.Conv2d(2 * mid, 2, 1), nn.Sigmoid()) if fuse else None
        for conv in (self.conv1[0], self.conv2[0]):
            assert isinstance(conv, nn.Conv2d)
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(self, x: Tensor, deeper: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """`size`: (H, W) of the teacher's map, to which the fused map is resized (nearest neighbor)."""
        x = self.conv1(x)
        if self.attention is not None:
            assert deeper is not None
            deeper = F.interpolate(deeper, x.shape[2:], mode="nearest")
            share = self.attention(torch.cat([x, deeper], dim=1))
            x = x * share[:, :1] + deeper * share[:, 1:]
        if x.shape[2:] != tuple(size):
            x = F.interpolate(x, tuple(size), mode="nearest")
        return self.conv2(x), x


def stages(features: Mapping[str, Tensor]) -> list[Tensor]:
    """Returns the maps, and vectors (N, C) as maps of one position. Raises `UserError` where there is no map."""
    maps(features, "reviewkd")
    return [f[:, :, None, None] if f.ndim == 2 else f for f in features.values() if f.ndim in (2, 4)]


class ReviewKD(MapMethod):
    """`hard` · labels' loss + `hint` · Σ HCL(fused student map, teacher map).

    Stages as in the authors' CIFAR code: the student's after their activation, the teacher's before it, and the pooled
    vector of either network as one more stage. Their warm-up over 20 epochs belongs to a schedule of `hint`.
    """

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 5.0,
        student_taps: Sequence[str] | str = ("stages", "pooled"),
        teacher_taps: Sequence[str] | str = ("stages:pre", "pooled"),
    ):
        super().__init__(hard, hint, student_taps, teacher_taps)

    def pairs(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        return pair(stages(student.features), stages(teacher.features))

    def build_pairs(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        mid = min(MAX_CHANNELS, pairs[-1][0].shape[1])
        deepest = len(pairs) - 1
        self.abfs = nn.ModuleList(ABF(s.shape[1], mid, t.shape[1], i < deepest) for i, (s, t) in enumerate(pairs))

    def loss(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        losses, fused = [], None
        for (s, t), abf in zip(reversed(pairs), reversed(self.abfs), strict=True):
            out, fused = abf(s, fused, t.shape[2:])
            losses.append(pyramid(out, t))
        return summed(losses)
