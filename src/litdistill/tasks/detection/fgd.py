"""Focal and global distillation (FGD). Yang et al. 2022 (arXiv 2111.11837), section 3.

    litdistill experiment=… method=fgd

Written from the paper's equations, whose numbers stand beside the functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from litdistill.losses import same_size
from litdistill.losses.values import wide
from litdistill.methods.base import BOXES, MapMethod, check_temperature, check_weights, summed
from litdistill.methods.layers import projectors
from litdistill.tasks.detection.boxes import present
from litdistill.tasks.detection.decode import SCORE, detections
from litdistill.types import Batch, Outputs, has_label
from litdistill.utils.errors import UserError


class FGD(MapMethod):
    """`hard` · labels' loss, and level by level: `foreground` and `background` · squared error of the maps, weighted by box
    sizes and by the teacher's attention; `attention` · L1 of both attentions; `context` · squared error of maps that a
    GcBlock has added their global context to. Means over the batch, sums over channels and positions.

    Foreground are the boxes of the batch; crowds are background. In a picture without labels it is the teacher's
    detections with a score of `confidence` or more; of a teacher that gives none, all is background. A student whose channels
    differ from the teacher's passes a 1x1 convolution first.

    Args:
        hard: weight of the labels' loss.
        foreground, background, attention, context: the paper's α, β, γ and λ; the defaults are its for anchor-free detectors
            of one stage (FCOS). With anchors they are 1e-3, 5e-4, 1e-3, 5e-6, of two stages 5e-5, 2.5e-5, 5e-5, 5e-7.
        temperature: T of both attentions.
        confidence: least score of a detection of the teacher in a picture without labels.
        student_taps, teacher_taps: see `litdistill.types.Taps`.
    """

    kinds = (BOXES,)

    def __init__(
        self,
        hard: float = 1.0,
        foreground: float = 1.6e-3,
        background: float = 8e-4,
        attention: float = 8e-3,
        context: float = 8e-6,
        temperature: float = 0.5,
        confidence: float = 0.5,
        student_taps: Sequence[str] | str = "pyramid",
        teacher_taps: Sequence[str] | str = "pyramid",
    ):
        check_weights(foreground=foreground, background=background, attention=attention, context=context)
        check_temperature(temperature)
        if not 0 <= confidence < 1:
            raise UserError(
                f"confidence={confidence} is a score of the teacher, from 0 to below 1. A good start is 0.5."
            )
        super().__init__(hard, foreground + background + attention + context, student_taps, teacher_taps)
        self.foreground, self.background, self.attention, self.context = foreground, background, attention, context
        self.temperature, self.confidence = temperature, confidence

    def own_weights(self) -> set[str]:
        """All: also the defaults, which are the paper's for detectors."""
        return {"foreground", "background", "attention", "context"}

    def build_pairs(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.projectors = projectors(pairs, bias=True)
        if self.context:  # plain DDP fails on parameters that are not used
            self.of_student = nn.ModuleList(GlobalContext(t.shape[1]).to(t.device) for _, t in pairs)
            self.of_teacher = nn.ModuleList(GlobalContext(t.shape[1]).to(t.device) for _, t in pairs)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        if not self.hint:
            return {}
        boxes, real = objects(batch, teacher, self.confidence)
        weights = {k: w for k in ("foreground", "background", "attention", "context") if (w := getattr(self, k))}
        found: dict[str, list[Tensor]] = {name: [] for name in weights}
        for level, (s, t) in enumerate(self.pairs(student, teacher)):
            s, t = same_size(s, t)
            s, t = wide(self.projectors[level](s)), wide(t)
            if self.foreground or self.background:
                parts = scales(boxes, real, batch.inputs.shape[-2:], t.shape[-2:])
                error = attended_error(s, t, self.temperature)
                for name, scale in zip(("foreground", "background"), parts, strict=True):
                    if name in found:
                        found[name].append((error * scale).sum() / len(t))
            if self.attention:
                found["attention"].append(attention_distance(s, t, self.temperature))
            if self.context:
                difference = self.of_student[level](s) - self.of_teacher[level](t)
                found["context"].append(difference.square().sum() / len(t))
        return {name: weights[name] * summed(values) for name, values in found.items()}


def objects(batch: Batch, teacher: Outputs, confidence: float) -> tuple[Tensor, Tensor]:
    """Returns the boxes (N, M, 4) of foreground in pixels, and which of the rows hold one, (N, M) bool.

    Those of the labels, and in pictures without labels the teacher's detections with a score of `confidence` or more.
    """
    boxes, real = batch.targets[..., :4], present(batch.targets)
    unknown = (~has_label(batch.targets)).nonzero()[:, 0]
    if not len(unknown):
        return boxes, real
    boxes = boxes.nan_to_num()
    if "detections" in teacher.heads:  # those of a teacher of two stages
        found = teacher.heads["detections"][unknown]
    elif "boxes" in teacher.heads:
        heads = {k: v[unknown] for k, v in teacher.heads.items() if k in ("logits", "boxes", "centerness")}
        height, width = batch.inputs.shape[-2:]
        found = detections(heads, (height, width), 0.0)
    else:
        return boxes, real
    own = found.new_zeros(len(boxes), found.shape[1], 4).index_copy(0, unknown, found[..., :4])
    sure = real.new_zeros(len(boxes), found.shape[1]).index_copy(0, unknown, found[..., SCORE] >= max(confidence, 1e-6))
    return torch.cat([boxes, own.to(boxes)], 1), torch.cat([real, sure], 1)


def scales(boxes: Tensor, real: Tensor, image: Sequence[int], size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Returns the weights of foreground and background, M·S and (1 − M)·S of equations 2 and 3, each (N, H, W).

    A cell of the map that a box touches is foreground, with the weight 1/n of a box of n cells: every object counts the same,
    whatever its size. Where boxes overlap it is the smallest. The cells of the background share the weight 1 alike.

    Args:
        boxes: (N, M, 4) in pixels of images of height and width `image`. real: (N, M), which of them there are.
        size: height and width of the map.
    """
    rows, tall = _touched(boxes[..., 1], boxes[..., 3], size[0] / image[0], size[0])
    columns, wide_ = _touched(boxes[..., 0], boxes[..., 2], size[1] / image[1], size[1])
    inside = rows[..., :, None] & columns[..., None, :] & real[..., None, None]
    foreground = (inside / (tall * wide_)[..., None, None]).amax(1)
    outside = (foreground == 0).to(foreground)
    return foreground, outside / outside.sum((1, 2), keepdim=True).clamp(min=1)


def _touched(low: Tensor, high: Tensor, ratio: float, cells: int) -> tuple[Tensor, Tensor]:
    """Returns which cells of one side of the map each box touches, (N, M, cells) bool, and how many, (N, M)."""
    first = (low * ratio + 1e-4).floor().clamp(0, cells - 1)  # a touch of less is rounding
    last = torch.maximum((high * ratio - 1e-4).ceil().clamp(0, cells), first + 1)
    at = torch.arange(cells, device=low.device)
    return (at >= first[..., None]) & (at < last[..., None]), last - first


def spatial_attention(f: Tensor, temperature: float) -> Tensor:
    """Returns HW · softmax over positions of the mean |f| of the channels, divided by T: (N, C, H, W) -> (N, H, W).

    Equations 4 and 6.
    """
    mean = f.abs().mean(1)
    return (mean.flatten(1) / temperature).softmax(1).view_as(mean) * mean[0].numel()


def channel_attention(f: Tensor, temperature: float) -> Tensor:
    """Returns C · softmax over channels of the mean |f| of the positions, divided by T: (N, C, H, W) -> (N, C).

    Equations 5 and 7.
    """
    return (f.abs().mean((2, 3)) / temperature).softmax(1) * f.shape[1]


def attended_error(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Returns A^S · Σ over channels of A^C (teacher − student)², (N, H, W), by the teacher's attentions; of equation 8."""
    places, channels = spatial_attention(teacher, temperature), channel_attention(teacher, temperature)
    return places * ((teacher - student).square() * channels[..., None, None]).sum(1)


def attention_distance(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Returns Σ |A^S_t − A^S_s| + Σ |A^C_t − A^C_s|, the mean over the batch; a scalar. Equation 9, whose published weights
    belong to sums."""
    distances = [
        (attention(teacher, temperature) - attention(student, temperature)).abs().sum() / len(teacher)
        for attention in (spatial_attention, channel_attention)
    ]
    return summed(distances)


class GlobalContext(nn.Module):
    """R of equation 12, a GcBlock: F + W2 ReLU(LN(W1 Σ_j softmax_j(Wk F)_j F_j)), (N, C, H, W) -> the same shape.

    Cao et al. 2019 (GCNet, arXiv 1904.11492), with half of the channels between. W2 begins at zero: R is then the identity.
    """

    def __init__(self, channels: int):
        super().__init__()
        middle = max(1, channels // 2)
        self.key = nn.Conv2d(channels, 1, 1)
        self.shrink, self.norm, self.grow = (
            nn.Linear(channels, middle),
            nn.LayerNorm(middle),
            nn.Linear(middle, channels),
        )
        nn.init.zeros_(self.grow.weight)
        nn.init.zeros_(self.grow.bias)

    def forward(self, f: Tensor) -> Tensor:
        share = self.key(f).flatten(1).softmax(1)
        context = torch.einsum("np,ncp->nc", share, f.flatten(2))
        return f + self.grow(self.norm(self.shrink(context)).relu())[..., None, None]
