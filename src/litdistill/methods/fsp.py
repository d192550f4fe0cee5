"""Flow of solution procedure (FSP). Yim et al. 2017 (CVPR, A Gift from Knowledge Distillation), sections 3.2 to 3.4."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from litdistill.losses import mse
from litdistill.methods.base import MapMethod, summed
from litdistill.methods.layers import projectors
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError


def flow(first: Tensor, second: Tensor) -> Tensor:
    """FSP matrix (N, C1, C2) of two maps (N, C, H, W): products of channels averaged over positions (equation 1).

    The larger map is max-pooled to the size of the smaller, as in the paper.
    """
    size = (min(first.shape[2], second.shape[2]), min(first.shape[3], second.shape[3]))
    a, b = (f if f.shape[2:] == size else F.adaptive_max_pool2d(f, size) for f in (first.float(), second.float()))
    with torch.autocast(a.device.type, enabled=False):
        return a.flatten(2) @ b.flatten(2).transpose(1, 2) / (size[0] * size[1])


class FSP(MapMethod):
    """Two phases: for `init_epochs` epochs `hint` · FSP loss alone, then `hard` · labels' loss alone.

    FSP loss: sum over consecutive stages of the mean squared difference of both networks' `flow` matrices (equation 2 sums
    over the matrix; the published weight belongs to the mean). The paper requires equal channels; here a student's stage
    with other channels than the teacher's passes a learned 1x1 convolution. In the first phase the student's classifier
    gets no gradient, in the second these convolutions get none.
    """

    needs_hard = True

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 50.0,
        init_epochs: int = 30,
        student_taps: Sequence[str] | str = "stages",
        teacher_taps: Sequence[str] | str = "stages",
    ):
        super().__init__(hard, hint, student_taps, teacher_taps)
        if not (hard and hint and init_epochs > 0):
            raise UserError("fsp trains in two phases: hard, hint and init_epochs must be above 0.")
        self.init_epochs = init_epochs

    def build_pairs(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        if len(pairs) < 2:
            raise UserError(
                "fsp compares flows between stages, and these networks have one stage in common. Name more taps."
            )
        self.connectors = projectors(pairs)

    def loss(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        f_s = [connect(s) for connect, (s, _) in zip(self.connectors, pairs, strict=True)]
        f_t = [t for _, t in pairs]
        return summed([mse(flow(*f_s[i : i + 2]), flow(*f_t[i : i + 2])) for i in range(len(pairs) - 1)])

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return super().forward(student, teacher, batch) if self.epoch < self.init_epochs else {}
