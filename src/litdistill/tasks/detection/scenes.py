"""Scenes of digits: pictures with boxes (and masks) that need no download.

    python scripts/train.py data=digit_scenes task=detection net@student=fcos_slim net@teacher=fcos_slim

scikit-learn's 1,797 handwritten digits lie on darkened crops of its two photographs, one to three in a scene, each of its own
color and lighter than its ground: a network of few layers learns them from a thousand scenes.
The scenes to test on have other digits (those that `data=digits` tests on) and another part of the photographs than those to
train on. Each scene is a pure function of its number, and is computed in whole numbers: it is the same on every machine.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor

from litdistill.data import augment as aug
from litdistill.data.sources import DIGITS, load
from litdistill.data.tensors import TensorData, TensorSource, TensorSplit
from litdistill.utils.errors import UserError
from litdistill.utils.modality import Modality

MOST = 3  # digits of a scene
TESTED = 500  # scenes to test on, whatever the number of those to train on
SIZES = (32, 160)  # pixels of a side; a part of a photograph that is tested on is 176 pixels wide
CUT = 464  # the column of the photographs, 640 wide, from which on they are tested on
CONTRAST = 90  # of 255: how much lighter than its ground a digit is, at least
FAINTEST = 64  # of 255: what is covered less is not drawn
TRIES = 16  # places that are drawn for a digit, of which the first that is free is taken
CHUNK = 256  # scenes that are composed at once
LUMINANCE = np.array([299, 587, 114])  # of red, green and blue, in thousandths (ITU-R BT.601)
SEED = 0
# Streams of random bits (`aug.random_bits`), of scenes and of digits.
PHOTO, SHRINK, LEFT, TOP, COUNT, WHICH, TALL, WIDE, COLOR, PLACE = range(1, 11)


class Scenes(NamedTuple):
    """N scenes of side S."""

    images: Tensor  # (N, 3, S, S) uint8
    targets: Tensor  # (N, 3, 6) float32: x1, y1, x2, y2 in pixels, class, 0; a class of -1 where there is no digit
    masks: Tensor  # (N, S, S) int64: 1 + class of the digit that is drawn at each pixel, 0 of the ground


def digit_scenes(count: int = 1250, size: int = 64, **options: Any) -> TensorData:
    """Returns scenes of one to three digits with their boxes, `count` to train and validate on and `TESTED` to test on.

    Boxes are tight around what is drawn, and do not overlap. Scene i to train on is the same for every `count` above i.

    Args:
        count: scenes to train on, the validation set included. size: pixels of a side, 32 to 160.
        options: those of `TensorData`.
    """
    check_options(count, size)
    read = functools.partial(_read, count, size)
    return TensorData(read, "digit_scenes", "detection", standardize=True, **options)


def check_options(count: int, size: int) -> None:
    """Raises `UserError` for a number or a size of scenes that cannot be made."""
    if count < 2:
        raise UserError(f"data.count={count} must be at least 2: a scene to train on and one to validate on.")
    if not SIZES[0] <= size <= SIZES[1]:
        raise UserError(f"data.size={size} must be {SIZES[0]} to {SIZES[1]} pixels, as the photographs behind allow.")


def _read(count: int, size: int) -> TensorSource:
    train, test = compose(count, size, "train"), compose(TESTED, size, "test")

    def show(split: str, i: int) -> str:
        found = (test if split == "test" else train).targets[i, :, 4].int().tolist()
        return " and ".join(DIGITS[c] for c in found if c >= 0)

    return TensorSource(
        TensorSplit(train.images, train.targets),
        TensorSplit(test.images, test.targets),
        DIGITS,
        Modality(),
        show=show,
        geometry="boxes",
    )


@functools.lru_cache(maxsize=4)
def compose(count: int, size: int, split: str) -> Scenes:
    """Returns the first `count` scenes of a side of `size` pixels of the split "train" or "test"."""
    digits = load("digits", None, None, False)
    glyphs = digits.test if split == "test" else digits.train
    parts = [torch.arange(count)[start : start + CHUNK] for start in range(0, count, CHUNK)]
    made = [_compose(ids, size, split, glyphs.images[:, 0].numpy(), glyphs.targets.numpy()) for ids in parts]
    return Scenes(*(torch.from_numpy(np.concatenate(part)) for part in zip(*made, strict=True)))


def _compose(ids: Tensor, size: int, split: str, glyphs: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns images, targets and masks of the scenes of these numbers, as arrays."""
    stream = 100 * (split == "test")
    images: np.ndarray = grounds(ids, size, split).astype(np.int32)  # (N, S, S, 3)
    masks = np.zeros((len(ids), size, size), np.int64)
    targets = np.zeros((len(ids), MOST, 6), np.float32)
    targets[..., 4] = -1
    numbers = 1 + _bits(ids, stream + COUNT) % MOST
    for k in range(MOST):
        own = ids * MOST + k  # the number of the digit among all
        which = _bits(own, stream + WHICH) % len(glyphs)
        cover = _drawn(glyphs[which], own, stream, size)
        height, width = _extent(cover)
        x, y, free = _place(own, stream, size, width, height, targets[:, :k])
        there = free & (k < numbers)
        laid = _shifted(cover, x, y, size) * there[:, None, None]
        color = _color(own, stream, images, laid)
        weight = laid[..., None].astype(np.int32)
        images = (images * (255 - weight) + color[:, None, None] * weight + 127) // 255
        masks[laid > 0] = np.broadcast_to((1 + classes[which])[:, None, None], laid.shape)[laid > 0]
        boxes = np.stack([x, y, x + width, y + height, classes[which], np.zeros_like(x)], 1)
        targets[there, k] = boxes[there]
    return images.astype(np.uint8).transpose(0, 3, 1, 2), targets, masks


