"""A head of FCOS that gives a distribution for each side of a box, and its loss. Li et al. 2020, GFL (arXiv 2006.04388).

    python scripts/train.py data=digit_scenes task=detection net@student=fcos_slim student.bins=8 …

The distance from a place to a side is the expectation of a softmax over the values 0, 1, …, `bins`, in sizes of its map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOSHead

from litdistill.losses.values import wide

DISTRIBUTION = "distribution"  # of the losses of `SidesHead`
WEIGHT = 0.25  # of the distribution focal loss, as in MMDetection's configs of GFL


class SidesBranch(nn.Module):
    """The regression branch of FCOS with logits (N, A, 4 · (bins + 1)) for the sides instead of distances (N, A, 4).

    Args:
        branch: torchvision's `FCOSRegressionHead`, whose convolutions and centerness are taken over.
        bins: the largest distance to a side, in sizes of a map.
    """

    def __init__(self, branch: Any, bins: int):
        super().__init__()
        self.conv, self.bbox_ctrness = branch.conv, branch.bbox_ctrness
        self.bbox_reg = nn.Conv2d(branch.bbox_reg.in_channels, 4 * (bins + 1), 3, padding=1)
        nn.init.normal_(self.bbox_reg.weight, std=0.01)
        self.bbox_reg.bias = nn.Parameter(torch.zeros(4 * (bins + 1)))

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        inside = [self.conv(m) for m in maps]
        sides, centerness = (
            torch.cat([layer(x).flatten(2).transpose(1, 2) for x in inside], 1)
            for layer in (self.bbox_reg, self.bbox_ctrness)
        )
        return sides, centerness


class SidesHead(nn.Module):
    """torchvision's `FCOSHead` with a `SidesBranch`; its `compute_loss` adds the distribution focal loss of the same matches.

    Args:
        head: torchvision's `FCOSHead` of one anchor a place, which it takes over.
        bins: as of `SidesBranch`.
    """

    def __init__(self, head: FCOSHead, bins: int):
        super().__init__()
        self.classification_head: nn.Module = head.classification_head
        self.regression_head = SidesBranch(head.regression_head, bins)
        self.box_coder: Any = head.box_coder
        self.loss_of = head.compute_loss  # it reads no parameters

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        sides, centerness = self.regression_head(maps)
        return {"cls_logits": self.classification_head(maps), "bbox_regression": sides, "bbox_ctrness": centerness}

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """Returns torchvision's losses of the distances `bbox_regression` (N, A, 4), and `distribution`: `WEIGHT` · DFL.

        It has the names of torchvision's method, which `FCOS.compute_loss` calls with each anchor's object, (A,), -1 for none.
        `head_outputs` has beside torchvision's also `sides` (N, A, 4, bins + 1).
        """
        losses = self.loss_of(targets, head_outputs, anchors, matched_idxs)
        values, logits = [], []
        for objects, sides, places, match in zip(targets, head_outputs["sides"], anchors, matched_idxs, strict=True):
            found = match >= 0
            values.append(self.box_coder.encode(places[found], objects["boxes"][match[found]]))
            logits.append(sides[found])
        return {**losses, DISTRIBUTION: WEIGHT * distribution_focal(torch.cat(logits), torch.cat(values))}


def distances(raw: Tensor) -> Tensor:
    """Returns the distances (N, A, 4) of what a regression branch gives: itself, or the expectations of its sides
    (N, A, 4 · (bins + 1))."""
    return raw if raw.shape[2] == 4 else expected(split(raw))


def split(raw: Tensor) -> Tensor:
    """Returns the logits of each side, (N, A, 4, bins + 1), of what a `SidesBranch` gives."""
    return raw.unflatten(2, (4, raw.shape[2] // 4))


def expected(sides: Tensor) -> Tensor:
    """Returns Σ i · p_i over the values i = 0, …, bins of softmaxes, (…), of logits (…, bins + 1)."""
    return sides.softmax(-1) @ torch.arange(sides.shape[-1], dtype=sides.dtype, device=sides.device)


def distribution_focal(sides: Tensor, values: Tensor) -> Tensor:
    """Mean over places and their sides of −((i + 1 − y) log p_i + (y − i) log p_{i+1}); 0 without places.

    GFL's equation 6; i is the integer below y. `sides` (P, 4, bins + 1) logits, `values` (P, 4) the true distances y in sizes
    of a map; those beyond the last value are taken for it.
    """
    sides = wide(sides)
    last = sides.shape[-1] - 1
    values = values.to(sides.dtype).clamp(0, last)
    below = values.floor().clamp(max=last - 1)
    log_p, share = sides.log_softmax(-1), values - below
    low, high = (log_p.gather(-1, (below.long() + k).unsqueeze(-1)).squeeze(-1) for k in (0, 1))
    return -((1 - share) * low + share * high).mean(-1).sum() / max(1, len(sides))
