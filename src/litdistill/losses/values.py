"""Losses that compare two features value by value. Both have channels in dimension 1: (N, C), (N, C, T) or (N, C, H, W)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """Returns the tensor in float32, or unchanged in float64: losses are not computed in half precision, nor under autocast."""
    return x if x.dtype == torch.float64 else x.float()


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference; a scalar. The hint of FitNets (Romero et al. 2015, arXiv 1412.6550), whose paper sums."""
    return F.mse_loss(wide(student), wide(teacher))


def l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference; a scalar."""
    return F.l1_loss(wide(student), wide(teacher))


def smooth_l1(student: Tensor, teacher: Tensor, beta: float = 1.0) -> Tensor:
    """Mean of d²/(2β) where |d| < β, else |d| − β/2, of the difference d; a scalar."""
    return F.smooth_l1_loss(wide(student), wide(teacher), beta=beta)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 − cosine of the angle between both vectors of channels, averaged over samples and positions; in [0, 2].

    A vector of zeros has cosine 0 with every other.
    """
    return 1 - F.cosine_similarity(wide(student), wide(teacher), dim=1).mean()


def pearson(student: Tensor, teacher: Tensor) -> Tensor:
    """1 − Pearson correlation r of a channel over batch and positions, averaged over channels; in [0, 2].

    Cao et al. 2022 (PKD, arXiv 2207.02039), section 3, computed as half the mean squared error of the normalized maps. The
    variance is the biased one, which makes the identity with 1 − r exact; the authors' code takes the unbiased one, which
    gives (n − 1)/n of this, with n the number of values of a channel. A channel that is constant in both networks is at
    distance 0, and one that is constant in one of them at ½.
    """
    return F.mse_loss(standardize_channels(student), standardize_channels(teacher)) / 2


def standardize_channels(x: Tensor) -> Tensor:
    """Normalizes each channel to mean 0 and variance 1 over batch and positions; shape unchanged.

    A constant channel (a dead one, or a single value) has no correlation: it becomes 0, without a gradient, where PKD's
    code divides by 1e-6 and returns gradients a million times as large.
    """
    x = wide(x)
    var, mean = torch.var_mean(x, dim=[0, *range(2, x.ndim)], keepdim=True, correction=0)
    return (x - mean) * torch.where(var > 1e-12, var, torch.inf).rsqrt()


def boundary(student: Tensor, teacher: Tensor, margin: float = 1.0) -> Tensor:
    """Squared hinge loss that puts student and teacher on the same side of every neuron's boundary; a scalar.

    Pre-activations of one shape (N, ...). Where the teacher is above 0, the loss is max(0, `margin` − student)², elsewhere
    max(0, `margin` + student)². Summed over neurons, averaged over the batch. Heo et al. 2019 (AB, arXiv 1811.03233).
    """
    student, teacher = wide(student), wide(teacher)
    violation = torch.where(teacher > 0, margin - student, margin + student).clamp(min=0)
    return violation.square().sum() / len(student)


def partial_l2(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance except where student <= teacher <= 0, summed over values and averaged over the batch; a scalar.

    Both before their ReLU. Heo et al. 2019 (OFD, arXiv 1904.01866), section 3.2, whose teacher passes a margin ReLU first.
    """
    student, teacher = wide(student), wide(teacher)
    counts = (student > teacher) | (teacher > 0)
    return ((student - teacher).square() * counts).sum() / student.shape[0]


def log_power(student: Tensor, teacher: Tensor, exponent: float = 4.0) -> Tensor:
    """log Σ |student − teacher|^exponent over all values of the batch; a scalar, which may be negative.

    For equal features it is the logarithm of the smallest normal number, without a gradient, instead of −∞. Miles &
    Mikolajczyk 2024 (SRD, arXiv 2303.11098), who normalize both features first.
    """
    total = (wide(student) - wide(teacher)).abs().pow(exponent).sum()
    return total.clamp(min=torch.finfo(total.dtype).tiny).log()


def consecutive(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over i of Σ_d |s − t|_{i,d} · |s − t|_{i+1,d}, of embeddings (N, D); 0 for a batch of one.

    Peng et al. 2019 (CC, arXiv 1904.01802) in the form that its author contributed to RepDistiller, which the CRD table's CC
    row was computed with: it multiplies the errors of consecutive samples of the batch, dimension by dimension.
    """
    delta = (wide(student) - wide(teacher)).abs()
    return (delta[:-1] * delta[1:]).sum() / max(len(delta) - 1, 1)
