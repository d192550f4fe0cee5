"""Networks for masks: a slim one of few layers, and those of torchvision by name. Each gives logits (N, classes, H, W)."""

from __future__ import annotations

import difflib
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision.models.segmentation as zoo
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, list_models

from litdistill.models.adaptations import adapted, head_change
from litdistill.models.finetune import zero_head
from litdistill.models.parts import evaluating, he_init, keep_inputs, require_size, tensors_only
from litdistill.models.preprocess import Preprocess, Preprocessed, network_modules, network_submodule, transparent_state
from litdistill.models.torchvision import fit_stem
from litdistill.utils.checkpoint import load_state_dict_checked, load_weights, names_file
from litdistill.utils.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which all of torchvision's weights expect
HEADS = (
    "classifier.4",
    "classifier.low_classifier",
    "classifier.high_classifier",
)  # last layers of torchvision's networks


class FCN(nn.Module):
    """See `fcn_slim`."""

    def __init__(self, num_classes: int, channels: int, widths: Sequence[int], depth: int, pyramid: int):
        super().__init__()
        self.names = [f"layer{i}" for i in range(1, len(widths) + 1)]
        for name, width in zip(self.names, widths, strict=True):
            blocks = [_block(channels if i == 0 else width, width, stride=2 if i == 0 else 1) for i in range(depth)]
            self.add_module(name, nn.Sequential(*blocks))
            channels = width
        self.laterals = nn.ModuleList(nn.Conv2d(width, pyramid, 1) for width in widths)
        self.fuse = _block(pyramid, pyramid)
        self.classifier = nn.Conv2d(pyramid, num_classes, 1)
        he_init(self)

    def forward(self, images: Tensor) -> Tensor:
        maps, x = [], images
        for name in self.names:
            maps.append(x := self.get_submodule(name)(x))
        top = self.laterals[-1](maps[-1])
        for lateral, given in zip(reversed(self.laterals[:-1]), reversed(maps[:-1]), strict=True):
            top = lateral(given) + F.interpolate(top, given.shape[2:], mode="bilinear", align_corners=False)
        logits = self.classifier(self.fuse(top))
        return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)


def _block(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())


def fcn_slim(
    num_classes: int,
    input_shape: Sequence[int],
    widths: Sequence[int] = (16, 32, 64, 64),
    depth: int = 1,
    pyramid: int = 32,
) -> nn.Module:
    """A fully convolutional network (Long et al. 2015, arXiv 1411.4038) with a top-down path as of Kirillov et al. 2019 (arXiv
    1901.02446, figure 1): stages of `depth` 3x3 convolutions, of which the first halves height and width.

    1x1 convolutions bring the end of each stage to `pyramid` channels; from the last to the first they are enlarged (bilinear)
    and summed, followed by a 3x3 convolution and the `classifier`, a 1x1 convolution at half the size of the picture. Its
    logits are enlarged to the picture. `widths`: channels of each stage `layer1`, `layer2`, …
    """
    if not widths or min(*widths, depth, pyramid, 1) < 1:
        raise UserError(
            "fcn_slim needs channels of one stage at least, a depth and channels of its pyramid: widths=[16,32,64,64]."
        )
    require_size("fcn_slim", input_shape, 2 ** len(widths))
    return FCN(num_classes, input_shape[0], widths, depth, pyramid)


class Maps(nn.Module):
    """A network of torchvision that gives its map `out`, (N, classes, H, W), alone. Names and keys are those of the network."""

    named_modules, get_submodule = network_modules, network_submodule

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        transparent_state(self)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.net(images)["out"]
        return found


