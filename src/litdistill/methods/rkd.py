"""Relational knowledge distillation. Park et al. 2019 (arXiv 1904.05068), section 3."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from litdistill.methods.base import Method, check_weights, hard_loss, pair
from litdistill.types import Outputs, Taps


def relations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Distances `(N, N)` between N vectors `(N, D)` over their mean, and cosines `(N, N, N)` of the angles they form.

    The mean is over ordered pairs of different samples. `cosines[i, j, k]` is that of the angle at i between j and k, 0
    where i is j or k. Samples that coincide have distance 0, cosine 0 and no gradient from either. Differences are
    taken one by one and not through inner products, which lose small distances.
    """
    difference = x[None] - x[:, None]
    distance = difference.norm(dim=2)
    n = len(x)
    mean = distance.sum() / max(n * (n - 1), 1)
    inverse = torch.where(distance > 0, 1 / distance.clamp(min=1e-20), torch.zeros_like(distance))
    unit = difference * inverse[..., None]
    return distance / mean.clamp(min=1e-20), unit @ unit.transpose(1, 2)


class RKD(Method):
    """`hard` · CE + `distance` · Huber(distances) + `angle` · Huber(angles), each a mean over all pairs or triples.

    The weights are the CRD protocol's, for means over all N² and N³ entries, a sample's zeros with itself included.
    With several taps the terms are summed over the pairs of features. A batch of one has no relation: the terms are 0.
    """

    def __init__(
        self,
        hard: float = 1.0,
        distance: float = 25.0,
        angle: float = 50.0,
        student_taps: Sequence[str] | str = "pooled",
        teacher_taps: Sequence[str] | str = "pooled",
    ):
        super().__init__()
        check_weights(hard=hard, distance=distance, angle=angle)
        self.hard, self.distance, self.angle = hard, distance, angle
        self.read = Taps(student_taps, teacher_taps)

    def taps(self) -> Taps:
        return self.read

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor) -> dict[str, Tensor]:
        terms = {}
        if self.hard:
            terms["hard"] = self.hard * hard_loss(student.logits, target)
        if not (self.distance or self.angle):
            return terms
        assert teacher is not None
        distances, angles = [], []
        with torch.autocast(student.logits.device.type, enabled=False):
            for s, t in pair(list(student.features.values()), list(teacher.features.values())):
                s_distance, s_angle = relations(s.float().flatten(1))
                t_distance, t_angle = relations(t.float().flatten(1))
                distances.append(F.smooth_l1_loss(s_distance, t_distance))
                angles.append(F.smooth_l1_loss(s_angle, t_angle))
        if self.distance:
            terms["distance"] = self.distance * torch.stack(distances).sum()
        if self.angle:
            terms["angle"] = self.angle * torch.stack(angles).sum()
        return terms
