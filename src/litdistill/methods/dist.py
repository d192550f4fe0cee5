"""Matching relations rather than values of predictions. Huang et al. 2022, "DIST" (arXiv 2205.10536), section 3."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from litdistill.methods.base import CATEGORICAL, Method, check_temperature, check_weights
from litdistill.types import Batch, Outputs


def pearson_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 − the Pearson correlation of the rows of two matrices `(rows, columns)`, a mean over the rows; in [0, 2].

    Unchanged when a row is scaled (by a positive number) or shifted. The 10⁻⁸ of the authors' code, added to the
    product of the norms, makes a row without any variance uncorrelated with everything; a row whose variance is that of
    rounding is one, and gets no gradient, which would be as large as the inverse of that.
    """
    a, b = centered(a), centered(b)
    correlation = (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)
    return 1 - correlation.mean()


def centered(x: Tensor) -> Tensor:
    """Rows without their mean; 0, and without a gradient, where what is left is rounding."""
    rest = x - x.mean(dim=1, keepdim=True)
    rounding = 8 * torch.finfo(x.dtype).eps * x.detach().norm(dim=1, keepdim=True)
    return rest.masked_fill(rest.detach().norm(dim=1, keepdim=True) <= rounding, 0.0)


class DIST(Method):
    """`hard` · labels' loss + `inter` · T² · distance over a sample's classes + `intra` · T² · over a class's samples.

    Distances are Pearson's, of the probabilities at temperature T. The correlation over samples is not defined for a
    batch of one: the intra term is 0 there.
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
