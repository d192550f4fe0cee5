"""Weights of the terms of the loss that fit by themselves: rules (`Rule`), of which this is the one by gradients, the default.

Published weights were tuned for one data set and one pair of networks. On others the gradient of a hint at the student may be
a hundred times that of the labels' loss. So in the first minibatches the norm of each term's gradient at all parameters of
the student is measured; a factor then makes it `ratio` times that of the reference, and stays as it is for the rest of the run.

What reads the student's features alone (a hint) is balanced; a hint whose weight was chosen for the case at hand
(`Method.own_weights`) is not. The reference is the loss of the labels and of all terms that keep their weights.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from litdistill.methods.base import Method
from litdistill.utils.errors import UserError

Together = Callable[[Tensor], Tensor]  # adds up a vector over all processes


class Rule(ABC):
    """A rule by which the terms of a loss have factors; hints by default, relative to a reference.

    Args:
        ratio: what a hint is set to, relative to the reference.
        terms: the same of terms by name, in place of `ratio` and also of those that read logits; None keeps a term's weight.

    Raises `UserError` for a ratio that is negative or not finite.
    """

    def __init__(self, ratio: float, terms: Mapping[str, float | None] | None):
        self.ratio, self.terms = ratio, dict(terms or {})
        self.ratios: dict[str, float] = {}  # of the terms that are balanced
        self.finished = False  # whether nothing is left for `measure`
        for name, value in {"ratio": ratio, **self.terms}.items():
            if value is not None and not 0 <= value < math.inf:
                raise UserError(
                    f"balance: {name}={value} must be 0 or more: a hint's share, relative to the labels' loss."
                )

    @property
    @abstractmethod
    def factors(self) -> Mapping[str, float | Tensor]:
        """Returns the factors of balanced terms by name."""

    @property
    @abstractmethod
    def constants(self) -> tuple[Any, ...]:
        """Returns the numbers of Python that a step reads."""

    def measure(
        self,
        labels: Mapping[str, Tensor],
        terms: Mapping[str, Tensor],
        heads: Sequence[Tensor],
        parameters: Sequence[Tensor],
        together: Together | None = None,
        scale: float = 1.0,
        own: Collection[str] = (),
    ) -> None:
        """Measures one of the first minibatches, until the rule has `finished`.

        `labels`, `terms`: the scalar terms of the labels' loss and of the method, weighted. `heads`: what the student gives
        (its logits). `parameters`: those of the student that are trained. `together`: where there are several processes.
        `scale`: what the loss is multiplied by in backward, so that no gradient in float16 is lost. `own`: names of terms
        that keep their weights, unless `terms` says otherwise. The graph is kept.

        Where the labels do not count and no term keeps its weight, all keep theirs. Raises `UserError` for a name in `terms`
        that no term has, and where `terms` names them all and nothing is left to be in proportion to.
        """
        balanced = self.ratios_of(labels, terms, heads, own)
        if not balanced:  # nothing to measure, now or later
            self.finished = True
            return
        values = [reference(labels, terms, balanced), *(terms[name] for name in balanced)]
        norms = torch.stack([gradient_norm(value * scale, parameters) / scale for value in values])
        self.begin(balanced, labels, terms, norms, together)

    @abstractmethod
    def begin(
        self,
        balanced: dict[str, float],
        labels: Mapping[str, Tensor],
        terms: Mapping[str, Tensor],
        norms: Tensor,
        together: Together | None,
    ) -> None:
        """Sets the factors by one of the first minibatches, and `finished` where it is the last of them.

        `balanced`: the ratios of balanced terms by name. `norms`: of the gradients of the reference and of these, in order.
        """

    @abstractmethod
    def follow(
        self, labels: Mapping[str, Tensor], terms: Mapping[str, Tensor], together: Together | None = None
    ) -> None:
        """Follows the terms of a minibatch after those; arguments as of `measure`."""

    @abstractmethod
    def found(self) -> dict[str, dict[str, float]]:
        """Returns what was found of each balanced term, its `factor` among it."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Returns plain values, exact to the bit."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""

    def ratios_of(
        self, labels: Mapping[str, Tensor], terms: Mapping[str, Tensor], heads: Sequence[Tensor], own: Collection[str]
    ) -> dict[str, float]:
        """Returns the ratios of the terms that are balanced, none where there is no reference; arguments as of `measure`."""
        if unknown := self.terms.keys() - terms.keys():
            raise UserError(
                f"balance.terms names {', '.join(sorted(unknown))}; the terms of this method are {', '.join(terms)}."
            )
        ratios = {name: self._ratio(name, value, heads, own) for name, value in terms.items()}
        balanced = {name: ratio for name, ratio in ratios.items() if ratio is not None}
        kept = bool(labels) or len(balanced) < len(terms)
        if not kept and self.terms:
            raise UserError(
                "balance.terms: the labels do not count (hard=0) and every term is named: to what in proportion?"
            )
        return balanced if kept else {}

    def _ratio(self, name: str, value: Tensor, heads: Sequence[Tensor], own: Collection[str]) -> float | None:
        """Returns the ratio of a term; None if it keeps its weight: one of its own, or that of a term that reads logits."""
        if name in self.terms:
            return self.terms[name]
        return None if name in own or reads(value, heads) else self.ratio


