"""Wide residual networks with pre-activation. Zagoruyko & Komodakis 2016 (arXiv 1605.07146), section 2, table 1.

A stage ends in a sum, not in an activation; its activation is the first one of the next stage.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from litdistill.models.parts import he_init
from litdistill.utils.errors import UserError


class WideBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float):
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(inputs), nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(outputs), nn.ReLU()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        out = self.conv2(self.dropout(self.relu2(self.bn2(self.conv1(active)))))
        # Where the shape changes, the shortcut starts after the activation, as in the authors' code.
        return out + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    def __init__(self, num_classes: int, channels: int, blocks: int, widths: Sequence[int], dropout: float):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(WideBlock(a if j == 0 else b, b, s if j == 0 else 1, dropout) for j in range(blocks)))
            for a, b, s in zip((16, *widths[:2]), widths, (1, 2, 2), strict=True)
        )
        self.bn1, self.relu = nn.BatchNorm2d(widths[2]), nn.ReLU()
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.fc = nn.Linear(widths[2], num_classes)
        he_init(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(self.flatten(self.pool(self.relu(self.bn1(x)))))


def wrn(
    num_classes: int, input_shape: Sequence[int], depth: int = 40, widen: int = 2, dropout: float = 0.0
) -> nn.Module:
    """WRN-depth-widen: depth 6n + 4 gives three stages of n blocks with 16, 32 and 64 times `widen` channels.

    `dropout`: between the two convolutions of a block (section 2.4); the distillation tables use none.
    """
    if depth < 10 or (depth - 4) % 6:
        raise UserError(f"A wide ResNet has depth 6n + 4 (10, 16, 22, 28, 40), not {depth}.")
    return WideResNet(num_classes, input_shape[0], (depth - 4) // 6, [16 * widen, 32 * widen, 64 * widen], dropout)
