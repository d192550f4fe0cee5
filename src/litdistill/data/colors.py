"""`ColorJitter` for whole batches of uint8 images, on their device.

Name, options, distribution and arithmetic are those of `torchvision.transforms.ColorJitter`, which draws and transforms
image by image. The views cannot be counted.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
import torchvision.transforms.functional as tv
from torch import Tensor

from litdistill.data import augment as aug
from litdistill.data.augment import further_bits
from litdistill.utils.errors import UserError

STEPS = ("brightness", "contrast", "saturation", "hue")
LEVELS = 2**16  # equally likely factors
CHUNK = 2**20  # values computed at once on a CPU, so that floats stay in its cache


class ColorJitter:
    """Brightness, contrast, saturation and hue of each image changed by a factor of its own, in an order of its own.

    A factor is uniform from max(0, 1 - x) to 1 + x, or in the given range; that of `hue` is a shift by at most `hue` turns of
    the color wheel (up to 0.5). Saturation and hue leave gray images unchanged.
    """

    views = None
    moves = False

    def __init__(
        self,
        brightness: float | Sequence[float] = 0.0,
        contrast: float | Sequence[float] = 0.0,
        saturation: float | Sequence[float] = 0.0,
        hue: float | Sequence[float] = 0.0,
    ):
        given = zip(STEPS, (brightness, contrast, saturation, hue), strict=True)
        ranges = {name: _range(name, value) for name, value in given}
        self.ranges = {name: ends for name, ends in ranges.items() if ends != ((0, 0) if name == "hue" else (1, 1))}

    def draw(self, bits: Tensor) -> Tensor:
        return bits

    def factors(self, code: Tensor) -> dict[str, Tensor]:
        """Returns the factor (N,) float32 of each step that changes anything."""
        found = {}
        for name, (low, high) in self.ranges.items():
            # Exact in float32 up to the last product and sum, which every device rounds alike.
            share = (further_bits(code, STEPS.index(name)) % LEVELS + 0.5) / LEVELS
            found[name] = share.float() * (high - low) + low
        return found

    def order(self, code: Tensor) -> Tensor:
        """Returns (N, steps) int64: the steps of each image in their order, as indices of `ranges`."""
        orders = _orders(len(self.ranges), code.device)
        return orders[further_bits(code, len(STEPS)) % len(orders)]

    def apply(self, images: Tensor, code: Tensor) -> Tensor:
        if images.device.type == "cpu" and images.numel() > CHUNK and len(images) > 1:
            part = max(1, CHUNK // images[0].numel())
            return torch.cat([self._apply(*pair) for pair in zip(images.split(part), code.split(part), strict=True)])
        return self._apply(images, code)

    def _apply(self, images: Tensor, code: Tensor) -> Tensor:
        factors, order = self.factors(code), self.order(code)
        images = images.clone(memory_format=torch.contiguous_format)
        for place in range(len(self.ranges)):
            for step, name in enumerate(self.ranges):
                change = functools.partial(_adjust, name)
                images = aug.change_where(order[:, place] == step, change, images, factors[name])
        return images


def _adjust(name: str, images: Tensor, factor: Tensor) -> Tensor:
    """Returns what torchvision's `adjust_<name>` makes of each image (N, C, H, W) uint8 by its factor (N,)."""
    factor, color = factor[:, None, None, None], images.shape[1] == 3
    if name == "brightness":
        return (images * factor).clamp(0, 255).to(torch.uint8)
    if name == "contrast":
        gray = tv.rgb_to_grayscale(images) if color else images
        return _blend(images, gray.float().mean((1, 2, 3), keepdim=True), factor)
    if not color:
        return images
    return _blend(images, tv.rgb_to_grayscale(images), factor) if name == "saturation" else _turn_hue(images, factor)


def _blend(images: Tensor, others: Tensor, factor: Tensor) -> Tensor:
    return (images * factor + others * (1 - factor)).clamp(0, 255).to(torch.uint8)


def _turn_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue by `shift` (N, 1, 1, 1) turns at the same lightest channel and the same spread (Smith 1978, HSV).

    With hue h in sixths of a turn, value v and spread c = v - min, channel k of (red, green, blue) is
    v - c · clamp(min(t, 4 - t), 0, 1) with t = (5, 3, 1)[k] + h modulo 6.
    """
    x = images.float()
    value, spread = x.amax(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    red, green, blue = x.split(1, 1)
    safe = spread.clamp(min=1)
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    turned = (hue + 6 * shift + _places(x.device)).remainder(6)
    return (value - spread * torch.minimum(turned, 4 - turned).clamp(0, 1) + 0.5).clamp(0, 255).to(torch.uint8)


@functools.lru_cache(maxsize=16)
def _places(device: torch.device) -> Tensor:
    return torch.tensor([5.0, 3.0, 1.0], device=device).view(1, 3, 1, 1)


@functools.lru_cache(maxsize=16)
def _orders(count: int, device: torch.device) -> Tensor:
    """Returns all orders of `count` steps (count!, count)."""
    return torch.tensor(list(itertools.permutations(range(count))), dtype=torch.int64, device=device)


def _range(name: str, value: float | Sequence[float]) -> tuple[float, float]:
    """Returns the lowest and the highest factor. Raises `UserError` for options that torchvision would refuse."""
    middle, least, most = (0.0, -0.5, 0.5) if name == "hue" else (1.0, 0.0, math.inf)
    if isinstance(value, (int, float)):
        ends = (max(least, middle - value), middle + value)
        valid = value >= 0 and ends[1] <= most
    else:
        ends = (float(value[0]), float(value[-1]))
        valid = len(value) == 2 and least <= ends[0] <= ends[1] <= most
    if not valid or not math.isfinite(ends[1]):
        limit = "at most 0.5" if name == "hue" else "0.4, for example"
        raise UserError(
            f"ColorJitter: {name}={value} must be a number that is not negative ({limit}), or [lowest, highest]."
        )
    return ends
