"""Schedules of the learning rate that torch does not have in one piece."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from litdistill.utils.errors import UserError


def warmup_cosine(optimizer: Optimizer, total: int, warmup: float = 0.05) -> LambdaLR:
    """The learning rate rises linearly over `warmup` of `total` steps, then falls to zero along half a cosine.

    Loshchilov & Hutter 2017 (arXiv 1608.03983, equation 5) without restarts; warm-up as in Goyal et al. 2017
    (arXiv 1706.02677, section 2.2). Raises `UserError` for a share that leaves no step to fall.
    """
    if not 0 <= warmup < 1 or total < 1:
        raise UserError(f"warmup={warmup} is a share of total={total} steps: at least 0 and below 1; 0.05 is common.")
    rising = int(warmup * total)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, total - rising))))

    return LambdaLR(optimizer, factor)
