"""Semantic segmentation: cross-entropy of each pixel, mean IoU, figures of masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from litdistill.methods.base import CATEGORICAL
from litdistill.tasks.base import Samples, Task
from litdistill.tasks.segmentation.metrics import IGNORED, PixelMetrics, labels_of
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError
from litdistill.utils.manifest import MASK
from litdistill.utils.shapes import described


class Segmentation(Task):
    """Inputs (N, C, H, W); targets (N, H, W) int64, a class for each pixel; logits (N, H·W, classes), row by row.

    A pixel of the class `ignored` counts for nothing: neither for the labels nor for the teacher, nor in a metric. One of −1
    has no label, and the teacher is learned from there: a picture without labels is −1 everywhere.
    Networks give maps of logits (N, classes, h, w), which are resized to the pictures (bilinear) where they are smaller. All
    means are over pixels, so that how pictures are divided into batches and processes changes nothing.

    Args:
        ignored: the class of pixels that do not count.
        class_weights: of each class in the labels' loss; None: 1 each.
    """

    kind = CATEGORICAL
    output_kind = MASK
    compared = ("masks (share of pixels)", "pixels agree")
    monitor: tuple[str, Literal["max", "min"]] = ("miou", "max")

    def __init__(self, ignored: int = IGNORED, class_weights: Sequence[float] | None = None):
        if ignored in range(-1, 2):
            raise UserError(
                f"ignored={ignored} must be a number that is no class: 255 is usual, −1 is a missing label."
            )
        if class_weights is not None and (
            isinstance(class_weights, str) or not all(0 <= w < math.inf for w in class_weights)
        ):
            raise UserError(f"class_weights={class_weights} must be one number for each class, none negative.")
        self.ignored = ignored
        self.class_weights = None if class_weights is None else torch.tensor(list(class_weights), dtype=torch.float32)

    def places(self, targets: Any) -> Tensor | None:
        """Returns which pixels count, (N, H·W) bool. Raises `UserError` for targets that are no masks, or where none counts."""
        if not isinstance(targets, Tensor) or targets.ndim != 3 or targets.is_floating_point():
            raise UserError(
                f"The targets are {described(targets)}, and segmentation needs masks (N, H, W) of integers, a class for each "
                "pixel. One class a picture is task=classification."
            )
        found = targets.flatten(1) != self.ignored
        if not bool(found.any()):
            raise UserError(
                f"No pixel of {len(targets)} pictures counts: all are of the class {self.ignored}, which is ignored. Leave "
                "such pictures out, or say which class is to be ignored (task.ignored)."
            )
        return found

    def forward(self, net: nn.Module, batch: Batch, training: bool) -> Outputs:
        outputs = super().forward(net, batch, training)
        given, size = outputs.logits, tuple(batch.inputs.shape[-2:])
        if given.ndim == 3 and given.shape[1] == size[0] * size[1]:
            return outputs
        if given.ndim != 4:
            raise UserError(
                f"The network gives {tuple(given.shape)}, and segmentation needs a map of logits (N, classes, h, w), such as "
                "that of net=fcn_slim."
            )
        return outputs._replace(heads={**outputs.heads, "logits": by_pixel(given, size)})

    def loss(self, net: nn.Module, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Returns `hard`: the cross-entropy of pixels in nats, in float32 also under autocast.

        Takes pictures, (N, H·W, C) and (N, H, W), or pixels, (P, C) and (P,). Class weights scale each pixel's, and the mean is
        over pixels. Raises `UserError` for a class beyond the logits.
        """
        logits, targets = outputs.logits.float(), batch.targets
        if logits.ndim == 3:
            found = self.places(targets)
            logits, targets = logits[found], targets.flatten(1)[found]
        weight = self._weights_for(logits)
        try:
            return {"hard": F.cross_entropy(logits, targets, weight, reduction="sum") / len(targets)}
        except IndexError as error:  # raised on a CPU only; a check on a GPU would need a synchronization
            raise UserError(
                f"Masks hold classes from {int(targets.min())} to {int(targets.max())}, and the network gives "
                f"{logits.shape[1]} logits: it needs one for each class, and classes are counted from 0."
            ) from error

    def _weights_for(self, logits: Tensor) -> Tensor | None:
        if self.class_weights is None:
            return None
        if len(self.class_weights) != logits.shape[1]:
            raise UserError(
                f"class_weights={self.class_weights.tolist()} are {len(self.class_weights)}, and the network gives "
                f"{logits.shape[1]} logits: give one for each class."
            )
        return self.class_weights.to(logits.device)

    def measures(self, outputs: Outputs) -> bool:
        return "label" in outputs.heads or super().measures(outputs)

    def keep(self, outputs: Outputs) -> Outputs:
        """Returns the head `label` alone, the class of each pixel, (N, H·W) int64: logits of a whole split are large."""
        return Outputs({"label": labels_of(outputs)}, ids=outputs.ids)

    def decode(self, outputs: Outputs) -> dict[str, Tensor]:
        """Returns the most probable class of each pixel, and its probability, (N, H·W), row by row."""
        confidence, label = outputs.logits.float().softmax(-1).max(-1)
        return {"label": label, "confidence": confidence}

    def metrics(self) -> Metric:
        return PixelMetrics(self.ignored)

    def scores(self, outputs: Outputs, targets: Tensor) -> dict[str, Tensor]:
        return {"pixel_accuracy": (outputs.logits.argmax(-1) == targets).float()}

    def agreement(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """Returns for each pixel whether the classes are equal; of logits also KL(teacher ‖ student) in nats, in float32."""
        found = {"agreement": (labels_of(student) == labels_of(teacher)).float()}
        if "label" in student.heads or "label" in teacher.heads:
            return found
        s, t = student.logits.float(), teacher.logits.float()
        return found | {"kl": F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True).sum(-1)}

    def chance(self, targets: Tensor) -> float | None:
        """Returns the mean IoU of a network that gives every pixel the most frequent class."""
        counts = torch.bincount(targets[(targets >= 0) & (targets != self.ignored)].cpu())
        present = int((counts > 0).sum())
        return float(counts.max() / counts.sum() / present) if present else None

    def exported(self, outputs: Outputs, inputs: Tensor) -> tuple[Tensor, ...]:
        size = tuple(inputs.shape[2:])
        return (by_pixel(outputs.logits, size).argmax(2).unflatten(1, size),)

    def read_exported(self, found: Tensor) -> Outputs:
        return Outputs({"label": found.flatten(1)})

    def compare_exported(
        self, exported: Outputs, own: Outputs, targets: Any, precision: str = "fp32"
    ) -> tuple[float, float, float]:
        """Returns the share of pixels that have another class, 1, and the share of those that count whose class is equal."""
        a, b = labels_of(exported), labels_of(own)
        same, counted = a == b, self.places(targets)
        return 1 - same.double().mean().item(), 1.0, same[counted].double().mean().item()

    def figures(self, samples: Samples) -> dict[str, Any]:
        from litdistill.tasks.segmentation.figures import mask_figures

        return mask_figures(samples, self.ignored)


def by_pixel(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Returns maps of logits (N, C, h, w) as (N, H·W, C), resized to `size` = (H, W), bilinear."""
    if tuple(maps.shape[2:]) != size:
        maps = F.interpolate(maps, size, mode="bilinear", align_corners=False)
    return maps.flatten(2).transpose(1, 2)
