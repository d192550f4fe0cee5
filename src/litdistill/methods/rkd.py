"""Relational knowledge distillation (RKD). Park et al. 2019 (arXiv 1904.05068), section 3."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from litdistill.losses import distances_and_angles, smooth_l1
from litdistill.methods.base import Method, check_weights, pair, summed, vectors
from litdistill.types import Batch, Outputs, Taps


class RKD(Method):
    """`hard` · labels' loss + `distance` · Huber(distances) + `angle` · Huber(angles), averaged over all pairs or triples.

    The weights are the CRD protocol's, for means over all N² and N³ entries, including the zeros of a sample with itself.
    With several taps the terms are summed over the pairs of features. For a batch of one the terms are 0.
    """

    some_classes = True

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
        with torch.autocast(student.main.device.type, enabled=False):
            for s, t in pair(vectors(student.features, "rkd"), vectors(teacher.features, "rkd")):
                (s_distance, s_angle), (t_distance, t_angle) = distances_and_angles(s), distances_and_angles(t)
                distances.append(smooth_l1(s_distance, t_distance))
                angles.append(smooth_l1(s_angle, t_angle))
        terms = {"distance": self.distance * summed(distances)} if self.distance else {}
        return terms | ({"angle": self.angle * summed(angles)} if self.angle else {})
