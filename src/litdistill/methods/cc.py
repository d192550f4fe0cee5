"""Correlation congruence (CC). Peng et al. 2019 (arXiv 1904.01802), section 3."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litdistill.methods.base import VectorMethod
from litdistill.utils.errors import UserError


def consecutive(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over i of Σ_d |s − t|_{i,d} · |s − t|_{i+1,d}, of embeddings `(N, D)`; 0 for a batch of one.

    The form that the paper's author contributed to RepDistiller, which the CRD table's CC row was computed with: it
    multiplies the errors of consecutive samples of the batch, dimension by dimension.
    """
    delta = (student - teacher).abs()
    return (delta[:-1] * delta[1:]).sum() / max(len(delta) - 1, 1)


def gaussian(student: Tensor, teacher: Tensor, gamma: float, order: int) -> Tensor:
    """‖K(student) − K(teacher)‖² / N² with K the `(N, N)` matrix of Gaussian kernels exp(−γ ‖a − b‖²) of the unit vectors.

    The kernel is a Taylor series about a·b = 0 up to `order`: exp(−2γ) · Σ_p (2γ)^p / p! · (a·b)^p.
    """

    def kernel(x: Tensor) -> Tensor:
        x = F.normalize(x, dim=1)
        dot = x @ x.T
        series = [(2 * gamma) ** p / math.factorial(p) * dot**p for p in range(order + 1)]
        return math.exp(-2 * gamma) * torch.stack(series).sum(dim=0)

    return (kernel(student) - kernel(teacher)).square().mean()


class CC(VectorMethod):
    """`hard` · labels' loss + `hint` · correlation congruence of learned linear embeddings of the two networks' features.

    `kernel: consecutive` is the published tables' form, to which the weight .02 belongs; `gaussian` is the paper's
    (γ = .4, order 2, weight .003). Of several taps the last is embedded.
    """

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 0.02,
        width: int = 128,
        kernel: str = "consecutive",
        gamma: float = 0.4,
        order: int = 2,
        student_taps: Sequence[str] | str = "pooled",
        teacher_taps: Sequence[str] | str = "pooled",
    ):
        super().__init__(hard, hint, student_taps, teacher_taps)
        if kernel not in ("consecutive", "gaussian"):
            raise UserError(
                f"kernel={kernel} is unknown. Use consecutive (the published tables) or gaussian (the paper)."
            )
        self.width, self.kernel, self.gamma, self.order = width, kernel, gamma, order

    def build_pairs(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        s, t = pairs[-1]
        self.embed_student = nn.Linear(s.shape[1], self.width, device=s.device)
        self.embed_teacher = nn.Linear(t.shape[1], self.width, device=t.device)

    def loss(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        s, t = self.embed_student(pairs[-1][0]), self.embed_teacher(pairs[-1][1])
        return gaussian(s, t, self.gamma, self.order) if self.kernel == "gaussian" else consecutive(s, t)
