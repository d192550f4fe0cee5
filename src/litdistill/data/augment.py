"""Augmentation and order as pure functions of (seed, round, sample id), computed for a whole batch on its device.

A round is one pass through the training set: an epoch, unless `epoch_size` makes an epoch something else. Nothing here
holds generator state: a counter-based hash gives each sample of each round its random bits. So a sample's
view is the same on any device, in any batch size and at any world size, a resumed run needs no generator state, and a
teacher's outputs can be keyed by (sample id, view).

An augmentation is an object with two methods:
    draw(bits)            (N,) int64 random bits -> (N,) int64 codes: which view of the image
    apply(images, code)   (N, C, H, W) uint8 and the codes -> the views, uint8
and `views`, how many distinct codes there are. A code says what is done to the image and not when, so that equal views
of different epochs and seeds are known to be equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number, the increment of splitmix64
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


class Augmentation(Protocol):
    """What an augmentation offers; see the head of this file."""

    @property
    def views(self) -> int: ...

    def draw(self, bits: Tensor) -> Tensor: ...

    def apply(self, images: Tensor, code: Tensor) -> Tensor: ...


def _shift_right(x: Tensor, n: int) -> Tensor:
    """Logical shift of int64, which torch has only as an arithmetic one."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014), a bijection of 64 bits; int64 wraps on every device."""
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def random_bits(seed: int, round: int | Tensor, ids: Tensor, stream: int) -> Tensor:
    """63 random bits for each sample: (N,) int64, none negative. Streams are independent of each other.

    `round`: how often the training set was passed through before, which is the epoch unless an epoch is something else;
    one number, or one for each sample (N,).
    """
    state = _mix(_word(seed) + _GOLDEN)
    state = _mix(state + _GOLDEN + _word(stream))
    if isinstance(round, Tensor):
        state = state.to(round.device)
    state = _mix(state + _GOLDEN + (round if isinstance(round, Tensor) else _word(round)))
    return _shift_right(_mix(_mix(ids + state.to(ids.device)) + _GOLDEN), 1)


def _word(number: int) -> Tensor:
    return torch.tensor(number, dtype=torch.int64)


def order(seed: int, round: int, ids: Tensor) -> Tensor:
    """The samples in the order in which this round visits them: a permutation of `ids` (N,), however they are sorted."""
    ids = ids.sort().values
    return ids[random_bits(seed, round, ids, stream=0).sort(stable=True).indices]


def epoch_order(seed: int, epoch: int, ids: Tensor, size: int | None = None) -> tuple[Tensor, Tensor]:
    """The samples of an epoch and the round that each belongs to: two tensors (size,).

    Without a `size` an epoch is one round. With one, epochs cut an endless row of rounds into pieces of that size.
    """
    size = size or len(ids)
    start, stop = epoch * size, (epoch + 1) * size
    first, last = start // len(ids), -(-stop // len(ids))
    row = torch.cat([order(seed, round, ids) for round in range(first, last)])
    rounds = torch.arange(first, last).repeat_interleave(len(ids))
    cut = slice(start - first * len(ids), stop - first * len(ids))
    return row[cut], rounds[cut]


class Crop:
    """A crop of the padded image at its own size: ±`pad` pixels of shift in both axes, (2·pad + 1)² views.

    `mode`: "zero" or "reflect", what stands outside the image.
    """

    def __init__(self, pad: int, mode: str = "zero"):
        if mode not in ("zero", "reflect"):
            raise ValueError(f"mode={mode!r}: a crop pads with 'zero' or 'reflect'.")
        self.pad, self.mode, self.side = pad, mode, 2 * pad + 1
        self.views = self.side**2

    def draw(self, bits: Tensor) -> Tensor:
        return bits % self.views

    def apply(self, images: Tensor, code: Tensor) -> Tensor:
        n, _, h, w = images.shape
        dy, dx = code // self.side - self.pad, code % self.side - self.pad
        rows = torch.arange(h, device=images.device) + dy[:, None]
        cols = torch.arange(w, device=images.device) + dx[:, None]
        if self.mode == "reflect":
            rows, cols = _reflect(rows, h), _reflect(cols, w)
        else:
            images = F.pad(images, [self.pad] * 4)
            rows, cols = rows + self.pad, cols + self.pad
        sample = torch.arange(n, device=images.device)[:, None, None]
        # One gather, which leaves the channels last: the memory format that convolutions want.
        return images.permute(0, 2, 3, 1)[sample, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Indices outside [0, size) folded back at the border pixels, which are not repeated."""
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)


class Flip:
    """A mirror image, left and right, for half of the samples; 2 views."""

    views = 2

    def draw(self, bits: Tensor) -> Tensor:
        return bits % 2

    def apply(self, images: Tensor, code: Tensor) -> Tensor:
        return torch.where(code.bool()[:, None, None, None], images.flip(3), images)


class Cutout:
    """A square of `size` pixels set to zero, its centre anywhere in the image (DeVries & Taylor 2017, arXiv 1708.04552).

    `image_size`: (H, W) of the images; H · W views.
    """

    def __init__(self, size: int, image_size: Sequence[int]):
        self.size, (self.height, self.width) = size, image_size
        self.views = self.height * self.width

    def draw(self, bits: Tensor) -> Tensor:
        return bits % self.views

    def apply(self, images: Tensor, code: Tensor) -> Tensor:
        top, left = code // self.width - self.size // 2, code % self.width - self.size // 2
        rows = torch.arange(images.shape[2], device=images.device) - top[:, None]
        cols = torch.arange(images.shape[3], device=images.device) - left[:, None]
        hit = ((rows >= 0) & (rows < self.size))[:, None, :, None] & ((cols >= 0) & (cols < self.size))[
            :, None, None, :
        ]
        return images.masked_fill(hit, 0)


def draw_views(augment: Sequence[Augmentation], seed: int, round: int | Tensor, ids: Tensor) -> Tensor:
    """The view of each sample as one number, (N,) int64: the codes of all augmentations in mixed radix.

    Equal numbers are equal views, in whatever epoch and run; all zeros where there is no augmentation.
    """
    view = torch.zeros_like(ids)
    for stream, step in enumerate(augment, start=1):
        view = view * step.views + step.draw(random_bits(seed, round, ids, stream))
    return view


def apply_views(augment: Sequence[Augmentation], images: Tensor, view: Tensor) -> Tensor:
    """The images (N, C, H, W) uint8 as seen in views (N,) of `draw_views` with the same augmentations."""
    codes = []
    for step in reversed(augment):
        codes.append(view % step.views)
        view = view // step.views
    for step, code in zip(augment, reversed(codes), strict=True):
        images = step.apply(images, code)
    return images


def count_views(augment: Sequence[Augmentation]) -> int:
    """How many distinct views there are of one image."""
    total = 1
    for step in augment:
        total *= step.views
    return total
