"""Residual networks with a 3x3 stem for small images. He et al. 2016 (arXiv 1512.03385), section 4.2 and table 1.

The published distillation tables for CIFAR-100 use the definition of RepDistiller (arXiv 1910.10699, appendix):
shortcuts are 1x1 convolutions with batch normalization where the shape changes, not the paper's zero padding.
The ResNet-20 and -110 of the CIFAR-10 tables that train with reflection padding (Knowledge-Distillation-Zoo) are the
same networks. Every activation is a module of its own, so a hook on `layer2[-1].relu2` reads a stage's pre-activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from litdistill.models.parts import he_init
from litdistill.utils.errors import UserError

Shortcut = Literal["conv", "pad"]


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class PadShortcut(nn.Module):
    """Option A of the paper: subsamples by the stride and pads new channels with zeros; no parameters."""

    def __init__(self, new_channels: int, stride: int):
        super().__init__()
        self.new_channels, self.stride = new_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        before = self.new_channels // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))


def make_shortcut(inputs: int, outputs: int, stride: int, kind: Shortcut) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    if kind == "pad":
        return PadShortcut(outputs - inputs, stride)
    return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, shortcut: Shortcut):
        super().__init__()
        self.conv1, self.bn1, self.relu1 = conv(inputs, width, 3, stride), nn.BatchNorm2d(width), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = conv(width, width, 3), nn.BatchNorm2d(width), nn.ReLU()
        self.downsample = make_shortcut(inputs, width, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(out + self.downsample(x))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, shortcut: Shortcut):
        super().__init__()
        outputs = width * self.expansion
        self.conv1, self.bn1, self.relu1 = conv(inputs, width, 1), nn.BatchNorm2d(width), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = conv(width, width, 3, stride), nn.BatchNorm2d(width), nn.ReLU()
        self.conv3, self.bn3, self.relu3 = conv(width, outputs, 1), nn.BatchNorm2d(outputs), nn.ReLU()
        self.downsample = make_shortcut(inputs, outputs, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))
        return self.relu3(self.bn3(self.conv3(out)) + self.downsample(x))


class ResNet(nn.Module):
    """A 3x3 convolution of `stem` channels, one stage `layer1`, `layer2`, … for each width, average pooling, `fc`."""

    def __init__(
        self,
        num_classes: int,
        channels: int,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: Sequence[int],
        stem: int,
        widths: Sequence[int],
        shortcut: Shortcut,
    ):
        super().__init__()
        self.conv1, self.bn1, self.relu = conv(channels, stem, 3), nn.BatchNorm2d(stem), nn.ReLU()
        self.stages = [f"layer{i}" for i in range(1, len(widths) + 1)]
        inputs = stem
        for i, (name, depth, width) in enumerate(zip(self.stages, blocks, widths, strict=True)):
            stage = nn.Sequential()
            for j in range(depth):
                stage.append(block(inputs, width, 2 if i and not j else 1, shortcut))
                inputs = width * block.expansion
            self.add_module(name, stage)
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.fc = nn.Linear(inputs, num_classes)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.fc(self.flatten(self.pool(x)))


def resnet(
    num_classes: int,
    input_shape: Sequence[int],
    depth: int = 20,
    widths: Sequence[int] = (16, 16, 32, 64),
    shortcut: Shortcut = "conv",
) -> nn.Module:
    """ResNet for CIFAR with basic blocks (section 4.2): depth 6n + 2 gives three stages of n blocks.

    `widths`: channels of the stem and of the three stages; [32, 64, 128, 256] makes the "x4" networks of the tables.
    `shortcut`: "conv" (the tables) or "pad" (the paper).
    """
    if depth < 8 or (depth - 2) % 6:
        raise UserError(f"A CIFAR ResNet has depth 6n + 2 (8, 14, 20, 32, 44, 56, 110), not {depth}.")
    if len(widths) != 4:
        raise UserError(f"widths={list(widths)}: give four, the stem's and the three stages', as in [16, 16, 32, 64].")
    if shortcut not in ("conv", "pad"):
        raise UserError(f"shortcut={shortcut} is neither conv (1x1 convolution) nor pad (zero padding).")
    stem, *stages = widths
    return ResNet(num_classes, input_shape[0], BasicBlock, [(depth - 2) // 6] * 3, stem, stages, shortcut)


def resnet_cifar(num_classes: int, input_shape: Sequence[int], depth: int = 18) -> nn.Module:
    """ResNet-18, -34 or -50 of table 1 with a 3x3 stem of stride 1 and no max-pooling, as is usual on CIFAR."""
    forms: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]]
    forms = {18: (BasicBlock, (2, 2, 2, 2)), 34: (BasicBlock, (3, 4, 6, 3)), 50: (Bottleneck, (3, 4, 6, 3))}
    if depth not in forms:
        raise UserError(f"depth={depth}: resnet_cifar comes in depths 18, 34 and 50. For others see net=torchvision.")
    block, blocks = forms[depth]
    return ResNet(num_classes, input_shape[0], block, blocks, 64, (64, 128, 256, 512), "conv")
