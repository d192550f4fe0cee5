"""Cross-head distillation. Wang et al. 2023, CrossKD (arXiv 2306.11369), section 3: written from the paper's formulas alone.

    litdistill experiment=… method=crosskd

The student's features inside its head pass through the rest of the teacher's frozen head. These cross-head predictions, and not
the student's own, are compared with the teacher's, so that the labels and the teacher do not pull at the same last layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from litdistill.methods.base import BOXES, Method
from litdistill.models.preprocess import SCALE
from litdistill.tasks.detection.dense_kd import DenseTerms, check_anchors
from litdistill.tasks.detection.detector import Detector, detector_of
from litdistill.types import Batch, Outputs, Taps
from litdistill.utils.errors import UserError

# The branches of a head, each with the layers that follow its convolutions.
BRANCHES = {"classification_head": "cls_logits", "regression_head": "bbox_reg"}


class CrossKD(Method):
    """`hard` · labels' loss + the terms of `DenseKD` between the cross-head predictions and the teacher's.

    The features are those before the last `remaining` convolutions of each branch of the head: with 1 those after the third of
    four, the usual depth. Both heads are counted from their end, so that heads of other depths fit; a head without so many
    convolutions is crossed at its input, the pyramid. Where channels differ, a 1x1 convolution for each branch maps the
    student's to the teacher's; it is trained, and is not deployed.

    Own choices beside the paper's scheme: which anchors count is said by the teacher's confidence, which needs no labels; the
    classes are compared by the quality focal loss for each kind of head (`power` = 0 is the binary cross-entropy); the
    centerness is compared, too.

    Args:
        hard, soft, box, centerness, power, least: as of `DenseKD`.
        remaining: convolutions of the teacher's head that the student's features pass, before its last layer.

    Raises `UserError` for a head that is no stack of convolutions for all levels (SSD), and as `DenseKD` does.
    """

    kinds = (BOXES,)

    def __init__(
        self,
        hard: float = 1.0,
        soft: float = 1.0,
        box: float = 1.0,
        centerness: float = 1.0,
        power: float = 2.0,
        least: float = 0.05,
        remaining: int = 1,
    ):
        super().__init__(hard)
        self.terms = DenseTerms(soft, box, centerness, power, least)
        if remaining < 0:
            raise UserError(f"remaining={remaining} is a number of convolutions of the teacher's head, 0 or more.")
        self.remaining = remaining
        self.names: dict[str, list[str]] = {}  # by branch, of the student's features of each level
        self.rest: Rest | None = None
        self.projectors = nn.ModuleDict()

    def prepare(self, student: nn.Module, teacher: Any, example: Any) -> nn.Module:
        if callable(getattr(teacher, "parts", None)):
            raise UserError(
                "crosskd continues the head of one teacher, and this one is several networks: name one of them."
            )
        own, other = detector_of(student), detector_of(teacher)
        prefix = next(name for name, module in student.named_modules() if module is own)
        levels = len(own.anchor_generator.sizes)
        self.names = {
            branch: [f"{_joined(prefix, 'head', branch, place)}:in@{level}" for level in range(levels)]
            for branch, place in crossings(own.head, self.remaining, "student").items()
            if branch in self._used()
        }
        self.rest = Rest(other, self.remaining)
        return student

    def _used(self) -> tuple[str, ...]:
        """Returns the branches with a term: an unused projector would stop DDP."""
        wanted = (self.terms.soft, self.terms.box or self.terms.centerness)
        return tuple(branch for branch, weight in zip(BRANCHES, wanted, strict=True) if weight)

    def taps(self) -> Taps:
        return Taps([name for names in self.names.values() for name in names])

    def build(self, student: Outputs, teacher: Outputs, targets: Tensor | None) -> None:
        check_anchors(student, teacher, "crosskd")
        assert self.rest is not None
        for branch, names in self.names.items():
            first = student.features[names[0]]
            channels = self.rest.channels[branch]
            if first.shape[1] != channels:
                self.projectors[branch] = nn.Conv2d(first.shape[1], channels, 1, device=first.device)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return self.terms(Outputs(self.cross(student)), teacher)

    def cross(self, student: Outputs) -> dict[str, Tensor]:
        """Returns the cross-head predictions, heads as of a detector; without `boxes` for a student in evaluation mode."""
        assert self.rest is not None
        maps: dict[str, list[Tensor]] = {}
        for branch, names in self.names.items():
            project = self.projectors[branch] if branch in self.projectors else nn.Identity()
            maps[branch] = [project(student.features[name]) for name in names]
        heads = self.rest(maps, student.heads.get("anchors"))
        if "boxes" in heads and SCALE in student.heads:
            heads["boxes"] = heads["boxes"] / student.heads[SCALE][:, None]
        return heads


class Rest:
    """The last layers of a detector's head, frozen: a copy, which is no module.

    So no checkpoint, optimizer, average or bucket of gradients holds it, and copies of a method share it.
    """

    def __init__(self, detector: Detector, remaining: int):
        self.decoded: Callable[[Tensor, Tensor], Tensor] = detector.decoded  # it reads no weights
        self.branches: dict[str, nn.Module] = {}
        self.channels: dict[str, int] = {}
        for branch, place in crossings(detector.head, remaining, "teacher").items():
            kept: Any = copy.deepcopy(detector.head.get_submodule(branch)).requires_grad_(False).eval()
            layers = list(kept.conv)
            kept.conv = nn.Sequential(*layers[int(place.split(".")[1]) :] if place.startswith("conv.") else [])
            first = next(m for m in [*kept.conv.modules(), getattr(kept, BRANCHES[branch])] if isinstance(m, nn.Conv2d))
            self.branches[branch], self.channels[branch] = kept, first.in_channels

    def __deepcopy__(self, memo: dict[int, Any]) -> Rest:
        return self

    def __call__(self, maps: dict[str, list[Tensor]], anchors: Tensor | None) -> dict[str, Tensor]:
        """Returns the heads for the maps of each branch, a list of levels (N, C, H, W). `anchors`: (N, A, 4)."""
        heads = {}
        for branch, levels in maps.items():
            given = self.branches[branch].to(levels[0].device)(levels)
            if branch == "classification_head":
                heads["logits"] = given
                continue
            deltas, centerness = given if isinstance(given, tuple) else (given, None)
            if anchors is not None:
                heads["boxes"] = self.decoded(deltas, anchors[0])
            if centerness is not None:
                heads["centerness"] = centerness.squeeze(2)
        return heads


def crossings(head: nn.Module, remaining: int, whose: str) -> dict[str, str]:
    """Returns by branch of a head the layer before which it is crossed: "conv.9", or its last layer for `remaining` = 0."""
    found = {}
    for branch, last in BRANCHES.items():
        inside: Any = getattr(head, branch, None)
        if not isinstance(getattr(inside, "conv", None), nn.Sequential) or not hasattr(inside, last):
            raise UserError(
                f"crosskd crosses heads of convolutions that all levels share, and the {whose}'s is a {type(head).__name__}: "
                "use dense_kd, or an FCOS or RetinaNet."
            )
        starts = convolutions(inside.conv)
        found[branch] = f"conv.{starts[-min(remaining, len(starts))]}" if remaining and starts else last
    return found


def convolutions(layers: Sequence[nn.Module] | nn.Sequential) -> list[int]:
    """Returns the positions of the layers that are or hold a convolution; its normalization and activation follow."""
    return [i for i, layer in enumerate(layers) if any(isinstance(m, nn.Conv2d) for m in layer.modules())]


def _joined(*names: str) -> str:
    return ".".join(name for name in names if name)
