"""Supervised training on labels alone: for teachers, and for the baselines of a distilled student."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from litdistill.methods.base import ALL_KINDS, Method
from litdistill.types import Batch, Outputs


class Supervised(Method):
    """`hard` · labels' loss. A teacher, if given, is used for comparison only."""

    kinds = ALL_KINDS
    needs_teacher = False
    takes_places = True

    def forward(self, student: Outputs, teacher: Any, batch: Batch) -> dict[str, Tensor]:
        return {}
