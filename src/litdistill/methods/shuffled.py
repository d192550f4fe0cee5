"""The control that shows whether it is the teacher's knowledge that helps: any method, with another image's teacher."""

from __future__ import annotations

from torch import Tensor, nn

from litdistill.errors import UserError
from litdistill.methods.base import Method, Outputs, Taps


class Shuffled(Method):
    """`method` as it is, but that every sample is given what the teacher says of the sample before it in the batch.

    The teacher's outputs have the same distribution as ever, in each batch exactly, and say nothing of the image that they
    are given for. Since batches are drawn at random, so is the pairing; it needs no random number, so that a resumed run
    goes on to the bit. Labels stay with their images. Raises `UserError` for a batch of one.
    """

    def __init__(self, method: Method):
        super().__init__()
        self.method = method
        self.needs_teacher, self.phases = method.needs_teacher, method.phases

    def taps(self) -> Taps:
        return self.method.taps()

    def prepare(self, student: nn.Module, teacher: nn.Module | None, example: Tensor) -> nn.Module:
        return self.method.prepare(student, teacher, example)

    def ship(self, student: nn.Module) -> nn.Module:
        return self.method.ship(student)

    def build(self, student: Outputs, teacher: Outputs | None, targets: Tensor) -> None:
        self.method.build(student, teacher, targets)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor) -> dict[str, Tensor]:
        if len(target) < 2:
            raise UserError("A batch of one image has no other to take the teacher of. Choose another data.batch_size.")
        self.method.epoch = self.epoch
        if teacher is not None:
            features = {name: x.roll(1, 0) for name, x in teacher.features.items()}
            teacher = teacher._replace(logits=teacher.logits.roll(1, 0), features=features)
        return self.method(student, teacher, target)
