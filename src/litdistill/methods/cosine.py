"""Cosine of embeddings. Ranzinger et al. 2024, AM-RADIO (arXiv 2312.06709): one vector a sample follows that of a backbone.

It needs no classes and no labels: the teacher may be a network that gives features alone.
"""

from __future__ import annotations

from torch import Tensor, nn

from litdistill.losses import cosine
from litdistill.methods.base import VectorMethod
from litdistill.methods.srd import pooled
from litdistill.types import Outputs


class Cosine(VectorMethod):
    """`hard` · labels' loss + `hint` · (1 − cosine of the student's vector W and the teacher's).

    A vector is a network's embedding, or the classifier's input, or the mean of a tapped map or of tokens. W is learned with
    the student and left out where the widths are equal: then the student's vectors can stand in for the teacher's.
    """

    def pairs(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        """Returns the last feature of either network as vectors, (N, D_s) and (N, D_t)."""
        return [(pooled(student), pooled(teacher))]

    def build_pairs(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        (s, t) = pairs[0]
        same = s.shape[1] == t.shape[1]
        self.projector = nn.Identity() if same else nn.Linear(s.shape[1], t.shape[1], bias=False, device=s.device)

    def loss(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        return cosine(self.projector(pairs[0][0]), pairs[0][1])
