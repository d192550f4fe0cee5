"""Weights of the terms of the loss that follow their values: uncertainty weights (Kendall et al. 2018, arXiv 1705.07115).

There each term L of a loss has a variance σ², which is learned with the network: the sum of L / 2σ² + log σ is minimized
(equation 7). For a given L the best variance is L itself (UW-O of Kirchdorfer et al. 2024, arXiv 2408.07985), and over
minibatches its mean. So nothing need be learned: the variance is the running mean of a term, and its weight 1 / 2σ². Here
all weights are divided by that of the reference, so that the labels' loss keeps its own and the learning rate its meaning.
A hint then counts `ratio` times as much as the reference, by value and to the end of the run.

Which terms are balanced, and what the reference is: see `litdistill.distillation.balance`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from litdistill.distillation.balance import Rule, Together, reference
from litdistill.utils.errors import UserError


class Uncertainty(Rule):
    """Factors by running means of the terms' values.

    Args:
        ratio: a hint's value relative to the reference's, both as running means; 1: uncertainty weights.
        terms: as of `Rule`.
        decay: of the running means, by minibatch.

    A value that is 0 (a minibatch in which no sample has a label), negative or not finite leaves its mean as it is. Before
    the reference has one, factors are 0; a term without a mean has the factor 1. Raises `UserError` for a ratio that is
    negative or not finite, and for a decay outside of [0, 1).
    """

    def __init__(self, ratio: float = 1.0, terms: Mapping[str, float | None] | None = None, decay: float = 0.98):
        super().__init__(ratio, terms)
        if not 0 <= decay < 1:
            raise UserError(f"balance: decay={decay} must be at least 0 and below 1; 0.98 is the default.")
        self.decay = decay
        self.means = torch.zeros(1)  # of the reference and of the balanced terms in their order; 0: none yet
        self.first: dict[str, float] = {}  # factors of the first minibatch that counts
        self.gradients: dict[str, float] = {}  # norms there with these factors, relative to that of the reference

    @property
    def factors(self) -> dict[str, Tensor]:
        """Returns the factors of balanced terms by name, scalars on the device of the terms."""
        whole, *means = self.means
        return {
            name: torch.where(mean > 0, ratio * whole / mean, torch.ones_like(mean))
            for (name, ratio), mean in zip(self.ratios.items(), means, strict=True)
        }

    @property
    def constants(self) -> tuple[Any, ...]:
        """Returns nothing that changes: means are read on the device."""
        return ()

    def begin(
        self,
        balanced: dict[str, float],
        labels: Mapping[str, Tensor],
        terms: Mapping[str, Tensor],
        norms: Tensor,
        together: Together | None,
    ) -> None:
        """Follows a minibatch, the last of the first ones where the reference has a mean; see `Rule.begin`."""
        self.ratios = balanced
        self.follow(labels, terms, together)
        self.first = {name: float(factor) for name, factor in self.factors.items()}
        self.finished = bool(self.means[0] > 0)
        whole, *others = (norms if together is None else together(norms)).tolist()
        shares = {k: self.first[k] * norm / whole if whole else 0.0 for k, norm in zip(balanced, others, strict=True)}
        self.gradients = {
            name: share if math.isfinite(share) else 0.0 for name, share in shares.items()
        }  # of an overflow

    @torch.no_grad()
    def follow(
        self, labels: Mapping[str, Tensor], terms: Mapping[str, Tensor], together: Together | None = None
    ) -> None:
        """Moves the means towards the values of a minibatch, in place; reads nothing from the device."""
        if not self.ratios:
            return
        whole = reference(labels, terms, self.ratios)
        found = torch.stack([whole, *(terms.get(name, torch.zeros_like(whole)) for name in self.ratios)])
        found = found if found.dtype == torch.float64 else found.float()
        counts = found.isfinite() & (found > 0)
        sums = torch.stack([torch.where(counts, found, 0), counts.to(found)])
        values, counted = sums if together is None else together(sums)
        values = values / counted.clamp(min=1)
        if len(self.means) != len(found) or self.means.device != found.device or self.means.dtype != found.dtype:
            self.means = self.means.to(found).expand(len(found)).clone()
        moved = torch.where(self.means > 0, torch.lerp(values, self.means, self.decay), values)
        self.means.copy_(torch.where(counted > 0, moved, self.means))

    def found(self) -> dict[str, dict[str, float]]:
        """Returns for each balanced term its `factor` now, the `first` one and the `gradient` with it, and its `ratio`."""
        return {
            name: {
                "factor": float(factor),
                "first": self.first[name],
                "gradient": self.gradients.get(name, 0.0),
                "ratio": self.ratios[name],
            }
            for name, factor in self.factors.items()
        }

    def __str__(self) -> str:
        parts = [
            f"{name} by {factor:.3g}, with a gradient {self.gradients.get(name, 0.0):.3g} times that of the other terms"
            for name, factor in self.first.items()
        ]
        terms = ", ".join(f"{name}: {ratio:g}" for name, ratio in self.ratios.items())
        return (
            f"Uncertainty weights begin with {'; '.join(parts)}. The defaults of these weights have no effect: "
            f"balance.terms={{{terms}}} sets what a term counts, balance=auto goes by gradients, balance=none keeps defaults."
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns plain values, exact to the bit."""
        known = {"ratios": dict(self.ratios), "first": dict(self.first), "gradients": dict(self.gradients)}
        return known | {"means": self.means.tolist(), "finished": self.finished}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.ratios, self.first, self.gradients = (dict(state[key]) for key in ("ratios", "first", "gradients"))
        self.finished = state["finished"]
        self.means = torch.tensor(state["means"], dtype=torch.float64)  # in the terms' own type at the next minibatch
