"""Distillation by the Pearson correlation of maps (PKD). Cao et al. 2022 (arXiv 2207.02039), section 3."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from litdistill.losses import pearson, same_size
from litdistill.methods.base import MapMethod, names_pyramid, summed
from litdistill.methods.layers import projectors


class PKD(MapMethod):
    """`hard` · labels' loss + `hint` · Σ (1 − Pearson correlation), stage by stage.

    A student whose channels differ from the teacher's passes a 1x1 convolution first (the paper's detectors all have 256
    channels and need none).
    """

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 10.0,
        student_taps: Sequence[str] | str = "stages",
        teacher_taps: Sequence[str] | str = "stages",
    ):
        super().__init__(hard, hint, student_taps, teacher_taps)

    def own_weights(self) -> set[str]:
        """On the levels of a pyramid also the default, which is the paper's for detectors."""
        return super().own_weights() | ({"hint"} if any(names_pyramid(taps) for taps in self.read) else set())

    def build_pairs(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.projectors = projectors(pairs)

    def loss(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        losses = []
        for (s, t), project in zip(pairs, self.projectors, strict=True):
            s, t = same_size(s, t)
            losses.append(pearson(project(s), t))
        return summed(losses)
