"""Probabilistic knowledge transfer (PKT). Passalis & Tefas 2018 (arXiv 1803.10837), section 3."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from litdistill.methods.base import VectorMethod, summed
from litdistill.types import Outputs
from litdistill.utils.errors import UserError

EPS = 1e-7


def conditional_probabilities(f: Tensor) -> Tensor:
    """Probabilities that a sample selects each sample of the batch as its neighbor: (N, N), rows sum to 1.

    `f`: (N, ...), flattened. Kernel (1 + cosine) / 2. As in the authors' code, a sample is a neighbor of itself; the
    paper's formula excludes it.
    """
    f = F.normalize(f.float().flatten(1), eps=EPS)
    with torch.autocast(f.device.type, enabled=False):
        kernel = (f @ f.T + 1) / 2
    return kernel / kernel.sum(1, keepdim=True)


def pkt_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) of `conditional_probabilities`, averaged over all N² pairs as in the authors' code; a scalar.

    (N, ...) each; widths may differ. The paper's sum is N² times as large.
    """
    q, p = conditional_probabilities(student), conditional_probabilities(teacher)
    return (p * torch.log((p + EPS) / (q + EPS))).mean()


class PKT(VectorMethod):
    """`hard` · labels' loss + `hint` · sum over taps of `pkt_loss`, by default on the classifiers' inputs.

    Several taps are compared in pairs; both networks need the same number of them.
    """

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 30000.0,
        student_taps: Sequence[str] | str = "pooled",
        teacher_taps: Sequence[str] | str = "pooled",
    ):
        super().__init__(hard, hint, student_taps, teacher_taps)

    def pairs(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        n_s, n_t = len(student.features), len(teacher.features)
        if n_s != n_t:
            raise UserError(f"pkt pairs its taps: {n_s} of the student, {n_t} of the teacher. Name as many.")
        return super().pairs(student, teacher)

    def loss(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        return summed([pkt_loss(s, t) for s, t in pairs])