def _bits(ids: Tensor, stream: int) -> np.ndarray:
    return aug.random_bits(SEED, 0, ids, stream).numpy()


def grounds(ids: Tensor, size: int, split: str) -> np.ndarray:
    """Returns what lies behind the digits of these scenes, (N, S, S, 3) uint8: crops of the split's part of the photographs,
    half as light, at their size or, where they are large enough, at half of it.
    """
    columns = slice(CUT, None) if split == "test" else slice(0, CUT)
    photos = [np.asarray(photo)[:, columns] for photo in load_sample_images().images]
    halves = [(p[: len(p) // 2 * 2, : p.shape[1] // 2 * 2]).reshape(len(p) // 2, 2, -1, 2, 3) for p in photos]
    small = [((half.sum((1, 3), dtype=np.int32) + 2) // 4).astype(np.uint8) for half in halves]
    stream = 100 * (split == "test")
    which, shrink = _bits(ids, stream + PHOTO) % len(photos), _bits(ids, stream + SHRINK) % 2
    left, top = _bits(ids, stream + LEFT), _bits(ids, stream + TOP)
    made = np.empty((len(ids), size, size, 3), np.uint8)
    for i, (photo, halved) in enumerate(zip(which, shrink, strict=True)):
        ground = small[photo] if halved and min(small[photo].shape[:2]) >= size else photos[photo]
        y, x = top[i] % (ground.shape[0] - size + 1), left[i] % (ground.shape[1] - size + 1)
        made[i] = ground[y : y + size, x : x + size] // 2
    return made


def _drawn(glyphs: np.ndarray, own: Tensor, stream: int, size: int) -> np.ndarray:
    """Returns how much each pixel is covered, 0 to 255, by glyphs (N, 8, 8) that are enlarged to between a quarter and 7/16 of
    the scene, and made up to a quarter narrower: (N, P, P), cut to what is drawn, which begins at the first row and column.
    """
    least, most = size // 4, size * 7 // 16
    tall = least + _bits(own, stream + TALL) % (most - least + 1)
    wide = np.maximum(tall * (75 + _bits(own, stream + WIDE) % 26) // 100, 4)
    rows, columns = _interpolation(tall, most), _interpolation(wide, most)
    # Whole numbers below 2^53, which float64 adds without rounding, in whatever order.
    cover = (rows @ glyphs.astype(np.float64) @ columns.transpose(0, 2, 1)).astype(np.int64) >> 16
    cover = np.minimum(cover * 3 // 2, 255)
    cover[cover < FAINTEST] = 0
    top, left = (np.asarray(cover.any(axis)).argmax(1) for axis in (2, 1))
    return _shifted(cover, -left, -top, most)


def _interpolation(lengths: np.ndarray, most: int) -> np.ndarray:
    """Returns the weights (N, most, 8), in 1/256, by which 8 values are interpolated linearly at `lengths` (N,) places; zero
    beyond these."""
    place = np.arange(most)
    source = (2 * place + 1) * 1024 // lengths[:, None] - 128  # of the middle of a pixel, in 1/256 of a glyph's
    near = np.clip(source, 0, 7 * 256)[..., None] - 256 * np.arange(8)
    inside = place < lengths[:, None]
    return np.clip(256 - np.abs(near), 0, None) * inside[..., None].astype(np.float64)


def _shifted(cover: np.ndarray, x: np.ndarray, y: np.ndarray, size: int) -> np.ndarray:
    """Returns pictures (N, P, P) moved by x columns and y rows (N,), on a ground of zeros: (N, size, size)."""
    side = cover.shape[1]
    rows, columns = (np.arange(size) - shift[:, None] for shift in (y, x))
    padded = np.pad(cover, ((0, 0), (0, 1), (0, 1)))
    rows, columns = (np.where((at >= 0) & (at < side), at, side) for at in (rows, columns))
    return padded[np.arange(len(cover))[:, None, None], rows[:, :, None], columns[:, None, :]]


def _extent(cover: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns height and width (N,) of what is drawn from the first row and column on."""
    side = cover.shape[1]
    height, width = (side - np.asarray(cover.any(axis))[:, ::-1].argmax(1) for axis in (2, 1))
    return height, width


def _place(
    own: Tensor, stream: int, size: int, width: np.ndarray, height: np.ndarray, others: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns x and y (N,) of the first place drawn that overlaps and touches none of the other boxes (N, k, 6), and whether
    there is one."""
    bits = np.stack([_bits(own * TRIES + i, stream + PLACE) for i in range(TRIES)], 1)
    x, y = bits % (size - width + 1)[:, None], (bits >> 20) % (size - height + 1)[:, None]  # (N, tries)
    x1, y1, x2, y2 = (np.asarray(others[:, None, :, i]) for i in range(4))
    apart: np.ndarray = (
        (x[..., None] > x2)
        | (y[..., None] > y2)
        | ((x + width[:, None])[..., None] < x1)
        | ((y + height[:, None])[..., None] < y1)
        | (others[:, None, :, 4] < 0)
    )
    free: np.ndarray = np.asarray(apart.all(2))
    first, every = free.argmax(1), np.arange(len(x))
    return x[every, first], y[every, first], np.asarray(free.any(1))


def _color(own: Tensor, stream: int, images: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """Returns a random color (N, 3) for each digit, made lighter where its luminance is not above that of its ground by more
    than `CONTRAST`."""
    bits = _bits(own, stream + COLOR)
    color = np.stack([bits, bits >> 8, bits >> 16], 1) % 256
    total = np.maximum(cover.sum((1, 2)), 1)
    ground = ((images @ LUMINANCE * cover).sum((1, 2)) // (1000 * total)).astype(np.int64)
    own_luminance = color @ LUMINANCE // 1000
    lighter = ground + CONTRAST + 1
    change = 255 - (255 - color) * (255 - lighter)[:, None] // np.maximum(255 - own_luminance, 1)[:, None]
    near = own_luminance - ground <= CONTRAST
    return np.where(near[:, None], np.clip(change, 0, 255), color).astype(np.int32)
