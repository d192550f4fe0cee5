"""Neuron selectivity transfer (NST). Huang & Wang 2017 (arXiv 1707.01219), sections 3 and 4."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from litdistill.losses import mmd
from litdistill.methods.base import MapMethod, summed


class NST(MapMethod):
    """`hard` · labels' loss + `hint` · sum over stages of `mmd`."""

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 50.0,
        student_taps: Sequence[str] | str = "stages",
        teacher_taps: Sequence[str] | str = "stages",
    ):
        super().__init__(hard, hint, student_taps, teacher_taps)

    def loss(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        return summed([mmd(s, t) for s, t in pairs])
