"""DIST: matching relations instead of values of predictions. Huang et al. 2022 (arXiv 2205.10536), section 3."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from litdistill.methods.base import CATEGORICAL, Method, check_temperature, check_weights
from litdistill.types import Batch, Outputs


def pearson_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 − Pearson correlation of the rows of two matrices `(rows, columns)`, averaged over the rows; in [0, 2].

    Invariant to a positive scale and a shift of a row. As in the authors' code, 10⁻⁸ is added to the product of the norms:
    a row without variance is uncorrelated with every other. A row whose variance is rounding error counts as one, and has
    no gradient, which would be as large as the inverse of that variance.
    """
    a, b = centered(a), centered(b)
    correlation = (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)
    return 1 - correlation.mean()


def centered(x: Tensor) -> Tensor:
    """Subtracts each row's mean; rows whose residual is rounding error become 0, without a gradient."""
    residual = x - x.mean(dim=1, keepdim=True)
    rounding = 8 * torch.finfo(x.dtype).eps * x.detach().norm(dim=1, keepdim=True)
    return residual.masked_fill(residual.detach().norm(dim=1, keepdim=True) <= rounding, 0.0)


class DIST(Method):
    """`hard` · labels' loss + `inter` · T² · inter-class distance + `intra` · T² · intra-class distance.

    Both are Pearson distances of the probabilities at temperature T: inter over the classes of each sample, intra over the
    samples of each class. The intra term is 0 for a batch of one, where it is not defined.
    The factor T² is that of the authors' CIFAR code; their weight of 2 for β = γ = 1 makes inter and intra 2.
    """

    kinds = (CATEGORICAL,)

    def __init__(self, hard: float = 1.0, inter: float = 2.0, intra: float = 2.0, temperature: float = 4.0):
        super().__init__(hard)
        check_weights(inter=inter, intra=intra)
        check_temperature(temperature)
        self.inter, self.intra, self.temperature = inter, intra, temperature

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        if not (self.inter or self.intra):
            return {}
        terms = {}
        q = F.softmax(student.logits.float() / self.temperature, dim=1)
        p = F.softmax(teacher.logits.float() / self.temperature, dim=1)
        if self.inter:
            terms["inter"] = self.inter * self.temperature**2 * pearson_distance(q, p)
        if self.intra:
            distance = pearson_distance(q.T, p.T) if len(q) > 1 else q.new_zeros(())
            terms["intra"] = self.intra * self.temperature**2 * distance
        return terms
