"""Relational knowledge distillation (RKD). Park et al. 2019 (arXiv 1904.05068), section 3."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from litdistill.methods.base import Method, check_weights, pair, summed, vectors
from litdistill.types import Batch, Outputs, Taps


def relations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Distances `(N, N)` between N vectors `(N, D)` divided by their mean, and cosines `(N, N, N)` of the angles between them.

    The mean is over ordered pairs of different samples. `cosines[i, j, k]` is that of the angle at i between j and k, 0
    where i is j or k. Coinciding samples have distance 0, cosine 0 and no gradient from either. Differences are computed
    explicitly; inner products would lose small distances.
    """
    difference = x[None] - x[:, None]
    distance = difference.norm(dim=2)
    n = len(x)
    mean = distance.sum() / max(n * (n - 1), 1)
    inverse = torch.where(distance > 0, 1 / distance.clamp(min=1e-20), torch.zeros_like(distance))
    unit = difference * inverse[..., None]
    return distance / mean.clamp(min=1e-20), unit @ unit.transpose(1, 2)


class RKD(Method):
    """`hard` · labels' loss + `distance` · Huber(distances) + `angle` · Huber(angles), averaged over all pairs or triples.

    The weights are the CRD protocol's, for means over all N² and N³ entries, including the zeros of a sample with itself.
    With several taps the terms are summed over the pairs of features. For a batch of one the terms are 0.
    """

    def __init__(
        self,
        hard: float = 1.0,
        distance: float = 25.0,
        angle: float = 50.0,
        student_taps: Sequence[str] | str = "pooled",
        teacher_taps: Sequence[str] | str = "pooled",
    ):
        super().__init__(hard)
        check_weights(distance=distance, angle=angle)
        self.distance, self.angle, self.read = distance, angle, Taps(student_taps, teacher_taps)

    def taps(self) -> Taps:
        return self.read if self.distance or self.angle else Taps()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        if not (self.distance or self.angle):
            return {}
        distances, angles = [], []
        with torch.autocast(student.logits.device.type, enabled=False):
            for s, t in pair(vectors(student.features, "rkd"), vectors(teacher.features, "rkd")):
                (s_distance, s_angle), (t_distance, t_angle) = relations(s), relations(t)
                distances.append(F.smooth_l1_loss(s_distance, t_distance))
                angles.append(F.smooth_l1_loss(s_angle, t_angle))
        terms = {"distance": self.distance * summed(distances)} if self.distance else {}
        return terms | ({"angle": self.angle * summed(angles)} if self.angle else {})
