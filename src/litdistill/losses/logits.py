"""Losses that compare two predictions: logits (N, classes), unless said otherwise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from litdistill.losses.values import wide


def kl(student: Tensor, teacher: Tensor, temperature: float | Tensor = 4.0) -> Tensor:
    """T² · KL(teacher ‖ student) of both softmaxes at temperature T over dimension 1; a scalar, averaged over all else.

    Of logits (N, classes) it is averaged over the batch and not over the classes; of features (N, C, ...) over positions
    too, with a softmax over the channels. The factor T² keeps the ratio of the soft and hard gradients when T changes
    (Hinton, Vinyals & Dean 2015, arXiv 1503.02531, section 2).
    """
    log_p = F.log_softmax(wide(teacher) / temperature, dim=1)
    log_q = F.log_softmax(wide(student) / temperature, dim=1)
    rows = log_q.numel() // log_q.shape[1]
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / rows * temperature**2


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """T² · cross-entropy of the student's softmax with the teacher's, both at temperature T; a scalar, the batch mean.

    It is `kl` plus the teacher's entropy, which is constant.
    """
    p = F.softmax(wide(teacher) / temperature, dim=1)
    return F.cross_entropy(wide(student) / temperature, p) * temperature**2


def pseudo_label(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with the class that the teacher gives the largest logit; a scalar, the batch mean."""
    return F.cross_entropy(wide(student), teacher.argmax(dim=1))


def binary_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T² · Σ over labels of KL(teacher ‖ student) between Bernoulli distributions of sigmoid(z / T), averaged over the batch.

    Both (N, labels); a scalar. Log-probabilities are computed from logits (logsigmoid); the authors' code clamps
    probabilities to 1e-8 from 0 and 1, beyond which a student gets no gradient. Yang et al. 2023 (arXiv 2308.06453).
    """
    z_s, z_t = wide(student) / temperature, wide(teacher) / temperature
    divergence = z_t.sigmoid() * (F.logsigmoid(z_t) - F.logsigmoid(z_s))
    divergence = divergence + (-z_t).sigmoid() * (F.logsigmoid(-z_t) - F.logsigmoid(-z_s))
    return divergence.sum() / len(z_s) * temperature**2


def half_squared(student: Tensor, teacher: Tensor, centered: bool = False) -> Tensor:
    """½ ‖student − teacher‖² of the logits, summed over classes and averaged over the batch; a scalar.

    `centered` first subtracts each sample's mean over the classes from its logits, to which the softmax is invariant. Ba &
    Caruana 2014 (arXiv 1312.6184), equation 1.
    """
    difference = wide(student) - wide(teacher)
    if centered:
        difference = difference - difference.mean(dim=1, keepdim=True)
    return difference.square().sum(dim=1).mean() / 2


def standardized_kl(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """`kl` of standardized logits; a scalar. Sun et al. 2024 (arXiv 2403.01427), section 4."""
    return kl(standardize(student), standardize(teacher), temperature)


def standardize(logits: Tensor) -> Tensor:
    """(z − mean) / (10⁻⁷ + std) over the classes of each sample, (N, classes).

    The standard deviation divides by classes − 1, as in the authors' code. Equal logits (a classifier whose weights start
    at zero) have none: they become 0, with the gradient of logits whose deviation is 1. Of two classes all are ±0.7071.
    """
    z = wide(logits)
    z = z - z.mean(dim=1, keepdim=True)
    equal = is_rounding(z, wide(logits))
    scale = torch.where(
        equal, 1.0, z.detach().abs().amax(dim=1, keepdim=True)
    )  # so that no square underflows or overflows
    variance = (z / scale).square().sum(dim=1, keepdim=True) / max(z.shape[1] - 1, 1)
    std = torch.where(equal, 1.0, variance).sqrt() * scale
    return z / (1e-7 + std)


def transformed_kl(student: Tensor, teacher: Tensor, gamma: float = 0.2, weighted: bool = True) -> Tensor:
    """Mean over the batch of U · KL(p^γ / U ‖ q), with U = Σ p^γ over the classes, or 1 if not `weighted`; a scalar.

    p, q: the softmaxes of teacher and student, both at temperature 1; p^γ / U is the teacher softened with T = 1/γ. The
    student is not softened, and samples with an uncertain teacher (large U) have more weight. Zheng & Yang 2024 (TTM and
    WTTM, arXiv 2402.11148).
    """
    log_power = gamma * F.log_softmax(wide(teacher), dim=1)
    log_u = log_power.logsumexp(dim=1, keepdim=True)
    log_q = F.log_softmax(wide(student), dim=1)
    divergence = F.kl_div(log_q, log_power - log_u, reduction="none", log_target=True).sum(dim=1)
    return (log_u.squeeze(1).exp() * divergence).mean() if weighted else divergence.mean()


def inter_class(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """T² · Pearson distance over the classes of each sample, of both softmaxes at temperature T; a scalar.

    Huang et al. 2022 (DIST, arXiv 2205.10536), section 3, with the factor T² of the authors' CIFAR code.
    """
    q, p = (F.softmax(wide(x) / temperature, dim=1) for x in (student, teacher))
    return pearson_distance(q, p) * temperature**2


def intra_class(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """T² · Pearson distance over the samples of each class, of both softmaxes at temperature T; 0 for a batch of one.

    The other term of DIST: see `inter_class`.
    """
    q, p = (F.softmax(wide(x) / temperature, dim=1) for x in (student, teacher))
    return pearson_distance(q.T, p.T) * temperature**2 if len(q) > 1 else q.new_zeros(())


def pearson_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 − Pearson correlation of the rows of two matrices (rows, columns), averaged over the rows; in [0, 2].

    Invariant to a positive scale and a shift of a row. A row without variance is uncorrelated with every other. A row whose
    variance is rounding error, or whose norm is below 10⁻¹², counts as one: its gradient would be the inverse of its norm.
    DIST's code adds 10⁻⁸ to the product of the norms, which is not small for softened probabilities of many classes.
    """
    return 1 - (_unit_rows(center_rows(a)) * _unit_rows(center_rows(b))).sum(dim=1).mean()


