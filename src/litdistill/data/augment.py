"""Augmentation and order as pure functions of (seed, round, sample id), computed for a whole batch on its device.

A round is one pass through the training set: an epoch, unless `epoch_size` makes an epoch something else. Nothing here
holds generator state: a counter-based hash gives each sample of each round its random bits. So a sample's
view is the same on any device, in any batch size and at any world size, a resumed run needs no generator state, and a
teacher's outputs can be keyed by (sample id, view).

An augmentation is an object with two methods:
    draw(bits)            (N,) int64 random bits, none negative -> (N,) int64 codes: which view of the image
    apply(images, code)   (N, C, H, W) uint8 and the codes -> the views, uint8
and `views`, how many distinct codes there are. A code says what is done to the image and not when, so that equal views
of different epochs and seeds are known to be equal. Where views cannot be counted (a continuous augmentation, whose
`views` is None, or more of them than an int64 numbers), a view is numbered by its round and holds for its seed alone.

One that only moves pixels along rows and columns may have `axes(code, height, width)` instead of working in `apply`:
which row (N, H) and which column (N, W) each pixel comes from, H or W where it comes from outside and is zero.
Any number of such steps in a row is a single gather.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from litdistill.utils.errors import UserError

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number, the increment of splitmix64
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


class Augmentation(Protocol):
    """What an augmentation offers; see the head of this file."""

    @property
    def views(self) -> int | None: ...

    def draw(self, bits: Tensor) -> Tensor: ...

    def apply(self, images: Tensor, code: Tensor) -> Tensor: ...


def _shift_right(x: Tensor, n: int) -> Tensor:
    """Logical shift of int64, which torch has only as an arithmetic one."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def splitmix64(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014), a bijection of 64 bits; int64 wraps on every device."""
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def random_bits(seed: int, round: int | Tensor, ids: Tensor, stream: int) -> Tensor:
    """63 random bits for each sample: (N,) int64, none negative. Streams are independent of each other.

    `round`: how often the training set was passed through before, which is the epoch unless an epoch is something else;
    one number, or one for each sample (N,).
    """
    state = splitmix64(_word(seed) + GOLDEN)
    state = splitmix64(state + GOLDEN + _word(stream))
    if isinstance(round, Tensor):
        state = state.to(round.device)
    state = splitmix64(state + GOLDEN + (round if isinstance(round, Tensor) else _word(round)))
    return _shift_right(splitmix64(splitmix64(ids + state.to(ids.device)) + GOLDEN), 1)


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

    `mode`: "zero" or "reflect", what stands outside the image. MNIST's usual shift by up to 2 pixels is `Crop(2)`.
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

    def apply(self, images: Tensor, code: Tensor) -> Tensor:
        return _move((self,), images, code)


