"""Correlation congruence (CC). Peng et al. 2019 (arXiv 1904.01802), section 3."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from litdistill.losses import consecutive, gaussian
from litdistill.methods.base import VectorMethod
from litdistill.utils.errors import UserError


class CC(VectorMethod):
    """`hard` · labels' loss + `hint` · correlation congruence of learned linear embeddings of the two networks' features.

    `kernel: consecutive` is the published tables' form, to which the weight .02 belongs; `gaussian` is the paper's
    (γ = .4, order 2, weight .003). Of several taps the last is embedded.
    """

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 0.02,
        width: int = 128,
        kernel: str = "consecutive",
        gamma: float = 0.4,
        order: int = 2,
        student_taps: Sequence[str] | str = "pooled",
        teacher_taps: Sequence[str] | str = "pooled",
    ):
        super().__init__(hard, hint, student_taps, teacher_taps)
        if kernel not in ("consecutive", "gaussian"):
            raise UserError(
                f"kernel={kernel} is unknown. Use consecutive (the published tables) or gaussian (the paper)."
            )
        self.width, self.kernel, self.gamma, self.order = width, kernel, gamma, order

    def build_pairs(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        s, t = pairs[-1]
        self.embed_student = nn.Linear(s.shape[1], self.width, device=s.device)
        self.embed_teacher = nn.Linear(t.shape[1], self.width, device=t.device)

    def loss(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        s, t = self.embed_student(pairs[-1][0]), self.embed_teacher(pairs[-1][1])
        return gaussian(s, t, self.gamma, self.order) if self.kernel == "gaussian" else consecutive(s, t)
