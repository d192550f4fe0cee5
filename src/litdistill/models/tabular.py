"""A perceptron for tables: numbers as they are, and a learned vector for each code of a category."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from litdistill.models.small import mlp
from litdistill.utils.errors import UserError


def embedding_mlp(
    num_classes: int,
    input_shape: Sequence[int],
    widths: Sequence[int] = (64, 64),
    dropout: float = 0.0,
    size: int = 8,
    categories: Sequence[int] = (),
) -> nn.Module:
    """Embeddings of codes beside the numbers (Guo & Berkhahn 2016, arXiv 1604.06737), then a perceptron.

    `categories`: for each of the F features how many categories its codes 0, 1, … are of; 0 for a number. The data know it.
    `size`: numbers of each vector. A code beyond the last category has a vector of its own, which starts at zero.
    """
    counts = list(categories) or [0] * input_shape[0]
    if len(counts) != input_shape[0] or size < 1:
        raise UserError(
            f"embedding_mlp: categories has {len(counts)} counts for {input_shape[0]} features, size={size} (at least 1)."
        )
    return nn.Sequential(CodeEmbedding(counts, size), mlp(num_classes, [_width(counts, size)], widths, dropout))


def _width(counts: Sequence[int], size: int) -> int:
    return sum(size if count else 1 for count in counts)


class CodeEmbedding(nn.Module):
    """From (N, F) floats to (N, features): numbers, and then the vectors of the codes."""

    def __init__(self, counts: Sequence[int], size: int):
        super().__init__()
        self.numbers = [i for i, count in enumerate(counts) if not count]
        self.codes = [i for i, count in enumerate(counts) if count]
        self.tables = nn.ModuleList(nn.Embedding(count + 1, size) for count in counts if count)
        for table in self.tables:
            assert isinstance(table, nn.Embedding)
            nn.init.zeros_(table.weight[-1:].detach())

    def forward(self, inputs: Tensor) -> Tensor:
        vectors = [table(inputs[:, i].long()) for i, table in zip(self.codes, self.tables, strict=True)]
        return torch.cat([inputs[:, self.numbers], *vectors], dim=1)
