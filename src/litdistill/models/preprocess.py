"""Preprocessing as a part of the network: it takes raw images, and normalizes and resizes them itself.

    net = Preprocessed(conv4(10, (1, 28, 28)), Preprocess(mean=[0.13], std=[0.31]))
    logits = net(images)          # uint8 from 0 to 255, or floats from 0 to 1

So a teacher and its student can preprocess differently, and a network needs no separate preprocessing.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litdistill.types import DETECTIONS
from litdistill.utils.errors import UserError

SLACK = 1e-3  # tolerance of floats outside 0 to 1, from rounding in resizing or mixing
BOXES, SCALE = "boxes", "scale"  # heads of a detector: its boxes in pixels, and by what resizing has multiplied them


class Preprocess(nn.Module):
    """Images (N, C, H, W), uint8 or floats from 0 to 1 -> floats, resized and normalized: (x - mean) / std.

    Rows (N, F) of a table, of any scale, are standardized in the same way, per feature. There is no learned or saved state. A
    single channel is broadcast to several means: gray images for a network of color images.

    Args:
        mean, std: of each channel, on the scale 0 to 1; of each feature of a table, on its own scale.
        size: height and width, or one number for both, to which images are resized (bilinear, antialiased). None: images
            are not resized.
    """

    shift: Tensor
    scale: Tensor
    scale_uint8: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], size: int | Sequence[int] | None = None):
        super().__init__()
        self.mean, self.std = tuple(float(m) for m in mean), tuple(float(s) for s in std)
        self.size = (size, size) if isinstance(size, int) else None if size is None else tuple(int(n) for n in size)
        if len(self.mean) != len(self.std) or not self.mean or not all(s > 0 for s in self.std):
            raise UserError(f"preprocess: mean={list(mean)} and std={list(std)} must be as many, and each std above 0.")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise UserError(f"preprocess: size={size} must be a number of pixels, or height and width.")
        for name, values in zip(("shift", "scale", "scale_uint8"), _constants(self.mean, self.std), strict=True):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim == 2:
            return torch.addcmul(self.shift.flatten(), images.to(self.shift.dtype), self.scale.flatten())
        levels = not images.is_floating_point()
        images = images.to(self.shift.dtype)
        if self.size is not None and tuple(images.shape[2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        shift, scale = self.shift, self.scale_uint8 if levels else self.scale
        if not (torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing()):
            last = images.shape[1] > 1 and images.stride(1) == 1
            which = (self.mean, self.std, images.shape[2:], last, images.device, images.dtype)
            tables = _tables(*which)
            shift, scale = tables[0], tables[2 if levels else 1]
        return torch.addcmul(shift, images, scale)

    def input_shape(self, images: Sequence[int]) -> tuple[int, ...]:
        """Returns the output shape (C, H, W) for images of shape (C, H, W), and (F,) for (F,).

        Raises `UserError` where the number of channels or features does not fit.
        """
        if len(images) == 1 and images[0] == len(self.mean):
            return tuple(images)
        if len(images) == 1 or images[0] not in (1, len(self.mean)):
            raise UserError(
                f"preprocess: mean={list(self.mean)} is of {len(self.mean)} channels, and the images have {images[0]}."
            )
        height, width = self.size or images[1:]
        return len(self.mean), height, width

    def facts(self) -> dict[str, Any]:
        """Returns mean, std and size as plain values, the constructor's arguments."""
        return {"mean": list(self.mean), "std": list(self.std), "size": None if self.size is None else list(self.size)}

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.facts().items())


def _constants(mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float], list[float]]:
    """Returns -mean / std, 1 / std for floats and 1 / (255 · std) for uint8."""
    pairs = list(zip(mean, std, strict=True))
    return [-m / s for m, s in pairs], [1 / s for _, s in pairs], [1 / (255 * s) for _, s in pairs]