def torchvision_segmenter(
    num_classes: int,
    input_shape: Sequence[int],
    name: str = "lraspp_mobilenet_v3_large",
    weights: str | None = None,
    size: int | Sequence[int] | None = None,
    fetch: bool = True,
) -> nn.Module:
    """Returns the segmentation network `name` of torchvision: DeepLabV3, FCN or LR-ASPP.

    `weights`: None; the name of published weights ("DEFAULT"), which are downloaded once; or the path of a file of weights
    under torchvision's keys (.pth, .safetensors), as those that torchvision publishes. They come with ImageNet's mean and std.
    A head for other numbers of classes begins at zero, and a line says so. Auxiliary heads are left out.
    `size`: the side, or height and width, to which pictures are resized for published weights; None: they keep their size.
    `fetch`: False leaves out the loading of `weights`, for a caller that loads others of the same structure.

    Raises `UserError` for an unknown name, for weights that cannot be had or do not fit, and for pictures that do not.
    """
    known = list_models(module=zoo)
    if name not in known:
        close = difflib.get_close_matches(name, known, 3) or known
        raise UserError(f"torchvision has no segmentation network {name!r}. Did you mean {', '.join(close)}?")
    from_disk = bool(weights) and fetch and torch.get_default_device().type != "meta"
    state = published_state(name, str(weights)) if from_disk else {}
    trained = next((len(v) for k, v in state.items() if k.removesuffix(".weight") in HEADS), num_classes)
    net = keep_inputs(get_model(name, weights=None, weights_backbone=None, num_classes=trained))
    if state:
        load_state_dict_checked(net, state, str(weights), "network")
    changes = fit_stem(net, name, input_shape[0], small=False, required=False, keep=bool(state))
    changes += _fit_heads(net, trained, num_classes)
    maps = Maps(net)
    check_maps(net, num_classes, input_shape, name)
    if not weights:
        return adapted(maps, name, changes)
    adapted(maps, name, [*changes, "ImageNet's mean and std"] if input_shape[0] == 3 else changes, Path(weights).name)
    return Preprocessed(maps, Preprocess(MEAN, STD, size)) if input_shape[0] in (1, 3) else maps


def _fit_heads(net: nn.Module, trained: int, num_classes: int) -> list[str]:
    """Replaces the last layers, in place, where the classes are others in number; returns the change in words."""
    if trained != num_classes:
        for at, old in [(k, m) for k, m in net.named_modules() if k in HEADS and isinstance(m, nn.Conv2d)]:
            net.set_submodule(at, nn.Conv2d(old.in_channels, num_classes, 1))
            zero_head(net.get_submodule(at))
    return head_change(trained, num_classes)


def published_state(name: str, weights: str) -> dict[str, Tensor]:
    """Returns weights of a network of torchvision without auxiliary heads, of a file, or published ones by their name.

    Files are read as tensors only. Raises `UserError` for a name that is not published, and for weights that cannot be had.
    """
    if names_file(weights):
        state = load_weights(weights)
    else:
        offered: Any = get_model_weights(name)
        if weights not in offered.__members__:
            raise UserError(
                f"weights={weights}: {name} offers {', '.join(offered.__members__)}; or name a file of weights (.pth, "
                ".safetensors), or null for none."
            )
        entry = offered[weights]
        try:
            with tensors_only():
                state = entry.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            file = f"{torch.hub.get_dir()}/checkpoints/{entry.url.rsplit('/', 1)[-1]}"
            raise UserError(
                f"The weights {entry.name} of {name} could not be had from {entry.url} ({error}): is there a network? Put that "
                f"file into {file}, name a file of your own, or use weights=null."
            ) from error
    return {k: v for k, v in state.items() if not k.startswith("aux_classifier.")}


def check_maps(net: nn.Module, num_classes: int, input_shape: Sequence[int], name: str) -> None:
    """Raises `UserError` unless a forward on the meta device gives a map `out` of logits (1, classes, h, w)."""
    state = {k: torch.empty_like(v, device="meta") for k, v in (*net.state_dict().items(), *net.named_buffers())}
    given = "x".join(map(str, input_shape))
    try:
        with evaluating(net):
            logits = torch.func.functional_call(net, state, (torch.empty(1, *input_shape, device="meta"),))["out"]
    except Exception as error:  # networks raise many kinds of errors for unsupported sizes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name} cannot take pictures of {given} ({reason}): resize them.") from error
    if logits.ndim != 4 or logits.shape[1] != num_classes:
        raise UserError(
            f"{name} gives {tuple(logits.shape)} for one picture of {given}, and not a map of {num_classes} classes."
        )
