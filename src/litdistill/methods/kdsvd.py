"""Distillation of singular vectors (KDSVD). Lee, Kim & Song 2018 (arXiv 1807.06819), section 3.

Each map is reduced to its leading right singular vectors, which describe how channels respond together. The student
learns the radial basis function between the vectors of each stage and those of the previous stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from litdistill.methods.base import MapMethod
from litdistill.methods.layers import projectors
from litdistill.utils.errors import UserError

CANDIDATES = 3  # additional student vectors that the alignment chooses from, as in RepDistiller


def rounding(s: Tensor) -> Tensor:
    """Threshold (N, 1) below which squares of singular values (N, n; largest first) or their differences are rounding."""
    return s[:, :1].square() * 10 * torch.finfo(s.dtype).eps


class RightVectors(torch.autograd.Function):
    """(N, P, C) -> the first n right singular vectors (N, C, n) and singular values (N, n; without a gradient).

    The gradient is that of first-order perturbation theory, without the undefined parts: between equal singular values,
    and of zero ones. torch's own gradient of an SVD can be NaN where channels are dead, as is common after a ReLU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        _, s, vh = torch.linalg.svd(x, full_matrices=False)
        v = vh.transpose(1, 2)
        ctx.save_for_backward(x, s, v)
        values = s[:, :n].clone()
        ctx.mark_non_differentiable(values)
        return v[:, :, :n].clone(), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        x, s, v = ctx.saved_tensors
        n = grad.shape[2]
        square, top, leading = s.square(), s[:, None, :n].square(), v[:, :, :n]
        least = rounding(s)[:, :, None]
        gap = top - square[:, :, None]
        inner = v.transpose(1, 2) @ grad
        a = v @ torch.where(gap.abs() > least, inner / gap, 0)
        a = a + torch.where(top > least, (grad - v @ inner) / top, 0)  # outside the row space of x
        return (x @ a) @ leading.transpose(1, 2) + (x @ leading) @ a.transpose(1, 2), None


def right_vectors(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Right singular vectors (N, C, n) of a map (N, C, H, W) and singular values (N, n) of unit length, at least float32."""
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    v, s = RightVectors.apply(x.flatten(2).transpose(1, 2), n)
    return v, F.normalize(s, dim=1)


def aligned(student: Tensor, values: Tensor, teacher: Tensor) -> Tensor:
    """Selects for each teacher vector (N, C, k) the student vector of largest |cosine|, with its sign: (N, C, k).

    `values`: the student's singular values. Vectors of a zero value have no defined direction and are excluded.
    """
    cosine = student.detach().transpose(1, 2) @ teacher
    undefined = values.square() <= rounding(values)
    best = cosine.abs().masked_fill(undefined[:, :, None], -1).argmax(1, keepdim=True)
    sign = torch.where(cosine.gather(1, best) < 0, -1.0, 1.0).to(student.dtype)
    return student.gather(2, best.expand(-1, student.shape[1], -1)) * sign


def svd_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], k: int) -> Tensor:
    """Squared differences of exp(−(v − w)²/8) over all elements v, w of corresponding vectors of consecutive stages.

    Maps (N, C, H, W) by stage, of equal channels; sizes may differ. Vectors of both networks are weighted by the
    teacher's singular values. Summed over stages, averaged over the batch; a scalar. An SVD does not determine the signs
    of vectors, and the loss depends on them: here the sum of each teacher vector is made 0 or more, so that the loss is
    the same on every device, unlike RepDistiller's.
    """
    k = min([k, *(min(f.shape[1], f.shape[2:].numel()) for f in (*student, *teacher))])
    loss, previous = student[0].new_zeros((), dtype=torch.float32), None
    for s, t in zip(student, teacher, strict=True):
        with torch.autocast(s.device.type, enabled=False):
            v_t, weight = right_vectors(t, k)
            v_t = v_t * torch.where(v_t.sum(1, keepdim=True) < 0, -1, 1)
            v_s = aligned(*right_vectors(s, k + CANDIDATES), v_t)
        current = (v_s * weight[:, None], v_t * weight[:, None])
        if previous is not None:
            rbf = [
                torch.exp(-(a[:, :, None] - b[:, None]).square() / 8) for a, b in zip(current, previous, strict=True)
            ]
            loss = loss + (rbf[0] - rbf[1]).square().sum() / len(s)
        previous = current
    return loss


class KDSVD(MapMethod):
    """`hard` · labels' loss + `hint` · `svd_loss` over the stages.

    RepDistiller's KDSVD takes one vector per map, and fails on maps that are not square or of unequal channels; here a
    student whose channels differ from the teacher's passes a 1x1 convolution first.
    """

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 1.0,
        vectors: int = 1,
        student_taps: Sequence[str] | str = "stages",
        teacher_taps: Sequence[str] | str = "stages",
    ):
        super().__init__(hard, hint, student_taps, teacher_taps)
        if vectors < 1:
            raise UserError(f"vectors={vectors} must be 1 or more singular vectors a map; 1 is usual.")
        self.vectors = vectors

    def build_pairs(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        if len(pairs) < 2:
            raise UserError(
                "kdsvd relates each stage to the previous one and needs at least two maps of either network. "
                "Name more (student_taps, teacher_taps), or use a method of one map (ickd, fitnet)."
            )
        self.projectors = projectors(pairs)

    def loss(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        projected = [p(s) for (s, _), p in zip(pairs, self.projectors, strict=True)]
        return svd_loss(projected, [t for _, t in pairs], self.vectors)
