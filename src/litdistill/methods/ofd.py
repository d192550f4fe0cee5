"""Overhaul of feature distillation (OFD). Heo et al. 2019 (arXiv 1904.01866), section 3.2.

Maps are compared before their ReLU: with a margin ReLU on the teacher, a 1x1 convolution with BatchNorm on the student,
and a partial L2 distance that is 0 where both are negative and the student is the lower one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from litdistill.losses import partial_l2, same_size
from litdistill.methods.base import MapMethod
from litdistill.methods.layers import connector


class MarginReLU(nn.Module):
    """max(x, m), where m < 0 is the mean of a channel's negative responses, (C,).

    The paper estimates m either from the preceding BatchNorm, assuming normal responses (the authors' code), or directly
    during training. The latter is implemented, which needs no BatchNorm and no assumption: the exact mean over all
    negative responses in the training batches so far, including the current one. In evaluation m is fixed. With several
    processes each one counts its own batches.
    """

    margin: Tensor
    seen: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("margin", torch.zeros(channels))
        self.register_buffer("seen", torch.zeros(channels, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                count = (x < 0).sum((0, 2, 3))
                self.seen += count
                # a running mean: a float32 sum over an epoch would lose digits
                self.margin += (x.clamp(max=0).sum((0, 2, 3)) - count * self.margin) / self.seen.clamp(min=1)
        return torch.maximum(x, self.margin.to(x.dtype)[:, None, None])


class OFD(MapMethod):
    """`hard` · labels' loss + `hint` · Σ partial L2 of stage i / 2^(stages − 1 − i).

    Each stage has half the weight of the next deeper one, and distances are summed over positions and channels, not
    averaged, as in the authors' code, to which the weight 1e-3 belongs. That code also runs the teacher's BatchNorm in
    training mode (section 3.3); here the teacher is always in eval mode.
    """

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 1e-3,
        student_taps: Sequence[str] | str = "stages:pre",
        teacher_taps: Sequence[str] | str = "stages:pre",
    ):
        super().__init__(hard, hint, student_taps, teacher_taps)

    def build_pairs(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.connectors = nn.ModuleList(connector(s.shape[1], t.shape[1]) for s, t in pairs)
        self.margins = nn.ModuleList(MarginReLU(t.shape[1]) for _, t in pairs)

    def loss(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        total = pairs[0][0].new_zeros((), dtype=torch.float32)
        for (s, t), connect, margin in zip(pairs, self.connectors, self.margins, strict=True):
            s, t = same_size(s, t)
            total = total / 2 + partial_l2(connect(s), margin(t.float()))
        return total
