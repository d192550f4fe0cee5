"""Activation boundaries (AB). Heo et al. 2019 (arXiv 1811.03233), sections 3.1 to 3.3."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from litdistill.losses import boundary, same_size
from litdistill.methods.base import MapMethod, check_weights, summed
from litdistill.methods.layers import regressor
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError


class AB(MapMethod):
    """Two phases: for `init_epochs` epochs `hint` · boundary loss alone, then `hard` · labels' loss alone.

    Boundary loss: sum over stages of `boundary` · 0.003 · 2^−(number of later stages), the authors' scale for CIFAR. A
    student's stage whose shape differs from the teacher's passes a convolution and BatchNorm; maps whose sizes still differ
    are pooled. In the first phase the student's classifier gets no gradient, in the second the connectors get none.
    A boundary lies at 0 before an activation: name taps where `stages:pre` finds none.
    """

    needs_hard = True

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 1.0,
        margin: float = 1.0,
        init_epochs: int = 30,
        student_taps: Sequence[str] | str = "stages:pre",
        teacher_taps: Sequence[str] | str = "stages:pre",
    ):
        super().__init__(hard, hint, student_taps, teacher_taps)
        check_weights(margin=margin)
        if not (hard and hint and init_epochs > 0):
            raise UserError("ab trains in two phases: hard, hint and init_epochs must be above 0.")
        self.margin, self.init_epochs = margin, init_epochs

    def build_pairs(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        equal_shapes = [s.shape[1:] == t.shape[1:] for s, t in pairs]
        self.connectors = nn.ModuleList(
            nn.Identity() if equal else regressor(s, t, relu=False)
            for equal, (s, t) in zip(equal_shapes, pairs, strict=True)
        )

    def loss(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        losses = []
        for later, (connect, (s, t)) in enumerate(zip(reversed(self.connectors), reversed(pairs), strict=True)):
            s, t = same_size(connect(s), t)
            losses.append(boundary(s, t, self.margin) * 0.003 / 2**later)
        return summed(losses)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return super().forward(student, teacher, batch) if self.epoch < self.init_epochs else {}
