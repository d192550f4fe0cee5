"""Inter-channel correlation (ICKD-C). Liu et al. 2021 (arXiv 2202.03680), section 3."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from litdistill.losses import channel_correlation
from litdistill.methods.base import MapMethod, summed
from litdistill.methods.layers import BatchNorm


class ICKD(MapMethod):
    """`hard` · labels' loss + `hint` · Σ distance of inter-channel correlations.

    The student always passes a 1x1 convolution with BatchNorm to the teacher's channels, as in the paper.
    """

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 2.5,
        student_taps: Sequence[str] | str = "last",
        teacher_taps: Sequence[str] | str = "last",
    ):
        super().__init__(hard, hint, student_taps, teacher_taps)

    def build_pairs(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.projectors = nn.ModuleList(
            nn.Sequential(nn.Conv2d(s.shape[1], t.shape[1], 1, bias=False), BatchNorm(t.shape[1])) for s, t in pairs
        )

    def loss(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        return summed([channel_correlation(p(s), t) for (s, t), p in zip(pairs, self.projectors, strict=True)])
