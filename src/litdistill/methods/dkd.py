"""Decoupled knowledge distillation (DKD). Zhao et al. 2022 (arXiv 2203.08679), section 3."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from litdistill.losses.logits import non_target
from litdistill.methods.base import CATEGORICAL, Method, check_weights
from litdistill.methods.softening import Softening, use_softening
from litdistill.types import Batch, Outputs, class_of


def decoupled_losses(
    student: Tensor, teacher: Tensor, target: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the two terms of KD, each times T² and averaged over the batch: TCKD and NCKD.

    TCKD is KL(teacher ‖ student) of the pair (target class, all others together); NCKD is the same among the
    non-target classes alone, and 0 for two classes. KD = TCKD + (1 − p_teacher(target)) · NCKD.
    Logits `(N, classes)`, target `(N,)`; float32. The target's column is removed before the softmax, where the
    authors' code subtracts 1,000 from its logit: the same value, for logits of any size.
    """
    z_s, z_t = student.float() / temperature, teacher.float() / temperature

    def target_vs_others(z: Tensor) -> Tensor:
        log_p = F.log_softmax(z, dim=1)
        return torch.cat(
            [log_p.gather(1, target[:, None]), non_target(log_p, target).logsumexp(1, keepdim=True)], dim=1
        )

    def others(z: Tensor) -> Tensor:
        return F.log_softmax(non_target(z, target), dim=1)

    tckd = F.kl_div(target_vs_others(z_s), target_vs_others(z_t), reduction="batchmean", log_target=True)
    nckd = F.kl_div(others(z_s), others(z_t), reduction="batchmean", log_target=True)
    return tckd * temperature**2, nckd * temperature**2


class DKD(Method):
    """`hard` · labels' loss + `tckd` · TCKD + `nckd` · NCKD; the paper's α is `tckd`, its β is `nckd`.

    The authors' linear warm-up of both terms over 20 epochs belongs to the training schedule.
    For mixed labels, the class with the largest share is the target of both terms. `standardized`, `learnt`: see `Softening`.
    """

    reads_targets = True
    kinds = (CATEGORICAL,)
    takes_places = True

    def __init__(
        self,
        hard: float = 1.0,
        tckd: float = 1.0,
        nckd: float = 8.0,
        temperature: float = 4.0,
        standardized: bool = False,
        learnt: int = 0,
    ):
        super().__init__(hard)
        check_weights(tckd=tckd, nckd=nckd)
        self.tckd, self.nckd = tckd, nckd
        self.softening = use_softening(self, Softening([temperature], standardized, learnt if tckd or nckd else 0))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        if not (self.tckd or self.nckd):
            return {}
        target = class_of(batch.targets)
        logits = self.softening.logits(student.logits, teacher.logits)
        tckd, nckd = decoupled_losses(*logits, target, self.softening.temperatures(self.epoch)[0])
        terms = {"tckd": self.tckd * tckd} if self.tckd else {}
        return terms | ({"nckd": self.nckd * nckd} if self.nckd else {})

    def watched(self) -> dict[str, Tensor]:
        return self.softening.watched()
