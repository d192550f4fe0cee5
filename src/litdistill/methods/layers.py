"""Layers shared by methods: projectors and regressors between two networks' features, and a dry forward of a network."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litdistill.features.feature_extractor import FeatureExtractor, resolve_taps
from litdistill.methods.base import maps
from litdistill.types import Outputs
from litdistill.utils.errors import UserError
from litdistill.utils.modes import eval_mode


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm2d that uses its running statistics for a batch with one value per channel, which has no variance.

    Without it, a last batch of one sample with a 1x1 map would raise an error, also for a student without BatchNorm.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.numel() == input.shape[1]:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


def connector(channels: int, out: int) -> nn.Sequential:
    """1x1 convolution and BatchNorm, initialized as in OFD's code (He normal, fan-out)."""
    conv = nn.Conv2d(channels, out, 1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    return nn.Sequential(conv, BatchNorm(out))


def projectors(pairs: Sequence[tuple[Tensor, Tensor]], bias: bool = False) -> nn.ModuleList:
    """For each pair of maps (N, C, H, W), a 1x1 convolution from the student's channels to the teacher's if they differ."""
    return nn.ModuleList(
        nn.Identity() if s.shape[1] == t.shape[1] else nn.Conv2d(s.shape[1], t.shape[1], 1, bias=bias, device=s.device)
        for s, t in pairs
    )


def regressor(student: Tensor, teacher: Tensor, relu: bool) -> nn.Sequential:
    """Convolution, BatchNorm and optional ReLU from a student's map (N, C, H, W) to a teacher's channels and size.

    The layers of FitNet and AB in the CRD table: a strided 3x3 where the student's map is twice as large on each side, a
    transposed 4x4 where it is half as large, else a 1x1, which keeps the size.
    """
    (c_s, *size_s), (c_t, *size_t) = student.shape[1:], teacher.shape[1:]
    conv: nn.Module
    if size_s == [2 * n for n in size_t]:
        conv = nn.Conv2d(c_s, c_t, 3, stride=2, padding=1)
    elif [2 * n for n in size_s] == size_t:
        conv = nn.ConvTranspose2d(c_s, c_t, 4, stride=2, padding=1)
    else:
        conv = nn.Conv2d(c_s, c_t, 1)
    layers = [conv, nn.BatchNorm2d(c_t), *([nn.ReLU()] if relu else [])]
    return nn.Sequential(*layers).to(student.device)


def dry_forward(net: nn.Module, example: Any, taps: Sequence[str] | str) -> tuple[str, Outputs, list[nn.Module]]:
    """Returns, from an eval-mode forward, the name of the last tap, the outputs, and the leaf modules in call order."""
    name = resolve_taps(net, example, taps)[-1]
    called: list[nn.Module] = []
    leaves = [m for m in net.modules() if not list(m.children())]
    handles = [m.register_forward_hook(lambda module, args, out: called.append(module)) for m in leaves]
    extractor = FeatureExtractor(net, [name])
    try:
        with eval_mode(net), torch.no_grad():
            return name, extractor(example), called
    finally:
        extractor.remove()
        for handle in handles:
            handle.remove()


def reusable_classifier(teacher: nn.Module, example: Any, taps: Sequence[str] | str, method: str) -> nn.Linear:
    """Returns a frozen copy of the teacher's classifier, its last linear layer.

    Raises `UserError` unless that layer, applied to the mean of the tapped map (N, C, H, W) over its positions, gives
    the teacher's logits: otherwise a student's map is not a valid input for it.
    """
    name, outputs, called = dry_forward(teacher, example, taps)
    pooled, logits = maps(outputs.features, method)[-1].mean((2, 3)), outputs.logits
    if (last := layer_between(pooled, logits, called)) is not None:
        return copy.deepcopy(last).requires_grad_(False)
    raise UserError(
        f"{method} reuses the teacher's classifier, which must be one linear layer on the mean over positions "
        f"of a map, and is not that on {name!r} of this teacher. Name the map in front of its pooling "
        "(teacher_taps), take a teacher such as a ResNet, or use another method (kd, dkd, fitnet)."
    )


def output_layer(net: nn.Module, example: Any, method: str) -> nn.Linear:
    """Returns the network's linear layer that gives its logits. Raises `UserError` where there is none."""
    outputs, called = dry_forward(net, example, "pooled")[1:]
    last = layer_between(list(outputs.features.values())[-1], outputs.logits, called)
    if last is None:
        raise UserError(
            f"{method} reads the weights of the teacher's classifier, which must be one linear layer, and this teacher ends in "
            "none. Take another teacher, or another method of logits (kd, dkd, nkd)."
        )
    return last


def layer_between(given: Tensor, logits: Tensor, called: Sequence[nn.Module]) -> nn.Linear | None:
    """Returns the last linear layer of those called if it makes the logits (N, classes) of the vectors (N, C), else None."""
    last = next((m for m in reversed(called) if isinstance(m, nn.Linear)), None)
    if last is None or given.ndim != 2 or last.in_features != given.shape[1]:
        return None
    with torch.no_grad():
        found = last(given)
    same = found.shape == logits.shape and float((found - logits).abs().max()) <= 1e-3 * float(logits.abs().max())
    return last if same else None
