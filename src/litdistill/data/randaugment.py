"""RandAugment for whole batches of uint8 images, on their device (Cubuk et al. 2020, arXiv 1909.13719, section 3).

The operations, their magnitudes and their arithmetic are those of `torchvision.transforms.RandAugment`, which computes
the tables here. torchvision transforms image by image in Python; here an operation is applied to all images of a batch
that drew it, and an operation that only moves pixels or maps levels is a table lookup.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torchvision.transforms.functional as tv
import torchvision.transforms.v2.functional as tv2
from torch import Tensor

from litdistill.data import augment as aug
from litdistill.utils.errors import UserError

MOVES = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")  # with either sign
BLENDS = ("contrast", "color", "sharpness")  # with either sign
CHOICES = (
    "identity",
    *(f"{name}{sign}" for name in MOVES for sign in "+-"),
    *("brightness+", "brightness-", "posterize", "solarize"),
    *(f"{name}{sign}" for name in BLENDS for sign in "+-"),
    *("autocontrast", "equalize"),
)
# Operations are equally likely, and so are the two signs of an operation.
OPERATIONS = list(dict.fromkeys(name.rstrip("+-") for name in CHOICES))
DRAWN = tuple(CHOICES.index(name if name in CHOICES else name + sign) for name in OPERATIONS for sign in "+-")


class RandAugment:
    """`ops` consecutive operations, each drawn from the 14 of torchvision, at one `magnitude` of `bins` (0 is none, `bins` - 1
    the maximum); 23 choices of operation and sign, 23^ops views.

    Pixels from outside the image are zero, and pixels are not interpolated. `color` leaves gray images unchanged.
    """

    def __init__(self, ops: int = 2, magnitude: int = 9, bins: int = 31):
        if not 1 <= ops <= 12 or not 0 <= magnitude < bins:
            raise UserError(
                f"RandAugment: ops={ops} must be 1 to 12, and magnitude={magnitude} from 0 to bins - 1 = {bins - 1}. "
                "The paper takes ops=1 or 2 and magnitude=5 to 14 on CIFAR-10, with 31 bins."
            )
        self.ops, self.magnitude, self.bins = ops, magnitude, bins
        self.views = len(CHOICES) ** ops

    def draw(self, bits: Tensor) -> Tensor:
        drawn, code = _drawn(bits.device), torch.zeros_like(bits)
        for _ in range(self.ops):
            code = code * len(CHOICES) + drawn[bits % len(DRAWN)]
            bits = bits // len(DRAWN)
        return code

    def apply(self, images: Tensor, code: Tensor) -> Tensor:
        images = images.clone(memory_format=torch.contiguous_format)
        for i in reversed(range(self.ops)):
            images = self._apply_one(images, code // len(CHOICES) ** i % len(CHOICES))
        return images

    def _apply_one(self, images: Tensor, choice: Tensor) -> Tensor:
        (c, h, w), scale = images.shape[1:], (self.magnitude, self.bins)
        device, amount = images.device, _strength(0.9, scale)

        def change_range(first: str, last: str, change: Callable[[Tensor, Tensor], Tensor]) -> None:
            nonlocal images
            i, j = CHOICES.index(first), CHOICES.index(last)
            images = aug.change_where((choice >= i) & (choice <= j), change, images, choice - i)

        change_range("shear_x+", "rotate-", lambda x, which: _move(x, _move_table(scale, h, w, device), which))
        change_range("brightness+", "solarize", lambda x, which: _map_levels(x, _level_table(scale, device), which))
        change_range("contrast+", "contrast-", lambda x, which: _blend(x, _gray_mean(x), amount, which))
        if c == 3:
            change_range("color+", "color-", lambda x, which: _blend(x, tv.rgb_to_grayscale(x), amount, which))
        if min(h, w) > 2:
            change_range(
                "sharpness+", "sharpness-", lambda x, which: _blend(x, tv.adjust_sharpness(x, 0), amount, which)
            )
        change_range("autocontrast", "autocontrast", lambda x, _: tv2.autocontrast(x))
        change_range("equalize", "equalize", lambda x, _: tv2.equalize(x))
        return images


@functools.lru_cache(maxsize=8)
def _drawn(device: torch.device) -> Tensor:
    return torch.tensor(DRAWN, device=device)


@functools.cache
def _strength(most: float, scale: tuple[int, int], least: float = 0.0) -> float:
    """Returns the strength of an operation at (magnitude, bins), bit-identical to torchvision's."""
    magnitude, bins = scale
    return float(torch.linspace(least, most, bins)[magnitude])


