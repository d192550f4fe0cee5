"""VGG with batch normalization and one linear classifier. Simonyan & Zisserman 2014 (arXiv 1409.1556), table 1.

The variant of the distillation tables for CIFAR-100 (RepDistiller, arXiv 1910.10699), for small images: five stages, maps
halved after the first three only (after the fourth too from 64x64 on), average pooling before `fc`. Depth 8 is
RepDistiller's own.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from litdistill.models.parts import he_init, require_size
from litdistill.utils.errors import UserError

DEPTHS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    def __init__(self, num_classes: int, channels: int, depths: Sequence[int], large: bool):
        super().__init__()
        stages, inputs = [], channels
        for depth, width in zip(depths, WIDTHS, strict=True):
            stage = nn.Sequential()
            for _ in range(depth):
                stage.extend([nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()])
                inputs = width
            stages.append(stage)
        self.layer1, self.layer2, self.layer3, self.layer4, self.layer5 = stages
        self.pool1, self.pool2, self.pool3 = nn.MaxPool2d(2), nn.MaxPool2d(2), nn.MaxPool2d(2)
        self.pool4 = nn.MaxPool2d(2) if large else nn.Identity()
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.fc = nn.Linear(inputs, num_classes)
        he_init(self, linear_std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool3(self.layer3(self.pool2(self.layer2(self.pool1(self.layer1(x))))))
        x = self.layer5(self.pool4(self.layer4(x)))
        return self.fc(self.flatten(self.pool(x)))


def vgg(num_classes: int, input_shape: Sequence[int], depth: int = 8) -> nn.Module:
    """VGG-8, -11, -13, -16 or -19. Raises `UserError` below 8x8."""
    if depth not in DEPTHS:
        raise UserError(f"depth={depth}: VGG comes in depths {', '.join(map(str, DEPTHS))}.")
    require_size(f"vgg{depth}", input_shape, 8)
    return VGG(num_classes, input_shape[0], DEPTHS[depth], large=min(input_shape[1:]) >= 64)
