"""Encoders of texts in the form of BERT, and MiniLM with the weights of `all-MiniLM-L6-v2`.

    net = minilm(2, (64,))                 # logits (N, 2) of token ids (N, 64) int64, in which 0 is padding
    net = minilm(0, (64,))                 # without classes: {"embedding": (N, 384)}, of length 1

Weights come from a Python package (`litdistill.data.weights`) and are read with safetensors alone. The texts must be tokenized
by MiniLM's own tokenizer, which comes with them (`data.tokenizer=minilm`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from litdistill.data.weights import obtain_weights
from litdistill.models.adaptations import adapted
from litdistill.models.finetune import zero_head
from litdistill.utils.errors import UserError

MINILM_VOCABULARY = 30522


class BertEmbedding(nn.Module):
    """Token ids (N, L) -> (N, L, width): the sum of a vector of the token, of its place and of the segment, normalized."""

    def __init__(self, vocab_size: int, length: int, width: int, dropout: float, eps: float):
        super().__init__()
        self.words = nn.Embedding(vocab_size, width, padding_idx=0)
        self.positions = nn.Embedding(length, width)
        self.segment = nn.Parameter(torch.zeros(width))  # BERT's first segment; a text has no second
        self.norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> Tensor:
        return self.dropout(self.norm(self.words(ids) + self.positions.weight[: ids.shape[1]] + self.segment))


class BertBlock(nn.Module):
    """Attention over the valid tokens, then two linear layers, each added to its input and normalized (post-norm).

    Vaswani et al. 2017 (arXiv 1706.03762, section 3) with GELU, as in Devlin et al. 2019 (arXiv 1810.04805).
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, eps: float):
        super().__init__()
        self.heads, self.p = heads, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """Returns (N, L, width). `valid`: (N, L) bool, which tokens are no padding."""
        n, length, width = x.shape
        query, key, value = (
            layer(x).view(n, length, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        # A finite number, so that a row of padding alone gives numbers.
        bias = torch.zeros_like(x[:, :, 0]).masked_fill(~valid, torch.finfo(x.dtype).min / 2)[:, None, None, :]
        p = self.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, bias.to(query.dtype), dropout_p=p)
        x = self.norm1(x + self.dropout(self.out(mixed.transpose(1, 2).reshape(n, length, width))))
        return self.norm2(x + self.dropout(self.down(F.gelu(self.up(x)))))


class Bert(nn.Module):
    """Token ids (N, L) int64, 0 = padding -> {"logits": (N, classes)} or {"embedding": (N, width)}, or both.

    The embedding is the mean over the valid tokens of the last block. One output alone is returned as a tensor if it is the
    logits.

    Args:
        num_classes: of the linear head; 0: none.
        outputs: which of logits and embedding to return; None: the logits if there are classes, else the embedding.
        embedding: width of a linear layer in front of the embedding, so that it is as wide as another network's; None: no such
            layer.
        normalize: divides the embedding by its length, as `all-MiniLM-L6-v2` does; the head reads the mean itself.
    """

    def __init__(
        self,
        num_classes: int,
        vocab_size: int,
        length: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        dropout: float = 0.1,
        outputs: Sequence[str] | None = None,
        embedding: int | None = None,
        normalize: bool = True,
        eps: float = 1e-12,
    ):
        super().__init__()
        if width % heads:
            raise UserError(f"width={width} must be a multiple of heads={heads}.")
        self.outputs = chosen_outputs(outputs, num_classes)
        self.normalize = normalize
        self.embed = BertEmbedding(vocab_size, length, width, dropout, eps)
        self.blocks = nn.ModuleList(BertBlock(width, heads, hidden, dropout, eps) for _ in range(depth))
        self.head, self.project = heads_of(width, num_classes, embedding)

    def forward(self, ids: Tensor) -> Tensor | dict[str, Tensor]:
        valid = ids != 0
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, valid)
        return named_outputs(self.outputs, mean_of_tokens(x, valid), self.head, self.project, self.normalize)


def text_length(name: str, input_shape: Sequence[int]) -> int:
    """Returns L of the shape (L,) of texts. Raises `UserError` for inputs of another shape."""
    if len(input_shape) != 1:
        raise UserError(
            f"net={name} reads texts, rows of token ids, and these inputs are {'x'.join(map(str, input_shape))}: take text "
            "data (data=movie_reviews, data=texts), or another network."
        )
    return input_shape[0]


def mean_of_tokens(x: Tensor, valid: Tensor) -> Tensor:
    """Returns the mean (N, C) of the tokens (N, L, C) where `valid` (N, L) is true; zeros where none is."""
    weight = valid.to(x.dtype)[:, :, None]
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)


