"""Multi-level logit distillation (MLKD). Jin, Wang & Lin 2023 (CVPR), section 3."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from litdistill.losses import gram_distance, kl
from litdistill.methods.base import CATEGORICAL, Method, check_weights, summed
from litdistill.methods.softening import Softening, use_softening
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError


class MLKD(Method):
    """`hard` · labels' loss + the sum over temperatures of `instance` · T² · KL + `batch` and `classes` · Gram distances.

    With probabilities P `(N, classes)` at temperature T, the batch level compares P Pᵀ (similarity of samples; divided by
    N) and the class level Pᵀ P (similarity of classes; divided by the number of classes).

    The authors train on two augmentations of each image; the loss needs only one, which is used here. Their code also
    weighs the first view's terms by a mask of the samples (classes) whose confidence is not above the median, but after
    the mean: the mask is a constant factor of ½. The default weights are those of their code for two equal views
    (CE .1, KD .9): hard 2 · .1, instance (½ + 1) · .9, batch and classes ½ · .9.

    `standardized`, `learnt`: see `Softening`. Standardized logits are those of the instance level alone, as in the code of
    Sun et al. 2024; learnt temperatures, one for each that is given, are those of all three levels.
    """

    kinds = (CATEGORICAL,)

    def __init__(
        self,
        hard: float = 0.2,
        instance: float = 1.35,
        batch: float = 0.45,
        classes: float = 0.45,
        temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
        standardized: bool = False,
        learnt: int = 0,
    ):
        super().__init__(hard)
        check_weights(instance=instance, batch=batch, classes=classes)
        if not temperatures:
            raise UserError("temperatures is empty. Give at least one temperature; the paper's are [2, 3, 4, 5, 6].")
        self.instance, self.batch, self.classes = instance, batch, classes
        self.softening = use_softening(
            self, Softening(temperatures, standardized, learnt if instance or batch or classes else 0)
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        terms = {}
        s, t = student.logits.float(), teacher.logits.float()
        temperatures = self.softening.temperatures(self.epoch)
        if self.instance:
            logits = self.softening.logits(s, t)
            terms["instance"] = self.instance * summed([kl(*logits, tau) for tau in temperatures])
        if not (self.batch or self.classes):
            return terms
        pairs = [(F.softmax(s / tau, dim=1), F.softmax(t / tau, dim=1)) for tau in temperatures]
        if self.batch:
            terms["batch"] = self.batch * summed([gram_distance(q, p) for q, p in pairs])
        if self.classes:
            terms["classes"] = self.classes * summed([gram_distance(q.T, p.T) for q, p in pairs])
        return terms

    def watched(self) -> dict[str, Tensor]:
        return self.softening.watched()
