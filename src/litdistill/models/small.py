"""Small students, at most five weight layers by default: a convolutional net, a perceptron and LeNet-5."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from litdistill.models.parts import he_init, require_size
from litdistill.utils.errors import UserError


def conv4(
    num_classes: int,
    input_shape: Sequence[int],
    widths: Sequence[int] = (16, 32, 64),
    global_pool: bool = True,
) -> nn.Module:
    """Blocks of 3x3 convolution, batch normalization, ReLU and 2x2 max-pooling, then one linear layer: 4 weight layers.

    Global average pooling replaces the last max-pooling, so any image size fits; maps of one pixel are not pooled any
    further. `widths`: channels of each block. The blocks are `layer1`, `layer2`, …
    `global_pool=False` keeps spatial positions instead: max-pooling as after the other blocks, and a wider classifier,
    which is more accurate on centered images such as MNIST's.
    """
    if not widths:
        raise UserError("conv4 needs the channels of one block at least: widths=[16,32,64].")
    channels, height, width = input_shape
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for i, out in enumerate(widths, 1):
        if i > 1 and min(height, width) >= 2:
            parts[f"pool{i - 1}"] = nn.MaxPool2d(2)
            height, width = height // 2, width // 2
        conv = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        parts[f"layer{i}"] = nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())
        channels = out
    if global_pool:
        parts["pool"] = nn.AdaptiveAvgPool2d(1)
    else:
        if min(height, width) >= 2:
            parts["pool"] = nn.MaxPool2d(2)
            height, width = height // 2, width // 2
        channels *= height * width
    parts["flatten"], parts["fc"] = nn.Flatten(), nn.Linear(channels, num_classes)
    net = nn.Sequential(parts)
    he_init(net)
    return net


def mlp(
    num_classes: int,
    input_shape: Sequence[int],
    widths: Sequence[int] = (800, 800),
    dropout: float = 0.0,
    input_dropout: float = 0.0,
    max_norm: float | None = None,
) -> nn.Module:
    """A multilayer perceptron with ReLU on flattened images or features (N, F); by default that of arXiv 1503.02531, section 3.

    `widths`: units of each hidden layer ([1200, 1200] for the paper's teacher); the layers are `layer1`, `layer2`, …
    `dropout`, `input_dropout`: probability of dropping a hidden unit or a pixel (.5 and .2 in arXiv 1207.0580).
    `max_norm`: the maximum L2 norm of the incoming weights of a hidden unit, enforced before each training forward (the
    weight constraint of arXiv 1207.0580; its appendix A.1 limits the squared length to 15).
    """
    parts: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    if input_dropout:
        parts["input_dropout"] = nn.Dropout(input_dropout)
    units = prod(input_shape)
    for i, out in enumerate(widths, 1):
        layer = [nn.Linear(units, out), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
        parts[f"layer{i}"] = nn.Sequential(*layer)
        units = out
        if max_norm is not None:
            layer[0].register_forward_pre_hook(functools.partial(_hold_norm, max_norm))
    parts["fc"] = nn.Linear(units, num_classes)
    return nn.Sequential(parts)


def _hold_norm(max_norm: float, layer: nn.Module, _: object) -> None:
    """Forward pre-hook: limits the weights' norm in training mode; evaluation does not change the weights."""
    if layer.training:
        with torch.no_grad():
            layer.weight.renorm_(2, 0, max_norm)  # type: ignore[operator]


class LeNet(nn.Module):
    """See `lenet`."""

    def __init__(self, num_classes: int, input_shape: Sequence[int]):
        super().__init__()
        channels, height, width = input_shape
        padding = 2 if min(height, width) < 32 else 0
        side = [((n + 2 * padding - 4) // 2 - 4) // 2 for n in (height, width)]
        self.layer1 = nn.Sequential(nn.Conv2d(channels, 6, 5, padding=padding), nn.ReLU())
        self.pool1 = nn.MaxPool2d(2)
        self.layer2 = nn.Sequential(nn.Conv2d(6, 16, 5), nn.ReLU())
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.layer3 = nn.Sequential(nn.Linear(16 * prod(side), 120), nn.ReLU())
        self.layer4 = nn.Sequential(nn.Linear(120, 84), nn.ReLU())
        self.fc = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool2(self.layer2(self.pool1(self.layer1(x))))
        return self.fc(self.layer4(self.layer3(self.flatten(x))))


def lenet(num_classes: int, input_shape: Sequence[int]) -> nn.Module:
    """LeNet-5 (LeCun et al. 1998, §II.B) with today's usual changes: ReLU, max-pooling, full connections, a linear classifier.

    Images below 32x32 are padded by 2, as MNIST is in the paper. Raises `UserError` below 12x12.
    """
    require_size("lenet", input_shape, 12)
    return LeNet(num_classes, input_shape)
