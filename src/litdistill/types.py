"""What flows: batches into networks, outputs out of them, and which features are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """What a step gets. Ids count through the official training (or test) set, whatever subset is used of it."""

    images: Tensor  # (N, C, H, W) float, normalised
    targets: Tensor  # (N,) int64, or (N, classes) float32 where images were mixed
    ids: Tensor | None = None  # (N,) int64
    views: Tensor | None = None  # (N,) int64, which view of each image this is; None where nothing was augmented
    sizes: tuple[int, ...] | None = None  # of the minibatches that these are, one after the other; None: a single one
    skip: int = 0  # how many of them were trained on before this run went on


class Outputs(NamedTuple):
    """What a network gives for one batch of N samples."""

    logits: Tensor  # (N, classes)
    features: Mapping[str, Tensor] = {}  # by tap, in the order of execution: (N, C, H, W), (N, tokens, C) or (N, C)
    ids: Tensor | None = None  # (N,) int64, which samples of the training set these are


class Taps(NamedTuple):
    """Which features a method reads of either network.

    A sequence of names of submodules of the network (`"layer2"`; its output) or with `:in` behind it (`"layer2.0.relu:in"`;
    its input), or one of the words that `litdistill.features.feature_extractor.resolve_taps` resolves on any network:
    `"stages"` (the end of each stage: the last map of each spatial size), `"stages:pre"` (the same before their last
    activation), `"last"` (the last of the stages), `"pooled"` (the input of the classifier, (N, C)).
    """

    student: Sequence[str] | str = ()
    teacher: Sequence[str] | str = ()
