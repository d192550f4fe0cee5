"""Small networks for texts as token ids (N, L) int64, in which 0 is padding: students of an encoder such as MiniLM.

    net = text_cnn(2, (64,), vocab_size=30522, width=64)
    logits = net(ids)

Padding changes no output. With `outputs=[embedding]` they give an embedding in place of logits: see `litdistill.models.bert`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litdistill.models.bert import (
    Bert,
    bert_init,
    chosen_outputs,
    heads_of,
    mean_of_tokens,
    named_outputs,
    text_length,
)
from litdistill.utils.errors import UserError

PRIME = 1_000_003  # of the hash of two tokens


class Bag(nn.Module):
    """The mean of the embeddings of tokens, and of pairs of neighboring ones, then one linear layer.

    Joulin et al. 2017 (fastText, arXiv 1607.01759), with the pairs hashed into as many rows of a second embedding.
    """

    def __init__(
        self,
        num_classes: int,
        vocab_size: int,
        width: int,
        bigrams: int,
        dropout: float,
        outputs: Sequence[str] | None,
        embedding: int | None,
    ):
        super().__init__()
        self.outputs, self.bigrams = chosen_outputs(outputs, num_classes), bigrams
        self.words = nn.Embedding(vocab_size, width, padding_idx=0)
        self.pairs = nn.Embedding(bigrams, width) if bigrams else None
        self.dropout = nn.Dropout(dropout)
        self.head, self.project = heads_of(width, num_classes, embedding)

    def forward(self, ids: Tensor) -> Tensor | dict[str, Tensor]:
        pooled = mean_of_tokens(self.words(ids), ids != 0)
        if self.pairs is not None:
            hashed = torch.remainder(ids[:, :-1] * PRIME + ids[:, 1:], self.bigrams)
            pooled = pooled + mean_of_tokens(self.pairs(hashed), ids[:, 1:] != 0)
        return named_outputs(self.outputs, self.dropout(pooled), self.head, self.project, normalize=True)


class TextCNN(nn.Module):
    """Convolutions of several widths over the embeddings, the largest value of each channel, then one linear layer.

    Kim 2014 (arXiv 1408.5882, "CNN-rand").
    """

    def __init__(
        self,
        num_classes: int,
        vocab_size: int,
        width: int,
        kernels: Sequence[int],
        channels: int,
        dropout: float,
        outputs: Sequence[str] | None,
        embedding: int | None,
    ):
        super().__init__()
        self.outputs, self.kernels = chosen_outputs(outputs, num_classes), tuple(kernels)
        self.words = nn.Embedding(vocab_size, width, padding_idx=0)
        self.convs = nn.ModuleList(nn.Conv1d(width, channels, k) for k in kernels)
        self.dropout = nn.Dropout(dropout)
        self.head, self.project = heads_of(channels * len(kernels), num_classes, embedding)

    def forward(self, ids: Tensor) -> Tensor | dict[str, Tensor]:
        valid = (ids != 0)[:, None, :]
        x = self.words(ids).transpose(1, 2) * valid
        # Zero is the least that a ReLU gives, so what is centered on padding is never the largest.
        found = []
        for conv, k in zip(self.convs, self.kernels, strict=True):
            found.append((conv(F.pad(x, ((k - 1) // 2, k // 2))).relu() * valid).amax(2))
        pooled = torch.cat(found, 1)
        return named_outputs(self.outputs, self.dropout(pooled), self.head, self.project, normalize=True)


def embedding_bag(
    num_classes: int,
    input_shape: Sequence[int],
    vocab_size: int,
    width: int = 64,
    bigrams: int = 0,
    dropout: float = 0.0,
    outputs: Sequence[str] | None = None,
    embedding: int | None = None,
) -> nn.Module:
    """Returns a `Bag`: one lookup a token. `bigrams`: rows for pairs of neighboring tokens (100000 is common); 0: none."""
    text_length("embedding_bag", input_shape)
    return Bag(num_classes, vocab_size, width, bigrams, dropout, outputs, embedding)


def text_cnn(
    num_classes: int,
    input_shape: Sequence[int],
    vocab_size: int,
    width: int = 300,
    kernels: Sequence[int] = (3, 4, 5),
    channels: int = 100,
    dropout: float = 0.5,
    outputs: Sequence[str] | None = None,
    embedding: int | None = None,
) -> nn.Module:
    """Returns a `TextCNN`. `width`: of the embeddings; `kernels`: widths of the convolutions; `channels`: of each of them."""
    if not kernels or min(kernels) < 1:
        raise UserError(
            f"kernels={list(kernels)}: text_cnn needs the width of one convolution at least: kernels=[3,4,5]."
        )
    text_length("text_cnn", input_shape)
    return TextCNN(num_classes, vocab_size, width, kernels, channels, dropout, outputs, embedding)


def text_transformer(
    num_classes: int,
    input_shape: Sequence[int],
    vocab_size: int,
    width: int = 128,
    depth: int = 2,
    heads: int = 2,
    dropout: float = 0.1,
    outputs: Sequence[str] | None = None,
    embedding: int | None = None,
) -> nn.Module:
    """Returns an encoder in the form of BERT, by default of BERT-tiny's size: 2 layers of width 128 with 2 heads.

    Turc et al. 2019 (arXiv 1908.08962). The layers' hidden width is four times `width`.
    """
    length = text_length("text_transformer", input_shape)
    return bert_init(Bert(num_classes, vocab_size, length, width, depth, heads, 4 * width, dropout, outputs, embedding))
