"""Augmentation and order as pure functions of (seed, round, sample id), computed for a whole batch on its device.

A round is one pass through the training set: an epoch, unless `epoch_size` sets another length of an epoch. No generator
state is kept: a counter-based hash gives each sample of each round its random bits. A sample's view is therefore the same
on any device, in any batch size and at any world size, a resumed run needs no generator state, and a teacher's outputs
can be keyed by (sample id, view).

An augmentation is an object with two methods:
    draw(bits)            (N,) int64 random bits, none negative -> (N,) int64 codes: which view of the image
    apply(images, code)   (N, C, H, W) uint8 and the codes -> the views, uint8
and `views`, the number of distinct codes. A code does not depend on the time it was drawn, so equal views of different
epochs and seeds have equal codes. Where views cannot be counted (a continuous augmentation, whose `views` is None, or
more of them than an int64 can number), a view is numbered by its round and is valid for its seed alone.

An augmentation that only moves pixels along rows and columns may have `axes(code, height, width)`: the row (N, H) and the
column (N, W) that each pixel is read from, H or W for a pixel outside the image, which is zero.
Any number of consecutive augmentations with `axes` is a single gather. `affine` and `moves` say how boxes and masks follow
(`litdistill.data.geometry`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from litdistill.utils.errors import UserError

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number, the increment of splitmix64
CLASS_STREAM = (
    -3
)  # of the order of classes in `balanced_epoch`; `mixing` has -1 and -2, those of augmentations count from 1
PER_IMAGE = ("cpu",)  # types of device on which only the images are computed that an augmentation changes
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


class Augmentation(Protocol):
    """The interface of an augmentation; see the module docstring."""

    @property
    def views(self) -> int | None: ...

    def draw(self, bits: Tensor) -> Tensor: ...

    def apply(self, images: Tensor, code: Tensor) -> Tensor: ...


def _shift_right(x: Tensor, n: int) -> Tensor:
    """Logical right shift of int64; torch's own is arithmetic."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def splitmix64(x: Tensor) -> Tensor:
    """The finalizer of splitmix64 (Steele, Lea & Flood 2014), a bijection of 64 bits; int64 wraps on every device."""
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def random_bits(seed: int, round: int | Tensor, ids: Tensor, stream: int) -> Tensor:
    """Returns 63 random bits for each sample: (N,) int64, none negative. Streams are independent of each other.

    `round`: the number of earlier passes through the training set; one number, or one for each sample (N,). Numbers are mixed
    on the host and samples on their device, so that nothing is copied between the two.
    """
    state = _signed(GOLDEN + _splitmix64_of(GOLDEN + _splitmix64_of(GOLDEN + seed) + stream))
    mixed = splitmix64(round + state) if isinstance(round, Tensor) else _splitmix64_of(round + state)
    return _shift_right(splitmix64(splitmix64(ids + mixed) + GOLDEN), 1)


def further_bits(bits: Tensor, number: int) -> Tensor:
    """Returns further 63 random bits for each of those of `random_bits` (N,), independent for each `number` from 0."""
    return _shift_right(splitmix64(splitmix64(bits + (2 * number + 1) * GOLDEN % 2**63)), 1)


def _splitmix64_of(x: int) -> int:
    """`splitmix64` of one number."""
    x %= 2**64
    x = (x ^ x >> 30) * _MIX1 % 2**64
    x = (x ^ x >> 27) * _MIX2 % 2**64
    return _signed(x ^ x >> 31)


def _signed(x: int) -> int:
    """Returns the signed number of 64 bits that equals `x` modulo 2⁶⁴."""
    return (x + 2**63) % 2**64 - 2**63


def order(seed: int, round: int, ids: Tensor) -> Tensor:
    """Returns the samples in the order of this round: a permutation of `ids` (N,), whatever their order."""
    ids = ids.sort().values
    return ids[random_bits(seed, round, ids, stream=0).sort(stable=True).indices]