def _unit_rows(x: Tensor) -> Tensor:
    """Divides each row by its norm; a row whose norm is below 10⁻¹² becomes 0."""
    small = x.detach().norm(dim=1, keepdim=True) < 1e-12
    return x.masked_fill(small, 0.0) / x.masked_fill(small, 1.0).norm(dim=1, keepdim=True)


def center_rows(x: Tensor) -> Tensor:
    """Subtracts each row's mean; rows whose residual is rounding error become 0, without a gradient."""
    residual = x - x.mean(dim=1, keepdim=True)
    return residual.masked_fill(is_rounding(residual, x), 0.0)


def is_rounding(residual: Tensor, x: Tensor) -> Tensor:
    """Returns for each row whether its `residual` is no larger than the rounding error of `x`; (rows, 1)."""
    rounding = 8 * torch.finfo(x.dtype).eps * x.detach().norm(dim=1, keepdim=True)
    return residual.detach().norm(dim=1, keepdim=True) <= rounding


def non_target(logits: Tensor, target: Tensor) -> Tensor:
    """Returns the logits of all classes but the target's, in their order: (N, classes), (N,) -> (N, classes − 1)."""
    others = torch.arange(logits.shape[1] - 1, device=target.device)
    return logits.gather(1, others + (others >= target[:, None]))


def sample_gram(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """‖Q Qᵀ − P Pᵀ‖² / N of both softmaxes at temperature T: similarity of samples; a scalar.

    The batch level of Jin, Wang & Lin 2023 (MLKD, CVPR), section 3.
    """
    return gram_distance(*(F.softmax(wide(x) / temperature, dim=1) for x in (student, teacher)))


def class_gram(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """‖Qᵀ Q − Pᵀ P‖² / classes of both softmaxes at temperature T: similarity of classes; a scalar. MLKD's class level."""
    return gram_distance(*(F.softmax(wide(x) / temperature, dim=1).T for x in (student, teacher)))


def gram_distance(a: Tensor, b: Tensor) -> Tensor:
    """‖A Aᵀ − B Bᵀ‖² / rows of two matrices (rows, columns); not in half precision under autocast either."""
    with torch.autocast(a.device.type, enabled=False):
        return (a @ a.T - b @ b.T).square().sum() / len(a)
