"""Losses that compare the positions of two feature maps (N, C, H, W), or of two sequences with channels first (N, C, T)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from litdistill.losses.values import wide


def same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pools the larger of two maps (N, C, H, W) to the height and width of the smaller, each axis by itself.

    The same for sequences (N, C, T). Vectors (N, C) have no positions and are returned as they are.
    """
    size = tuple(min(pair) for pair in zip(a.shape[2:], b.shape[2:], strict=True))
    return _pool(a, size), _pool(b, size)


def _pool(x: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(x.shape[2:]) == size:
        return x
    return F.adaptive_avg_pool1d(x, size[0]) if len(size) == 1 else F.adaptive_avg_pool2d(x, (size[0], size[1]))


def attention(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two attention maps; the larger map is pooled first; channels may differ; a scalar.

    Zagoruyko & Komodakis 2017 (AT, arXiv 1612.03928). Equation 2 has the L2 norm of the difference; the authors' code,
    which produced the paper's tables, has the mean of the squares, as here, and β = 1000 belongs to the latter.
    """
    f_s, f_t = same_size(wide(student), wide(teacher))
    return F.mse_loss(attention_map(f_s), attention_map(f_t))


def attention_map(f: Tensor) -> Tensor:
    """Returns the mean square over channels of (N, C, ...), flattened to (N, positions) and of unit length."""
    return F.normalize(wide(f).square().mean(1).flatten(1))


def kl_places(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """T² · KL(teacher ‖ student) of each channel's softmax over positions, averaged over channels and batch; a scalar.

    Both (N, C, ...) of one shape. Shu et al. 2021 (CWD, arXiv 2011.13256), section 3.
    """
    log_p = F.log_softmax(wide(teacher).flatten(2) / temperature, dim=2)
    log_q = F.log_softmax(wide(student).flatten(2) / temperature, dim=2)
    n, channels = student.shape[:2]
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) * temperature**2 / (n * channels)


def mmd(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of the channels' activation patterns, kernel (a · b)²; a scalar, the batch mean.

    Each channel of a map is one sample: its activations over positions, of unit length. The numbers of channels may
    differ; the larger map is pooled. The teacher's own kernel is a constant, which makes the loss 0 for equal maps. Huang &
    Wang 2017 (NST, arXiv 1707.01219).
    """
    f_s, f_t = same_size(wide(student), wide(teacher))
    s, t = F.normalize(f_s.flatten(2), dim=2), F.normalize(f_t.flatten(2), dim=2)
    with torch.autocast(s.device.type, enabled=False):
        kernel = lambda a, b: (a @ b.transpose(1, 2)).square().mean()  # noqa: E731
        return kernel(s, s) + kernel(t, t) - 2 * kernel(s, t)


def channel_correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of the matrices of correlations of channels, divided by the channels; a scalar, the batch mean.

    Both (N, C, ...); sizes may differ, since positions are summed over. Rows are normalized, and the sum is divided by N·C,
    as in the CIFAR code of Liu et al. 2021 (ICKD, arXiv 2202.03680), to which the weight 2.5 belongs (the paper's formula
    divides by C² and does not normalize; the authors' ImageNet code divides by N twice).
    """
    n, channels = student.shape[:2]
    return (_correlation(student) - _correlation(teacher)).square().sum() / (n * channels)


def _correlation(x: Tensor) -> Tensor:
    """Inner products over positions of all pairs of channels, rows of unit length: (N, C, ...) -> (N, C, C)."""
    flat = wide(x).flatten(2)
    with torch.autocast(x.device.type, enabled=False):  # under autocast the product would be rounded to bfloat16
        return F.normalize(flat @ flat.transpose(1, 2), dim=2)


def factor(student: Tensor, teacher: Tensor, p: int = 1, pool_channels: bool = False) -> Tensor:
    """Distance of two factors (N, C, ...), each flattened and normalized to unit length; the larger is pooled; a scalar.

    p = 1: the mean absolute difference over all elements, as in the authors' code. p = 2: the L2 norm of the difference,
    averaged over the batch. `pool_channels`: compares mean squares over channels instead, as in RepDistiller. Kim, Park &
    Kwak 2018 (FT, arXiv 1802.04977).
    """
    f_s, f_t = same_size(wide(student), wide(teacher))
    if pool_channels:
        f_s, f_t = f_s.square().mean(1), f_t.square().mean(1)
    difference = F.normalize(f_s.flatten(1)) - F.normalize(f_t.flatten(1))
    return difference.abs().mean() if p == 1 else torch.linalg.vector_norm(difference, dim=1).mean()


def pyramid(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of two maps (N, C, H, W) and of their 4x4, 2x2 and 1x1 averages; a scalar.

    Each level has half the weight of the previous one, and the weights sum to 1; a level no smaller than the map's shorter
    side is left out. The hierarchical context loss of Chen et al. 2021 (ReviewKD, arXiv 2104.09044).
    """
    student, teacher = wide(student), wide(teacher)
    loss, weight, total = F.mse_loss(student, teacher), 1.0, 1.0
    for level in (4, 2, 1):
        if level < min(student.shape[2:]):
            weight /= 2
            total += weight
            s, t = (F.adaptive_avg_pool2d(x, level) for x in (student, teacher))
            loss = loss + weight * F.mse_loss(s, t)
    return loss / total