def epoch_order(seed: int, epoch: int, ids: Tensor, size: int | None = None) -> tuple[Tensor, Tensor]:
    """Returns the samples of an epoch and the round of each: two tensors (size,).

    Without `size` an epoch is one round. With it, epochs are consecutive pieces of that size of an endless series of rounds.
    """
    size = size or len(ids)
    return _cut_from_rounds(seed, ids, epoch * size, (epoch + 1) * size)


def balanced_epoch(
    seed: int, epoch: int, ids: Tensor, labels: Tensor, size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the samples of an epoch, of each class as many, and the round of each: two tensors (size,).

    `labels` (N,): the class of each of the `ids`. Epochs are consecutive pieces of an endless series of blocks, each of one
    sample of every class in an order of its own. The samples of a class follow each other as in `epoch_order`, so that a round
    is one pass through the images of that class; the samples of a small class have more rounds than those of a large one.
    """
    size, classes = size or len(ids), labels.unique()
    start, stop = epoch * size, (epoch + 1) * size
    first, last = start // len(classes), -(-stop // len(classes))
    of_classes = [_cut_from_rounds(seed, ids[labels == c], first, last) for c in classes]
    blocks = torch.arange(first, last)
    by_block = torch.stack(
        [random_bits(seed, blocks, torch.full_like(blocks, int(c)), CLASS_STREAM) for c in classes], 1
    )
    place = by_block.sort(dim=1, stable=True).indices
    cut = slice(start - first * len(classes), stop - first * len(classes))
    samples, rounds = (torch.stack(x, 1).gather(1, place).flatten()[cut] for x in zip(*of_classes, strict=True))
    return samples, rounds


def _cut_from_rounds(seed: int, ids: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Returns the samples from `start` to `stop` of the endless series of rounds of `ids`, and the round of each."""
    first, last = start // len(ids), -(-stop // len(ids))
    series = torch.cat([order(seed, round, ids) for round in range(first, last)])
    rounds = torch.arange(first, last).repeat_interleave(len(ids))
    cut = slice(start - first * len(ids), stop - first * len(ids))
    return series[cut], rounds[cut]


class Crop:
    """A crop of the padded image at its own size: a shift of up to ±`pad` pixels in both axes, (2·pad + 1)² views.

    `mode`: the padding, "zero" or "reflect". MNIST's usual shift by up to 2 pixels is `Crop(2)`.
    """

    def __init__(self, pad: int, mode: str = "zero"):
        if mode not in ("zero", "reflect"):
            raise ValueError(f"mode={mode!r}: a crop pads with 'zero' or 'reflect'.")
        self.pad, self.mode, self.side = pad, mode, 2 * pad + 1
        self.views = self.side**2

    def draw(self, bits: Tensor) -> Tensor:
        return bits % self.views

    def axes(self, code: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        return self._axis(code // self.side, height), self._axis(code % self.side, width)

    def _axis(self, shift: Tensor, size: int) -> Tensor:
        index = torch.arange(-self.pad, size - self.pad, device=shift.device) + shift[:, None]
        if self.mode == "reflect" and self.pad >= size:
            raise UserError(
                f"Crop: pad={self.pad} with mode=reflect needs images of more than {self.pad} pixels a side."
            )
        if self.mode == "reflect":  # at the border pixels, which are not repeated
            index = index.abs()
            return torch.where(index >= size, 2 * (size - 1) - index, index)
        return torch.where((index < 0) | (index >= size), size, index)

    def affine(self, code: Tensor, height: int, width: int) -> Tensor:
        """See `litdistill.data.geometry`."""
        one = torch.ones_like(code)
        return torch.stack([one, self.pad - code % self.side, one, self.pad - code // self.side], 1).float()

    def apply(self, images: Tensor, code: Tensor) -> Tensor:
        return _move((self,), images, code)


class Flip:
    """A horizontal flip of half of the samples; 2 views."""

    views = 2

    def draw(self, bits: Tensor) -> Tensor:
        return bits % 2

    def axes(self, code: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        rows, cols = torch.arange(height, device=code.device), torch.arange(width, device=code.device)
        return rows.expand(len(code), -1), torch.where(code[:, None] == 1, width - 1 - cols, cols)

    def affine(self, code: Tensor, height: int, width: int) -> Tensor:
        """See `litdistill.data.geometry`."""
        one = torch.ones_like(code)
        return torch.stack([1 - 2 * code, width * code, one, 0 * one], 1).float()

    def apply(self, images: Tensor, code: Tensor) -> Tensor:
        return _move((self,), images, code)


class Cutout:
    """A square of `size` pixels set to zero, its center uniform in the image (DeVries & Taylor 2017, arXiv 1708.04552).

    `image_size`: (H, W) of the images; H · W views.
    """

    moves = False

    def __init__(self, size: int, image_size: Sequence[int]):
        self.size, (self.height, self.width) = size, image_size
        self.views = self.height * self.width

    def draw(self, bits: Tensor) -> Tensor:
        return bits % self.views

    def apply(self, images: Tensor, code: Tensor) -> Tensor:
        top, left = code // self.width - self.size // 2, code % self.width - self.size // 2
        return images.masked_fill(box(images, top, left, top + self.size, left + self.size), 0)


def box(images: Tensor, top: Tensor, left: Tensor, bottom: Tensor, right: Tensor) -> Tensor:
    """Returns masks (N, 1, H, W) bool of a box in each of the images (N, C, H, W); bottom and right are exclusive."""
    rows = torch.arange(images.shape[2], device=images.device)
    cols = torch.arange(images.shape[3], device=images.device)
    hit_rows = (rows >= top[:, None]) & (rows < bottom[:, None])
    hit_cols = (cols >= left[:, None]) & (cols < right[:, None])
    return hit_rows[:, None, :, None] & hit_cols[:, None, None, :]


# -- views of a list of augmentations ----------------------------------------------------------------------------------


def count_views(augment: Sequence[Augmentation]) -> int | None:
    """Returns the number of distinct views of an image; None where they cannot be numbered (see the module docstring)."""
    total = 1
    for step in augment:
        total *= step.views or 2**63
    return total if total < 2**63 else None


def draw_views(augment: Sequence[Augmentation], seed: int, round: int | Tensor, ids: Tensor) -> Tensor:
    """Returns the view of each sample as one number, (N,) int64: the codes of all augmentations in mixed radix.

    Equal numbers are equal views, in every epoch and run; all are 0 without augmentations. Where `count_views` is None the
    number is the round.
    """
    if count_views(augment) is None:
        return round if isinstance(round, Tensor) else torch.full_like(ids, round)
    view = torch.zeros_like(ids)
    for stream, step in enumerate(augment, start=1):
        view = view * (step.views or 0) + step.draw(random_bits(seed, round, ids, stream))
    return view


def apply_views(
    augment: Sequence[Augmentation],
    images: Tensor,
    view: Tensor,
    seed: int | None = None,
    ids: Tensor | None = None,
) -> Tensor:
    """Returns the images (N, C, H, W) uint8 in the views (N,) that `draw_views` numbers with the same augmentations.

    `seed` and `ids` (N,) are needed where `count_views` is None.
    """
    if count_views(augment) is None:
        assert seed is not None
        assert ids is not None
        for stream, step in enumerate(augment, start=1):
            images = step.apply(images, step.draw(random_bits(seed, view, ids, stream)))
        return images
    for steps, later, views in _step_groups(tuple(augment)):
        code = view if later == 1 else view // later
        code = code if views is None else code % views
        images = _move(steps, images, code) if hasattr(steps[0], "axes") else steps[0].apply(images, code)
    return images


@functools.lru_cache(maxsize=32)
def _step_groups(augment: tuple[Any, ...]) -> list[tuple[tuple[Any, ...], int, int | None]]:
    """Groups consecutive steps with `axes`; returns for each group the number of views of all later groups, and its own (None
    for the first, whose code needs no modulo).
    """
    groups = [tuple(run) for _, run in itertools.groupby(augment, lambda step: hasattr(step, "axes") or step)]
    sizes = [math.prod(step.views for step in run) for run in groups]
    return [(run, math.prod(sizes[i + 1 :]), sizes[i] if i else None) for i, run in enumerate(groups)]


OUTSIDE = 2**29  # an index beyond every pixel of a batch
CACHED = 2**20  # pixels gathered at once on a CPU, so that their indices stay in its cache
TABLE = 2**22  # largest number of entries of a table of pixel indices by view: 16 MiB


def _move(steps: tuple[Any, ...], images: Tensor, code: Tensor) -> Tensor:
    """Applies consecutive steps with `axes`, whose codes are in mixed radix, as one gather. The result is in channels_last
    memory format, the preferred one of convolutions.
    """
    n, c, h, w = images.shape
    size = c * h * w
    part = max(1, (CACHED if images.device.type == "cpu" else OUTSIDE) // (size + 1))
    if n > part:
        return torch.cat([_move(steps, *pair) for pair in zip(images.split(part), code.split(part), strict=True)])
    if math.prod(step.views for step in steps) * size <= TABLE:
        index = _table(steps, c, h, w, images.device).index_select(0, code)
    else:
        index = _pixels(steps, code, c, h, w)
    # Pixels outside the image read one zero appended after the last pixel. A flat tensor with 32-bit indices is the
    # fastest of torch's gathers, by a factor of two and more.
    index = index.add_(_starts(n, size, images.device)).clamp_(max=n * size)
    flat = F.pad(images.reshape(-1), [0, 1])
    return flat.index_select(0, index.view(-1)).view(n, h, w, c).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=32)
def _starts(n: int, size: int, device: torch.device) -> Tensor:
    return torch.arange(0, n * size, size, dtype=torch.int32, device=device)[:, None]


@functools.lru_cache(maxsize=32)
def _table(steps: tuple[Any, ...], c: int, h: int, w: int, device: torch.device) -> Tensor:
    """Returns `_pixels` of every view, indexed by its number."""
    return _pixels(steps, torch.arange(math.prod(step.views for step in steps), device=device), c, h, w)


def _pixels(steps: tuple[Any, ...], code: Tensor, c: int, h: int, w: int) -> Tensor:
    """Returns (N, H·W·C) int32: the index in an image (C, H, W) that each pixel is read from; `OUTSIDE` or more outside it."""
    rows = torch.arange(h + 1, device=code.device).expand(len(code), -1)
    cols = torch.arange(w + 1, device=code.device).expand(len(code), -1)
    later = math.prod(step.views for step in steps)
    for step in steps:
        later //= step.views
        new_rows, new_cols = step.axes(code // later % step.views, h, w)
        outside = torch.zeros_like(code)[:, None]
        rows = rows.gather(1, torch.cat([new_rows, outside + h], 1))
        cols = cols.gather(1, torch.cat([new_cols, outside + w], 1))
    rows = torch.where(rows == h, OUTSIDE, rows * w)[:, :h].int()
    cols = torch.where(cols == w, OUTSIDE, cols)[:, :w].int()
    channels = torch.arange(0, c * h * w, h * w, device=code.device, dtype=torch.int32)
    return (rows[:, :, None] + (cols[:, :, None] + channels).flatten(1)[:, None]).flatten(1)


def change_where(hit: Tensor, change: Callable[[Tensor, Tensor], Tensor], images: Tensor, which: Tensor) -> Tensor:
    """Applies `change` to the images where `hit` (N,) is true, by the rows of `which` (N,); `images` may be changed.

    On a CPU only these images are computed. On other devices their number would need a synchronization, which costs more
    than computing the whole batch and selecting.
    """
    if images.device.type not in PER_IMAGE:
        return torch.where(hit[:, None, None, None], change(images, which * hit), images)
    rows = hit.nonzero().squeeze(1)
    if len(rows):
        images.index_copy_(0, rows, change(images.index_select(0, rows), which.index_select(0, rows)))
    return images
