"""Non-maximum suppression of a batch of pictures, as one operator: `litdistill::suppress`.

As an operator it exports to the NonMaxSuppression of ONNX, which knows batches and classes, leaves out what has no score and
stops at the last box that can count. torchvision's has none of these: it compares boxes with those of all pictures and classes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import nms


@torch.library.custom_op(
    "litdistill::suppress",
    mutates_args=(),
    schema="(Tensor boxes, Tensor scores, Tensor labels, float iou, int classes, int top) -> Tensor",
)
def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, iou: float, classes: int, top: int) -> Tensor:
    """Returns which boxes of each picture are kept, (N, M) booleans: those with a score above 0 whose IoU with any kept box
    of a higher score is at most `iou`. In ONNX, those among them that are not of the best `top` of their class are left out.

    `boxes`: (N, M, 4), x1, y1, x2, y2; those of two classes do not overlap. `scores`: (N, M). `labels`: (N, M) int64, below
    `classes`.
    """
    if boxes.device.type != "cpu":
        return at_once(boxes, scores, labels, iou, classes, top)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for picture, some, score in zip(kept, boxes, scores, strict=True):
        scored = (score > 0).nonzero()[:, 0]
        picture[scored[nms(some[scored], score[scored], iou)]] = True
    return kept


OPERATOR = torch.ops.litdistill.suppress.default


@suppress.register_fake
def _(boxes: Tensor, scores: Tensor, labels: Tensor, iou: float, classes: int, top: int) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def at_once(boxes: Tensor, scores: Tensor, labels: Tensor, iou: float, classes: int, top: int) -> Tensor:
    """Returns `suppress` by one call of torchvision's operator: pictures lie in fields of their own, one below the other."""
    height = boxes[..., 3].amax().clamp(min=0) + 1
    down = (torch.arange(boxes.shape[0], device=boxes.device)[:, None] * height).expand(scores.shape)
    placed = (boxes + torch.stack([torch.zeros_like(down), down] * 2, 2)).flatten(0, 1)
    scored = (scores.flatten() > 0).nonzero()[:, 0]
    index = scored[nms(placed[scored], scores.flatten()[scored], iou)]
    return torch.zeros_like(scores, dtype=torch.bool).flatten().index_fill(0, index, True).view(scores.shape)


def in_onnx() -> Callable[..., Any]:
    """Returns what the operator is in ONNX, for the custom_translation_table of `torch.onnx.export`. It needs onnxscript."""
    op: Any = importlib.import_module("onnxscript").opset18

    def suppressed(boxes: Any, scores: Any, labels: Any, iou: float, classes: int, top: int) -> Any:
        axis, each = op.Constant(value_ints=[1]), op.Constant(value_ints=list(range(classes)))
        own = op.Equal(op.Unsqueeze(labels, axis), op.Unsqueeze(each, axis))  # (N, classes, M)
        by_class = op.Where(own, op.Unsqueeze(scores, axis), op.Constant(value_float=0.0))
        limits = op.Constant(value_floats=[float(iou)]), op.Constant(value_floats=[0.0])
        found = op.NonMaxSuppression(boxes, by_class, op.Constant(value_ints=[top]), *limits)
        places = op.Gather(found, op.Constant(value_ints=[0, 2]), axis=1)
        ones = op.Expand(op.Constant(value_float=1.0), op.Gather(op.Shape(found), op.Constant(value_ints=[0])))
        none = op.Mul(scores, op.Constant(value_float=0.0))
        return op.Greater(op.ScatterND(none, places, ones), op.Constant(value_float=0.0))

    return suppressed
