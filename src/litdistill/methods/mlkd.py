"""Multi-level logit distillation. Jin, Wang & Lin 2023 (CVPR 2023, "Multi-level Logit Distillation"), section 3."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from litdistill.methods.base import Method, check_temperature, check_weights, hard_loss
from litdistill.methods.kd import soft_loss
from litdistill.types import Outputs
from litdistill.utils.errors import UserError


def gram_distance(a: Tensor, b: Tensor) -> Tensor:
    """‖A Aᵀ − B Bᵀ‖² / rows, of two matrices `(rows, columns)`; float32 whatever the autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return (a @ a.T - b @ b.T).square().sum() / len(a)


class MLKD(Method):
    """`hard` · CE + the sum over temperatures of `instance` · T² · KL + `batch` and `classes` · Gram distances.

    With probabilities P `(N, classes)` at temperature T, the batch level compares P Pᵀ (how alike the samples are; over
    N) and the class level Pᵀ P (how alike the classes are; over the number of classes).

    The authors train on two augmentations of each image; the loss needs only one, and here has one. Their code also
    weighs the first view's terms by a mask of the samples (classes) whose confidence is not above the median, but does
    so after the mean: the mask is a constant factor of ½. The default weights are those of their code for two equal
    views (CE .1, KD .9): hard 2 · .1, instance (½ + 1) · .9, batch and classes ½ · .9.
    """

    def __init__(
        self,
        hard: float = 0.2,
        instance: float = 1.35,
        batch: float = 0.45,
        classes: float = 0.45,
        temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
    ):
        super().__init__()
        check_weights(hard=hard, instance=instance, batch=batch, classes=classes)
        if not temperatures:
            raise UserError(
                "method.temperatures is empty. Give at least one temperature; the paper's are [2, 3, 4, 5, 6]."
            )
        for temperature in temperatures:
            check_temperature(temperature)
        self.hard, self.instance, self.batch, self.classes = hard, instance, batch, classes
        self.temperatures = tuple(temperatures)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor) -> dict[str, Tensor]:
        terms = {}
        if self.hard:
            terms["hard"] = self.hard * hard_loss(student.logits, target)
        if not (self.instance or self.batch or self.classes):
            return terms
        assert teacher is not None
        s, t = student.logits.float(), teacher.logits.float()
        pairs = [(F.softmax(s / tau, dim=1), F.softmax(t / tau, dim=1)) for tau in self.temperatures]
        if self.instance:
            terms["instance"] = self.instance * torch.stack([soft_loss(s, t, tau) for tau in self.temperatures]).sum()
        if self.batch:
            terms["batch"] = self.batch * torch.stack([gram_distance(q, p) for q, p in pairs]).sum()
        if self.classes:
            terms["classes"] = self.classes * torch.stack([gram_distance(q.T, p.T) for q, p in pairs]).sum()
        return terms
