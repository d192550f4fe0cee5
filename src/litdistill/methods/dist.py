"""DIST: matching relations instead of values of predictions. Huang et al. 2022 (arXiv 2205.10536), section 3."""

from __future__ import annotations

from torch import Tensor

from litdistill.losses import inter_class, intra_class
from litdistill.methods.base import CATEGORICAL, Method, check_temperature, check_weights
from litdistill.types import Batch, Outputs


class DIST(Method):
    """`hard` · labels' loss + `inter` · T² · inter-class distance + `intra` · T² · intra-class distance.

    Both are Pearson distances of the probabilities at temperature T: inter over the classes of each sample, intra over the
    samples of each class. The intra term is 0 for a batch of one, where it is not defined. Of two classes the inter-class
    distance is 0 or 2: it compares decisions alone.
    The factor T² is that of the authors' CIFAR code; their weight of 2 for β = γ = 1 makes inter and intra 2.
    """

    kinds = (CATEGORICAL,)
    takes_places = True
    fewest_classes = 3

    def __init__(self, hard: float = 1.0, inter: float = 2.0, intra: float = 2.0, temperature: float = 4.0):
        super().__init__(hard)
        check_weights(inter=inter, intra=intra)
        check_temperature(temperature)
        self.inter, self.intra, self.temperature = inter, intra, temperature

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        if not (self.inter or self.intra):
            return {}
        terms = {}
        if self.inter:
            terms["inter"] = self.inter * inter_class(student.logits, teacher.logits, self.temperature)
        if self.intra:
            terms["intra"] = self.intra * intra_class(student.logits, teacher.logits, self.temperature)
        return terms
