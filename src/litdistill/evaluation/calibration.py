"""Temperature scaling: one number that makes a classifier's probabilities as sure as they are right."""

from __future__ import annotations

import math

import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

BOUNDS = (0.05, 20.0)  # where every image of the validation set is right, no temperature is small enough


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """The T within `BOUNDS` for which the negative log-likelihood of logits / T is least.

    Guo et al. 2017 (arXiv 1706.04599), section 4.2. Logits (N, classes) and targets (N,) of the validation set: on the
    test set it would be a measurement of nothing. The NLL is convex in 1/T, so that there is one minimum only.
    """
    logits = logits.double()
    nll = lambda log_t: F.cross_entropy(logits / math.exp(log_t), targets).item()  # noqa: E731
    low, high = map(math.log, BOUNDS)
    return math.exp(minimize_scalar(nll, bounds=(low, high), method="bounded", options={"xatol": 1e-6}).x)
