"""Any classification network of torchvision by name, with a stem for the images and a head for the classes."""

from __future__ import annotations

import difflib
import pickle
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torchvision.models as zoo
from torch import nn
from torchvision.models import WeightsEnum, get_model, get_model_weights, list_models

from litdistill.models.adaptations import Published, adapted, head_change, preprocess_changes
from litdistill.models.finetune import zero_head
from litdistill.models.parts import check_fits, keep_inputs, tensors_only
from litdistill.models.preprocess import Preprocess, Preprocessed
from litdistill.utils.errors import UserError

SMALL = 32  # largest side in pixels for which stem=auto makes the stem of an untrained network small
REMEDY = "Resize the images, or use a network of this project (net=resnet18_cifar, net=wrn_40_2)."


def torchvision_classifier(
    num_classes: int,
    input_shape: Sequence[int],
    name: str,
    weights: str | None = None,
    stem: Literal["auto", "standard", "small"] = "auto",
    size: int | Sequence[int] | None = None,
    fetch: bool = True,
    **options: Any,
) -> nn.Module:
    """Returns the network `name` of torchvision (`torchvision.models.list_models(module=torchvision.models)`).

    `weights`: None, or the name of pretrained weights ("DEFAULT", "IMAGENET1K_V2"). Their own transform comes with them, for
    images of one or three channels: mean, std and size, with gray images shown as three equal channels. What it says beyond
    that, the interpolation and the crop, is listed as left out. A head for another number of classes begins at zero; for
    other numbers of channels the first kernels are summed over colors, and images keep their size and the data's mean and std.
    `stem`: "standard" keeps the published geometry; "small" makes the first convolution 3x3 with stride 1 (the center of a
    pretrained kernel) and removes the max-pooling after it; "auto" is small up to 32 pixels without weights, and standard
    otherwise. Transformers have no such stem; without weights a ViT is built for the size of the images.
    `size`: the side, or height and width, to which images are resized for pretrained weights, in place of the weights' own.
    `fetch`: False leaves out the loading of `weights`, for a caller that loads others of the same structure.
    `options`: arguments of torchvision's builder.
    Activations are not in place, auxiliary heads are removed, and files are read as tensors only, never as objects.
    `adaptations_of` (`litdistill.models.adaptations`) lists what was changed.

    Raises `UserError` for an unknown name, unavailable weights, and unsupported images.
    """
    channels, height, width = input_shape
    check_names(name, stem)
    if weights:
        entry = entry_of(name, weights)
        published, preprocess = published_transform(entry, input_shape, size)
        if preprocess is not None:
            channels, height, width = preprocess.input_shape(input_shape)
    elif name.startswith(("vit_", "maxvit")):
        if height != width:
            raise UserError(f"{name} takes square images only, and these are {height}x{width}. {REMEDY}")
        options = (
            {"image_size": height} | options if name.startswith("vit_") else {"input_size": (height, width)} | options
        )

    if weights and fetch and torch.get_default_device().type != "meta":
        net = pretrained(name, entry, options)
    else:
        net = built(name, num_classes, options)
    small = stem == "small" or (stem == "auto" and not weights and min(height, width) <= SMALL)
    changes = fit_stem(net, name, channels, small, required=stem == "small", keep=bool(weights))
    if weights:
        fit_head(net, num_classes)
        changes += head_change(len(entry.meta["categories"]), num_classes)
    check_fits(keep_inputs(net), num_classes, (channels, height, width), name, REMEDY)
    if not weights:
        return adapted(net, name, changes)
    if not any("stem" in change for change in changes):
        changes.insert(0, "standard stem")
    if preprocess is None:
        return adapted(net, name, changes, weights)
    changes += preprocess_changes(input_shape, preprocess, published)
    return adapted(Preprocessed(net, preprocess), name, changes, weights)


def check_names(name: str, stem: str) -> None:
    """Raises `UserError` for a network that torchvision does not have, and for an unknown stem."""
    known = list_models(module=zoo)
    if name not in known:
        close = difflib.get_close_matches(name, known, 4) or ["resnet18", "resnet50", "mobilenet_v3_small"]
        raise UserError(f"torchvision has no classification network {name!r}. Did you mean {', '.join(close)}?")
    if stem not in ("auto", "standard", "small"):
        raise UserError(f"stem={stem} is none of auto, standard, small.")


def entry_of(name: str, weights: str) -> WeightsEnum:
    """Returns the published weights of a network by their name. Raises `UserError` for an unknown one."""
    offered: type[WeightsEnum] = get_model_weights(name)
    if weights not in offered.__members__:
        raise UserError(f"weights={weights}: {name} offers {', '.join(offered.__members__)}, or null for none.")
    return offered[weights]


