"""Transfer learning: replaces the classifier of a trained network, and freezes all but some layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from litdistill.features.feature_extractor import resolve_taps
from litdistill.utils.errors import UserError

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
ALIASES = {"head": "pooled", "last": "last"}  # part names valid for every network, and their taps


def head_of(net: nn.Module, example: Tensor) -> str:
    """Returns the name of the classifier module: `classifier_name` of a network that says it, else found by a dry forward of
    `example` (N, C, H, W)."""
    if isinstance(own := getattr(net, "classifier_name", None), str):
        return own
    return resolve_taps(net, example, "pooled")[0].partition(":")[0]


def with_own_head(net: nn.Module, state: Mapping[str, Tensor], example: Tensor) -> dict[str, Tensor]:
    """Returns `state` with the classifier's weights replaced by those of `net`."""
    head = head_of(net, example) + "."
    return {k: v for k, v in state.items() if not k.startswith(head)} | {
        k: v.clone() for k, v in net.state_dict().items() if k.startswith(head)
    }


def fix_statistics(net: nn.Module) -> int:
    """Sets batch normalization in `net` to eval mode, in place, and returns the number of its layers.

    Their running statistics stay those of the weights and are what training normalizes by; scale and bias are trained. Few
    images make poor statistics (docs/photos.md).
    """
    layers = [m for m in net.modules() if isinstance(m, NORMS) and m.track_running_stats]
    for layer in layers:
        layer.training = False
    return len(layers)


def zero_head(layer: nn.Module) -> None:
    """Sets the weights of a new classifier to zero, in place: its first gradients do not disturb what pretrained layers know.

    As in Kolesnikov et al. 2020 (Big Transfer, arXiv 1912.11370, section 3.3).
    """
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def freeze(net: nn.Module, trainable: Sequence[str], example: Tensor) -> None:
    """Freezes `net` in place except for `trainable`: module names, "head" (the classifier) or "last" (the last stage).

    Frozen modules are in eval mode: batch normalization keeps its running statistics, and dropout is off.
    Raises `UserError` for an unknown name.
    """
    modules = dict(net.named_modules())
    own = isinstance(getattr(net, "classifier_name", None), str)  # whose parts are named alone
    taps = [
        part if own and part in modules else resolve_taps(net, example, ALIASES.get(part, part))[0]
        for part in trainable
    ]
    names = [tap.partition(":")[0] for tap in taps]
    trained = {id(m) for name in names for m in modules[name].modules()}
    if not trained:
        raise UserError("student.trainable names nothing: no layer would learn. Name layers, or null for all of them.")
    for module in modules.values():
        if id(module) not in trained:
            module.training = False
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
