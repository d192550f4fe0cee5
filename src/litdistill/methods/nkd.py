"""Normalized knowledge distillation (NKD). Yang et al. 2023 (arXiv 2303.13005), section 3."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from litdistill.losses.logits import non_target
from litdistill.losses.values import wide
from litdistill.methods.base import CATEGORICAL, Method, check_temperature, check_weights
from litdistill.types import Batch, Outputs, class_of


def target_term(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """−T_t · log S_t, with T_t and S_t the probabilities that teacher and student give the target class; the batch mean.

    Logits (N, classes), target (N,).
    """
    probability = F.softmax(wide(teacher), dim=1).gather(1, target[:, None])
    return -(probability * F.log_softmax(wide(student), dim=1).gather(1, target[:, None])).mean()


def others_term(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    """−λ² · Σ N(T_i) log N(S_i) over the classes but the target, at temperature λ; the batch mean.

    N normalizes their probabilities to a sum of 1, so that it is a cross-entropy of two distributions. 0 for two classes.
    Logits (N, classes), target (N,).
    """
    p = F.softmax(non_target(wide(teacher), target) / temperature, dim=1)
    return F.cross_entropy(non_target(wide(student), target) / temperature, p) * temperature**2


class NKD(Method):
    """`hard` · labels' loss + `target` · the target's term + `others` · the others' term; the paper's γ is `others`.

    For mixed labels, the class with the largest share is the target.
    """

    reads_targets = True
    kinds = (CATEGORICAL,)
    takes_places = True

    def __init__(self, hard: float = 1.0, target: float = 1.0, others: float = 1.5, temperature: float = 1.0):
        super().__init__(hard)
        check_weights(target=target, others=others)
        check_temperature(temperature)
        self.target, self.others, self.temperature = target, others, temperature

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        labels = class_of(batch.targets)
        terms, pair = {}, (student.logits, teacher.logits)
        if self.target:
            terms["target"] = self.target * target_term(*pair, labels)
        if self.others:
            terms["others"] = self.others * others_term(*pair, labels, self.temperature)
        return terms