def published_transform(
    entry: WeightsEnum, images: Sequence[int], size: int | Sequence[int] | None
) -> tuple[Published, Preprocess | None]:
    """Returns what the weights' authors say of their images, and the preprocessing for images of shape (C, H, W): None where
    the number of channels is not theirs."""
    own = entry.transforms()
    published = Published((own.crop_size[0],) * 2, own.interpolation.value, own.crop_size[0] / own.resize_size[0])
    if images[0] not in (1, len(own.mean)):
        return published, None
    return published, Preprocess(own.mean, own.std, size or published.size)


def built(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    """Returns the network with initial weights. Raises `UserError` for options that its builder does not take."""
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True} | options
    try:
        return get_model(name, weights=None, num_classes=num_classes, **options)
    except (TypeError, ValueError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"torchvision cannot build {name} with {options} ({reason}). {REMEDY}") from error


def pretrained(name: str, entry: WeightsEnum, options: dict[str, Any]) -> nn.Module:
    """Returns the network with its published weights. Raises `UserError` where they cannot be had, or are no plain weights."""
    try:
        with tensors_only():
            net = get_model(name, weights=entry, progress=False, **options)
    except OSError as error:
        raise UserError(
            f"The weights {entry.name} of {name} could not be had from {entry.url} ({error}): is there a network? "
            f"Use weights=null, or put that file into {torch.hub.get_dir()}/checkpoints."
        ) from error
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        path = f"{torch.hub.get_dir()}/checkpoints/{entry.url.rsplit('/', 1)[-1]}"
        raise UserError(
            f"{path} does not hold the plain weights {entry.name} of {name}: delete it and try again."
        ) from error
    if name == "inception_v3":
        net.aux_logits, net.AuxLogits = False, None
    if hasattr(net, "transform_input"):
        # It indexes three channels, which gray images lack; images are normalized before the network.
        net.transform_input = False
    return net


def fit_stem(net: nn.Module, name: str, channels: int, small: bool, required: bool, keep: bool) -> list[str]:
    """Replaces the first convolution where the channels or the geometry require it; returns the changes in words.

    `required`: raises `UserError` for a network without a reducing stem. `keep`: copies the present (pretrained) kernel.
    """
    layers = [(k, m) for k, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.MaxPool2d)]
    at, old = next((k, m) for k, m in layers if isinstance(m, nn.Conv2d))
    # Not for transformers: windows and position embeddings depend on the patches of their first convolution.
    reducing = max(old.stride) > 1 and not name.startswith(("vit_", "swin", "maxvit"))
    if required and not reducing:
        raise UserError(f"{name} has no stem to make small. Use stem=standard.")
    small = small and reducing
    changes = ["stem made small, 3x3 with stride 1"] if small else []
    if small and len(layers) > 1 and isinstance(layers[1][1], nn.MaxPool2d):
        net.set_submodule(layers[1][0], nn.Identity())
        changes[0] += " and no max-pooling"
    if not small and old.in_channels == channels:
        return changes
    if keep and old.in_channels != channels:
        changes.append(f"first kernels summed over colors, {old.in_channels} to {channels} channels")

    tall, wide = old.kernel_size
    kernel = (min(3, tall), min(3, wide)) if small else (tall, wide)
    new = nn.Conv2d(
        channels,
        old.out_channels,
        kernel,
        1 if small else old.stride,  # type: ignore[arg-type]
        (kernel[0] // 2, kernel[1] // 2) if small else old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    with torch.no_grad():
        if keep:  # pretrained
            top, left = (tall - kernel[0]) // 2, (wide - kernel[1]) // 2
            weight = old.weight[:, :, top : top + kernel[0], left : left + kernel[1]]
            if channels != old.in_channels:  # a gray image has the same output as three equal channels
                weight = weight.sum(1, keepdim=True).expand(-1, channels, -1, -1) / channels
            new.weight.copy_(weight)
            if new.bias is not None and old.bias is not None:
                new.bias.copy_(old.bias)
        else:
            nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
            if new.bias is not None:
                nn.init.zeros_(new.bias)
    net.set_submodule(at, new)
    return changes


def fit_head(net: nn.Module, num_classes: int) -> None:
    """Replaces the last layer (linear or 1x1 convolution) where its number of classes differs, by one of zeros."""
    at, old = [(k, m) for k, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    if isinstance(old, nn.Linear):
        if old.out_features != num_classes:
            net.set_submodule(at, nn.Linear(old.in_features, num_classes, bias=old.bias is not None))
            zero_head(net.get_submodule(at))
    elif old.out_channels != num_classes:
        net.set_submodule(at, nn.Conv2d(old.in_channels, num_classes, 1))
        zero_head(net.get_submodule(at))