class Balance(Rule):
    """Factors by the norms of gradients in the first minibatches.

    Args:
        ratio: the norm of a hint's gradient relative to the reference's.
        terms: as of `Rule`.
        steps: minibatches over which gradients are measured; those in which no sample has a label do not count.

    Until the last of these a factor is that of the minibatches so far, and 0 where the reference has no gradient yet. Raises
    `UserError` for a ratio that is negative or not finite, and for no minibatch.
    """

    def __init__(self, ratio: float = 0.1, terms: Mapping[str, float | None] | None = None, steps: int = 16):
        super().__init__(ratio, terms)
        if steps < 1:
            raise UserError(f"balance: steps={steps} must be 1 or more.")
        self.steps, self.measured = steps, 0  # the second: minibatches so far
        self.norms: dict[str, float] = {}  # sums over minibatches and processes; that of the reference is ""

    @property
    def factors(self) -> dict[str, float]:
        """Returns the factors of balanced terms by name: 0 without a gradient of the reference, 1 without one of their own."""
        return {
            name: ratio * self.norms[""] / self.norms[name] if self.norms[name] else float(self.measured > 0)
            for name, ratio in self.ratios.items()
        }

    @property
    def constants(self) -> tuple[Any, ...]:
        """Returns the factors: they are numbers of Python."""
        return tuple(self.factors.items())

    def begin(
        self,
        balanced: dict[str, float],
        labels: Mapping[str, Tensor],
        terms: Mapping[str, Tensor],
        norms: Tensor,
        together: Together | None,
    ) -> None:
        """Adds the gradients of one minibatch; see `Rule.begin`."""
        counts = bool(norms.isfinite().all()) and bool(norms[0] > 0)
        sums = torch.cat([norms if counts else torch.zeros_like(norms), norms.new_tensor([float(counts)])])
        if together is not None:
            sums = together(sums)
        self.ratios = balanced
        found = zip(["", *balanced], sums[:-1].tolist(), strict=True)
        self.norms = {name: self.norms.get(name, 0.0) + norm for name, norm in found}
        self.measured += int(sums[-1] > 0)
        self.finished = self.measured >= self.steps

    def follow(self, *_: Any) -> None:
        """Changes nothing: the factors are fixed."""

    def found(self) -> dict[str, dict[str, float]]:
        """Returns for each balanced term its `factor`, its `ratio`, and what the ratio would be `unbalanced`."""
        reference = self.norms.get("", 0.0)
        return {
            name: {
                "factor": factor,
                "ratio": self.ratios[name],
                "unbalanced": self.norms[name] / reference if reference else 0.0,
            }
            for name, factor in self.factors.items()
        }

    def __str__(self) -> str:
        parts = [
            f"{name} by {f['factor']:.3g}, so that its gradient is {f['ratio']:g} times that of the other terms, not "
            f"{f['unbalanced']:.3g} times"
            for name, f in self.found().items()
        ]
        terms = ", ".join(f"{name}: {ratio:g}" for name, ratio in self.ratios.items())
        return (
            f"Weights of {self.measured} minibatches' gradients: {'; '.join(parts)}. The defaults of these weights have no "
            f"effect: balance.terms={{{terms}}} sets the ratios, balance=none keeps the defaults."
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns plain values, exact to the bit."""
        known = {"measured": self.measured, "ratios": dict(self.ratios), "norms": dict(self.norms)}
        return known | {"finished": self.finished}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.measured, self.ratios, self.norms = state["measured"], dict(state["ratios"]), dict(state["norms"])
        self.finished = state["finished"]


def reference(labels: Mapping[str, Tensor], terms: Mapping[str, Tensor], balanced: Collection[str]) -> Tensor:
    """Returns the loss that balanced terms are relative to, a scalar: that of the labels and of all other terms."""
    return torch.stack([*labels.values(), *(value for name, value in terms.items() if name not in balanced)]).sum()


def balance_for(method: Method, chosen: Rule | Literal["auto"] | None) -> Rule | None:
    """Returns what balances a prepared method: `chosen`, a `Balance` for "auto"; None where there is no hint to balance.

    Raises `UserError` for anything else.
    """
    balance = Balance() if chosen == "auto" else chosen
    if balance is not None and not isinstance(balance, Rule):
        raise UserError(
            f'balance={balance!r}: give "auto", None, or a rule: Balance(ratio=0.3) of litdistill.distillation.balance, '
            "Uncertainty() of litdistill.distillation.uncertainty."
        )
    if balance is None or any(ratio is not None for ratio in balance.terms.values()):
        return balance
    return balance if method.taps().student else None


def gradient_norm(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Returns the norm of a scalar's gradient at all `parameters` together, in float32 or their float64; the graph is kept."""
    found: Sequence[Tensor | None] = []
    if value.requires_grad:
        found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    gradients = [g if g.dtype == torch.float64 else g.float() for g in found if g is not None]
    return get_total_norm(gradients) if gradients else value.new_zeros(())


def reads(value: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Returns whether a scalar is computed from any of the tensors."""
    inputs = [t for t in tensors if t.requires_grad]
    if not inputs or not value.requires_grad:
        return False
    return any(g is not None for g in torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True))
