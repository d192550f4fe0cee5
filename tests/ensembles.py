"""Networks with fixed outputs that know some of the classes, shared by the tests of ensembles."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

KNOWN = [[0, 1, 2, 3], [5, 1, 4]]  # of six classes: the columns of the outputs of two networks stand for these
COLUMNS = [[0, 1, 2, 3, -1, -1], [-1, 1, -1, -1, 2, 0]]
WEIGHTS = [3.0, 1.0]


class Fixed(nn.Module):
    """Returns the same logits for any inputs."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.logits


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()
