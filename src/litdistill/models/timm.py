"""Any network of timm by name. timm is the optional extra `models`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from torch import nn

from litdistill.models.parts import check_fits, keep_inputs, tensors_only
from litdistill.models.preprocess import Preprocess, Preprocessed
from litdistill.utils.errors import UserError

REMEDY = "Resize the images, give a transformer a smaller patch_size (4 for 28 or 32 pixels), or name another network."


def timm_classifier(
    num_classes: int, input_shape: Sequence[int], name: str, pretrained: bool = False, **options: Any
) -> nn.Module:
    """Returns `timm.create_model(name, …)` for the classes, channels and, where its size is fixed, the image size.

    `options`: arguments of timm's builder (`drop_path_rate`, `patch_size`, …). Activations are not in place. Published weights
    come with the mean and std of their training, where the number of channels is the same.
    Raises `UserError` without timm, for an unknown name, unavailable weights, and unsupported images.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError("net=timm needs timm: pip install 'litdistill[models]'") from error

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), 4) or ["resnet50", "vit_tiny_patch16_224"]
        raise UserError(f"timm has no network {name!r}. Did you mean {', '.join(close)}?")
    channels, height, width = input_shape
    published = timm.get_pretrained_cfg(name)
    if pretrained and not (published and published.has_weights):
        raise UserError(
            f"timm offers no weights for {name}. Use pretrained=false, or a name that list_pretrained shows."
        )
    if published and published.fixed_input_size:
        options = {"img_size": (height, width)} | options
    try:
        with tensors_only():
            net = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, in_chans=channels, **options)
    except Exception as error:  # timm asserts, and download clients raise many kinds of errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if pretrained:
            raise UserError(
                f"The weights of {name} could not be had ({reason}): is there a network? "
                "Use pretrained=false, or give a local file as pretrained_cfg_overlay={file: path}."
            ) from error
        raise UserError(f"timm cannot build {name} with {options} ({reason}). {REMEDY}") from error
    patch = getattr(getattr(net, "patch_embed", None), "patch_size", None)
    if patch and (height % patch[0] or width % patch[1]):  # timm would ignore the pixels at the edge silently
        raise UserError(
            f"{name} cuts {height}x{width} pixels into patches of {patch[0]}x{patch[1]}: some are left. {REMEDY}"
        )
    check_fits(keep_inputs(net), num_classes, input_shape, name, REMEDY)
    own: Any = net.pretrained_cfg
    if pretrained and len(own["mean"]) == channels:
        return Preprocessed(net, Preprocess(own["mean"], own["std"]))
    return net
