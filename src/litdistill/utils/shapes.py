"""What a value that somebody else made is, in words for a message: types and shapes, never the numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

SHOWN = 6  # entries of a list, a tuple or a mapping


def described(value: Any) -> str:
    """Returns the type of a value, and of tensors and arrays dtype and shape: `{image: float32 (8, 3, 32, 32)}`."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"array of NumPy {value.dtype} {value.shape}"
    if isinstance(value, Mapping):
        inside = [f"{key}: {described(one)}" for key, one in list(value.items())[:SHOWN]]
        return "{" + ", ".join(inside) + (", …" if len(value) > SHOWN else "") + "}"
    if isinstance(value, (tuple, list)):
        inside = [described(one) for one in value[:SHOWN]]
        if len(value) > 2 and len(set(inside)) == 1:
            return f"{type(value).__name__} of {len(value)} {inside[0]}"
        return f"({', '.join(inside)}{', …' if len(value) > SHOWN else ''})"
    return type(value).__name__
