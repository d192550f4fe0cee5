"""Backbones: networks without classes, which give one vector a sample.

    backbone = cut(resnet50(weights="DEFAULT"), images)      # its classifier is left out
    backbone(images)["embedding"]                            # (N, 2048)

`teacher.head=cut` does it to any network of a config. A network that returns `{"embedding": …}` itself is one already.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from litdistill.features.outputs import run_network
from litdistill.models.finetune import head_of
from litdistill.models.parts import evaluating
from litdistill.models.preprocess import network_modules, network_submodule, transparent_state
from litdistill.types import EMBEDDING
from litdistill.utils.errors import UserError


class Backbone(nn.Module):
    """Returns `{"embedding": net(inputs)}`: says of a network's output that it is no logits.

    Names of parameters and submodules and keys of the state dict are those of `net`.
    """

    named_modules, get_submodule = network_modules, network_submodule

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        transparent_state(self)

    def forward(self, *inputs: Any, **named: Any) -> dict[str, Tensor]:
        return {EMBEDDING: self.net(*inputs, **named)}

    def plain(self) -> nn.Module:
        """Returns the network alone for torch.export, which follows names to modules."""
        return self.net


def cut(net: nn.Module, example: Any) -> nn.Module:
    """Returns `net` without its classifier, in whose place stands an `nn.Identity`; `net` itself where it has none.

    `example`: inputs of a few samples, as the network takes them. Raises `UserError` where the network has no classifier, or
    does not give one vector (N, D) without it.
    """
    with evaluating(net):
        if EMBEDDING in run_network(net, example).heads:
            return net
    head = head_of(net, example)
    net.set_submodule(head, nn.Identity())
    found = Backbone(net)
    try:
        with evaluating(net):
            given = found(example)[EMBEDDING]
    except Exception as error:  # networks raise many kinds of errors
        raise UserError(
            f"This network does not work without its classifier {head!r}: name another backbone."
        ) from error
    if given.ndim != 2 or given.shape[1] < 2:
        raise UserError(
            f"Without its classifier {head!r} this network gives {tuple(given.shape)}, and a backbone gives one vector a "
            "sample, (N, D): name another."
        )
    return found
