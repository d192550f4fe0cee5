"""How much a classifier betrays about which samples it was trained on.

Membership inference by a threshold on the loss, and by a likelihood ratio with shadow models, whose runs are made by
`litdistill.benchmarks.shadows`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FALSE_POSITIVES = 0.01  # the share of samples not trained on that an attack may take for members
FEWEST = 100  # samples on either side from which that share is measured
FEWEST_SHADOWS = 2  # on either side of a sample, from which it has a mean and its deviation from it counts


class Membership(NamedTuple):
    """The success of the attack that takes samples with a small loss for members."""

    auc: float  # the probability that a member has a smaller loss than another sample, ties half; 0.5 if it learns nothing
    found: float | None  # the share of members found at `FALSE_POSITIVES`; None for fewer than `FEWEST` samples
    members: int
    others: int


def membership(members: Tensor, others: Tensor) -> Membership:
    """Returns how well a threshold on the loss tells members (M,) of the training set from other samples (N,).

    The attack of Yeom et al. 2018 (arXiv 1709.01604), with the true positives at few false ones as Carlini et al. 2022 (arXiv
    2112.03570) report them: an average such as the area hides that some samples may be recognized for certain.
    """
    members, others = members.double().sort().values, others.double().sort().values
    smaller = torch.searchsorted(others, members, right=False)  # others whose loss is below that of each member
    equal = torch.searchsorted(others, members, right=True) - smaller
    auc = 1 - (smaller.double() + equal / 2).mean().item() / len(others)
    found = None
    if min(len(members), len(others)) >= FEWEST:
        allowed = int(FALSE_POSITIVES * len(others))
        found = (members < others[allowed]).double().mean().item()  # so that no more than `allowed` others are below
    return Membership(auc, found, len(members), len(others))


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the cross-entropy of each sample in float64, (N,), of logits (N, classes)."""
    return F.cross_entropy(logits.double(), targets, reduction="none")


def log_odds(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns log p / (1 - p) of each sample's label in float64, (N,), of logits (N, classes).

    Taken from the logits themselves, as log p and log (1 - p) would be 0 for a confident network.
    """
    logits = logits.double()
    others = logits.masked_fill(F.one_hot(targets, logits.shape[1]).bool(), float("-inf")).logsumexp(1)
    return logits.gather(1, targets[:, None])[:, 0] - others


def likelihood_ratio(scores: Tensor, shadows: Tensor, trained: Tensor) -> Tensor:
    """Returns log N(s; mean_in, var_in) - log N(s; mean_out, var_out) of each sample, (N,), NaN where it is not known.

    The attack of Carlini et al. 2022 (arXiv 2112.03570): `scores` (N,) are the attacked model's `log_odds`, `shadows` (S, N)
    those of shadow models, and `trained` (S, N) says which of these were trained on which samples. Each sample has means of
    its own. For few shadow models the two variances are those around these means, pooled over all samples (chosen). Known
    is a sample with `FEWEST_SHADOWS` models on either side.
    """
    scores, shadows = scores.double(), shadows.double()
    count = torch.stack([trained.sum(0), (~trained).sum(0)])
    known = (count >= FEWEST_SHADOWS).all(0)
    logs = []
    for side, inside in enumerate((trained, ~trained)):
        mean = (shadows * inside).sum(0) / count[side]
        squares = ((shadows - mean).square() * inside).sum(0)
        variance = squares[known].sum() / (count[side][known] - 1).sum()
        logs.append(-((scores - mean).square() / variance + variance.log()) / 2)
    return torch.where(known, logs[0] - logs[1], torch.nan)