def chosen_outputs(outputs: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    """Returns the names of a text network's outputs. Raises `UserError` for others, and for logits without classes."""
    found = tuple(outputs) if outputs is not None else ("logits",) if num_classes else ("embedding",)
    if not found or not set(found) <= {"logits", "embedding"}:
        raise UserError(f"outputs={list(found)}: choose logits, embedding or both.")
    if "logits" in found and not num_classes:
        raise UserError("outputs=[logits]: these data have no classes. Leave it out, or take outputs=[embedding].")
    return found


def heads_of(width: int, num_classes: int, embedding: int | None) -> tuple[nn.Module | None, nn.Module | None]:
    """Returns the linear layers that give the logits and the embedding, None for those that there are not."""
    head = nn.Linear(width, num_classes) if num_classes else None
    return head, nn.Linear(width, embedding) if embedding else None


def named_outputs(
    names: Sequence[str], pooled: Tensor, head: nn.Module | None, project: nn.Module | None, normalize: bool
) -> Tensor | dict[str, Tensor]:
    """Returns the logits of `pooled` (N, width) alone as a tensor, and otherwise the named outputs in a dict."""
    found = {}
    for name in names:
        if name == "logits" and head is not None:
            found[name] = head(pooled)
        else:
            embedding = pooled if project is None else project(pooled)
            found[name] = F.normalize(embedding, dim=1) if normalize else embedding
    return found["logits"] if tuple(found) == ("logits",) else found


def minilm(
    num_classes: int,
    input_shape: Sequence[int],
    weights: str | None = "all_minilm_l6_v2",
    vocab_size: int = MINILM_VOCABULARY,
    dropout: float = 0.1,
    outputs: Sequence[str] | None = None,
    normalize: bool = True,
    fetch: bool = True,
) -> nn.Module:
    """Returns MiniLM (6 layers, width 384, 22.6 M parameters) with a linear head that starts at zero.

    Wang et al. 2020 (arXiv 2002.10957), fine-tuned on pairs of sentences as `sentence-transformers/all-MiniLM-L6-v2`.
    `input_shape`: (L,) tokens, at most 512. `weights`: null for none. `outputs`, `normalize`: see `Bert`. `fetch`: False leaves
    out the loading of the weights. Raises `UserError` for other weights, for longer texts, for ids of another tokenizer, and
    where the weights cannot be had.
    """
    if weights not in (None, "all_minilm_l6_v2"):
        raise UserError(f"weights={weights}: minilm offers all_minilm_l6_v2, or null for none.")
    length = text_length("minilm", input_shape)
    if length > 512:
        raise UserError(f"minilm reads 512 tokens at most, and data.length={length}: choose a smaller one.")
    if weights is not None and vocab_size != MINILM_VOCABULARY:
        raise UserError(
            f"minilm's weights are for the {MINILM_VOCABULARY} tokens of its own tokenizer, and these data have {vocab_size}: "
            "set data.tokenizer=minilm, or weights=null."
        )
    net = Bert(num_classes, vocab_size, 512, 384, 6, 12, 1536, dropout, outputs, None, normalize)
    if weights is None:
        return bert_init(net)
    if net.head is not None:
        zero_head(net.head)
    if fetch and torch.get_default_device().type != "meta":
        load_published(net)
    changes = [f"head new and zero, of {num_classes} classes"] * bool(num_classes) + [f"texts of {length} tokens"]
    return adapted(net, "minilm", changes, weights)


def bert_init(net: nn.Module) -> nn.Module:
    """Draws all matrices and embeddings with a standard deviation of 0.02, as BERT begins, in place; returns `net`."""
    for layer in net.modules():
        if isinstance(layer, (nn.Linear, nn.Embedding)):
            nn.init.normal_(layer.weight, std=0.02)
        if isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
            nn.init.zeros_(layer.weight[layer.padding_idx])
    return net


RENAMED = {  # names of BERT's published weights
    "embeddings.word_embeddings": "embed.words",
    "embeddings.position_embeddings": "embed.positions",
    "embeddings.LayerNorm": "embed.norm",
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "out",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "norm2",
}


def from_bert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns BERT's published weights under the names of `Bert`; its pooler, which the mean replaces, is left out."""
    found = {}
    for name, value in state.items():
        if name == "embeddings.token_type_embeddings.weight":
            found["embed.segment"] = value[0]
        elif not name.startswith("pooler.") and not name.endswith("position_ids"):
            for theirs, own in RENAMED.items():
                name = name.replace(theirs, own)
            found[name.replace("encoder.layer.", "blocks.")] = value
    return found


def load_published(net: nn.Module) -> None:
    """Loads the published weights of MiniLM into all but the head of `net`, in place."""
    path = obtain_weights("minilm")
    try:
        state = from_bert(load_file(path))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} does not hold the weights of minilm: delete it and try again.") from error
    own = {name: value for name, value in net.state_dict().items() if name.startswith("head.")}
    net.load_state_dict({**own, **state})
