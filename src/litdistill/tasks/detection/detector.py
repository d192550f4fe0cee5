"""One-stage detection networks behind one interface: dense heads for a batch of images of one size, and their labels' loss.

    net = Detector(FCOS(backbone, num_classes=3, anchor_generator=anchors))
    heads = net(images)                               # logits, boxes and centerness at every anchor
    losses = net.train().compute_loss(net(images), targets)

It takes torchvision's FCOS, RetinaNet and SSD. Their resizing, normalization and choice of detections stay outside:
`litdistill.models.preprocess` and `litdistill.tasks.detection.decode` do these for every network alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

from litdistill.models.ensemble import UNKNOWN
from litdistill.models.preprocess import SCALE, bare
from litdistill.tasks.detection.boxes import LABEL, present
from litdistill.tasks.detection.sides import DISTRIBUTION, distances, split
from litdistill.types import has_label
from litdistill.utils.errors import UserError

LOSSES = {"classification": "cls", "bbox_regression": "box", "bbox_ctrness": "centerness", DISTRIBUTION: "dfl"}
# The bias of a new class, whose probability begins at 0.01 (arXiv 1708.02002, section 3.3).
PRIOR = -math.log((1 - 0.01) / 0.01)
SHAPES = 8  # sizes of images of which the anchors are kept


class Detector(nn.Module):
    """Dense heads of a detection network of torchvision, for images (N, C, H, W) that are normalized.

    Names of parameters and keys of the state dict are those of `model`, which it takes over.

    Args:
        model: torchvision's `FCOS`, `RetinaNet` or `SSD`. SSD has a class for the background, which comes first; the other two
            have one sigmoid a class and none for it.

    Raises `UserError` for any other network.
    """

    columns: Tensor

    def __init__(self, model: nn.Module):
        super().__init__()
        if not isinstance(model, FCOS | RetinaNet | SSD):
            raise UserError(
                f"{type(model).__name__} is no one-stage detector of torchvision: give an FCOS, a RetinaNet or an SSD."
            )
        self.backbone, self.anchor_generator, self.head = model.backbone, model.anchor_generator, model.head
        self.box_coder: Any = model.box_coder
        self.matching: Any = getattr(model, "proposal_matcher", None)
        self.loss_of = model.compute_loss  # it holds settings of the model, and reads no parameters
        self.softmax = isinstance(model, SSD)
        self.classifier_name = "head.classification_head" + ("" if self.softmax else ".cls_logits")
        self.by_level = isinstance(model, FCOS)
        # Of a softmax over more classes than are detected, those that are. It follows from how the network was built.
        classes = model.head.classification_head.num_columns - 1 if self.softmax else 0
        self.register_buffer("columns", torch.arange(classes), persistent=False)
        self.divisor = int(model.transform.size_divisible)
        self.anchors: dict[Any, Tensor] = {}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Returns the heads at the A anchors of all levels, finest first, for images (N, C, H, W).

        `logits` (N, A, classes): a sigmoid of each is the probability of its class; `boxes` (N, A, 4): x1, y1, x2, y2 in pixels
        of `images`, not clipped; `centerness` (N, A): logits, where the network has them; `sides` (N, A, 4, bins + 1): logits,
        where its boxes are expectations. In training mode also what `compute_loss` needs. Images whose sides are no multiples
        of the largest stride are padded with zeros at the right and the bottom.
        """
        images = pad_to(images, self.divisor)
        maps = self.backbone(images)
        maps = [maps] if isinstance(maps, Tensor) else list(maps.values())
        raw = {k: v.float() if v.dtype in (torch.half, torch.bfloat16) else v for k, v in self.head(maps).items()}
        logits, deltas = raw["cls_logits"], distances(raw["bbox_regression"])
        anchors = self.anchors_of(images, maps, logits.dtype)
        heads = {"logits": sigmoid_logits(logits, self.columns) if self.softmax else logits}
        heads["boxes"] = self.decoded(deltas, anchors)
        if "bbox_ctrness" in raw:
            heads["centerness"] = raw["bbox_ctrness"].squeeze(2)
        if deltas is not raw["bbox_regression"]:
            heads["sides"] = split(raw["bbox_regression"])
        if self.training:
            heads |= {"deltas": deltas, "anchors": anchors.expand(len(deltas), -1, -1)}
            if self.softmax:
                heads["softmax"] = logits
        return heads

    def keep_classes(self, columns: Sequence[int], new: bool = False) -> None:
        """Puts other classes in place of those of the head, in place: the new class i is the old one `columns[i]`.

        A softmax over more classes than are kept stays whole, since the probabilities would be others without the rest: the
        outputs are then chosen from it. `new`: a column `UNKNOWN` begins anew; otherwise it raises `UserError`.
        """
        if UNKNOWN in columns and not new:
            raise UserError(
                "This detector does not know all classes of the data, and would teach that there are no such objects: train it "
                "on these classes, or choose data of the classes that it knows."
            )
        head: Any = self.head.classification_head
        ends = head.module_list if self.softmax else [head.cls_logits]
        last: list[Any] = [[m for m in end.modules() if isinstance(m, nn.Conv2d)][-1] for end in ends]
        first = int(self.softmax)
        part = bool(first) and (sorted(columns) != list(range(head.num_columns - 1)))
        if part and UNKNOWN not in columns:
            # With the weights: other data may have the classes in another order.
            self.register_buffer("columns", self.columns[list(columns)])
            return
        count = head.num_columns if self.softmax else head.num_classes
        index = torch.tensor([*range(first), *(c + first if c != UNKNOWN else -1 for c in columns)])
        for layer in last:
            weight = layer.weight.detach().unflatten(0, (-1, count))[:, index]
            bias = layer.bias.detach().unflatten(0, (-1, count))[:, index]
            if new and bool((index < 0).any()):
                weight[:, index < 0] = torch.randn_like(weight[:, index < 0]) * 0.01
                bias[:, index < 0] = 0.0 if self.softmax else PRIOR
            layer.weight, layer.bias = (nn.Parameter(x.flatten(0, 1).clone()) for x in (weight, bias))
            layer.out_channels = len(layer.weight)
        if self.softmax:
            head.num_columns, self.columns = len(index), torch.arange(len(columns), device=self.columns.device)
        else:
            head.num_classes = len(index)

    def anchors_of(self, images: Tensor, maps: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Returns the anchors (A, 4) of all levels, x1, y1, x2, y2 in pixels of the images."""
        shapes = tuple(tuple(int(n) for n in m.shape[-2:]) for m in maps)
        size = tuple(int(n) for n in images.shape[-2:])
        key = (size, shapes, dtype, images.device)
        if key not in self.anchors:
            if len(self.anchors) >= SHAPES:
                self.anchors.clear()
            # On the CPU: the generator keeps what it made last, and on the meta device it would lose its values.
            with torch.device("cpu"), torch.no_grad():
                like = [torch.empty(1, dtype=dtype).expand(1, 1, *shape) for shape in shapes]
                found = self.anchor_generator(ImageList(torch.empty(1).expand(1, 1, *size), [size]), like)[0]
            self.anchors[key] = found.to(images.device)
        return self.anchors[key]

    def decoded(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Returns the boxes (N, A, 4) of what the head says beside each anchor, (N, A, 4) or as of `sides.distances`."""
        deltas = distances(deltas) if self.by_level else deltas
        if self.by_level:
            return self.box_coder.decode(deltas, anchors)
        repeated = anchors.expand(len(deltas), -1, -1).reshape(-1, 4)
        return self.box_coder.decode_single(deltas.reshape(-1, 4), repeated).view_as(deltas)

    def compute_loss(self, heads: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Returns the labels' loss by torchvision's own `compute_loss`: `cls`, `box` and, where the head has them, `centerness`
        and `dfl` (`litdistill.tasks.detection.sides`).

        `heads`: of a forward in training mode. `targets`: (N, M, 6), x1, y1, x2, y2 in pixels, class, crowd; rows of class -1
        hold no object. Images without any object are background; images without labels (NaN) are left out. Crowds and boxes
        without area are not trained on. Raises `UserError` for heads of a forward in evaluation mode.
        """
        if "deltas" not in heads:
            raise UserError("The loss of a detector needs its heads in training mode: net.train() before its forward.")
        labeled = has_label(targets)
        if not bool(labeled.all()):
            heads, targets = {k: v[labeled] for k, v in heads.items()}, targets[labeled]
        raw = {"cls_logits": heads["softmax" if self.softmax else "logits"], "bbox_regression": heads["deltas"]}
        if "centerness" in heads:
            raw["bbox_ctrness"] = heads["centerness"].unsqueeze(2)
        if "sides" in heads:
            raw["sides"] = heads["sides"]
        if not len(targets):  # torchvision stacks what it finds in each image
            return {LOSSES[k]: v.sum() for k, v in zip(LOSSES, raw.values(), strict=False)}
        objects = trained_on(targets, heads.get(SCALE), raw["bbox_regression"].dtype)
        if self.softmax:  # after the background
            objects = [{**one, "labels": self.columns[one["labels"]] + 1} for one in objects]
        anchors = list(heads["anchors"])
        found = self.loss_of(objects, raw, anchors, *self._places(objects, anchors))
        return {short: found[name] for name, short in LOSSES.items() if name in found}

    def _places(self, objects: Sequence[Mapping[str, Tensor]], anchors: Sequence[Tensor]) -> tuple[Any, ...]:
        """Returns what `compute_loss` of this network takes beside the anchors: their number by level, or each one's object."""
        if self.by_level:  # anchors of one level are of one size
            sides = anchors[0][:, 2] - anchors[0][:, 0]
            return (sides.unique_consecutive(return_counts=True)[1].tolist(),)
        if not self.softmax:
            return ()
        none = torch.full((len(anchors[0]),), -1, dtype=torch.int64, device=anchors[0].device)
        pairs = zip(objects, anchors, strict=True)
        return ([self.matching(box_iou(o["boxes"], a)) if len(o["boxes"]) else none for o, a in pairs],)


def pad_to(images: Tensor, divisor: int) -> Tensor:
    """Returns images (N, C, H, W) with zeros at the right and the bottom, up to the next multiples of `divisor`."""
    right, bottom = (-images.shape[-1]) % divisor, (-images.shape[-2]) % divisor
    return F.pad(images, (0, right, 0, bottom)) if right or bottom else images


def sigmoid_logits(logits: Tensor, columns: Tensor) -> Tensor:
    """Returns for a softmax over the background and the classes, (…, 1 + classes), the logits (…, C) of the classes `columns`,
    (C,): log p - log(1 - p), whose sigmoids are their probabilities p."""
    log_p = logits.log_softmax(-1)[..., 1:][..., columns].clamp(max=-torch.finfo(logits.dtype).eps)
    return log_p - torch.where(log_p > -0.6931, (-log_p.expm1()).log(), (-log_p.exp()).log1p())


def trained_on(targets: Tensor, scale: Tensor | None, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Returns the objects of each image (N, M, 6) in torchvision's form, `boxes` and `labels`.

    `scale`: (N, 4), by which the boxes are multiplied. Crowds and boxes without area are left out.
    """
    boxes, real = targets[..., :4].to(dtype), present(targets)
    if scale is not None:
        boxes = boxes * scale[:, None].to(dtype)
    labels = targets[..., LABEL].long()
    return [{"boxes": b[r], "labels": c[r]} for b, c, r in zip(boxes, labels, real, strict=True)]


def detector_of(net: nn.Module) -> Detector:
    """Returns the `Detector` inside a network. Raises `UserError` where there is none."""
    for module in net.modules():
        if isinstance(module, Detector):
            return module
    raise UserError(
        f"{type(bare(net)).__name__} is no one-stage detector, and no other is trained here: name one (net@student=fcos_slim), "
        "or wrap a model of torchvision in litdistill.tasks.detection.detector.Detector. A two-stage one teaches with weights "
        "that it has: teacher.checkpoint=<file>, or teacher.checkpoint=null teacher.weights=DEFAULT."
    )
