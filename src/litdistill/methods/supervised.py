"""Training with labels alone: teachers, and the controls that a distilled student is compared with."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from litdistill.methods.base import Method
from litdistill.types import Batch, Outputs


class Supervised(Method):
    """`hard` · labels' loss. The teacher, if there is one, is only compared with."""

    needs_teacher = False

    def forward(self, student: Outputs, teacher: Any, batch: Batch) -> dict[str, Tensor]:
        return {}
