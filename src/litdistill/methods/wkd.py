"""Wasserstein distance of predictions (WKD-L). Lv, Yang & Li 2024 (arXiv 2412.08139), section 3.1.

Probability that the student has to move to a similar class costs less than to an unlike one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litdistill.losses.values import wide
from litdistill.methods.base import CATEGORICAL, Method, check_temperature, check_weights
from litdistill.methods.layers import output_layer
from litdistill.methods.nkd import target_term
from litdistill.types import Batch, Outputs, class_of
from litdistill.utils.errors import UserError

STEPS = 10  # of Sinkhorn's iteration, as in the authors' code


def class_costs(weight: Tensor, sharpness: float) -> Tensor:
    """1 − exp(−κ · (1 − cosine)) of each two rows of the classifier's weight (classes, C): (classes, classes)."""
    rows = F.normalize(wide(weight), dim=1)
    return 1 - torch.exp(-sharpness * (1 - (rows @ rows.T).clamp(max=1)).fill_diagonal_(0))


def transport(
    student: Tensor, teacher: Tensor, target: Tensor, costs: Tensor, temperature: float, eta: float
) -> Tensor:
    """Cost of moving the student's probabilities of the classes but the target to the teacher's; the batch mean.

    Softmaxes at `temperature` over these classes, `costs` (classes, classes) of a unit of probability, and the flow of an
    optimal transport with η = `eta` times its entropy (Cuturi 2013, arXiv 1306.0895), after `STEPS` iterations. Logits
    (N, classes), target (N,). The authors remove the target's row and column of the costs in each sample; here it has no
    mass, which is the same.
    """
    # F.one_hot reads values on a CPU.
    is_target = target[:, None] == torch.arange(student.shape[1], device=student.device)
    q, p = (F.softmax((wide(z) / temperature).masked_fill(is_target, float("-inf")), dim=1) for z in (student, teacher))
    costs = costs.to(q.dtype)
    kernel = torch.exp(-costs / eta)
    u = torch.full_like(q, 1 / max(q.shape[1] - 1, 1)).masked_fill(is_target, 0)
    for _ in range(STEPS):
        v = p / (u @ kernel)
        u = q / (v @ kernel)  # the costs are symmetric
    return (u * (v @ (kernel * costs))).sum(dim=1).mean()


class WKD(Method):
    """`hard` · labels' loss + `target` · −T_t log S_t + `others` · Wasserstein distance of the other classes.

    How unlike two classes are is 1 minus the cosine of their rows in the teacher's classifier, sharpened (`class_costs`).
    The authors' code offers that; their tables take CKA of the teacher's features of two classes instead, which needs a
    pass over the data. The target's term is that of NKD. For mixed labels, the class with the largest share is the target.
    """

    reads_targets = True
    kinds = (CATEGORICAL,)
    costs: Tensor

    def __init__(
        self,
        hard: float = 1.0,
        target: float = 1.0,
        others: float = 800.0,
        temperature: float = 8.0,
        sharpness: float = 1.0,
        eta: float = 0.05,
    ):
        super().__init__(hard)
        check_weights(target=target, others=others)
        check_temperature(temperature)
        if not eta >= 0.02:
            raise UserError(f"eta={eta} is below 0.02, where exp(-cost / eta) is 0 in float32. The authors take 0.05.")
        if not sharpness > 0:
            raise UserError(f"sharpness={sharpness} must be above 0. The authors take 1.")
        self.target, self.others, self.temperature = target, others, temperature
        self.sharpness, self.eta = sharpness, eta

    def prepare(self, student: nn.Module, teacher: nn.Module, example: Any) -> nn.Module:
        """Reads the teacher's classifier; the student is unchanged."""
        if self.others:
            weight = output_layer(teacher, example, "wkd").weight.detach()
            self.register_buffer("costs", class_costs(weight, self.sharpness))
        return student

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        labels = class_of(batch.targets)
        terms, pair = {}, (student.logits, teacher.logits, labels)
        if self.target:
            terms["target"] = self.target * target_term(*pair)
        if self.others:
            with torch.autocast(labels.device.type, enabled=False):
                terms["others"] = self.others * transport(*pair, self.costs, self.temperature, self.eta)
        return terms
