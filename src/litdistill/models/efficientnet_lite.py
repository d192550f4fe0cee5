"""EfficientNet-Lite0 with ImageNet weights from a Python package: a pretrained network where only package mirrors are open.

The network is timm's `tf_efficientnet_lite0` (the optional extra `models`); 4.7 M parameters, 0.39 G multiply-accumulates at
224 pixels. Its authors publish 75.1 % top-1 on ImageNet.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from litdistill.data.weights import obtain_weights
from litdistill.models.adaptations import adapted, changes_of
from litdistill.models.parts import tensors_only
from litdistill.models.preprocess import bare
from litdistill.models.timm import timm_classifier
from litdistill.utils.errors import UserError


def efficientnet_lite0(
    num_classes: int,
    input_shape: Sequence[int],
    weights: str | None = "imagenet",
    size: int | Sequence[int] | None = None,
    fetch: bool = True,
    **options: Any,
) -> nn.Module:
    """Returns EfficientNet-Lite0, by default with ImageNet weights and their transform: 224 pixels, mean and std 0.5.

    `weights`: "imagenet", fetched on first use and kept (`litdistill.data.weights`), or None. `size`, `fetch` and `options`: as
    for `timm_classifier`. Raises `UserError` without timm, for other weights, and where the weights cannot be had.
    """
    if weights not in (None, "imagenet"):
        raise UserError(f"weights={weights}: efficientnet_lite0 offers imagenet, or null for none.")
    known = weights is not None
    net = timm_classifier(num_classes, input_shape, "tf_efficientnet_lite0", known, size, fetch=False, **options)
    if not known:
        return net
    if fetch and torch.get_default_device().type != "meta":
        load_published(bare(net), num_classes)
    return adapted(net, "efficientnet_lite0", changes_of(net), weights)


def load_published(net: nn.Module, num_classes: int) -> None:
    """Loads the published weights into timm's network in place; the classifier only for as many classes as ImageNet's.

    The package names its tensors otherwise than timm, and in the same order.
    """
    path = obtain_weights("efficientnet_lite0")
    try:
        with tensors_only():
            published = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise UserError(
            f"{path} does not hold the plain weights of efficientnet_lite0: delete it and try again."
        ) from error
    own = net.state_dict()
    state = dict(zip(own, published.values(), strict=True))
    classifier = [name for name in state if state[name].shape != own[name].shape]
    net.load_state_dict({name: own[name] if name in classifier else value for name, value in state.items()})
