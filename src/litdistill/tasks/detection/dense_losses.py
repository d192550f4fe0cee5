"""Losses between the dense predictions of two detectors that share their anchors: plain functions that the methods use.

A is the number of anchors of a picture over all levels, C that of classes. Student and teacher have the same A and C. Every
loss is a scalar, in float32 at least, summed over the pictures of the batch and their anchors, and divided by how confident
the teacher is in all: a busy batch weighs no more than an empty one. Under DDP each process divides by its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from litdistill.losses.values import wide


def confidence(logits: Tensor) -> Tensor:
    """Returns the largest sigmoid over the classes of each anchor, (N, A), of logits (N, A, C); without a gradient."""
    return wide(logits).detach().amax(2).sigmoid()


def total(weight: Tensor) -> Tensor:
    """Returns the sum of the weights (N, A), 1 at least: a batch in which the teacher sees nothing is divided by 1."""
    return weight.sum().clamp(min=1)


def quality_focal(student: Tensor, teacher: Tensor, power: float = 2.0) -> Tensor:
    """Σ |p_t − p_s|^power · BCE(p_s, p_t) over anchors and classes, / Σ over anchors of max_c p_t; logits (N, A, C).

    p: sigmoids. The quality focal loss (Li et al. 2020, GFL, arXiv 2006.04388, equation 3; power 2) with the teacher's
    sigmoids as targets, and the normalization of Dense Teacher (Zhou et al. 2022, arXiv 2207.02541), which divides by the
    sum of the teacher's scores instead of a number of positive anchors, which needs boxes.
    """
    target = wide(teacher).sigmoid()
    entropy = F.binary_cross_entropy_with_logits(wide(student), target, reduction="none")
    difference = (target - wide(student).sigmoid()).abs()
    return (difference.pow(power) * entropy).sum() / total(confidence(teacher))


def weighted_giou(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Σ w · (1 − GIoU) / Σ w over anchors; boxes (N, A, 4) as x1, y1, x2, y2, weights (N, A).

    The weights are the teacher's confidences, as GFL weighs its box loss by the classification score. A box of the teacher
    without area (a ReLU may give one) weighs nothing.
    """
    weight = weight * (teacher[..., 2:] > teacher[..., :2]).all(2)
    losses = generalized_box_iou_loss(wide(student), wide(teacher))
    return (weight * losses).sum() / total(weight)


def weighted_entropy(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Σ w · (BCE(c_s, c_t) − BCE(c_t, c_t)) / Σ w over anchors, of logits of the centerness (N, A); weights (N, A).

    It is the divergence of two Bernoulli distributions, which is 0 where the student agrees.
    """
    target = wide(teacher).sigmoid()
    losses = F.binary_cross_entropy_with_logits(wide(student), target, reduction="none")
    least = F.binary_cross_entropy_with_logits(wide(teacher), target, reduction="none")
    return (weight * (losses - least)).sum() / total(weight)


def weighted_sides(student: Tensor, teacher: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Σ w · T² · mean over sides of KL(teacher ‖ student) / Σ w over anchors; logits (N, A, 4, bins + 1), weights (N, A).

    Both softmaxes are at temperature T. Localization distillation (Zheng et al. 2022, LD, arXiv 2102.12252, section 3.2).
    """
    s, t = ((wide(x) / temperature).log_softmax(-1) for x in (student, teacher))
    losses = temperature**2 * (t.exp() * (t - s)).sum(-1).mean(-1)
    return (weight * losses).sum() / total(weight)


def above(weight: Tensor, least: float) -> Tensor:
    """Returns the weights (N, A) that are `least` or more, and 0 for the others."""
    return torch.where(weight >= least, weight, 0)
