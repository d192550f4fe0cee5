"""What was changed in a published network so that it fits other images and classes, in words for the user.

A builder (`torchvision_classifier`, `timm_classifier`) notes the changes on the network that it returns; `build_net` prints
them in one line:

    resnet18 with weights IMAGENET1K_V1: standard stem; head new, 1000 to 3 classes; images resized from 64x64 to 224x224; …
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from litdistill.models.preprocess import Preprocess


class Published(NamedTuple):
    """What the authors of weights say of their images."""

    size: tuple[int, int]  # height and width in pixels
    interpolation: str
    crop: float  # share of the resized image's side that the center crop keeps


class Adaptations(NamedTuple):
    """The name of a published network, and what was changed in it."""

    name: str
    changes: tuple[str, ...]
    published: bool = False  # whether published weights were loaded
    classes: tuple[str, ...] = ()  # names of its classes, where the weights bring them


def adapted(
    net: nn.Module, name: str, changes: Sequence[str], weights: str | None = None, classes: Sequence[str] = ()
) -> nn.Module:
    """Returns `net` with the changes noted under `name`, and under that of its published weights; with the names of classes
    that the weights bring."""
    shown = f"{name} with weights {weights}" if weights else name
    net.adaptations = Adaptations(shown, tuple(changes), bool(weights), tuple(classes))  # type: ignore[assignment]
    return net


def published_classes(net: nn.Module) -> tuple[str, ...]:
    """Returns the names of the classes that the published weights of `net` bring; empty where it has the data's."""
    found: Any = getattr(net, "adaptations", None)
    return found.classes if isinstance(found, Adaptations) else ()


def has_published_weights(net: nn.Module) -> bool:
    """Returns whether the builder of `net` gave it published weights."""
    found: Any = getattr(net, "adaptations", None)
    return isinstance(found, Adaptations) and found.published


def changes_of(net: nn.Module) -> tuple[str, ...]:
    """Returns the changes that the builder of `net` noted."""
    found: Any = getattr(net, "adaptations", None)
    return found.changes if isinstance(found, Adaptations) else ()


def adaptations_of(net: nn.Module) -> str:
    """Returns the changes that the builder of `net` noted, in one line under the network's name; "" where there are none."""
    changes, noted = changes_of(net), getattr(net, "adaptations", None)
    return f"{noted.name}: {'; '.join(changes)}." if changes else ""  # type: ignore[union-attr]


def head_change(published: int, num_classes: int) -> list[str]:
    """Returns the change of the classifier, none where the classes are as many as published."""
    return [f"head new and zero, {published} to {num_classes} classes"] if published != num_classes else []


def preprocess_changes(images: Sequence[int], preprocess: Preprocess, published: Published) -> list[str]:
    """Returns what is done to images (C, H, W) by the weights' own preprocessing, and what of it is left out."""
    assert preprocess.size is not None
    given, size, own = (f"{h}x{w}" for h, w in (images[1:], preprocess.size, published.size))
    changes = [f"images resized from {given} to {size}" if given != size else f"images of {size}"]
    if size != own:
        changes[0] += f" (the weights' own size is {own})"
    if images[0] != len(preprocess.mean):
        changes.append(f"gray images shown as {len(preprocess.mean)} equal channels")
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (preprocess.mean, preprocess.std))
    changes.append(f"the weights' own mean [{mean}] and std [{std}]")
    left_out = [f"{published.interpolation} resizing (bilinear here)"] * (published.interpolation != "bilinear")
    left_out += [f"center crop of {published.crop:.3g}"] * (published.crop < 1)
    return changes + ([f"left out of the weights' transform: {', '.join(left_out)}"] if left_out else [])
