"""The levels of a feature pyramid network (FPN): the alias `"pyramid"` of `resolve_taps`, and how two networks' are paired.

names = resolve_taps(detector, images, "pyramid")  # ["backbone.fpn.layer_blocks.0", ..., "backbone.fpn.extra_blocks.p7"]
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from litdistill.features.stages import Call
from litdistill.utils.errors import UserError

PYRAMID = "pyramid"


def pyramid(net: nn.Module, calls: Sequence[Call]) -> list[str]:
    """Returns the names of the levels of the network's FPN, finest first.

    These are the outputs of the layers of torchvision's `FeaturePyramidNetwork`, which runs its coarsest level first, and
    those of the convolutions of its extra block (P6 and P7 of RetinaNet and FCOS). A level that is pooled from the one before
    (Faster R-CNN) says nothing new and is left out. `calls`: those of a forward of `net`.
    Raises `UserError` for a network without an FPN, or with several.
    """
    modules = [name for name, module in net.named_modules() if isinstance(module, FeaturePyramidNetwork)]
    if len(modules) != 1:
        found = f"{len(modules)} of them ({', '.join(modules)})" if modules else "none"
        raise UserError(
            f"Tap '{PYRAMID}' is the levels of a torchvision FeaturePyramidNetwork, and this network has {found}. Name the "
            "maps instead, finest first, or use 'stages'."
        )
    prefix = f"{modules[0]}." if modules[0] else ""
    blocks = {c.name.removeprefix(prefix): c for c in calls if c.name.startswith(prefix) and c.size is not None}
    levels = sorted(
        (name for name in blocks if _is_child(name, "layer_blocks")), key=lambda name: int(name.split(".")[1])
    )
    coarser = [name for name in blocks if _is_child(name, "extra_blocks")]
    return [prefix + name for name in (*levels, *coarser)]


def _is_child(name: str, parent: str) -> bool:
    return name.rpartition(".")[0] == parent


def same_stride(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Returns which maps (N, C, H, W) of two pyramids belong together, as pairs of indices in the student's order.

    Both networks see the same images, so that levels of one stride have one size. Sizes may differ by a factor below √2 in each
    direction, as where a network resizes its images; the nearest is taken, and each level belongs to one pair at most.
    """
    pairs: list[tuple[int, int]] = []
    for i, s in enumerate(student):
        free = [j for j in range(len(teacher)) if j not in {other for _, other in pairs}]
        near = [(_octaves(s, teacher[j]), j) for j in free]
        if near and min(near)[0] < 0.5:
            pairs.append((i, min(near)[1]))
    return pairs


def _octaves(a: Tensor, b: Tensor) -> float:
    """Returns by how many doublings the sizes of two maps differ, on the side where they differ more."""
    return max(abs(math.log2(m / n)) for m, n in zip(a.shape[2:], b.shape[2:], strict=True))
