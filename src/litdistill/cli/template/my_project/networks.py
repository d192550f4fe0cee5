"""Networks of this project: functions of the number of classes and of the shape (C, H, W) of an image."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import nn


def tiny(num_classes: int, input_shape: Sequence[int], width: int = 64) -> nn.Module:
    """Returns a network of one hidden layer. `width`: its units."""
    return nn.Sequential(nn.Flatten(), nn.Linear(prod(input_shape), width), nn.ReLU(), nn.Linear(width, num_classes))
