"""MobileNetV2 for small images. Sandler et al. 2018 (arXiv 1801.04381), table 2.

The variant of the distillation tables for CIFAR-100 (RepDistiller, arXiv 1910.10699): half width, ReLU instead of ReLU6,
stride 1 instead of 2 for 24 channels, no dropout. A stage ends in a linear bottleneck: it has no activation.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from litdistill.models.parts import he_init

# (channels, repeats, stride) by stage; a stage has one map size.
STAGES = (((16, 1, 1), (24, 2, 1)), ((32, 3, 2),), ((64, 4, 2), (96, 3, 1)), ((160, 3, 2), (320, 1, 1)))


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        hidden = inputs * expansion
        self.conv = nn.Sequential(
            *conv_bn(inputs, hidden, 1),
            nn.ReLU(),
            *conv_bn(hidden, hidden, 3, stride, groups=hidden),
            nn.ReLU(),
            *conv_bn(hidden, outputs, 1),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self, num_classes: int, channels: int, width: float, expansion: int):
        super().__init__()
        inputs = int(32 * width)
        self.conv1 = nn.Sequential(*conv_bn(channels, inputs, 3, 2), nn.ReLU())
        stages = []
        for form in STAGES:
            stage = nn.Sequential()
            for base, repeats, stride in form:
                for j in range(repeats):
                    t = 1 if base == 16 else expansion
                    stage.append(InvertedResidual(inputs, int(base * width), stride if j == 0 else 1, t))
                    inputs = int(base * width)
            stages.append(stage)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        last = int(1280 * max(width, 1.0))
        self.conv2 = nn.Sequential(*conv_bn(inputs, last, 1), nn.ReLU())
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.fc = nn.Linear(last, num_classes)
        he_init(self, linear_std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.fc(self.flatten(self.pool(self.conv2(x))))


def mobilenet_v2(num_classes: int, input_shape: Sequence[int], width: float = 0.5, expansion: int = 6) -> nn.Module:
    """MobileNetV2: `width` multiplies the channels, `expansion` is the paper's t."""
    return MobileNetV2(num_classes, input_shape[0], width, expansion)
