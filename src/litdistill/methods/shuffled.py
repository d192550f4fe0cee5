"""A control for a teacher's sample-wise knowledge: any method, with the teacher's outputs for another sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from litdistill.methods.base import CATEGORICAL, Method
from litdistill.types import Batch, Outputs, Taps, class_of


def same_class_partners(target: Tensor) -> Tensor:
    """Returns (N,) indices: the next sample of the same class in the batch, or the sample itself if it is the only one."""
    target = class_of(target)
    order = target.argsort(stable=True)
    ranked, following = target[order], order.roll(-1)
    first = order[torch.searchsorted(ranked, ranked)]
    return torch.empty_like(order).scatter_(0, order, torch.where(target[following] == ranked, following, first))


class Shuffled(Method):
    """`method` with the teacher's outputs of each sample replaced by those of another sample of the same class.

    The teacher's outputs keep their exact distribution in each batch and each class: the student still learns the classes'
    similarities and the teacher's confidence, but not the teacher's knowledge of the individual image. Batches are drawn at
    random, so the pairing needs no random numbers and a resumed run is bit-identical. A sample that is the only one of its
    class in the batch keeps its own outputs.
    """

    reads_targets = True

    def __init__(self, method: Method):
        super().__init__(method.hard)
        self.method = method
        self.needs_teacher, self.needs_hard = method.needs_teacher, method.needs_hard
        self.init_epochs, self.some_classes = method.init_epochs, method.some_classes
        self.takes_places, self.reads_adversarial = method.takes_places, method.reads_adversarial
        self.kinds = tuple(kind for kind in method.kinds if kind == CATEGORICAL)  # samples of one class are paired

    def taps(self) -> Taps:
        return self.method.taps()

    def prepare(self, student: nn.Module, teacher: Any, example: Any) -> nn.Module:
        return self.method.prepare(student, teacher, example)

    def watched(self) -> dict[str, Tensor]:
        return self.method.watched()

    def own_weights(self) -> set[str]:
        return self.method.own_weights()

    def ship(self, student: nn.Module) -> nn.Module:
        return self.method.ship(student)

    def build(self, student: Outputs, teacher: Any, targets: Tensor | None) -> None:
        self.method.build(student, teacher, targets)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.method.set_epoch(epoch)

    def hard_factor(self, epoch: int) -> float:
        return self.method.hard_factor(epoch)

    def companions(self, student: Outputs) -> Sequence[Outputs]:
        return self.method.companions(student)

    def forward(self, student: Outputs, teacher: Any, batch: Batch) -> dict[str, Tensor]:
        return self.method(student, _of_partners(teacher, batch), batch)

    def attacked_loss(self, student: Outputs, teacher: Any, batch: Batch) -> Tensor | None:
        return self.method.attacked_loss(student, _of_partners(teacher, batch), batch)


def _of_partners(teacher: Outputs | None, batch: Batch) -> Outputs | None:
    if teacher is None:
        return None
    other = same_class_partners(batch.targets)
    heads = {name: x[other] for name, x in teacher.heads.items()}
    features = {name: x[other] for name, x in teacher.features.items()}
    return teacher._replace(heads=heads, features=features)
