"""mixup and CutMix: two images as one, with both labels, as a pure function of (seed, round, sample id).

The published code permutes a batch to find each image its partner, and draws one share for all of it. Here the partner
is any sample that is trained on, drawn by hash, in the view that it has itself in that round, and every pair has a share
of its own: so what an image becomes does not depend on the batch that it stands in, on the batch's size or on the
number of ranks. Each mixed image and its labels have the same distribution as with a permutation (but that an image
meets itself once in M and not once in a batch), and so has the expected gradient of a step. What differs is how the
images of one batch hang together: a permutation makes each sample a partner exactly once a round, here that holds on
average; and one share a batch makes its gradients vary more from step to step than independent shares do.

A mixing is an object with one method, `apply(images, others, bits)`: (N, C, H, W) uint8 twice and (N,) random bits ->
the mixed images, uint8 or floats from 0 to 1, and (N,) float32, how much of the first image's label each has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor

from litdistill.data import augment as aug
from litdistill.utils.errors import UserError

LEVELS = 2**16  # equally likely values of a share
PARTNER, HOW = -1, -2  # streams of random bits beside those of augmentations, which count from 1


class Mixing(Protocol):
    """What a mixing offers; see the head of this file."""

    def apply(self, images: Tensor, others: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]: ...


def partners(seed: int, rounds: Tensor, ids: Tensor, trained: Tensor) -> Tensor:
    """Whom each of the samples (N,) meets in its round (N,): one of `trained` (M,), which are all that is trained on."""
    return trained[aug.random_bits(seed, rounds, ids, PARTNER) % len(trained)]


def mix(
    mixing: Mixing,
    seed: int,
    rounds: Tensor,
    ids: Tensor,
    images: Sequence[Tensor],
    labels: Sequence[Tensor],
    count: int,
) -> tuple[Tensor, Tensor]:
    """Mixes two times N images (N, C, H, W) and labels (N,): those of the samples `ids`, and those of their partners.

    Gives images, uint8 or floats from 0 to 1, and targets (N, `count`) float32, the probability of each class.
    """
    mixed, share = mixing.apply(images[0], images[1], aug.random_bits(seed, rounds, ids, HOW))
    classes = torch.arange(count, device=ids.device)
    first, second = (label[:, None] == classes for label in labels)
    return mixed, share[:, None] * first + (1 - share)[:, None] * second


def _shares(alpha: float, probability: float) -> Tensor:
    """`LEVELS` values that stand for Beta(alpha, alpha), its quantiles at the middles of as many equal parts of (0, 1);
    1 (nothing is mixed in) for all of the distribution but `probability`.

    A table, so that every device has the same shares to the bit.
    """
    if not alpha > 0 or not 0 < probability <= 1:
        raise UserError(
            f"data.mix: alpha={alpha} must be above 0, and probability={probability} above 0 and at most 1. "
            "Common are alpha 0.2 or 1 for mixup, alpha 1 for CutMix."
        )
    count = round(probability * LEVELS)
    shares = betaincinv(alpha, alpha, (np.arange(count) + 0.5) / count)
    return torch.from_numpy(np.concatenate([shares, np.ones(LEVELS - count)]).astype(np.float32))


class Mixup:
    """x = λ·x_i + (1 − λ)·x_j with λ ~ Beta(alpha, alpha); labels likewise (Zhang et al. 2018, arXiv 1710.09412, eq. 1).

    `probability`: the share of the images that are mixed at all.
    """

    def __init__(self, alpha: float = 0.2, probability: float = 1.0):
        self.alpha, self.probability = alpha, probability  # what tells one mixing from another
        self.shares = _shares(alpha, probability)

    def apply(self, images: Tensor, others: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
        share = self.shares.to(bits.device)[bits % LEVELS]
        return torch.lerp(others / 255, images / 255, share[:, None, None, None]), share


class CutMix:
    """A box of one image filled from another, labels mixed by area (Yun et al. 2019, arXiv 1905.04899, eq. 1 and 2).

    The box has 1 − λ of the image's area, λ ~ Beta(alpha, alpha), and its centre anywhere in the image; the share of a
    label is that of the pixels, once the box is cut off at the border. `probability`: the share of the images that are
    mixed at all; the authors take 0.5 for CIFAR and 1 for ImageNet.
    """

    def __init__(self, alpha: float = 1.0, probability: float = 1.0):
        self.alpha, self.probability = alpha, probability  # what tells one mixing from another
        self.sides = (1 - _shares(alpha, probability)).sqrt()

    def apply(self, images: Tensor, others: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
        height, width = images.shape[2:]
        side = self.sides.to(bits.device)[bits % LEVELS]
        ends = []
        for size, place in ((height, bits // LEVELS), (width, bits // LEVELS // 2**20)):
            middle = place % 2**20 * size // 2**20
            half = (side * size).long() // 2
            ends.append(((middle - half).clamp(min=0), (middle + half).clamp(max=size)))
        (top, bottom), (left, right) = ends
        share = 1 - (bottom - top) * (right - left) / (height * width)
        return torch.where(aug.box(images, top, left, bottom, right), others, images), share
