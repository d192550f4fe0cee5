"""The control that shows whether it is the teacher's knowledge that helps: any method, with another image's teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from litdistill.methods.base import CATEGORICAL, Method
from litdistill.types import Batch, Outputs, Taps


def of_its_class(target: Tensor) -> Tensor:
    """(N,): for each sample the place of the next one of its class in the batch, its own where it is alone of it."""
    target = target if target.ndim == 1 else target.argmax(1)
    order = target.argsort(stable=True)
    ranked, following = target[order], order.roll(-1)
    first = order[torch.searchsorted(ranked, ranked)]
    return torch.empty_like(order).scatter_(0, order, torch.where(target[following] == ranked, following, first))


class Shuffled(Method):
    """`method` as it is, but that every sample is given what the teacher says of another one of the same class.

    The teacher's outputs have the same distribution as ever, in each batch and each class exactly: what classes are like,
    and how sure the teacher is of them, the student still learns. What it cannot learn is what the teacher knows of the
    very image. Since batches are drawn at random, so is the pairing; it needs no random number, so that a resumed run goes
    on to the bit. A sample that is alone of its class in its batch keeps its own.
    """

    def __init__(self, method: Method):
        super().__init__(method.hard)
        self.method = method
        self.needs_teacher, self.needs_hard = method.needs_teacher, method.needs_hard
        self.init_epochs = method.init_epochs
        self.kinds = tuple(kind for kind in method.kinds if kind == CATEGORICAL)  # samples of one class are paired

    def taps(self) -> Taps:
        return self.method.taps()

    def prepare(self, student: nn.Module, teacher: Any, example: Any) -> nn.Module:
        return self.method.prepare(student, teacher, example)

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
        if teacher is not None:
            other = of_its_class(batch.targets)
            heads = {name: x[other] for name, x in teacher.heads.items()}
            features = {name: x[other] for name, x in teacher.features.items()}
            teacher = teacher._replace(heads=heads, features=features)
        return self.method(student, teacher, batch)