def _move(images: Tensor, table: Tensor, which: Tensor) -> Tensor:
    """Reads each pixel from the position in row `which` (N,) of the table; H·W is outside the image."""
    n, c, h, w = images.shape
    padded = images.new_zeros(n, c, h * w + 1)
    padded[..., :-1] = images.flatten(2)
    start = torch.arange(n * c, device=images.device, dtype=torch.int64).view(n, c, 1) * (h * w + 1)
    index = table.index_select(0, which)[:, None] + start.to(torch.int32 if padded.numel() < 2**31 else torch.int64)
    return padded.view(-1).index_select(0, index.view(-1)).view(images.shape)


def _map_levels(images: Tensor, table: Tensor, which: Tensor) -> Tensor:
    """Maps each level by row `which` (N,) of the table (rows, 256)."""
    index = images.int() + 256 * which.int()[:, None, None, None]
    return table.view(-1).index_select(0, index.view(-1)).view(images.shape)


def _blend(images: Tensor, others: Tensor, amount: float, which: Tensor) -> Tensor:
    """Extrapolates (`which` 0) or interpolates (1) between images and others, by torchvision's formula."""
    more, less = 1 + amount, 1 - amount  # Python numbers, which need no copy to the device
    weight, other_weight = torch.where(which == 0, more, less), torch.where(which == 0, 1 - more, 1 - less)
    weight, other_weight = weight[:, None, None, None], other_weight[:, None, None, None]
    return (weight * images + other_weight * others).clamp(0, 255).to(torch.uint8)


def _gray_mean(images: Tensor) -> Tensor:
    """Returns the mean of the gray image, (N, 1, 1, 1)."""
    gray = tv.rgb_to_grayscale(images) if images.shape[1] == 3 else images
    return gray.float().mean((1, 2, 3), keepdim=True)


@functools.lru_cache(maxsize=8)
def _move_table(scale: tuple[int, int], h: int, w: int, device: torch.device) -> Tensor:
    """Returns (2 · moves, H·W) int32: the position that each pixel is read from, computed by moving an image of positions."""
    positions = torch.arange(1, h * w + 1, dtype=torch.float32).view(1, 1, h, w)
    identity = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    rows = []
    for name in MOVES:
        for sign in (1, -1):
            if name == "rotate":
                moved = tv.rotate(positions, sign * _strength(30, scale))
            elif name.startswith("shear"):
                angle = math.degrees(math.atan(sign * _strength(0.3, scale)))
                shear = [angle, 0.0] if name == "shear_x" else [0.0, angle]
                moved = tv.affine(positions, **identity | {"shear": shear}, center=[0, 0])
            else:
                pixels = int(sign * _strength(150 / 331 * (w if name == "translate_x" else h), scale))
                shift = [pixels, 0] if name == "translate_x" else [0, pixels]
                moved = tv.affine(positions, **identity | {"translate": shift})
            rows.append(moved.flatten())
    table = torch.stack(rows).int()
    return torch.where(table == 0, h * w, table - 1).to(device)


@functools.lru_cache(maxsize=8)
def _level_table(scale: tuple[int, int], device: torch.device) -> Tensor:
    """Returns (4, 256) uint8: the new value of each level."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    amount, (magnitude, bins) = _strength(0.9, scale), scale
    dropped = int((torch.tensor(magnitude) / max((bins - 1) / 4, 1e-9)).round())
    rows = [tv.adjust_brightness(levels, 1 + amount), tv.adjust_brightness(levels, 1 - amount)]
    rows += [tv.posterize(levels, 8 - dropped), tv.solarize(levels, _strength(0, scale, least=255))]
    return torch.stack(rows).flatten(1).to(device)
