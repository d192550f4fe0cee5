"""Any network of timm by name. timm is the optional extra `models`."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn

from litdistill.models.adaptations import Published, adapted, head_change, preprocess_changes
from litdistill.models.finetune import zero_head
from litdistill.models.parts import check_fits, keep_inputs, tensors_only
from litdistill.models.preprocess import Preprocess, Preprocessed
from litdistill.utils.errors import UserError

REMEDY = "Resize the images, give a transformer a smaller patch_size (4 for 28 or 32 pixels), or name another network."


def timm_classifier(
    num_classes: int,
    input_shape: Sequence[int],
    name: str,
    pretrained: bool = False,
    size: int | Sequence[int] | None = None,
    fetch: bool = True,
    **options: Any,
) -> nn.Module:
    """Returns `timm.create_model(name, …)` for the classes, channels and, where its size is fixed, the image size.

    Published weights bring their own transform, for images of as many channels and for gray images, which are shown as equal
    channels: mean, std and size. What it says beyond that, the interpolation and the crop, is listed as left out.
    `size`: the side, or height and width, to which images are resized for pretrained weights, in place of the weights' own.
    `fetch`: False leaves out the loading of pretrained weights, for a caller that loads others of the same structure.
    `options`: arguments of timm's builder (`drop_path_rate`, `patch_size`, …). Activations are not in place.
    `adaptations_of` (`litdistill.models.adaptations`) lists what was changed.
    Raises `UserError` without timm, for an unknown name, unavailable weights, and unsupported images.
    """
    timm = library()
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), 4) or ["resnet50", "vit_tiny_patch16_224"]
        raise UserError(f"timm has no network {name!r}. Did you mean {', '.join(close)}?")
    published = timm.get_pretrained_cfg(name)
    if pretrained and not (published and published.has_weights):
        raise UserError(
            f"timm offers no weights for {name}. Use pretrained=false, or a name that list_pretrained shows."
        )
    preprocess = None
    if pretrained:
        own = published.to_dict() | dict(options.get("pretrained_cfg_overlay") or {})
        preprocess = published_preprocess(own, input_shape, size)
    shape = tuple(input_shape) if preprocess is None else preprocess.input_shape(input_shape)
    if published and published.fixed_input_size:
        options = {"img_size": shape[1:]} | options
    load = pretrained and fetch and torch.get_default_device().type != "meta"
    net = created(timm, name, load, {"num_classes": num_classes, "in_chans": shape[0], **options})
    patch = getattr(getattr(net, "patch_embed", None), "patch_size", None)
    if patch and (shape[1] % patch[0] or shape[2] % patch[1]):  # timm would ignore the pixels at the edge silently
        raise UserError(
            f"{name} cuts {shape[1]}x{shape[2]} pixels into patches of {patch[0]}x{patch[1]}: some are left. {REMEDY}"
        )
    check_fits(keep_inputs(net), num_classes, shape, name, REMEDY)
    if not pretrained:
        return net
    if own["num_classes"] != num_classes:
        fill_heads_with_zeros(net)
    changes = ["standard stem", *head_change(own["num_classes"], num_classes)]
    if preprocess is None:
        changes.append(f"first kernels adapted from {len(own['mean'])} to {shape[0]} channels")
        return adapted(net, name, changes, "of timm")
    facts = Published(tuple(own["input_size"][1:]), own["interpolation"], own["crop_pct"])
    changes += preprocess_changes(input_shape, preprocess, facts)
    return adapted(Preprocessed(net, preprocess), name, changes, "of timm")


def fill_heads_with_zeros(net: Any) -> None:
    """Sets the new classifier of a network of timm to zero; of a distilled transformer both of them."""
    found = net.get_classifier()
    for layer in found if isinstance(found, tuple) else (found,):
        zero_head(layer)


def library() -> ModuleType:
    """Returns timm. Raises `UserError` where it is not installed."""
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise UserError("net=timm needs timm: pip install 'litdistill[models]'") from error


def published_preprocess(
    own: Mapping[str, Any], images: Sequence[int], size: int | Sequence[int] | None
) -> Preprocess | None:
    """Returns the weights' preprocessing for images (C, H, W), resized to `size` or their own size; None where the number of
    channels is not theirs."""
    if images[0] not in (1, len(own["mean"])):
        return None
    return Preprocess(own["mean"], own["std"], size or own["input_size"][1:])


def created(timm: ModuleType, name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """Returns the network of timm's builder. Raises `UserError` for what it refuses."""
    try:
        with tensors_only():
            net: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:  # timm asserts, and download clients raise many kinds of errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if pretrained:
            raise UserError(
                f"The weights of {name} could not be had ({reason}): is there a network? "
                "Use pretrained=false, or give a local file as pretrained_cfg_overlay={file: path}."
            ) from error
        raise UserError(f"timm cannot build {name} with {options} ({reason}). {REMEDY}") from error
    return net