@functools.lru_cache(maxsize=16)
def _tables(
    mean: tuple[float, ...],
    std: tuple[float, ...],
    size: torch.Size,
    last: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Returns the constants expanded to an image's shape (C, H, W), in channels-first or channels-last memory format.

    Without broadcasting inside an image the arithmetic is vectorized, five times as fast on a CPU."""
    found = []
    for values in _constants(mean, std):
        full = torch.tensor(values, dtype=torch.float64).view(-1, 1, 1).expand(-1, *size)
        full = full.permute(1, 2, 0).contiguous().permute(2, 0, 1) if last else full.contiguous()
        found.append(full.to(device, dtype))
    return tuple(found)


def network_modules(
    module: nn.Module, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` of a module around `module.net`: yields itself and the network under one name, so that names inside are
    the network's; what else it has keeps its own name."""
    memo = set() if memo is None else memo
    if module not in memo:
        if remove_duplicate:
            memo.add(module)
        yield prefix, module
        for name, child in module.named_children():
            place = prefix if name == "net" else f"{prefix}.{name}".lstrip(".")
            yield from child.named_modules(memo, place, remove_duplicate)


def network_submodule(module: nn.Module, target: str) -> nn.Module:
    """`get_submodule` of such a module: returns a submodule by its name in the network."""
    net: Any = module.net
    return module if target == "" else net.get_submodule(target)


class Preprocessed(nn.Module):
    """`net` after its preprocessing. Names of parameters and submodules and keys of the state dict are those of `net`:
    a state dict fits the network with and without preprocessing, and a tap has the same name."""

    named_modules, get_submodule = network_modules, network_submodule

    def __init__(self, net: nn.Module, preprocess: Preprocess):
        super().__init__()
        self.preprocess, self.net = preprocess, net
        self.training = getattr(net, "training", False)  # a scripted network has no mode
        transparent_state(self)

    def forward(self, images: Tensor) -> Any:
        given = self.net(self.preprocess(images))
        size = self.preprocess.size
        if size is None or not isinstance(given, Mapping) or not given.keys() & {BOXES, DETECTIONS}:
            return given
        return in_pixels(given, images.shape[-2:], size, self.training)


def in_pixels(
    heads: Mapping[str, Tensor], images: Sequence[int], resized: Sequence[int], training: bool
) -> dict[str, Tensor]:
    """Returns the heads of a detector with `boxes` (N, A, 4) and the first columns of `detections` (N, K, 6) in pixels of the
    images and not of the resized ones.

    `images`, `resized`: height and width. While training a head `scale` (N, 4) says by what the boxes of the labels are to be
    multiplied for the network.
    """
    factor = [resized[1] / images[1], resized[0] / images[0]] * 2
    found = dict(heads)
    if BOXES in heads:
        by = heads[BOXES].new_tensor(factor)
        found[BOXES] = heads[BOXES] / by
        if training:
            found[SCALE] = by.expand(len(found[BOXES]), -1)
    if DETECTIONS in heads:
        found[DETECTIONS] = heads[DETECTIONS] / heads[DETECTIONS].new_tensor([*factor, 1.0, 1.0])
    return found


def transparent_state(module: nn.Module) -> None:
    """Gives the state dict of a module around `module.net` the keys of the network."""
    module.register_state_dict_post_hook(_without_level)
    module.register_load_state_dict_pre_hook(_with_level)


def _without_level(module: nn.Module, state: dict[str, Any], prefix: str, _: dict[str, Any]) -> None:
    for key in [k for k in state if k.startswith(f"{prefix}net.")]:
        state[prefix + key.removeprefix(f"{prefix}net.")] = state.pop(key)


def _with_level(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [k for k in state if k.startswith(prefix)]:
        state[f"{prefix}net.{key.removeprefix(prefix)}"] = state.pop(key)


def bare(net: nn.Module) -> nn.Module:
    """Returns the network without its preprocessing, for normalized images; `net` itself where it has none."""
    return net.net if isinstance(net, Preprocessed) else net


def wrap(net: nn.Module, preprocess: Preprocess | None) -> nn.Module:
    """Returns `net` after that preprocessing; `net` itself for None."""
    return net if preprocess is None else Preprocessed(net, preprocess)


def preprocess_of(net: nn.Module) -> Preprocess | None:
    """Returns the preprocessing of `net` or of the networks inside; None where there is none, or they differ."""
    found = [m.preprocess for m in net.modules() if isinstance(m, Preprocessed)]
    return found[0] if found and all(p.facts() == found[0].facts() for p in found) else None


def preprocessing(net: nn.Module) -> list[dict[str, Any]]:
    """Returns the preprocessing of each network inside `net` as plain values; empty where there is none."""
    return [m.preprocess.facts() for m in net.modules() if isinstance(m, Preprocessed)]


def without_preprocessing(net: nn.Module) -> nn.Module:
    """Returns a copy of `net` without any preprocessing inside, for normalized images."""
    return _replaced(copy.deepcopy(net), lambda module: module.net)


def as_plain_modules(net: nn.Module) -> nn.Module:
    """Returns a copy of `net` with `nn.Sequential` for `Preprocessed`, for tools that find parameters by their names."""
    sequence = lambda m: nn.Sequential(OrderedDict(preprocess=m.preprocess, net=m.net))  # noqa: E731
    return _replaced(copy.deepcopy(net), sequence)


def plain_modules(net: nn.Module) -> nn.Module:
    """Returns `net` with `plain()` of each module inside that has it, in place: for torch.export, to which a name must lead."""
    for name, child in list(net.named_children()):
        setattr(net, name, plain_modules(child))
    plain = getattr(net, "plain", None)
    return plain() if callable(plain) else net


def _replaced(net: nn.Module, by: Any) -> nn.Module:
    if isinstance(net, Preprocessed):
        return by(net)
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Preprocessed):
                setattr(parent, name, by(child))
    return net


def check_scale(net: nn.Module, inputs: Any) -> None:
    """Raises `UserError` for floats outside of 0 to 1 where `net` has a `Preprocess`."""
    if not any(isinstance(m, Preprocess) for m in net.modules()):
        return
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.ndim < 3 or inputs.numel() == 0:
        return
    low, high = inputs.min().item(), inputs.max().item()
    if not (low >= -SLACK and high <= 1 + SLACK):
        raise UserError(
            f"The images have values from {low:.3g} to {high:.3g}, and this network normalizes them itself: it takes uint8, or "
            "floats from 0 to 1. Yield such images (without normalization, nor a factor of 255); or, where they are "
            "normalized already, give the network without its preprocessing: litdistill.models.preprocess.bare(net)."
        )
