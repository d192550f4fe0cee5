"""A comprehensive overhaul of feature distillation (OFD). Heo et al. 2019 (arXiv 1904.01866), section 3.2.

Maps are compared before their ReLU: a margin ReLU on the teacher, a 1x1 convolution with BatchNorm on the student, and
a partial L2 distance that asks nothing of the student where both are negative and the student is the lower one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litdistill.methods.base import Method, check_weights, hard_loss, maps, pair, same_size
from litdistill.types import Outputs, Taps


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm2d that falls back on its running statistics where one value a channel is all there is to normalise.

    A last batch of one sample would else stop a run whose student has no such layer: a 1x1 map has no variance.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.numel() == input.shape[1]:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


def connector(channels: int, out: int) -> nn.Sequential:
    """1x1 convolution and BatchNorm, initialised as in the authors' code (He's normal by fan-out)."""
    conv = nn.Conv2d(channels, out, 1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    return nn.Sequential(conv, BatchNorm(out))


class MarginReLU(nn.Module):
    """max(x, m), where m < 0 is the mean of a channel's negative responses, (C,).

    The paper allows two ways to know m: from the preceding BatchNorm, as if responses were normal (the authors' code),
    or directly during training. Here it is the second, which needs no BatchNorm and no assumption: the exact mean over
    all negative responses in the training batches so far, this one included. In evaluation m stays as it is. With
    several processes each counts its own share of the batches.
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
                # the mean is moved and no sum kept: a float32 sum over an epoch would lose digits
                self.margin += (x.clamp(max=0).sum((0, 2, 3)) - count * self.margin) / self.seen.clamp(min=1)
        return torch.maximum(x, self.margin.to(x.dtype)[:, None, None])


def partial_l2(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance but where student <= teacher <= 0: summed over the map, the mean over the batch.

    Both (N, C, H, W); `teacher` after its margin ReLU. A scalar.
    """
    counts = (student > teacher) | (teacher > 0)
    return ((student - teacher).square() * counts).sum() / student.shape[0]


class OFD(Method):
    """`hard` · CE(student, labels) + `hint` · Σ partial L2 of stage i / 2^(stages − 1 − i).

    Each stage counts half as much as the next deeper one, and distances are summed over positions and channels and not
    averaged: so in the authors' code, from which the weight 1e-3 comes. They also run the teacher's BatchNorm in
    training mode (section 3.3), which is not done here: a teacher is always in eval mode.
    """

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 1e-3,
        student_taps: Sequence[str] | str = "stages:pre",
        teacher_taps: Sequence[str] | str = "stages:pre",
    ):
        super().__init__()
        check_weights(hard=hard, hint=hint)
        self.hard, self.hint = hard, hint
        self.student_taps, self.teacher_taps = student_taps, teacher_taps

    def taps(self) -> Taps:
        return Taps(self.student_taps, self.teacher_taps) if self.hint else Taps()

    def build(self, student: Outputs, teacher: Outputs | None, targets: Tensor) -> None:
        if not self.hint:
            return
        assert teacher is not None
        pairs = pair(maps(student.features, "ofd"), maps(teacher.features, "ofd"))
        self.connectors = nn.ModuleList(connector(s.shape[1], t.shape[1]) for s, t in pairs)
        self.margins = nn.ModuleList(MarginReLU(t.shape[1]) for _, t in pairs)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor) -> dict[str, Tensor]:
        terms = {}
        if self.hard:
            terms["hard"] = self.hard * hard_loss(student.logits, target)
        if self.hint:
            assert teacher is not None
            pairs = pair(maps(student.features, "ofd"), maps(teacher.features, "ofd"))
            total = student.logits.new_zeros((), dtype=torch.float32)
            for (s, t), connect, margin in zip(pairs, self.connectors, self.margins, strict=True):
                s, t = same_size(s, t)
                total = total / 2 + partial_l2(connect(s).float(), margin(t.float()))
            terms["hint"] = self.hint * total
        return terms
