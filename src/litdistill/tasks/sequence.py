"""Language models: the next token at each place of a padded sequence; perplexity and token accuracy.

python scripts/train.py experiment=tasks/tokens
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from litdistill.methods.base import CATEGORICAL
from litdistill.tasks.base import Samples, Task, overflowed
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError
from litdistill.utils.modality import PADDING
from litdistill.utils.shapes import described


class LanguageModel(Task):
    """Inputs (N, T) int64 token ids; logits (N, T, V); targets (N, T) int64, the token that follows each, `PADDING` where none.

    All means are over the tokens with a target, so that padding, and how tokens are divided into samples, batches and
    processes, change nothing.
    """

    kind = CATEGORICAL
    monitor: tuple[str, Literal["max", "min"]] = ("perplexity", "min")

    def places(self, targets: Any) -> Tensor | None:
        """Returns where there is a target, (N, T) bool. Raises `UserError` where there is none, or for other targets."""
        if not isinstance(targets, Tensor) or targets.ndim != 2 or targets.is_floating_point():
            raise UserError(
                f"The targets are {described(targets)}, and a language model needs the next tokens, integers (N, T), {PADDING} "
                "for padding. One class a text is task=classification."
            )
        found = targets != PADDING
        if not bool(found.any()):
            raise UserError(
                f"No token of a batch of {len(targets)} has a target: all are {PADDING}. Leave empty texts out."
            )
        return found

    def forward(self, net: nn.Module, batch: Batch, training: bool) -> Outputs:
        try:
            outputs = super().forward(net, batch, training)
        except IndexError as error:  # of an embedding on a CPU
            raise _beyond_embedding(batch.inputs, error) from error
        if outputs.logits.ndim != 3:
            raise UserError(
                f"The network gives {tuple(outputs.logits.shape)}, and a language model gives logits (N, T, vocabulary), "
                "such as net=causal_transformer."
            )
        return outputs

    def loss(self, net: nn.Module, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Returns `hard`: the cross-entropy of the places with a target in nats, in float32 also under autocast.

        Takes sequences, (N, T, V) and (N, T), or places, (P, V) and (P,). Raises `UserError` for a token beyond the logits.
        """
        logits, targets = flat(outputs.logits.float(), batch.targets)
        try:
            return {"hard": F.cross_entropy(logits, targets)}
        except IndexError as error:  # raised on a CPU only; a check on a GPU would need a synchronization
            raise beyond(targets, logits.shape[1]) from error

    def decode(self, outputs: Outputs) -> dict[str, Tensor]:
        """Returns the most probable next token at each place, and its probability, (N, T)."""
        probability, token = outputs.logits.float().softmax(-1).max(-1)
        return {"token": token, "probability": probability}

    def metrics(self) -> Metric:
        return TokenMetrics()

    def scores(self, outputs: Outputs, targets: Tensor) -> dict[str, Tensor]:
        logits, targets = flat(outputs.logits, targets)
        return {"accuracy": (logits.argmax(1) == targets).float()}

    def agreement(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """Returns for each place whether the predictions are equal, and KL(teacher ‖ student) in nats, in float32."""
        s, t = student.logits.float(), teacher.logits.float()
        kl = F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        return {"agreement": (s.argmax(-1) == t.argmax(-1)).float(), "kl": kl}

    def chance(self, targets: Tensor) -> float | None:
        """Returns the perplexity of these tokens' own frequencies (the unigram distribution): the least of any network that
        does not look at the text."""
        counts = torch.bincount(targets[targets != PADDING].cpu()).double()
        p = counts[counts > 0] / counts.sum()
        return math.exp(-(p * p.log()).sum().item()) if len(p) else None

    def figures(self, samples: Samples) -> dict[str, Any]:
        from litdistill.tasks.text_figures import language_figures

        return language_figures(samples)


class TokenMetrics(Metric):
    """Perplexity exp(mean NLL), token accuracy and NLL in nats over all places with a target.

    States are sums in float64: the same for any batches and number of processes, up to the rounding of such sums.
    """

    full_state_update = False
    nll: Tensor
    right: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("nll", "right", "tokens"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, outputs: Outputs, targets: Tensor) -> None:
        """Takes sequences, (N, T, V) and (N, T), or places, (P, V) and (P,)."""
        logits, targets = flat(outputs.logits.detach(), targets)
        self.nll += token_nll(logits, targets).sum()
        self.right += (logits.argmax(1) == targets).sum()
        self.tokens += len(targets)

    def compute(self) -> dict[str, Tensor]:
        """Raises `UserError` where the logits are not finite."""
        nll = self.nll / self.tokens
        if not bool(nll.isfinite()):
            raise overflowed("The logits of some tokens")
        return {"perplexity": nll.exp(), "accuracy": self.right / self.tokens, "nll": nll}

    def set_dtype(self, dst_type: Any) -> TokenMetrics:
        """Stays in float64."""
        return self


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the surprise −log p of each token in nats, (P,) float64; logits (P, V), targets (P,). The logarithms are
    computed in chunks, since float64 logits of a whole split are large."""
    chunks = zip(logits.split(4096), targets.split(4096), strict=True)
    return torch.cat([F.cross_entropy(x.double(), y, reduction="none") for x, y in chunks])


def _beyond_embedding(tokens: Any, error: IndexError) -> UserError:
    if not isinstance(tokens, Tensor) or not tokens.numel():
        return UserError(f"The network cannot look these tokens up: {error}.")
    return UserError(
        f"Token ids go from {int(tokens.min())} to {int(tokens.max())}, and the network's embedding has no row for one: "
        "build it with the vocabulary of these data, or encode the texts with the tokenizer of the network."
    )


def flat(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns logits (P, V) and targets (P,) of the places with a target."""
    found = targets != PADDING
    return logits[found], targets[found]


def beyond(targets: Tensor, vocabulary: int) -> UserError:
    """Returns the error for a token that the network has no logit for."""
    return UserError(
        f"Tokens go from {int(targets.min())} to {int(targets.max())}, and the network gives {vocabulary} logits: it needs one "
        "for each token of the vocabulary, and tokens are counted from 0."
    )
