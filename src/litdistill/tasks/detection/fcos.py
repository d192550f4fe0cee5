"""FCOS (Tian et al. 2019, arXiv 1904.01355) of torchvision's parts on a small backbone, for small images and fast students."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops import FeaturePyramidNetwork

from litdistill.models.parts import he_init
from litdistill.models.resnet import BasicBlock, conv
from litdistill.tasks.detection.detector import Detector
from litdistill.tasks.detection.sides import SidesHead
from litdistill.utils.errors import UserError

GROUPS = 32  # of the group normalization in the head of torchvision's FCOS


class Pyramid(nn.Module):
    """A backbone with a feature pyramid (Lin et al. 2017, arXiv 1612.03144), in the form that torchvision's detectors take.

    Args:
        body: a network that returns a dict of maps, the finest first.
        channels: of each of these maps.
        out_channels: of each map of the pyramid.
    """

    def __init__(self, body: nn.Module, channels: Sequence[int], out_channels: int):
        super().__init__()
        self.body, self.out_channels = body, out_channels
        self.fpn = FeaturePyramidNetwork(list(channels), out_channels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn(self.body(images))


class SlimBody(nn.Module):
    """Stages of 3x3 convolutions, each with half the resolution of the one before: `stem` of stride 2, `layer1` of stride 4, ….

    Args:
        inputs: channels of the images.
        width: channels of the stem and of `layer1`; each later stage has twice as many as the one before.
        depth: a stage is a convolution of stride 2 and `depth` - 1 residual blocks.
        strides: of the stages whose maps are returned.
    """

    def __init__(self, inputs: int, width: int, depth: int, strides: Sequence[int]):
        super().__init__()
        self.stem = nn.Sequential(conv(inputs, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU())
        self.names = [f"layer{s.bit_length() - 2}" for s in strides]
        self.channels = [width * s // 4 for s in strides]
        before = width
        for i in range(max(strides).bit_length() - 2):
            out = width * 2**i
            first = [conv(before, out, 3, 2), nn.BatchNorm2d(out), nn.ReLU()]
            rest = [BasicBlock(out, out, 1, "conv") for _ in range(depth - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*first, *rest))
            before = out
        he_init(self)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps: OrderedDict[str, Tensor] = OrderedDict()
        for name, stage in self.named_children():
            x = stage(x)
            if name in self.names:
                maps[name] = x
        return maps


def fcos_slim(
    num_classes: int,
    input_shape: Sequence[int],
    width: int = 16,
    depth: int = 1,
    fpn: int = 64,
    convs: int = 2,
    strides: Sequence[int] = (8, 16, 32),
    sizes: Sequence[int] | None = None,
    radius: float = 1.5,
    bins: int | None = None,
) -> Detector:
    """Returns an FCOS detector on a small backbone of 3x3 convolutions, with a feature pyramid.

    `width`: channels of the first stages; those of the later ones double. `depth`: of a stage, one convolution and residual
    blocks. `fpn`: channels of the pyramid and of the head, a multiple of 32. `convs`: convolutions in each of the head's two
    branches. `strides`: of the pyramid's maps, powers of two from 4 on. `sizes`: in pixels, of each map, the strides if null:
    a map finds objects whose farthest side is 4 to 8 times its size from the place, the first also smaller and the last also
    larger ones. `radius`: how far from the center of an object, in sizes, a place learns it.
    `bins`: None, or each side of a box is a distribution over 0, …, `bins` sizes from the place, whose expectation is the side
    (`litdistill.tasks.detection.sides`); 8 reaches all objects but the largest of the last map.

    Raises `UserError` for numbers that make no such network.
    """
    strides = list(strides)
    sizes = strides if sizes is None else list(sizes)
    check_options(width, depth, fpn, convs, strides, sizes, bins)
    _, tall, wide = input_shape
    if max(tall, wide) <= strides[-1]:
        raise UserError(
            f"Images of {tall}x{wide} leave one place of a map of stride {strides[-1]}: leave that stride out, strides="
            f"{[s for s in strides if s < max(tall, wide)]}, or use larger images."
        )
    body = SlimBody(input_shape[0], width, depth, strides)
    return fcos(num_classes, Pyramid(body, body.channels, fpn), convs, sizes, radius, max(strides), bins)


def fcos(
    num_classes: int,
    backbone: nn.Module,
    convs: int,
    sizes: Sequence[int],
    radius: float,
    divisor: int,
    bins: int | None = None,
) -> Detector:
    """Returns torchvision's FCOS on a backbone with `out_channels`, one anchor a place, as a `Detector`.

    Options: as of `fcos_slim`. `divisor`: of which the sides of images are made multiples, the backbone's largest stride.
    """
    head = FCOSHead(backbone.out_channels, 1, num_classes, convs)
    anchors = AnchorGenerator(tuple((s,) for s in sizes), ((1.0,),) * len(sizes))
    model = FCOS(
        backbone,
        num_classes,
        anchor_generator=anchors,
        head=SidesHead(head, bins) if bins else head,
        center_sampling_radius=radius,
        size_divisible=divisor,
    )
    return Detector(model)


def check_widths(fpn: int, **counts: int) -> None:
    """Raises `UserError` for a number of channels that the head cannot normalize, and for `counts` below 1."""
    if fpn < GROUPS or fpn % GROUPS:
        raise UserError(f"fpn={fpn}: the head normalizes its channels in {GROUPS} groups; give a multiple of {GROUPS}.")
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name}={count} must be 1 or more.")


def check_options(
    width: int, depth: int, fpn: int, convs: int, strides: Sequence[int], sizes: Sequence[int], bins: int | None
) -> None:
    """Raises `UserError` for options of `fcos_slim` that make no network."""
    check_widths(fpn, width=width, depth=depth, convs=convs)
    if bins is not None and (type(bins) is not int or bins < 1):
        raise UserError(
            f"bins={bins}: give null for plain distances, or the largest distance of a side in sizes: 8 or 16."
        )
    if not strides or sorted({int(s) for s in strides}) != strides or any(s < 4 or s & (s - 1) for s in strides):
        raise UserError(
            f"strides={strides} must be powers of two from 4 on, each larger than the one before: [8, 16, 32]."
        )
    if len(sizes) != len(strides) or sorted(set(sizes)) != sizes or any(s < 2 or s % 2 for s in sizes):
        raise UserError(
            f"sizes={sizes} must be even numbers of pixels, one of each of strides={strides}, each larger than the one before."
        )
