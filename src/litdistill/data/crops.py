"""Random boxes of whole batches of uint8 images, on their device: `RandomResizedCrop` and `RandomErasing`.

Names, options and distributions are those of `torchvision.transforms`, which draws and transforms image by image. Here a
box is a function of the sample's random bits in whole numbers, and so the same on every device (see `augment`). The views
cannot be counted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from litdistill.data import augment as aug
from litdistill.data.augment import box, further_bits
from litdistill.utils.errors import UserError

TRIES = 10  # as in torchvision: boxes that are drawn until one fits into the image
LEVELS = 2**16  # equally likely areas, and as many aspect ratios
UNIT = 2**20  # fixed-point one of the tables of square roots


class RandomResizedCrop:
    """A box of the image, resized to `size` (bilinear, antialiased): its share of the area is uniform in `scale`, the logarithm
    of its aspect ratio (width / height) uniform in `ratio`, and its place uniform (Szegedy et al. 2015, arXiv 1409.4842).

    `size`: a side in pixels, or (H, W); None: the size of the input. torchvision's default of `scale` is (0.08, 1).
    """

    views = None

    def __init__(
        self,
        scale: Sequence[float] = (0.35, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        size: int | Sequence[int] | None = None,
    ):
        self.scale, self.ratio = _checked("RandomResizedCrop", scale, ratio)
        self.size = (size, size) if isinstance(size, int) else None if size is None else (size[0], size[1])

    def draw(self, bits: Tensor) -> Tensor:
        return bits

    def boxes(self, code: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns top, left, height and width (N,) int64 of the boxes in images of this size.

        After `TRIES` boxes that do not fit it is the largest in the middle whose ratio is allowed, as in torchvision.
        """
        *drawn, fits = _draw_boxes(code, height, width, self.scale, self.ratio)
        least, most = self.ratio
        tall = round(width / least) if width / height < least else height
        wide = round(height * most) if width / height > most else width
        middle = ((height - tall) // 2, (width - wide) // 2, tall, wide)
        top, left, tall_, wide_ = (torch.where(fits, value, other) for value, other in zip(drawn, middle, strict=True))
        return top, left, tall_, wide_

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Returns the size of the views of images of this size."""
        return self.size or (height, width)

    def affine(self, code: Tensor, height: int, width: int) -> Tensor:
        """See `litdistill.data.geometry`."""
        top, left, tall, wide = self.boxes(code, height, width)
        down, across = (n / part for n, part in zip(self.output_size(height, width), (tall, wide), strict=True))
        return torch.stack([across, -left * across, down, -top * down], 1).float()

    def apply(self, images: Tensor, code: Tensor) -> Tensor:
        height, width = images.shape[2:]
        return resized_crops(images, *self.boxes(code, height, width), self.output_size(height, width))


class RandomErasing:
    """A box set to `value` in a share `p` of the images; its share of the area is uniform in `scale`, the logarithm of its
    aspect ratio (height / width) uniform in `ratio`, and its place uniform (Zhong et al. 2020, arXiv 1708.04896).

    `value`: 0 to 255, of all channels or of each. torchvision erases after normalization, where 0 is the mean color.
    """

    views = None
    moves = False

    def __init__(
        self,
        p: float = 0.5,
        scale: Sequence[float] = (0.02, 0.33),
        ratio: Sequence[float] = (0.3, 3.3),
        value: int | Sequence[int] = 0,
    ):
        if not 0 <= p <= 1:
            raise UserError(f"RandomErasing: p={p} must be from 0 to 1.")
        self.value = [value] if isinstance(value, int) else list(value)
        if not all(isinstance(v, int) and 0 <= v <= 255 for v in self.value):
            raise UserError(f"RandomErasing: value={value} must be whole numbers from 0 to 255.")
        self.p, (self.scale, self.ratio) = p, _checked("RandomErasing", scale, ratio)

    def draw(self, bits: Tensor) -> Tensor:
        return bits

    def boxes(self, code: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns top, left, height and width (N,) int64 of the boxes; height and width are 0 where nothing is erased."""
        # torchvision's ratio is width / height in a crop, and height / width here.
        left, top, wide, tall, fits = _draw_boxes(code, width, height, self.scale, self.ratio, smaller=True)
        hit = fits & (further_bits(code, TRIES) % LEVELS < round(self.p * LEVELS))
        return top, left, tall * hit, wide * hit

    def apply(self, images: Tensor, code: Tensor) -> Tensor:
        if len(self.value) not in (1, images.shape[1]):
            raise UserError(f"RandomErasing: value={self.value}, and the images have {images.shape[1]} channels.")
        top, left, tall, wide = self.boxes(code, *images.shape[2:])
        erased = box(images, top, left, top + tall, left + wide)
        if len(set(self.value)) == 1:
            return images.masked_fill(erased, self.value[0])
        return torch.where(erased, _levels(tuple(self.value), images.device), images)


def resized_crops(
    images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, size: Sequence[int]
) -> Tensor:
    """Returns a box of each of the images (N, C, H, W) uint8, resized to `size` (H, W): bilinear and antialiased, as
    torchvision's `resized_crop`; in channels-last memory format.

    On a CPU the pixels are torchvision's to the bit. Elsewhere all boxes are one product with matrices of weights, and a
    pixel may differ by one level, as it is rounded once and not after each axis.
    """
    if images.device.type not in aug.PER_IMAGE:
        rows = _weights(top, height, images.shape[2], size[0])
        cols = _weights(left, width, images.shape[3], size[1])
        product = rows[:, None] @ images.float() @ cols[:, None].transpose(2, 3)
        return product.round().clamp(0, 255).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    # ATen's kernel for bytes takes one size of box at a time, and is 10 to 30 times as fast as a product or `grid_sample`.
    shape = (len(images), images.shape[1], *size)
    found = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
    boxes = torch.stack([top, left, top + height, left + width], 1).tolist()
    for i, (up, first, down, last) in enumerate(boxes):
        crop = images[i : i + 1, :, up:down, first:last].contiguous(memory_format=torch.channels_last)
        found[i] = F.interpolate(crop, tuple(size), mode="bilinear", antialias=True)[0]
    return found


def _weights(start: Tensor, length: Tensor, size: int, out: int) -> Tensor:
    """Returns (N, `out`, `size`) float32: the weight of each pixel of an axis in each pixel of the resized box."""
    scale = (length / out)[:, None, None]  # source pixels of a resized one
    center = (torch.arange(out, device=start.device)[:, None] + 0.5) * scale
    pixel = torch.arange(size, device=start.device) - start[:, None, None]
    weights = (1 - (pixel + 0.5 - center).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((pixel >= 0) & (pixel < length[:, None, None]))
    return weights / weights.sum(2, keepdim=True)


def _draw_boxes(
    code: Tensor,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    smaller: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns top, left, height and width (N,) int64 of boxes, and whether one of `TRIES` fits into the image; `smaller`:
    in both axes with room to spare.
    """
    bits = torch.stack([further_bits(code, i) for i in range(TRIES)])
    area, stretch, squeeze = _roots(scale, ratio, code.device)
    side = area[bits % LEVELS] * round(math.sqrt(height * width) * 2**12) // 2**12
    bits = bits // LEVELS
    wide = (side * stretch[bits % LEVELS] + UNIT**2 // 2) // UNIT**2
    tall = (side * squeeze[bits % LEVELS] + UNIT**2 // 2) // UNIT**2
    fits = (wide > 0) & (tall > 0) & (wide <= width - smaller) & (tall <= height - smaller)
    first = fits.int().argmax(0, keepdim=True)  # the first that fits
    wide, tall, bits = (x.gather(0, first).squeeze(0) for x in (wide, tall, bits // LEVELS))
    place, side_place = bits % 2**15, bits // 2**15 % 2**15
    top = place * (height - tall + 1) // 2**15
    left = side_place * (width - wide + 1) // 2**15
    return top, left, tall, wide, fits.any(0)


@functools.lru_cache(maxsize=16)
def _roots(scale: tuple[float, float], ratio: tuple[float, float], device: torch.device) -> tuple[Tensor, ...]:
    """Returns the square roots of `LEVELS` equally likely areas, of as many ratios, and of their inverses, in `UNIT`s.

    Whole numbers, so that every device has the same boxes.
    """
    middles = (np.arange(LEVELS) + 0.5) / LEVELS
    area = np.sqrt(scale[0] + (scale[1] - scale[0]) * middles)
    log_ratio = np.log(ratio[0]) + (np.log(ratio[1]) - np.log(ratio[0])) * middles
    tables = (area, np.exp(log_ratio / 2), np.exp(-log_ratio / 2))
    return tuple(torch.from_numpy(np.rint(table * UNIT).astype(np.int64)).to(device) for table in tables)


@functools.lru_cache(maxsize=16)
def _levels(value: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.uint8, device=device).view(-1, 1, 1)


def _checked(
    name: str, scale: Sequence[float], ratio: Sequence[float]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Returns both ranges as pairs. Raises `UserError` for others than a lowest and a highest value that make sense."""
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
        raise UserError(
            f"{name}: scale={list(scale)} must be the least and the largest share of the area, as in [0.35, 1]."
        )
    if len(ratio) != 2 or not 0.05 <= ratio[0] <= ratio[1] <= 20:
        raise UserError(
            f"{name}: ratio={list(ratio)} must be the least and the largest, from 0.05 to 20, as in [0.75, 1.33]."
        )
    return (float(scale[0]), float(scale[1])), (float(ratio[0]), float(ratio[1]))
