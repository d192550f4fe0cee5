"""Object detection: boxes with a class each; torchvision's losses, COCO's mean average precision.

    python scripts/train.py experiment=detection/digit_scenes

Targets are one padded tensor (`litdistill.tasks.detection.boxes`). A network gives dense heads at every anchor; what is kept of
them for a whole split are its detections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from litdistill.methods.base import BOXES
from litdistill.tasks.base import Samples, Task, to_batch
from litdistill.tasks.detection.boxes import LABEL, padded, present
from litdistill.tasks.detection.decode import CLASS, SCORE, detections
from litdistill.tasks.detection.detector import detector_of
from litdistill.tasks.detection.matching import SURE
from litdistill.tasks.detection.metrics import MeanAP, Split, constant_map, curves
from litdistill.tasks.detection.shipping import compared, in_int8
from litdistill.tasks.detection.suppress import OPERATOR, at_once, in_onnx
from litdistill.types import DETECTIONS, Batch, Outputs
from litdistill.utils.errors import UserError
from litdistill.utils.shapes import described
from litdistill.utils.units import quantity

NOTHING_REMEDY = (
    "Train it for longer, look at its learning rate and its loss, and check that objects are not smaller than the finest "
    "stride of its pyramid; task.score_threshold lowers the score from which a box counts."
)
FEWEST = 20  # objects that a detector is judged by
SIZE = "size"  # a head (N, 2): height and width of the pictures, to which boxes are clipped


class Detection(Task):
    """Inputs (N, 3, H, W), or torchvision's lists; targets (N, M, 6) float32: x1, y1, x2, y2, class, crowd.

    Args:
        score_threshold: detections of a lower score are left out of the metrics; 0.05 as COCO's tools have it.
        nms: of two boxes of a class with a higher IoU the one of the lower score is left out.
        detections: the most that are kept of a picture; COCO counts 100.
    """

    kind = BOXES
    averages = False  # boxes of several networks stand at anchors of their own
    monitor: tuple[str, Literal["max", "min"]] = ("map", "max")
    compared = "scores of the same box", "boxes are the same"
    compared_in_int8 = "scores of the same box", f"boxes with a score of at least {SURE:g} are the same"

    def __init__(self, score_threshold: float = 0.05, nms: float = 0.6, detections: int = 100):
        if not 0 <= score_threshold < 1 or not 0 < nms <= 1:
            raise UserError(
                f"task.score_threshold={score_threshold} must be at least 0 and below 1, and task.nms={nms} above 0 and at "
                "most 1."
            )
        if type(detections) is not int or detections < 1:
            raise UserError(f"task.detections={detections} must be a number of boxes a picture, at least 1.")
        self.score_threshold, self.nms, self.detections = score_threshold, nms, detections

    def batch(self, raw: Any) -> Batch:
        """Returns the `Batch` of an item of a loader: as every task takes it, or torchvision's pair of a list of pictures
        (3, H, W) and a list of dicts with `boxes` (M, 4), `labels` (M,) from 0, and perhaps `iscrowd` (M,); None for a picture
        without labels.

        Raises `UserError` for other targets.
        """
        if _is_torchvisions(raw):
            pictures, objects = raw
            targets = padded([torch.zeros(0, 6) if o is None else _rows(o, i) for i, o in enumerate(objects)])
            targets[[o is None for o in objects]] = torch.nan
            inputs = stacked(pictures)
            return Batch(inputs, targets.to(inputs.device))
        batch = to_batch(raw)
        check_targets(batch.targets)
        return batch

    def forward(self, net: nn.Module, batch: Batch, training: bool) -> Outputs:
        """Returns the dense heads, and `size`; of a two-stage teacher its detections. Raises `UserError` for a network that is
        no detector."""
        outputs = super().forward(net, batch, training)
        if DETECTIONS in outputs.heads:
            return outputs
        if "boxes" not in outputs.heads:
            raise UserError(
                f"The network gives {' and '.join(outputs.heads)}, and detection needs logits and boxes at every anchor: name "
                "a detector (net=fcos_slim, net=torchvision_detector), or wrap yours in "
                "litdistill.tasks.detection.detector.Detector."
            )
        inputs = batch.inputs if isinstance(batch.inputs, Tensor) else next(iter(batch.inputs.values()))
        logits = outputs.logits
        size = logits.new_tensor(inputs.shape[-2:]).expand(len(logits), 2)
        return outputs._replace(heads={**outputs.heads, SIZE: size})

    def loss(self, net: nn.Module, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Returns torchvision's terms `cls`, `box` and, where the head has it, `centerness`.

        Crowds and boxes without area are not trained on; a picture without objects is background.
        """
        check_targets(batch.targets)
        return detector_of(net).compute_loss(outputs.heads, batch.targets)

    def keep(self, outputs: Outputs) -> Outputs:
        """Returns the detections (N, K, 6) of each picture as the head `detections`: x1, y1, x2, y2, score, class."""
        if "detections" in outputs.heads:
            return outputs
        height, width = (int(n) for n in outputs.heads[SIZE][0])
        return Outputs({"detections": self._detections(outputs, (height, width))}, {}, outputs.ids)

    def _detections(self, outputs: Outputs, size: tuple[int, int]) -> Tensor:
        return detections(outputs.heads, size, self.score_threshold, self.nms, self.detections)

    def exported(self, outputs: Outputs, inputs: Tensor) -> tuple[Tensor, ...]:
        """Returns `boxes` (N, K, 4), `scores` (N, K) and `labels` (N, K), as `decode` does."""
        found = self._detections(outputs, (inputs.shape[2], inputs.shape[3]))
        return found[..., :4], found[..., SCORE], found[..., CLASS].long()

    def own_operators(self, format: str) -> dict[Any, Any]:
        return {OPERATOR: in_onnx() if format == "onnx" else at_once}

    def read_exported(self, found: Tensor) -> Outputs:
        return Outputs({"detections": found})

    def compare_exported(
        self, exported: Outputs, own: Outputs, targets: Any, precision: str = "fp32"
    ) -> tuple[float, float, float]:
        """See `litdistill.tasks.detection.shipping`: `in_int8` compares the boxes that the network is sure of."""
        compare = in_int8 if precision == "int8" else compared
        return compare(exported.heads["detections"], own.heads["detections"])

    def least_metric(self, own: float, share: float, precision: str) -> float | None:
        """Returns for an int8 file the mAP of its network times `share`, the least agreement: mAP sees all boxes, also those
        below the score from which they are compared one by one."""
        return own * share if precision == "int8" else None

    def decode(self, outputs: Outputs) -> dict[str, Tensor]:
        """Returns `boxes` (N, K, 4) in pixels, `scores` (N, K), 0 where there is no more, and `labels` (N, K), −1 there."""
        found = self.keep(outputs).heads["detections"]
        return {"boxes": found[..., :4], "scores": found[..., SCORE], "labels": found[..., CLASS].long()}

    def metrics(self) -> Metric:
        return MeanAP(self.keep)

    def agreement_metric(self) -> Metric:
        """Returns the metric `agreement`: the student's mAP against the teacher's detections from a score of 0.5 on."""
        return MeanAP(self.keep, SURE)

    def by_class(self, outputs: Outputs, targets: Tensor, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Returns of each class with an object `map`, `map_50` and how many objects there are, crowds aside (`count`)."""
        curve = curves(Split.of(self.keep(outputs).heads["detections"], targets))
        counts = torch.bincount(targets[present(targets)][:, LABEL].long())
        return {
            names[c] if c < len(names) else str(c): {"map": ap.item(), "map_50": ap50.item(), "count": int(counts[c])}
            for c, ap, ap50 in zip(curve.classes, curve.average, curve.average_50, strict=True)
            if not ap.isnan()
        }

    def findings(self, outputs: Outputs, targets: Tensor, where: str) -> dict[str, str]:
        """Returns `nothing` for a student that finds nothing in any picture."""
        found = self.keep(outputs).heads["detections"]
        if bool((found[..., CLASS] >= 0).any()):
            return {}
        return {
            "nothing": f"The student finds nothing: none of its scores is above {self.score_threshold:g} in any of "
            f"{quantity(len(found), 'picture')} of the {where} set. {NOTHING_REMEDY}"
        }

    def measures(self, outputs: Outputs) -> bool:
        return "detections" in outputs.heads or "boxes" in outputs.heads

    def chance(self, targets: Tensor) -> float | None:
        """Returns the mAP of the same boxes for every picture, chosen among these objects (`constant_map`)."""
        return constant_map(Split.of(targets[:, :0], targets).truth)

    def can_judge(self, value: float, targets: Tensor) -> bool:
        """Returns whether there are at least 20 objects: a good detector, too, may miss all of fewer."""
        return int(present(targets).sum()) >= FEWEST

    def figures(self, samples: Samples) -> dict[str, Any]:
        from litdistill.tasks.detection.figures import detection_figures

        return detection_figures(samples)


def check_targets(targets: Any) -> None:
    """Raises `UserError` for targets that are not (N, M, 6)."""
    if isinstance(targets, Tensor) and targets.ndim == 3 and targets.shape[2] == 6 and targets.is_floating_point():
        return
    raise UserError(
        f"The targets are {described(targets)}, and detection needs boxes, floats (N, M, 6): x1, y1, x2, y2, class, crowd; or "
        "torchvision's lists of pictures and of dicts with boxes and labels. Data with boxes: data=digit_scenes, bccd, coco, "
        "voc."
    )


def stacked(pictures: Sequence[Tensor]) -> Tensor:
    """Returns pictures as one tensor. Raises `UserError` for pictures of several sizes."""
    sizes = sorted({tuple(p.shape) for p in pictures})
    if len(sizes) > 1:
        raise UserError(
            f"The pictures of a batch are of {len(sizes)} sizes, {sizes[0]} and {sizes[1]} among them: give all of them "
            "one, with their boxes."
        )
    return torch.stack(list(pictures))


def _is_torchvisions(raw: Any) -> bool:
    """Returns whether an item is a pair of a list of pictures and a list of dicts or None, one for each."""
    if not isinstance(raw, (tuple, list)) or len(raw) != 2 or not all(isinstance(x, (tuple, list)) for x in raw):
        return False
    pictures, objects = raw
    return len(pictures) == len(objects) > 0 and all(o is None or isinstance(o, Mapping) for o in objects)


def _rows(objects: Mapping[str, Any], index: int) -> Tensor:
    """Returns the objects of a picture as rows (M, 6). Raises `UserError` for others than boxes with a label each."""
    if not {"boxes", "labels"} <= objects.keys():
        raise UserError(
            f"The targets of picture {index} of a batch have {', '.join(map(str, objects)) or 'no key'}, and detection needs "
            "boxes (M, 4) and labels (M,)."
        )
    boxes, labels = objects["boxes"], objects["labels"]
    if boxes.numel() != 4 * len(labels):
        raise UserError(
            f"Picture {index} of a batch has boxes {tuple(boxes.shape)} and {len(labels)} labels: one of each."
        )
    if len(labels) and int(labels.min()) < 0:
        raise UserError(f"Picture {index} of a batch has the label {int(labels.min())}: classes count from 0.")
    crowd = objects.get("iscrowd", torch.zeros_like(labels))
    return torch.cat([boxes.view(-1, 4).float(), labels.view(-1, 1).float(), crowd.view(-1, 1).float()], 1)
