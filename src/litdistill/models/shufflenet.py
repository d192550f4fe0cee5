"""ShuffleNet V1 and V2 for small images. Zhang et al. 2017 (arXiv 1707.01083); Ma et al. 2018 (arXiv 1807.11164).

The variants of the distillation tables for CIFAR-100 (RepDistiller, arXiv 1910.10699): a 1x1 stem of 24 channels with
stride 1 and no max-pooling. V1 has 3 groups, and a ReLU after the depthwise convolution where the paper has none.
V2 at width 2 has the paper's 244 channels in its first stage, where RepDistiller has 224.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from litdistill.utils.errors import UserError


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channel shuffle: transposes (N, g · c, H, W) from g groups of c channels to c groups of g."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def conv_bn(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


class UnitV1(nn.Module):
    """Figure 2 (b) and, with stride 2, (c) of the V1 paper."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int):
        super().__init__()
        added = outputs - inputs if stride == 2 else outputs
        middle = added // 4
        self.groups = 1 if inputs == 24 else groups  # no groups for 24 input channels (section 3.2)
        self.conv1, self.relu1 = conv_bn(inputs, middle, groups=self.groups), nn.ReLU()
        self.conv2, self.relu2 = conv_bn(middle, middle, 3, stride, groups=middle), nn.ReLU()
        self.conv3, self.relu3 = conv_bn(middle, added, groups=groups), nn.ReLU()
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        out = shuffle(self.relu1(self.conv1(x)), self.groups)
        out = self.conv3(self.relu2(self.conv2(out)))
        return self.relu3(out + x if self.pool is None else torch.cat([out, self.pool(x)], dim=1))


class UnitV2(nn.Module):
    """Figure 3 (c) of the V2 paper: half of the channels skip the convolutions."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.conv1, self.relu1 = conv_bn(half, half), nn.ReLU()
        self.conv2 = conv_bn(half, half, 3, groups=half)
        self.conv3, self.relu2 = conv_bn(half, half), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        kept, x = x.chunk(2, dim=1)
        out = self.relu2(self.conv3(self.conv2(self.relu1(self.conv1(x)))))
        return shuffle(torch.cat([kept, out], dim=1), 2)


class DownV2(nn.Module):
    """Figure 3 (d) of the V2 paper: both branches downsample the map by 2."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        half = outputs // 2
        self.left1 = conv_bn(inputs, inputs, 3, 2, groups=inputs)
        self.left2, self.relu1 = conv_bn(inputs, half), nn.ReLU()
        self.right1, self.relu2 = conv_bn(inputs, half), nn.ReLU()
        self.right2 = conv_bn(half, half, 3, 2, groups=half)
        self.right3, self.relu3 = conv_bn(half, half), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        left = self.relu1(self.left2(self.left1(x)))
        right = self.relu3(self.right3(self.right2(self.relu2(self.right1(x)))))
        return shuffle(torch.cat([left, right], dim=1), 2)


class ShuffleNet(nn.Module):
    """Stem, three stages, an optional 1x1 convolution of `last` channels, average pooling, `fc`."""

    def __init__(self, num_classes: int, channels: int, stages: Sequence[nn.Sequential], width: int, last: int | None):
        super().__init__()
        self.conv1, self.relu = conv_bn(channels, 24), nn.ReLU()
        self.layer1, self.layer2, self.layer3 = stages
        self.conv2 = nn.Sequential(*conv_bn(width, last), nn.ReLU()) if last else nn.Identity()
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.fc = nn.Linear(last or width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.relu(self.conv1(x)))))
        return self.fc(self.flatten(self.pool(self.conv2(x))))


def shufflenet_v1(num_classes: int, input_shape: Sequence[int]) -> nn.Module:
    """ShuffleNet V1 1x with 3 groups: stages of 4, 8 and 4 units with 240, 480 and 960 channels."""
    stages, inputs = [], 24
    for outputs, units in ((240, 4), (480, 8), (960, 4)):
        rest = (UnitV1(outputs, outputs, 1, groups=3) for _ in range(units - 1))
        stages.append(nn.Sequential(UnitV1(inputs, outputs, 2, groups=3), *rest))
        inputs = outputs
    return ShuffleNet(num_classes, input_shape[0], stages, inputs, last=None)


def shufflenet_v2(num_classes: int, input_shape: Sequence[int], width: float = 1.0) -> nn.Module:
    """ShuffleNet V2 of table 5: stages of 4, 8 and 4 units. `width`: 0.5, 1, 1.5 or 2."""
    forms = {
        0.5: (48, 96, 192, 1024),
        1.0: (116, 232, 464, 1024),
        1.5: (176, 352, 704, 1024),
        2.0: (244, 488, 976, 2048),
    }
    if width not in forms:
        raise UserError(f"width={width}: ShuffleNet V2 comes in widths 0.5, 1, 1.5 and 2.")
    *widths, last = forms[width]
    stages, inputs = [], 24
    for outputs, units in zip(widths, (4, 8, 4), strict=True):
        stages.append(nn.Sequential(DownV2(inputs, outputs), *(UnitV2(outputs) for _ in range(units - 1))))
        inputs = outputs
    return ShuffleNet(num_classes, input_shape[0], stages, inputs, last)
