"""Attention transfer (AT). Zagoruyko & Komodakis 2017 (arXiv 1612.03928), section 3.1."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from litdistill.losses import attention
from litdistill.methods.base import MapMethod, summed


class AT(MapMethod):
    """`hard` · labels' loss + `hint` · sum over stages of `attention`."""

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 1000.0,
        student_taps: Sequence[str] | str = "stages",
        teacher_taps: Sequence[str] | str = "stages",
    ):
        super().__init__(hard, hint, student_taps, teacher_taps)

    def loss(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        return summed([attention(s, t) for s, t in pairs])
