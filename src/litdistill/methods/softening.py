"""How logit methods soften: of logits as they are or standardized, by a temperature that is fixed or learnt.

Standardized logits: Sun et al. 2024 (arXiv 2403.01427). A learnt temperature: Li et al. 2023, CTKD (arXiv 2211.16231).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from litdistill.losses.logits import standardize
from litdistill.methods.base import Method, check_temperature
from litdistill.utils.errors import UserError

LOWEST, RANGE = 1.0, 20.0  # of CTKD's global temperature: T = 1 + 20 · sigmoid(θ)


class Softening(nn.Module):
    """The temperatures of a method, and whether its logits are standardized first.

    Args:
        temperatures: one, or several of a loss that is summed over them.
        standardized: each sample's logits get a mean of 0 and a standard deviation of 1 first.
        learnt: epochs over which the reversed gradient of the temperatures rises to its full size along a cosine; 0 keeps
            the temperatures fixed. Each is T = 1 + 20 · sigmoid(θ), starts where it is given and is trained against the
            student: θ climbs the loss that the student descends. The paper's rise is 10 epochs, its start θ = 1 (T = 15.62).

    Raises `UserError` for a temperature that is not above 0, or, if learnt, not between 1 and 21.
    """

    def __init__(self, temperatures: Sequence[float], standardized: bool = False, learnt: int = 0):
        super().__init__()
        for temperature in temperatures:
            check_temperature(temperature)
            if learnt and not LOWEST < temperature < LOWEST + RANGE:
                raise UserError(f"A learnt temperature stays between 1 and 21: start it there, not at {temperature}.")
        if learnt < 0:
            raise UserError(f"learnt={learnt} is a number of epochs: 10 as in the paper, or 0 for a fixed temperature.")
        self.fixed, self.standardized, self.learnt = tuple(temperatures), standardized, learnt
        if learnt:
            shares = torch.tensor([(t - LOWEST) / RANGE for t in self.fixed])
            self.theta = nn.Parameter(torch.logit(shares))

    def logits(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the logits (N, classes) of both, standardized sample by sample if that is asked for."""
        return (standardize(student), standardize(teacher)) if self.standardized else (student, teacher)

    def temperatures(self, epoch: int) -> Sequence[float] | Tensor:
        """Returns the temperatures of an epoch, counted from 0; learnt ones as a tensor whose gradient is reversed."""
        if not self.learnt:
            return self.fixed
        value = self.theta.detach()
        reversed_theta = value - self.reversal(epoch) * (
            self.theta - value
        )  # the value of θ to the bit, its gradient times −λ
        return LOWEST + RANGE * reversed_theta.sigmoid()

    def reversal(self, epoch: int) -> float:
        """Returns λ: from 0 to 1 along half a cosine over the first `learnt` epochs."""
        return (1 - math.cos(math.pi * min(epoch + 1, self.learnt) / self.learnt)) / 2

    def watched(self) -> dict[str, Tensor]:
        """Returns the learnt temperatures to log: by their number where there are several."""
        if not self.learnt:
            return {}
        found = LOWEST + RANGE * self.theta.detach().sigmoid()
        return {"temperature" if len(found) == 1 else f"temperature_{i}": t for i, t in enumerate(found)}


def use_softening(method: Method, softening: Softening) -> Softening:
    """Says of a method what follows from its softening, and returns that."""
    method.by_epoch = bool(softening.learnt)
    if softening.standardized:
        method.fewest_classes = 3  # of two, standardized logits are the decision
    return softening
