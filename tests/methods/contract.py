"""What a test gives a method: batches, and features of networks by the method's taps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from litdistill.features.feature_extractor import FeatureExtractor, resolve_taps
from litdistill.types import Batch, Outputs


def batch(targets: Tensor, ids: Tensor | None = None) -> Batch:
    return Batch(None, targets, ids)


class Reader:
    """Calls a network of one head, its logits, and gives its outputs with the features of `taps`."""

    def __init__(self, net: nn.Module, example: Tensor, taps: Sequence[str] | str):
        self.net = net
        self.extractor = FeatureExtractor(net, resolve_taps(net, example, taps))

    def __call__(self, x: Tensor) -> Outputs:
        return self.extractor(x)

    def remove(self) -> None:
        self.extractor.remove()
