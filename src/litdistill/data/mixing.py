"""mixup and CutMix: pairs of images and labels mixed as a pure function of (seed, round, sample id).

The published code permutes a batch to pair its images, and draws one share for the whole batch. Here the partner is a
hash-drawn sample of the training set, in its own view of that round, and every pair has its own share: a mixed image
depends neither on its batch, nor on the batch size, nor on the number of ranks. Each mixed image and its labels have
the same distribution as with a permutation (except that an image is paired with itself once in M, not once in a batch),
and so has the expected gradient of a step. The dependence between the images of a batch differs: a permutation makes each
sample a partner exactly once per round, here once on average; and one share per batch has a larger gradient variance
from step to step than independent shares.

A mixing is an object with one method, `apply(images, others, bits)`: (N, C, H, W) uint8 twice and (N,) random bits ->
the mixed images, uint8 or floats from 0 to 1, and (N,) float32, the share of the first image's label.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor

from litdistill.data import augment as aug
from litdistill.utils.errors import UserError

LEVELS = 2**16  # equally likely values of a share
PARTNER_STREAM, MIX_STREAM = -1, -2  # streams of random bits; those of augmentations count from 1


class Mixing(Protocol):
    """The interface of a mixing; see the module docstring."""

    def apply(self, images: Tensor, others: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]: ...


def partners(seed: int, rounds: Tensor, ids: Tensor, trained: Tensor) -> Tensor:
    """Returns the partner (N,) of each sample (N,) in its round (N,), one of the ids `trained` (M,) of the training set."""
    return trained[aug.random_bits(seed, rounds, ids, PARTNER_STREAM) % len(trained)]


def mix(
    mixing: Mixing,
    seed: int,
    rounds: Tensor,
    ids: Tensor,
    images: Sequence[Tensor],
    labels: Sequence[Tensor],
    count: int,
) -> tuple[Tensor, Tensor]:
    """Mixes N images (N, C, H, W) and labels (N,) with those of their partners; `images` and `labels` hold both.

    Labels may be (N, `count`) float32, too. Returns images, uint8 or floats from 0 to 1, and targets (N, `count`) float32: the
    probability of each class, or the mean of labels or numbers.
    """
    mixed, share = mixing.apply(images[0], images[1], aug.random_bits(seed, rounds, ids, MIX_STREAM))
    classes = torch.arange(count, device=ids.device)
    first, second = (label if label.ndim == 2 else label[:, None] == classes for label in labels)
    return mixed, share[:, None] * first + (1 - share)[:, None] * second


def _shares(alpha: float, probability: float) -> Tensor:
    """Returns `LEVELS` equally likely shares of Beta(alpha, alpha), its quantiles at the midpoints of equal parts of (0, 1);
    a fraction 1 − `probability` of them is 1 (no mixing).

    A table, so that every device has bit-identical shares.
    """
    if not alpha > 0 or not 0 < probability <= 1:
        raise UserError(
            f"data.mix: alpha={alpha} must be above 0, and probability={probability} above 0 and at most 1. "
            "Common are alpha 0.2 or 1 for mixup, alpha 1 for CutMix."
        )
    count = round(probability * LEVELS)
    shares = betaincinv(alpha, alpha, (np.arange(count) + 0.5) / count)
    return torch.from_numpy(np.concatenate([shares, np.ones(LEVELS - count)]).astype(np.float32))


@functools.lru_cache(maxsize=16)
def _on(table: Tensor, device: torch.device) -> Tensor:
    """Returns a table on a device, to which it is copied once."""
    return table.to(device)


class Mixup:
    """x = λ·x_i + (1 − λ)·x_j with λ ~ Beta(alpha, alpha); labels likewise (Zhang et al. 2018, arXiv 1710.09412, eq. 1).

    `probability`: fraction of the images that are mixed.
    """

    def __init__(self, alpha: float = 0.2, probability: float = 1.0):
        self.alpha, self.probability = alpha, probability  # read by `stable_repr`, which identifies a mixing
        self.shares = _shares(alpha, probability)

    def apply(self, images: Tensor, others: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
        share = _on(self.shares, bits.device)[bits % LEVELS]
        return torch.lerp(others / 255, images / 255, share[:, None, None, None]), share


class CutMix:
    """A box of one image filled from another, labels mixed by area (Yun et al. 2019, arXiv 1905.04899, eq. 1 and 2).

    The box has 1 − λ of the image's area, λ ~ Beta(alpha, alpha), and its center is uniform in the image; a label's share is
    the fraction of its pixels after the box is clipped at the border. `probability`: fraction of the images that are mixed;
    the authors take 0.5 for CIFAR and 1 for ImageNet.
    """

    def __init__(self, alpha: float = 1.0, probability: float = 1.0):
        self.alpha, self.probability = alpha, probability  # read by `stable_repr`, which identifies a mixing
        self.sides = (1 - _shares(alpha, probability)).sqrt()

    def apply(self, images: Tensor, others: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
        height, width = images.shape[2:]
        side = _on(self.sides, bits.device)[bits % LEVELS]
        ends = []
        for size, place in ((height, bits // LEVELS), (width, bits // LEVELS // 2**20)):
            middle = place % 2**20 * size // 2**20
            half = (side * size).long() // 2
            ends.append(((middle - half).clamp(min=0), (middle + half).clamp(max=size)))
        (top, bottom), (left, right) = ends
        share = 1 - (bottom - top) * (right - left) / (height * width)
        return torch.where(aug.box(images, top, left, bottom, right), others, images), share
