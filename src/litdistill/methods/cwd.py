"""Channel-wise distillation (CWD). Shu et al. 2021 (arXiv 2011.13256), section 3."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from litdistill.losses import kl_places, same_size
from litdistill.methods.base import MapMethod, check_temperature, summed
from litdistill.methods.layers import projectors
from litdistill.utils.errors import UserError


class CWD(MapMethod):
    """`hard` · labels' loss + `hint` · Σ T² · KL over positions, channel by channel.

    A student whose channels differ from the teacher's passes a 1x1 convolution first, as in the paper.
    """

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 50.0,
        temperature: float = 4.0,
        student_taps: Sequence[str] | str = "last",
        teacher_taps: Sequence[str] | str = "last",
    ):
        super().__init__(hard, hint, student_taps, teacher_taps)
        check_temperature(temperature)
        self.temperature = temperature

    def build_pairs(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        if all(s.shape[2:].numel() == 1 for s, _ in [same_size(*p) for p in pairs]):
            raise UserError(
                "cwd compares the positions of a map, and its taps give maps of one position (1x1): the loss is "
                "always 0. Read earlier maps (student_taps=stages teacher_taps=stages) or larger images."
            )
        self.projectors = projectors(pairs, bias=True)

    def loss(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        losses = []
        for (s, t), project in zip(pairs, self.projectors, strict=True):
            s, t = same_size(s, t)
            losses.append(kl_places(project(s), t, self.temperature))
        return summed(losses)
