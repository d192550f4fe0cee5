"""Masked generative distillation (MGD). Yang et al. 2022 (arXiv 2205.01529), section 3."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from litdistill.losses import same_size
from litdistill.losses.values import wide
from litdistill.methods.base import MapMethod, summed
from litdistill.methods.layers import projectors
from litdistill.utils.errors import UserError

UNITS = ("places", "channels")


class MGD(MapMethod):
    """`hard` · labels' loss + `hint` · Σ over maps of Σ (teacher's map − G(mask · student's map))², the mean over the batch.

    G is a 3x3 convolution, a ReLU and another 3x3 convolution, trained beside the student, one for each map. A student whose
    channels differ from the teacher's passes a 1x1 convolution first. The sum is over channels and positions, so that
    published weights are small. Masks are drawn anew in each step, from the generator that is seeded by step.

    Args:
        masked: the probability λ by which a unit of the student's map is set to zero.
        mask: the unit: `places`, each with all its channels, as in the paper's formula and for detectors; `channels`, each
            with all its places, as in the authors' code for classification.
    """

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 7e-5,
        masked: float = 0.15,
        mask: str = "channels",
        student_taps: Sequence[str] | str = "last",
        teacher_taps: Sequence[str] | str = "last",
    ):
        super().__init__(hard, hint, student_taps, teacher_taps)
        if not 0 <= masked < 1:
            raise UserError(f"masked={masked} is the share that is masked: at least 0 and below 1, as 0.15 or 0.65.")
        if mask not in UNITS:
            raise UserError(f"mask={mask} is not known: use {' or '.join(UNITS)}.")
        self.masked, self.mask = masked, mask

    def build_pairs(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.projectors = projectors(pairs, bias=True)
        self.generators = nn.ModuleList(generator(t.shape[1]).to(t.device) for _, t in pairs)

    def loss(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        losses = []
        for (s, t), project, generate in zip(pairs, self.projectors, self.generators, strict=True):
            s, t = same_size(s, t)
            s = project(s)
            kept = draw_mask(s, self.masked, self.mask)
            losses.append((wide(t) - wide(generate(s * kept))).square().sum() / len(t))
        return summed(losses)


def generator(channels: int) -> nn.Sequential:
    """Returns the block that makes the teacher's map (N, C, H, W) of the masked one, of the same shape."""
    conv = lambda: nn.Conv2d(channels, channels, 3, padding=1)  # noqa: E731
    return nn.Sequential(conv(), nn.ReLU(), conv())


def draw_mask(x: Tensor, masked: float, unit: str) -> Tensor:
    """Returns a random mask for maps (N, C, H, W): 0 with the probability `masked`, else 1.

    (N, 1, H, W) of places or (N, C, 1, 1) of channels.
    """
    n, c, h, w = x.shape
    shape = (n, 1, h, w) if unit == "places" else (n, c, 1, 1)
    return (torch.rand(shape, device=x.device) >= masked).to(x.dtype)
