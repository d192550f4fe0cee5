"""FCOS on any backbone: a network of torchvision or timm by name, one's own, or that of a finished classification run.

net@student=fcos_on student.backbone=timm:mobilenetv3_small_100 student.weights=DEFAULT
net@student=fcos_on student.backbone=runs/train/2026-11-28_01-35-51_4afe
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from litdistill.features.feature_extractor import FeatureExtractor, resolve_taps
from litdistill.models.adaptations import adapted
from litdistill.models.parts import evaluating, keep_inputs
from litdistill.models.preprocess import Preprocess, Preprocessed, bare, preprocess_of
from litdistill.models.timm import created, library
from litdistill.models.torchvision import entry_of, torchvision_classifier
from litdistill.tasks.detection.detector import pad_to
from litdistill.tasks.detection.fcos import Pyramid, check_widths, fcos
from litdistill.utils.errors import UserError

LEAST = 4  # the smallest stride of a map of the pyramid
DIVISOR = 32  # of which the sides are a multiple while strides are measured


def fcos_on(
    num_classes: int,
    input_shape: Sequence[int],
    backbone: str | nn.Module,
    weights: str | None = None,
    fpn: int = 64,
    convs: int = 2,
    levels: int = 3,
    sizes: Sequence[int] | None = None,
    radius: float = 1.5,
    fetch: bool = True,
) -> nn.Module:
    """Returns torchvision's FCOS with a feature pyramid on the last stages of `backbone`, whose classifier is left out.

    `backbone`: torchvision:<name> or timm:<name>, or a network; a config also names a finished run or a `_target_`. `weights`:
    None, or the name of published weights of a backbone by name (DEFAULT for timm); their mean and std come with them, and
    images keep their size. `levels`: maps of the pyramid, of the backbone's last stages. `fetch`: False leaves out the loading
    of `weights`. `fpn`, `convs`, `sizes`, `radius`: as of `litdistill.tasks.detection.fcos.fcos_slim`.

    Raises `UserError` for a backbone of which no stages are found, and for options that make no network.
    """
    check_widths(fpn, convs=convs, levels=levels)
    net, preprocess, name = named(backbone, input_shape, weights, fetch)
    shape = tuple(input_shape) if preprocess is None else preprocess.input_shape(input_shape)
    body, channels, strides = body_of(bare(net), shape, levels, name)
    chosen = [max(2, stride) for stride in strides] if sizes is None else list(sizes)
    if len(chosen) != len(strides) or sorted(set(chosen)) != chosen or any(s < 2 or s % 2 for s in chosen):
        raise UserError(
            f"sizes={chosen} must be even numbers of pixels, one of each of the strides {strides}, increasing."
        )
    made = fcos(num_classes, Pyramid(keep_inputs(body), channels, fpn), convs, chosen, radius, strides[-1])
    said = [f"FCOS on its maps of strides {', '.join(map(str, strides))}, without its classifier"] if name else []
    built = made if preprocess is None else Preprocessed(made, preprocess)
    return adapted(built, name, said, weights)


def named(
    backbone: str | nn.Module, input_shape: Sequence[int], weights: str | None, fetch: bool
) -> tuple[nn.Module, Preprocess | None, str]:
    """Returns the network that `backbone` names, the mean and std of its weights, and its name; a network as it is."""
    if isinstance(backbone, nn.Module):
        own = preprocess_of(backbone)
        return backbone, None if own is None else Preprocess(own.mean, own.std), ""
    where, _, name = str(backbone).partition(":")
    if where == "torchvision" and name:
        net = torchvision_classifier(1000, input_shape, name, weights, stem="standard", fetch=fetch)
        own = entry_of(name, weights).transforms() if weights else None
    elif where == "timm" and name:
        timm = library()
        load = weights is not None and fetch and torch.get_default_device().type != "meta"
        net = created(timm, name, load, {"features_only": True, "in_chans": input_shape[0]})
        found = timm.get_pretrained_cfg(name, allow_unregistered=True) if weights else None
        own = None if found is None else Preprocess(found.mean, found.std)
    else:
        raise UserError(
            f"backbone={backbone} names no backbone: give torchvision:resnet18, timm:mobilenetv3_small_100, the folder of a "
            "finished classification run, or a node with a _target_."
        )
    fits = own is not None and input_shape[0] in (1, len(own.mean)) and (where, input_shape[0]) != ("timm", 1)
    return net, Preprocess(own.mean, own.std) if fits and own is not None else None, f"{where}:{name}"


def body_of(
    net: nn.Module, input_shape: Sequence[int], levels: int, name: str
) -> tuple[nn.Module, list[int], list[int]]:
    """Returns the part of a network up to its last stages, which gives their maps by name, and their channels and strides."""
    images = pad_to(torch.zeros(2, *input_shape), DIVISOR)
    try:
        taps = [] if hasattr(net, "feature_info") else list(resolve_taps(net, images, "stages"))
        with evaluating(net):
            maps = dict(FeatureExtractor(net, taps)(images).features) if taps else listed(net(images))
    except Exception as error:  # networks raise many kinds of errors for unsupported sizes
        raise UserError(
            f"backbone: {name or type(net).__name__} gives no maps ({str(error).splitlines()[0]})."
        ) from error
    strides = {k: images.shape[2] // m.shape[2] for k, m in maps.items() if m.ndim == 4 and whole(images, m)}
    kept = [k for k, stride in strides.items() if stride >= LEAST][-levels:]
    found = [strides[k] for k in kept]
    if not kept or sorted(set(found)) != found:
        raise UserError(
            f"backbone: {name or type(net).__name__} has no stages with maps of strides {LEAST}, 8, 16, …, each with half the "
            "resolution of the one before: name a convolutional network."
        )
    body = cut_after(net, kept, name) if taps else Listed(net, kept)
    return body, [maps[k].shape[1] for k in kept], found


def whole(images: Tensor, maps: Tensor) -> bool:
    """Returns whether one stride leads from the images to the maps, in both directions."""
    (tall, wide), (h, w) = images.shape[2:], maps.shape[2:]
    return tall % h == 0 and (tall // h) * w == wide


def listed(maps: Sequence[Tensor]) -> dict[str, Tensor]:
    """Returns maps by the number of each."""
    return {str(i): m for i, m in enumerate(maps)}


class Listed(nn.Module):
    """Returns some of the maps of a network that gives a list of them, by the number of each."""

    def __init__(self, net: nn.Module, names: Sequence[str]):
        super().__init__()
        self.net, self.names = net, list(names)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = listed(self.net(images))
        return OrderedDict((name, maps[name]) for name in self.names)


def cut_after(net: nn.Module, names: Sequence[str], name: str) -> nn.Module:
    """Returns the part of a network that makes the outputs of some of its modules. Names of parameters are the network's."""
    try:
        return create_feature_extractor(net, {tap: tap for tap in names})
    except Exception as error:  # symbolic tracing raises many kinds of errors
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"backbone: {name or type(net).__name__} cannot be cut after {names[-1]} ({reason}): name another network, or a "
            "module that gives its maps as a list and has feature_info, as timm's with features_only."
        ) from error
