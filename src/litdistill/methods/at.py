"""Attention transfer (AT). Zagoruyko & Komodakis 2017 (arXiv 1612.03928), section 3.1."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from litdistill.methods.base import MapMethod, same_size, summed


def attention(f: Tensor) -> Tensor:
    """Returns attention maps: the mean square over channels of (N, C, H, W), flattened, of unit length; (N, H·W) float32."""
    return F.normalize(f.float().square().mean(1).flatten(1))


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two attention maps; the larger map is pooled first. Both (N, C, H, W); a scalar.

    The paper's equation 2 has the L2 norm of the difference; the authors' code, which produced its tables, has the mean
    of the squares, as here, and β = 1000 belongs to the latter.
    """
    f_s, f_t = same_size(student.float(), teacher.float())
    return F.mse_loss(attention(f_s), attention(f_t))


class AT(MapMethod):
    """`hard` · labels' loss + `hint` · sum over stages of `attention_loss`."""

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 1000.0,
        student_taps: Sequence[str] | str = "stages",
        teacher_taps: Sequence[str] | str = "stages",
    ):
        super().__init__(hard, hint, student_taps, teacher_taps)

    def loss(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        return summed([attention_loss(s, t) for s, t in pairs])
