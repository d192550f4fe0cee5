"""How much a classifier betrays about which samples it was trained on: membership inference by a threshold on the loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FALSE_POSITIVES = 0.01  # the share of samples not trained on that an attack may take for members
FEWEST = 100  # samples on either side from which that share is measured


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
