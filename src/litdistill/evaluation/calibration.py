"""Temperature scaling: one scalar that calibrates a classifier's probabilities."""

from __future__ import annotations

import math

import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

BOUNDS = (0.05, 20.0)  # the NLL has no minimum where all predictions on the validation set are right


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """Returns the T within `BOUNDS` that minimizes the negative log-likelihood of logits / T.

    Guo et al. 2017 (arXiv 1706.04599), section 4.2. Logits (N, classes) and targets (N,) are those of the validation
    set: a temperature fitted on the test set would bias the test metrics. The NLL is convex in 1/T: it has one minimum.
    """
    logits = logits.double()
    nll = lambda log_t: F.cross_entropy(logits / math.exp(log_t), targets).item()  # noqa: E731
    low, high = map(math.log, BOUNDS)
    return math.exp(minimize_scalar(nll, bounds=(low, high), method="bounded", options={"xatol": 1e-6}).x)
