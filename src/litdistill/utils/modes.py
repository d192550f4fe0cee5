"""Evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(*networks: nn.Module) -> Iterator[None]:
    """Context with all modules of the networks in eval mode; restores the mode of each on exit.

    Not by `eval()` and `train()`, which a frozen network may override, and which forget that a part was in another mode.
    """
    modes = [(module, module.training) for net in networks for module in net.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
