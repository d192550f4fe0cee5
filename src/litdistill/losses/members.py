"""Losses that compare a prediction with those of several teachers that know only some of the classes.

What a teacher gives is the distribution of the classes that it knows under the condition that one of them is right, and this
is what it is compared with in the student. The relation is that of Vongkulbhisal et al. 2019, "Unifying heterogeneous
classifiers with distillation" (arXiv 1904.06062), who estimate a distribution of all classes from it; here the student is
compared directly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from litdistill.losses.values import wide


def members_kl(student: Tensor, members: Tensor, temperature: float | Tensor = 4.0) -> Tensor:
    """T² · Σ w · KL(teacher ‖ student) over teachers that know only some of the classes; a scalar, averaged over the batch.

    Each divergence is among the classes that the teacher knows: the student's softmax is taken over these alone, so that its
    other logits get no gradient from it, and neither does their sum. Where each teacher knows all classes, the gradient is that
    of `kl` with the mean of their distributions at temperature T.
    `student`: logits (N, classes). `members`: (N, teachers, classes), log(w·p), −∞ where a teacher does not know a class
    (`litdistill.models.ensemble.Ensemble`).
    """
    weights, p, log_p, log_q = _distributions(student, members, temperature)
    return (weights * (p * (log_p - log_q)).sum(2)).sum() / len(student) * temperature**2


def members_cross_entropy(student: Tensor, members: Tensor, temperature: float = 4.0) -> Tensor:
    """`members_kl` plus the entropies of the teachers, which are constant; a scalar. Arguments as there."""
    weights, p, _, log_q = _distributions(student, members, temperature)
    return -(weights * (p * log_q).sum(2)).sum() / len(student) * temperature**2


def _distributions(
    student: Tensor, members: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the weights (N, teachers), and at temperature T, among the classes that each teacher knows, its probabilities,
    their logarithms and the student's, (N, teachers, classes); 0 for other classes."""
    members = wide(members)
    unknown = members == -torch.inf
    log_p = F.log_softmax(members / temperature, dim=2)
    log_q = F.log_softmax((wide(student) / temperature)[:, None].masked_fill(unknown, -torch.inf), dim=2)
    weights, p = members.logsumexp(2).exp(), log_p.exp()
    return weights, p, log_p.masked_fill(unknown, 0.0), log_q.masked_fill(unknown, 0.0)
