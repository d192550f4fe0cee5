"""From the numbers in a file of outputs to logits of all classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from litdistill.methods.base import BERNOULLI

FLOOR = 1e-12  # of a probability, whose logarithm is a logit
LEFT_OUT = (
    -1e4
)  # the logit of a class that is left out: a probability of 0 at any temperature in use, and a finite logarithm


def to_logits(values: Tensor, kind: str, task_kind: str, units: Mapping[str, Sequence[float]] | None = None) -> Tensor:
    """Returns logits, float32, of numbers (N, ..., width) of a `kind` (`outputs_tables.KINDS`).

    Of probabilities: their logarithms, or for several labels (`task_kind` "bernoulli") their log-odds, of at least 1e-12. Of
    values: these standardized by the `mean` and `std` of the task's `units`, as targets are. Logits are at least -10,000.
    """
    if kind == "logits":
        return values.float().clamp(min=LEFT_OUT)
    exact = values.double()
    if kind == "values":
        assert units is not None
        mean, std = (torch.tensor(units[key], dtype=torch.float64) for key in ("mean", "std"))
        return ((exact - mean) / std).float()
    if task_kind == BERNOULLI:
        exact = exact.clamp(FLOOR, 1 - FLOOR)
        return (exact.log() - (-exact).log1p()).float()
    return exact.clamp(min=FLOOR).log().float()


def log_rest(values: Tensor, rest: Tensor | None, kind: str) -> Tensor | None:
    """Returns log Σ exp(logit) over the classes that are not among the top ones (N, ..., k), float32 (N, ...): `rest`, or of
    probabilities the logarithm of what they lack of 1. None where it is unknown."""
    if rest is not None:
        return rest.float()
    return (1 - values.double().sum(-1)).clamp(min=FLOOR).log().float() if kind == "probabilities" else None


def of_all_classes(top: Tensor, indices: Tensor, rest: Tensor | None, count: int) -> Tensor:
    """Returns the logits of `count` classes (N, ..., count), of which `top` (N, ..., k) are those at `indices`: the others
    share `rest` (N, ...) evenly, as `log_rest` has it, or are left out where it is None."""
    full = torch.full((*top.shape[:-1], count), LEFT_OUT)
    if rest is not None and count > top.shape[-1]:
        full = (rest - math.log(count - top.shape[-1]))[..., None].expand(full.shape).clone()
    return full.scatter(-1, indices, top)
