"""Losses that compare how the samples of a batch relate to each other: features (N, ...) are flattened, widths may differ."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from litdistill.losses.values import smooth_l1, wide

EPS = 1e-7


def similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """‖G_student − G_teacher‖² / N² of the matrices of inner products of samples, each row of unit length; a scalar.

    Tung & Mori 2019 (SP, arXiv 1907.09682), equation 4.
    """
    return (similarity_matrix(student) - similarity_matrix(teacher)).square().mean()


def similarity_matrix(x: Tensor) -> Tensor:
    """Similarity matrix of a batch: the inner products (N, N) of the samples' features, each row of unit length.

    `x`: (N, …), flattened. The row of a sample whose features are all 0 is 0, without a gradient.
    """
    x = wide(x).flatten(1)
    x = x / x.detach().abs().max().clamp(min=1e-20)  # cancels in each row; keeps fourth powers inside float32
    with torch.autocast(x.device.type, enabled=False):
        gram = x @ x.T
    norm = gram.norm(dim=1, keepdim=True)
    return gram * torch.where(norm > 0, 1 / norm.clamp(min=1e-20), torch.zeros_like(norm))


def cosines(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the matrices of cosines between all samples of the batch; a scalar.

    What searches by cosine is measured by these similarities. The diagonal, which is 1 in both, counts in the mean.
    """
    with torch.autocast(student.device.type, enabled=False):
        s, t = ((unit := F.normalize(wide(x).flatten(1))) @ unit.T for x in (student, teacher))
    return F.mse_loss(s, t)


def distances(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss of the distances between all samples, each matrix divided by its mean; a scalar.

    Park et al. 2019 (RKD, arXiv 1904.05068), section 3, averaged over all N² entries. 0 for a batch of one.
    """
    return smooth_l1(_relative(_differences(student)[1]), _relative(_differences(teacher)[1]))


def angles(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss of the cosines of the angles in all triples of samples; a scalar.

    The other term of RKD: see `distances`. Averaged over all N³ entries. 0 for a batch of one.
    """
    return smooth_l1(_triples(*_differences(student)), _triples(*_differences(teacher)))


def distances_and_angles(x: Tensor) -> tuple[Tensor, Tensor]:
    """Distances (N, N) between N vectors (N, ...) divided by their mean, and cosines (N, N, N) of the angles between them.

    The mean is over ordered pairs of different samples. `cosines[i, j, k]` is that of the angle at i between j and k, 0
    where i is j or k. Coinciding samples have distance 0, cosine 0 and no gradient from either. Differences are computed
    explicitly; inner products would lose small distances.
    """
    difference, distance = _differences(x)
    return _relative(distance), _triples(difference, distance)


def _differences(x: Tensor) -> tuple[Tensor, Tensor]:
    x = wide(x).flatten(1)
    difference = x[None] - x[:, None]
    return difference, difference.norm(dim=2)


def _relative(distance: Tensor) -> Tensor:
    n = len(distance)
    return distance / (distance.sum() / max(n * (n - 1), 1)).clamp(min=1e-20)


def _triples(difference: Tensor, distance: Tensor) -> Tensor:
    inverse = torch.where(distance > 0, 1 / distance.clamp(min=1e-20), torch.zeros_like(distance))
    unit = difference * inverse[..., None]
    with torch.autocast(unit.device.type, enabled=False):
        return unit @ unit.transpose(1, 2)


def neighbors(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) of `neighbor_probabilities`, averaged over all N² pairs as in the authors' code; a scalar.

    Passalis & Tefas 2018 (PKT, arXiv 1803.10837), whose sum is N² times as large.
    """
    q, p = neighbor_probabilities(student), neighbor_probabilities(teacher)
    return (p * torch.log((p + EPS) / (q + EPS))).mean()


def neighbor_probabilities(f: Tensor) -> Tensor:
    """Probabilities that a sample selects each sample of the batch as its neighbor: (N, N), rows sum to 1.

    `f`: (N, ...), flattened. Kernel (1 + cosine) / 2. As in PKT's code, a sample is a neighbor of itself; the paper's
    formula excludes it.
    """
    f = F.normalize(wide(f).flatten(1), eps=EPS)
    with torch.autocast(f.device.type, enabled=False):
        kernel = (f @ f.T + 1) / 2
    return kernel / kernel.sum(1, keepdim=True)


def gaussian(student: Tensor, teacher: Tensor, gamma: float = 0.4, order: int = 2) -> Tensor:
    """‖K(student) − K(teacher)‖² / N² with K the (N, N) matrix of Gaussian kernels exp(−γ ‖a − b‖²) of the unit vectors.

    The kernel is a Taylor series about a·b = 0 up to `order`: exp(−2γ) · Σ_p (2γ)^p / p! · (a·b)^p. Peng et al. 2019 (CC,
    arXiv 1904.01802).
    """

    def kernel(x: Tensor) -> Tensor:
        x = F.normalize(wide(x).flatten(1))
        with torch.autocast(x.device.type, enabled=False):
            dot = x @ x.T
        series = [(2 * gamma) ** p / math.factorial(p) * dot**p for p in range(order + 1)]
        return math.exp(-2 * gamma) * torch.stack(series).sum(dim=0)

    return (kernel(student) - kernel(teacher)).square().mean()
