"""Two-stage detectors of torchvision as teachers: their detections, and the maps of their feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.image_list import ImageList

from litdistill.models.ensemble import UNKNOWN
from litdistill.tasks.detection.detector import pad_to
from litdistill.types import DETECTIONS
from litdistill.utils.errors import UserError


class TwoStage(nn.Module):
    """Returns the detections of a Faster R-CNN or Mask R-CNN for images (N, C, H, W) that are normalized.

    `detections` (N, K, 6): x1, y1, x2, y2 in pixels, score, class; best first, the rest of the rows with score 0 and class -1.
    It has no dense heads, and is in evaluation mode alone. Its masks are left out.

    Args:
        model: torchvision's, which it takes over.
        columns: for each class of the data its place among the model's, which count from the one after the background;
            `UNKNOWN` where it has none. None: they are the data's.
        name: for messages.
    """

    place: Tensor

    def __init__(self, model: nn.Module, columns: Sequence[int] | None = None, name: str = "this network"):
        super().__init__()
        if not isinstance(model, FasterRCNN):
            raise UserError(f"{type(model).__name__} is no two-stage detector of torchvision.")
        if columns is not None and all(c == UNKNOWN for c in columns):
            raise UserError(
                f"{name} detects none of the data's classes, and a two-stage network is a teacher only: name its classes as "
                "the weights do, or use a one-stage network (fcos_resnet50_fpn)."
            )
        self.backbone, self.rpn, self.roi_heads = model.backbone, model.rpn, model.roi_heads
        self.roi_heads.mask_roi_pool = self.roi_heads.mask_head = self.roi_heads.mask_predictor = None
        self.divisor, self.top = int(model.transform.size_divisible), int(self.roi_heads.detections_per_img)
        classes = int(self.roi_heads.box_predictor.cls_score.out_features)
        self.register_buffer("place", torch.full((classes,), -1.0), persistent=False)
        self.keep_classes(range(classes - 1) if columns is None else columns)
        self.eval()

    def keep_classes(self, columns: Sequence[int]) -> None:
        """Sets for each class of the data its place among the model's, in place, as `columns` of the constructor.

        `place` (classes,) holds of each of the model's classes that among the data's, and -1 of one that the data do not have,
        as of the background."""
        self.place.fill_(-1.0)
        for i, column in enumerate(columns):
            if column != UNKNOWN:
                self.place[column + 1] = float(i)

    def train(self, mode: bool = True) -> TwoStage:
        """Raises `UserError` for training mode."""
        if mode:
            raise UserError(
                "A two-stage detector is a teacher only here: train a one-stage network (net@student=fcos_slim) with it."
            )
        return super().train(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        size = (int(images.shape[-2]), int(images.shape[-1]))
        images = pad_to(images, self.divisor)
        maps = self.backbone(images)
        listed = ImageList(images, [size] * len(images))
        proposals, _ = self.rpn(listed, maps)
        found, _ = self.roi_heads(maps, proposals, listed.image_sizes)
        rows = images.new_zeros(len(images), self.top, 6)
        rows[..., 5] = -1.0
        for i, one in enumerate(found):
            label = self.place[one["labels"]]
            known = torch.cat([one["boxes"], one["scores"][:, None], label[:, None]], 1)[label >= 0]
            rows[i, : len(known)] = known[known[:, 4].argsort(descending=True)]
        return {DETECTIONS: rows}
