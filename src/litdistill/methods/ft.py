"""Factor transfer (FT). Kim, Park & Kwak 2018 (arXiv 1802.04977), sections 3.1 to 3.3."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from litdistill.losses import factor, mse
from litdistill.methods.base import MapMethod, check_weights
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError


def convolutions(kind: type[nn.Module], widths: Sequence[int], norm: bool) -> nn.Sequential:
    """Returns 3x3 layers of the given widths, each with LeakyReLU(0.1) and, if `norm`, BatchNorm in between."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [kind(a, b, 3, 1, 1), *([nn.BatchNorm2d(b)] if norm else []), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


class FT(MapMethod):
    """Two phases: for `init_epochs` epochs a paraphraser alone, then `hard` · labels' loss + `hint` · `factor`.

    The paraphraser, an autoencoder with `rate` times the channels of the teacher's last map, learns to reconstruct that
    map. Then its encoder is fixed, and the student's translator learns its output. The student gets no gradient in the
    first phase: train that many more epochs.
    """

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 500.0,
        rate: float = 0.5,
        p: int = 1,
        pool_channels: bool = False,
        init_epochs: int = 30,
        student_taps: Sequence[str] | str = "last",
        teacher_taps: Sequence[str] | str = "last",
    ):
        super().__init__(hard, hint, student_taps, teacher_taps)
        check_weights(rate=rate)
        if not (hint and rate and init_epochs > 0):
            raise UserError("ft trains in two phases: hint, rate and init_epochs must be above 0.")
        if p not in (1, 2):
            raise UserError(f"p={p} is the norm of the factors' difference: use 1 or 2.")
        self.rate, self.p, self.pool_channels, self.init_epochs = rate, p, pool_channels, init_epochs

    def build_pairs(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        f_s, f_t = pairs[-1]
        c_s, c_t = f_s.shape[1], f_t.shape[1]
        k = max(1, round(c_t * self.rate))
        self.encoder = convolutions(nn.Conv2d, [c_t, c_t, k, k], norm=False).to(f_t.device)
        self.decoder = convolutions(nn.ConvTranspose2d, [k, k, c_t, c_t], norm=False).to(f_t.device)
        self.translator = convolutions(nn.Conv2d, [c_s, c_s, k, k], norm=True).to(f_s.device)

    def loss(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        f_s, f_t = pairs[-1]
        with torch.no_grad():
            encoded = self.encoder(f_t)
        return factor(self.translator(f_s), encoded, self.p, self.pool_channels)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        if self.epoch >= self.init_epochs:
            return super().forward(student, teacher, batch)
        _, f_t = self.pairs(student, teacher)[-1]
        return {"paraphraser": mse(self.decoder(self.encoder(f_t)), f_t)}
