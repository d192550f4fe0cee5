"""What a distillation method is: a function from what two networks put out to named, weighted loss terms.

A method sees no trainer, no network, no data set and no config. To add one, write one file here with a `Method`
and one yaml in `conf/method/` that names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from litdistill.types import Outputs, Taps
from litdistill.utils.errors import UserError


class Method(nn.Module):
    """Base of all methods. Parameters of a method (projectors) are trained beside the student and shipped with nobody."""

    needs_teacher = True
    phases = False  # whether the first epochs initialise and train other parameters than the rest (AB, FT, FSP)
    init_epochs = 0  # how many of those leave the student without the loss that it is trained for
    needs_hard = False  # whether its weight of the labels cannot be 0
    epoch = 0  # set by the distiller before each epoch

    def taps(self) -> Taps:
        """Which features are read; none by default."""
        return Taps()

    def prepare(self, student: nn.Module, teacher: nn.Module | None, example: Tensor) -> nn.Module:
        """The network that is trained: the student itself, but for methods that give it another head or companions.

        `example`: a few images (N, C, H, W) that both networks take.
        """
        return student

    def ship(self, student: nn.Module) -> nn.Module:
        """What of the prepared network is measured, saved and deployed: all of it, but for methods that train companions."""
        return student

    def build(self, student: Outputs, teacher: Outputs | None, targets: Tensor) -> None:
        """Makes projectors and memories, once, from what a dry forward of one small batch gave.

        Shapes are inferred here and typed nowhere. `targets`: (M,) int64, the label of every sample by id, -1 for those
        that are not trained on.
        Raises `UserError` where this pair of networks cannot do (no spatial maps, say).
        """

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor) -> dict[str, Tensor]:
        """Scalar loss terms by name, each already weighted; they are summed, and logged by their names.

        `target`: (N,) int64 class indices, or (N, classes) probabilities where labels were mixed.
        A term whose weight is 0 is left out, so that no work is done for it.
        """
        raise NotImplementedError


def check_weights(**weights: float) -> None:
    """Raises `UserError` for a loss weight below zero."""
    for name, value in weights.items():
        if not value >= 0:
            raise UserError(
                f"method.{name}={value} is a loss weight and cannot be negative. Use 0 to leave the term out."
            )


def check_temperature(temperature: float) -> None:
    """Raises `UserError` unless the temperature is above zero."""
    if not temperature > 0:
        raise UserError(
            f"method.temperature={temperature} must be above 0. Common values are 2 to 20; 4 is a good start."
        )


def maps(features: Mapping[str, Tensor], method: str) -> list[Tensor]:
    """The spatial maps (N, C, H, W) among the features, in order. Raises `UserError` where there is none."""
    found = [f for f in features.values() if f.ndim == 4]
    if not found:
        shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in features.items()) or "no feature at all"
        raise UserError(
            f"method={method} compares spatial maps (N, C, H, W), and this network offers {shapes}. "
            "Use a method that reads logits or vectors (kd, dkd, dist, pkt, rkd, sp), or name a tap that is a map."
        )
    return found


def pair(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Stage by stage, counted from the last, where the deeper of two networks has stages the other lacks."""
    n = min(len(student), len(teacher))
    return list(zip(student[len(student) - n :], teacher[len(teacher) - n :], strict=True))


def same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The larger of two maps (N, C, H, W) average-pooled to the height and width of the smaller, each axis by itself."""
    h, w = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
    fit = lambda x: x if x.shape[2:] == (h, w) else F.adaptive_avg_pool2d(x, (h, w))  # noqa: E731
    return fit(a), fit(b)


def hard_loss(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with the labels, in float32 whatever the autocast. A scalar, the mean over the batch."""
    return F.cross_entropy(logits.float(), target, label_smoothing=label_smoothing)
