"""Similarity-preserving distillation (SP). Tung & Mori 2019 (arXiv 1907.09682), section 3.1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from litdistill.methods.base import VectorMethod, summed


def similarity(x: Tensor) -> Tensor:
    """Similarity matrix of a batch: the inner products `(N, N)` of the samples' features, each row of unit length.

    `x`: (N, …), flattened. The row of a sample whose features are all 0 is 0, without a gradient.
    """
    x = x.float().flatten(1)
    x = x / x.detach().abs().max().clamp(min=1e-20)  # cancels in each row; keeps fourth powers inside float32
    gram = x @ x.T
    norm = gram.norm(dim=1, keepdim=True)
    return gram * torch.where(norm > 0, 1 / norm.clamp(min=1e-20), torch.zeros_like(norm))


class SP(VectorMethod):
    """`hard` · labels' loss + `hint` · ‖G_student − G_teacher‖² / N², summed over the pairs of features (equation 4)."""

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 3000.0,
        student_taps: Sequence[str] | str = "last",
        teacher_taps: Sequence[str] | str = "last",
    ):
        super().__init__(hard, hint, student_taps, teacher_taps)

    def loss(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        return summed([(similarity(s) - similarity(t)).square().mean() for s, t in pairs])
