"""From the dense heads of a one-stage detector to its detections: one suppression for all pictures and classes at once.

All shapes are fixed by those of the heads, so that a network with its post-processing exports to ONNX.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from litdistill.tasks.detection.suppress import suppress

SCORE, CLASS = 4, 5  # columns of a detection, after x1, y1, x2, y2
CANDIDATES = 1000  # of a picture that suppression sees; torchvision takes as many of each level


def scores_of(heads: Mapping[str, Tensor]) -> Tensor:
    """Returns the score of each anchor and class (N, A, C): the class's probability; with a `centerness` (N, A) the geometric
    mean of both, as torchvision's FCOS has it."""
    probability = heads["logits"].float().sigmoid()
    if "centerness" not in heads:
        return probability
    return (probability * heads["centerness"].float().sigmoid()[..., None]).sqrt()


def detections(
    heads: Mapping[str, Tensor],
    image_size: tuple[int, int],
    score_threshold: float = 0.05,
    nms: float = 0.6,
    top: int = 100,
    candidates: int = CANDIDATES,
) -> Tensor:
    """Returns the detections of N pictures, (N, top, 6) float32: x1, y1, x2, y2, score, class; best first.

    The rest of a picture's rows have the score 0 and the class −1. Equal to the `postprocess_detections` of torchvision's
    one-stage detectors on the same heads, wherever no more than `candidates` scores of a picture are above the threshold.

    Args:
        heads: `logits` (N, A, C), `boxes` (N, A, 4) in pixels, and `centerness` (N, A) where the network has it.
        image_size: height and width in pixels, to which boxes are clipped.
        score_threshold: a detection has a higher score.
        nms: of two boxes of a class with a higher IoU the better one is kept.
        top: how many of a picture are kept.
        candidates: how many of a picture are looked at, the best ones.
    """
    count, _, classes = heads["logits"].shape
    score, place = scores_of(heads).flatten(1).topk(min(max(candidates, top), heads["logits"].shape[1] * classes), 1)
    label = place % classes
    boxes = heads["boxes"].float().gather(1, place.div(classes, rounding_mode="floor")[..., None].expand(-1, -1, 4))
    height, width = image_size
    boxes = boxes.minimum(boxes.new_tensor([width, height, width, height])).clamp(min=0)
    low = score <= score_threshold  # NaN is not: it is for metrics to see
    score = score.masked_fill(low, 0.0)
    # Each class has a field of its own, side by side.
    placed = boxes + (label.to(boxes) * (width + 1))[..., None] * boxes.new_tensor([1.0, 0.0, 1.0, 0.0])
    kept = suppress(placed, score, label, nms, classes, top) | score.isnan()
    score, best = score.masked_fill(~kept, 0.0).topk(min(top, score.shape[1]), 1)
    label = label.gather(1, best).float().masked_fill(score == 0, -1.0)
    boxes = boxes.gather(1, best[..., None].expand(-1, -1, 4)).masked_fill((score == 0)[..., None], 0.0)
    found = torch.cat([boxes, score[..., None], label[..., None]], 2)
    short = top - found.shape[1]
    if not short:
        return found
    empty = found.new_zeros(1, 1, 6)
    empty[..., CLASS] = -1.0
    return torch.cat([found, empty.expand(count, short, 6)], 1)


def above(found: Tensor, threshold: float) -> Tensor:
    """Returns the detections (N, K, 6) with those below a threshold emptied: score 0, class −1."""
    low = ~(found[..., SCORE] >= threshold)
    return torch.where(low[..., None], found.new_tensor([0.0, 0.0, 0.0, 0.0, 0.0, -1.0]), found)
