"""FitNets: hints from the teacher's middle stage. Romero et al. 2015 (arXiv 1412.6550), section 2.2."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from litdistill.losses import mse, same_size
from litdistill.methods.base import MapMethod, names_pyramid
from litdistill.methods.layers import regressor
from litdistill.types import Outputs
from litdistill.utils.errors import UserError


class FitNet(MapMethod):
    """`hard` · labels' loss + `hint` · mean (regressor(student's map) − teacher's map)².

    `stage`: index of the pair of stages, None for the middle one (the later of two). Pairs are counted from the last
    stage; where sizes still differ the larger map is pooled. The paper sums squares and trains hints first; the
    published table used the mean, trained jointly, as here. The regressor ends in a ReLU as in that table, but not for the
    levels of a pyramid, which have negative values that it could never reach.
    """

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 100.0,
        stage: int | None = None,
        student_taps: Sequence[str] | str = "stages",
        teacher_taps: Sequence[str] | str = "stages",
    ):
        super().__init__(hard, hint, student_taps, teacher_taps)
        self.stage = stage

    def pairs(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        """Returns the one pair of `stage`. Raises `UserError` where that stage does not exist."""
        pairs = super().pairs(student, teacher)
        index = len(pairs) // 2 if self.stage is None else self.stage
        if not -len(pairs) <= index < len(pairs):
            raise UserError(f"stage={index}, and this pair has {len(pairs)} stages. Use 0 to {len(pairs) - 1}.")
        return [pairs[index]]

    def build_pairs(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.regressor = regressor(*pairs[0], relu=not any(names_pyramid(taps) for taps in self.read))

    def loss(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        return mse(*same_size(self.regressor(pairs[0][0]), pairs[0][1]))
