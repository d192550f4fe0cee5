"""A causal transformer for language models, in the form of GPT-2."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from litdistill.utils.errors import UserError


class Block(nn.Module):
    """Causal self-attention and a perceptron, each behind a layer norm and beside a residual: (N, T, width)."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up, self.act, self.down = (
            nn.Linear(width, 4 * width),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * width, width),
        )
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        # The mask keeps each place from what follows it, padding included: padded places change no other.
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout * self.training)
        x = x + self.drop(self.out(attended.transpose(1, 2).reshape(n, t, width)))
        return x + self.drop(self.down(self.act(self.up(self.norm2(x)))))


class CausalTransformer(nn.Module):
    """See `causal_transformer`. Token ids (N, T) int64, T at most `length` -> logits (N, T, vocabulary)."""

    def __init__(self, vocabulary: int, length: int, layers: int, width: int, heads: int, dropout: float):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.drop(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]])
        return self.head(self.norm(self.blocks(x)))


def causal_transformer(
    num_classes: int,
    input_shape: Sequence[int],
    layers: int = 2,
    width: int = 128,
    heads: int = 4,
    dropout: float = 0.0,
) -> nn.Module:
    """A decoder as of GPT-2 (Radford et al. 2019): learned positions, pre-norm blocks, and a head tied to the embedding.

    Weights are drawn from N(0, 0.02²), those that end in a residual with 0.02 / √(2 · layers), biases are 0 (section 2.3 of
    that report). `num_classes`: tokens of the vocabulary. `input_shape`: (T,), the longest sequence. The tap `head:in` is
    the last hidden state (N, T, width), `blocks.0`, … are those of the layers. Raises `UserError` for a width that the
    heads do not divide, and for inputs that are no sequence.
    """
    if len(input_shape) != 1:
        raise UserError(
            f"causal_transformer reads sequences of token ids, and these inputs are {tuple(input_shape)}: use other data, such "
            "as data=docstrings, or another network."
        )
    if min(layers, width, heads) < 1 or width % heads:
        raise UserError(f"layers={layers}, width={width}, heads={heads}: each at least 1, and heads divides width.")
    return CausalTransformer(num_classes, input_shape[0], layers, width, heads, dropout)
