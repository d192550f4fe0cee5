"""Transfer learning: a trained network with a new classifier, of which only some layers are trained any further."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from litdistill.features.feature_extractor import resolve_taps
from litdistill.utils.errors import UserError

ALIASES = {"head": "pooled", "last": "last"}  # what a part may be called on any network, and the tap that ends it


def head_of(net: nn.Module, example: Tensor) -> str:
    """The name of the classifier, told from a dry forward of `example` (N, C, H, W)."""
    return resolve_taps(net, example, "pooled")[0].partition(":")[0]


def with_own_head(net: nn.Module, state: Mapping[str, Tensor], example: Tensor) -> dict[str, Tensor]:
    """A state dict in which the classifier's weights are those that `net` was built with."""
    head = head_of(net, example) + "."
    return {k: v for k, v in state.items() if not k.startswith(head)} | {
        k: v.clone() for k, v in net.state_dict().items() if k.startswith(head)
    }


def freeze(net: nn.Module, trainable: Sequence[str], example: Tensor) -> None:
    """Freezes all of `net`, in place, but for the parts named: modules, "head" (the classifier), "last" (the last stage).

    A frozen part is in eval mode: batch normalisation normalises as it did and its averages stand, dropout drops nothing.
    Raises `UserError` for an unknown name.
    """
    modules = dict(net.named_modules())
    taps = [resolve_taps(net, example, ALIASES.get(part, part))[0] for part in trainable]
    names = [tap.partition(":")[0] for tap in taps]
    trained = {id(m) for name in names for m in modules[name].modules()}
    if not trained:
        raise UserError("student.trainable names nothing: no layer would learn. Name layers, or null for all of them.")
    for module in modules.values():
        if id(module) not in trained:
            module.training = False
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
