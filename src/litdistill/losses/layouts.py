"""Brings two features of any shapes into one layout, so that a loss can compare them.

Features are vectors (N, C), tokens (N, T, C) or maps (N, C, H, W); here channels are always in dimension 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor

from litdistill.losses.maps import same_size
from litdistill.utils.errors import UserError

PREFIXES = (
    0,
    1,
    2,
    5,
)  # leading tokens that are no positions: none; a class; a class and a distillation; four registers


def align(student: Tensor, teacher: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Returns both features in the layout of a loss (`litdistill.losses.named.Loss`), with their channels in dimension 1.

    - A vector beside a map or tokens: the other is averaged over its positions.
    - Two maps: the larger is average-pooled to the size of the smaller, each axis by itself.
    - A map beside tokens: the tokens are laid out as a grid of the map's proportions, without leading tokens that are no
      positions (class, distillation, registers); then as two maps.
    - Tokens of two lengths: as maps, if both lengths are squares of 2 or more; else the longer sequence is averaged down, if
      its length is a multiple of the shorter one's; else as maps, if both are squares behind equally many leading tokens, or
      one and the same square behind other numbers of them.

    Raises `UserError` for shapes that cannot be paired, or that have no positions where the loss compares positions.
    """
    s, t = channels_first(student), channels_first(teacher)
    if layout == "samples" and (s.ndim == 2) == (t.ndim == 2):
        return s, t
    if layout in ("places", "maps", "channels") and 2 in (s.ndim, t.ndim):
        raise UserError(
            "this loss compares positions, and a vector (N, C) has none: name a map or tokens of both networks."
        )
    if layout == "channels":
        return s, t
    s, t = same_positions(s, t)
    if layout == "maps" and s.ndim != 4:
        raise UserError("this loss compares maps (N, C, H, W): name one of both networks.")
    if layout in ("places", "maps") and s.shape[2:].numel() == 1:
        raise UserError(
            "this loss compares positions, and there is only one: name earlier features, or take larger inputs."
        )
    if layout == "rows":
        s, t = (x.flatten(2).transpose(1, 2).flatten(0, 1) if x.ndim > 2 else x for x in (s, t))
    return s, t


def channels_first(x: Tensor) -> Tensor:
    """Returns tokens (N, T, C) as (N, C, T); vectors (N, C) and maps (N, C, H, W) unchanged. Raises `UserError` for others."""
    if x.ndim not in (2, 3, 4):
        raise UserError("a feature is a vector (N, C), tokens (N, T, C) or a map (N, C, H, W): name another.")
    return x.transpose(1, 2) if x.ndim == 3 else x


def same_positions(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Returns both with the same positions behind dimension 1, or without any; see `align`."""
    if 2 in (s.ndim, t.ndim):
        s, t = (x.flatten(2).mean(2) if x.ndim > 2 else x for x in (s, t))
    elif s.ndim != t.ndim:
        s, t = (_grid(s, t.shape[2:]), t) if s.ndim == 3 else (s, _grid(t, s.shape[2:]))
    elif s.ndim == 3 and s.shape[2] != t.shape[2]:
        s, t = _two_lengths(s, t)
    return same_size(s, t)


def _grid(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """Returns tokens (N, C, T) as a map of the proportions of `size`. Raises `UserError` where they are none."""
    count = tokens.shape[2]
    for prefix in PREFIXES:
        height = math.isqrt((count - prefix) * size[0] // size[1]) if count > prefix else 0
        width = (count - prefix) // height if height else 0
        if height and height * width == count - prefix and height * size[1] == width * size[0]:
            return tokens[:, :, prefix:].unflatten(2, (height, width))
    raise UserError(
        f"{count} tokens are no grid of the proportions of a map of {size[0]}x{size[1]}: name a vector of either, as pooled."
    )


def _two_lengths(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Returns tokens (N, C, T) of two lengths as maps or as sequences that can be averaged to one length."""
    a, b = s.shape[2], t.shape[2]
    both = itertools.product(PREFIXES, PREFIXES)
    grids = [(k, m) for k, m in both if _square(a - k) and _square(b - m) and (k == m or a - k == b - m)]
    if max(a, b) % min(a, b) == 0 and (0, 0) not in grids:
        return s, t
    if not grids:
        raise UserError(
            f"sequences of {a} and {b} tokens cannot be paired: neither is a multiple of the other, nor are both square grids. "
            "Name a vector of either, as pooled."
        )
    k, m = min(grids, key=lambda pair: (pair[0] != pair[1], pair))
    return _grid(s[:, :, k:], (1, 1)), _grid(t[:, :, m:], (1, 1))


def _square(n: int) -> bool:
    return n > 1 and math.isqrt(n) ** 2 == n
