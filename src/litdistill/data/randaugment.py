"""RandAugment for whole batches of uint8 images, on their device (Cubuk et al. 2020, arXiv 1909.13719, section 3).

The operations, their magnitudes and their arithmetic are those of `torchvision.transforms.RandAugment`, which the tables
here are computed with. There each image takes its own way through Python; here an operation is done to all images of a
batch that drew it, and where an operation only moves pixels or maps levels it is a look-up in a table.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torchvision.transforms.functional as tv
import torchvision.transforms.v2.functional as tv2
from torch import Tensor

from litdistill.utils.errors import UserError

MOVES = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")  # either way
BLENDS = ("contrast", "color", "sharpness")  # more or less of it
CHOICES = (
    "identity",
    *(f"{name}{sign}" for name in MOVES for sign in "+-"),
    *("brightness+", "brightness-", "posterize", "solarize"),
    *(f"{name}{sign}" for name in BLENDS for sign in "+-"),
    *("autocontrast", "equalize"),
)
# Every operation is drawn as often as any other, and of those with two signs either.
OPERATIONS = list(dict.fromkeys(name.rstrip("+-") for name in CHOICES))
DRAWN = tuple(CHOICES.index(name if name in CHOICES else name + sign) for name in OPERATIONS for sign in "+-")


class RandAugment:
    """`ops` operations one after the other, each drawn from the 14 of torchvision, at one `magnitude` of `bins` (0 is
    none, `bins` - 1 all); 23 choices of operation and sign, 23^ops views.

    Pixels that come from outside are zero, and no pixel is interpolated. Of grey images `color` changes nothing.
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
        drawn, code = torch.tensor(DRAWN, device=bits.device), torch.zeros_like(bits)
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
        device, amount = images.device, _at(0.9, scale)

        def where(first: str, last: str, change: Callable[[Tensor, Tensor], Tensor]) -> None:
            nonlocal images
            i, j = CHOICES.index(first), CHOICES.index(last)
            images = _where((choice >= i) & (choice <= j), change, images, choice - i)

        where("shear_x+", "rotate-", lambda x, which: _move(x, _moves(scale, h, w, device), which))
        where("brightness+", "solarize", lambda x, which: _map_levels(x, _levels(scale, device), which))
        where("contrast+", "contrast-", lambda x, which: _blend(x, _mean(x), amount, which))
        if c == 3:
            where("color+", "color-", lambda x, which: _blend(x, tv.rgb_to_grayscale(x), amount, which))
        if min(h, w) > 2:
            where("sharpness+", "sharpness-", lambda x, which: _blend(x, tv.adjust_sharpness(x, 0), amount, which))
        where("autocontrast", "autocontrast", lambda x, _: tv2.autocontrast(x))
        where("equalize", "equalize", lambda x, _: tv2.equalize(x))
        return images


def _at(most: float, scale: tuple[int, int], least: float = 0.0) -> float:
    """How strong an operation is at (magnitude, bins): to the bit what torchvision computes."""
    magnitude, bins = scale
    return float(torch.linspace(least, most, bins)[magnitude])


def _where(hit: Tensor, change: Callable[[Tensor, Tensor], Tensor], images: Tensor, which: Tensor) -> Tensor:
    """The images with those of them changed that are hit (N,).

    A CPU works on these alone. On any other device to know how many they are would mean to wait for it, which costs more
    than to change all of a batch and to take what is wanted.
    """
    if images.device.type != "cpu":
        return torch.where(hit[:, None, None, None], change(images, which * hit), images)
    rows = hit.nonzero().squeeze(1)
    if len(rows):
        images.index_copy_(0, rows, change(images.index_select(0, rows), which.index_select(0, rows)))
    return images


def _move(images: Tensor, table: Tensor, which: Tensor) -> Tensor:
    """Each pixel from the place that row `which` (N,) of the table gives, H·W standing for outside."""
    n, c, h, w = images.shape
    padded = images.new_zeros(n, c, h * w + 1)
    padded[..., :-1] = images.flatten(2)
    start = torch.arange(n * c, device=images.device, dtype=torch.int64).view(n, c, 1) * (h * w + 1)
    index = table.index_select(0, which)[:, None] + start.to(torch.int32 if padded.numel() < 2**31 else torch.int64)
    return padded.view(-1).index_select(0, index.view(-1)).view(images.shape)


def _map_levels(images: Tensor, table: Tensor, which: Tensor) -> Tensor:
    """Each level as row `which` (N,) of the table (rows, 256) maps it."""
    index = images.int() + 256 * which.int()[:, None, None, None]
    return table.view(-1).index_select(0, index.view(-1)).view(images.shape)


def _blend(images: Tensor, others: Tensor, amount: float, which: Tensor) -> Tensor:
    """More (0) or less (1) of what tells the images from the others, by torchvision's formula."""
    more, less = 1 + amount, 1 - amount  # numbers, not a tensor of them, which would have to be copied to the device
    mine, theirs = torch.where(which == 0, more, less), torch.where(which == 0, 1 - more, 1 - less)
    mine, theirs = mine[:, None, None, None], theirs[:, None, None, None]
    return (mine * images + theirs * others).clamp(0, 255).to(torch.uint8)


def _mean(images: Tensor) -> Tensor:
    """(N, 1, 1, 1), of the grey image."""
    grey = tv.rgb_to_grayscale(images) if images.shape[1] == 3 else images
    return grey.float().mean((1, 2, 3), keepdim=True)


@functools.lru_cache(maxsize=8)
def _moves(scale: tuple[int, int], h: int, w: int, device: torch.device) -> Tensor:
    """(2 · moves, H·W) int32: the place that each pixel comes from, found by moving an image of the places."""
    places = torch.arange(1, h * w + 1, dtype=torch.float32).view(1, 1, h, w)
    still = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    rows = []
    for name in MOVES:
        for sign in (1, -1):
            if name == "rotate":
                moved = tv.rotate(places, sign * _at(30, scale))
            elif name.startswith("shear"):
                angle = math.degrees(math.atan(sign * _at(0.3, scale)))
                shear = [angle, 0.0] if name == "shear_x" else [0.0, angle]
                moved = tv.affine(places, **still | {"shear": shear}, center=[0, 0])
            else:
                pixels = int(sign * _at(150 / 331 * (w if name == "translate_x" else h), scale))
                shift = [pixels, 0] if name == "translate_x" else [0, pixels]
                moved = tv.affine(places, **still | {"translate": shift})
            rows.append(moved.flatten())
    table = torch.stack(rows).int()
    return torch.where(table == 0, h * w, table - 1).to(device)


@functools.lru_cache(maxsize=8)
def _levels(scale: tuple[int, int], device: torch.device) -> Tensor:
    """(4, 256) uint8: what becomes of each level."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    amount, (magnitude, bins) = _at(0.9, scale), scale
    dropped = int((torch.tensor(magnitude) / max((bins - 1) / 4, 1e-9)).round())
    rows = [tv.adjust_brightness(levels, 1 + amount), tv.adjust_brightness(levels, 1 - amount)]
    rows += [tv.posterize(levels, 8 - dropped), tv.solarize(levels, _at(0, scale, least=255))]
    return torch.stack(rows).flatten(1).to(device)