class Flip:
    """A mirror image, left and right, for half of the samples; 2 views."""

    views = 2

    def draw(self, bits: Tensor) -> Tensor:
        return bits % 2

    def axes(self, code: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        rows, cols = torch.arange(height, device=code.device), torch.arange(width, device=code.device)
        return rows.expand(len(code), -1), torch.where(code[:, None] == 1, width - 1 - cols, cols)

    def apply(self, images: Tensor, code: Tensor) -> Tensor:
        return _move((self,), images, code)


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
        return images.masked_fill(box(images, top, left, top + self.size, left + self.size), 0)


def box(images: Tensor, top: Tensor, left: Tensor, bottom: Tensor, right: Tensor) -> Tensor:
    """(N, 1, H, W) bool: for each of the images (N, C, H, W) what lies in its box, whose last two sides do not."""
    rows = torch.arange(images.shape[2], device=images.device)
    cols = torch.arange(images.shape[3], device=images.device)
    hit_rows = (rows >= top[:, None]) & (rows < bottom[:, None])
    hit_cols = (cols >= left[:, None]) & (cols < right[:, None])
    return hit_rows[:, None, :, None] & hit_cols[:, None, None, :]


# -- views: what a list of augmentations does --------------------------------------------------------------------------


def count_views(augment: Sequence[Augmentation]) -> int | None:
    """How many distinct views there are of one image; None where they cannot be numbered (see the head of this file)."""
    total = 1
    for step in augment:
        total *= step.views or 2**63
    return total if total < 2**63 else None


def draw_views(augment: Sequence[Augmentation], seed: int, round: int | Tensor, ids: Tensor) -> Tensor:
    """The view of each sample as one number, (N,) int64: the codes of all augmentations in mixed radix.

    Equal numbers are equal views, in whatever epoch and run; all zeros where there is no augmentation. Where
    `count_views` is None the number is the round.
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
    """The images (N, C, H, W) uint8 as seen in views (N,) of `draw_views` with the same augmentations.

    `seed` and `ids` (N,) are needed where `count_views` is None.
    """
    if count_views(augment) is None:
        assert seed is not None
        assert ids is not None
        for stream, step in enumerate(augment, start=1):
            images = step.apply(images, step.draw(random_bits(seed, view, ids, stream)))
        return images
    for run, after, views in _runs(tuple(augment)):
        code = view if after == 1 else view // after
        code = code if views is None else code % views
        images = _move(run, images, code) if hasattr(run[0], "axes") else run[0].apply(images, code)
    return images


@functools.lru_cache(maxsize=32)
def _runs(augment: tuple[Any, ...]) -> list[tuple[tuple[Any, ...], int, int | None]]:
    """The steps in groups that are done at once; of each, how many views the later ones have, and how many it has itself
    (None for the first, of whose code nothing is to be cut off)."""
    groups = [tuple(run) for _, run in itertools.groupby(augment, lambda step: hasattr(step, "axes") or step)]
    sizes = [math.prod(step.views for step in run) for run in groups]
    return [(run, math.prod(sizes[i + 1 :]), sizes[i] if i else None) for i, run in enumerate(groups)]


OUTSIDE = 2**29  # beyond every pixel of a batch
TABLE = 2**22  # numbers of a table of pixels by view: 16 MiB


def _move(steps: tuple[Any, ...], images: Tensor, code: Tensor) -> Tensor:
    """What steps with `axes` do one after the other, their codes in mixed radix; the channels are left last in memory,
    the format that convolutions want."""
    n, c, h, w = images.shape
    size = c * h * w
    if n * size >= OUTSIDE:
        half = (n + 1) // 2
        return torch.cat([_move(steps, *part) for part in zip(images.split(half), code.split(half), strict=True)])
    if math.prod(step.views for step in steps) * size <= TABLE:
        index = _table(steps, c, h, w, images.device).index_select(0, code)
    else:
        index = _pixels(steps, code, c, h, w)
    # What comes from outside comes from one zero behind the last pixel. A flat tensor and 32-bit numbers make the
    # fastest of torch's gathers, by a factor of two and more.
    index = index.add_(_starts(n, size, images.device)).clamp_(max=n * size)
    flat = F.pad(images.reshape(-1), [0, 1])
    return flat.index_select(0, index.view(-1)).view(n, h, w, c).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=32)
def _starts(n: int, size: int, device: torch.device) -> Tensor:
    return torch.arange(0, n * size, size, dtype=torch.int32, device=device)[:, None]


@functools.lru_cache(maxsize=32)
def _table(steps: tuple[Any, ...], c: int, h: int, w: int, device: torch.device) -> Tensor:
    """`_pixels` of every view, by its number."""
    return _pixels(steps, torch.arange(math.prod(step.views for step in steps), device=device), c, h, w)


def _pixels(steps: tuple[Any, ...], code: Tensor, c: int, h: int, w: int) -> Tensor:
    """(N, H·W·C) int32: where in an image (C, H, W) each pixel comes from, `OUTSIDE` or more if from outside."""
    rows = torch.arange(h + 1, device=code.device).expand(len(code), -1)
    cols = torch.arange(w + 1, device=code.device).expand(len(code), -1)
    left = math.prod(step.views for step in steps)
    for step in steps:
        left //= step.views
        new_rows, new_cols = step.axes(code // left % step.views, h, w)
        outside = torch.zeros_like(code)[:, None]
        rows = rows.gather(1, torch.cat([new_rows, outside + h], 1))
        cols = cols.gather(1, torch.cat([new_cols, outside + w], 1))
    rows = torch.where(rows == h, OUTSIDE, rows * w)[:, :h].int()
    cols = torch.where(cols == w, OUTSIDE, cols)[:, :w].int()
    channels = torch.arange(0, c * h * w, h * w, device=code.device, dtype=torch.int32)
    return (rows[:, :, None] + (cols[:, :, None] + channels).flatten(1)[:, None]).flatten(1)
