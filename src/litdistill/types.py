"""What flows: batches into networks, outputs out of them, and which features are read."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from litdistill.utils.errors import UserError


class Batch(NamedTuple):
    """One minibatch of N samples, as a task makes it of what a loader yields."""

    inputs: Any  # what the networks are called with: a tensor (N, ...), a tuple, or a dict of keyword arguments
    targets: Any  # the labels, as the task's loss takes them: (N,) int64 or (N, classes) float32 for classification
    ids: Tensor | None = None  # (N,) int64, the place of each sample in its data set, whatever subset is used of it
    views: Tensor | None = None  # (N,) int64, which augmented view of its sample each input is; None: as it is
    weight: float = 1.0  # of this process's mean among those of all processes, where their parts are unequal

    def rows(self, index: Tensor) -> Batch:
        """Some of the samples, whose inputs are one tensor; or some of the places of `at`, with the inputs whole."""
        ids, views = (None if x is None else x[index] for x in (self.ids, self.views))
        inputs = self.inputs[index] if len(self.inputs) == len(self.targets) else self.inputs
        return Batch(inputs, self.targets[index], ids, views, self.weight)

    def at(self, places: Tensor) -> Batch:
        """The targets at some places (N, T) bool of sequences or pictures, one after the other (P,), with the id and view of
        the sample of each; the inputs stay whole."""
        sample = places.nonzero()[:, 0]
        ids, views = (None if x is None else x[sample] for x in (self.ids, self.views))
        return self._replace(targets=self.targets.flatten(1)[places], ids=ids, views=views)


class Group(NamedTuple):
    """Several minibatches that one step of Lightning trains on, one after the other."""

    batch: Batch  # all of them in a row
    sizes: tuple[int, ...]  # samples of each
    weights: tuple[float, ...]  # of each: see `Batch`
    first: int  # the place of the first in its epoch
    logs: bool  # whether something is logged after the last
    # Of several trainings on this group: makes by its key what they have in common, once.
    once: Callable[[Any, Callable[[], Any]], Any] | None = None

    def minibatches(self) -> Iterator[Batch]:
        """Each of them, as views of the tensors of all."""
        start = 0
        for size, weight in zip(self.sizes, self.weights, strict=True):
            rows = slice(start, start + size)
            ids, views = (None if x is None else x[rows] for x in (self.batch.ids, self.batch.views))
            yield Batch(self.batch.inputs[rows], self.batch.targets[rows], ids, views, weight)
            start += size


def class_of(targets: Tensor) -> Tensor:
    """Returns the class of each sample, (N,), of targets (N,), or the most probable one of (N, classes)."""
    return targets if targets.ndim == 1 else targets.argmax(1)


EMBEDDING = "embedding"  # the head of a network without classes, (N, D)
# Logits at the inputs that an attack has found, (N, classes), beside those at the batch's own.
ADVERSARIAL = "adversarial"
DETECTIONS = "detections"  # of a detector, (N, K, 6): x1, y1, x2, y2 in pixels, score, class; best first


class Outputs(NamedTuple):
    """What a network gives for one minibatch of N samples."""

    heads: Mapping[str, Tensor]  # by name, each (N, ...): "logits" (N, classes) of a classifier, "embedding", ...
    features: Mapping[str, Tensor] = {}  # by tap, in the order of execution: (N, C, H, W), (N, tokens, C) or (N, C)
    ids: Tensor | None = None  # (N,) int64, as in `Batch`

    @property
    def logits(self) -> Tensor:
        """The head of that name, (N, classes). Raises `UserError` for a network without it."""
        if "logits" not in self.heads:
            raise UserError(
                f"Logits are needed here, and the network gives {' and '.join(self.heads)} alone: it has no classes, or names "
                "its logits otherwise. A student learns from such a teacher by its features: method=cosine, srd (soft=0), "
                "rkd or pkt."
            )
        return self.heads["logits"]

    @property
    def main(self) -> Tensor:
        """The head `logits`, or without classes `embedding`, else the first: what the network is trained for, (N, outputs)."""
        for name in ("logits", EMBEDDING):
            if name in self.heads:
                return self.heads[name]
        return next(iter(self.heads.values()))

    def split(self, sizes: Sequence[int]) -> list[Outputs]:
        """The outputs of each of several minibatches that were run as one."""
        at = [0, *itertools.accumulate(sizes)]
        return [self.rows(slice(a, b)) for a, b in itertools.pairwise(at)]

    def rows(self, index: slice | Tensor) -> Outputs:
        """The outputs of some of the samples; or of some of the places of `at`, with maps among the features whole."""
        count = len(self.main)
        heads = {k: v[index] for k, v in self.heads.items()}
        features = {k: v[index] if len(v) == count else v for k, v in self.features.items()}
        return Outputs(heads, features, None if self.ids is None else self.ids[index])

    def at(self, places: Tensor) -> Outputs:
        """The outputs at some places (N, T) bool of sequences or pictures, one after the other: what is (N, T, …) becomes
        (P, …), and the id of a place is its sample's. Maps (N, C, H, W) among the features stay as they are."""
        take = lambda x: x[places] if x.shape[:2] == places.shape else x  # noqa: E731
        heads = {k: take(v) for k, v in self.heads.items()}
        features = {k: v if v.ndim == 4 else take(v) for k, v in self.features.items()}
        return Outputs(heads, features, None if self.ids is None else self.ids[places.nonzero()[:, 0]])

    @classmethod
    def of(cls, logits: Tensor, features: Mapping[str, Tensor] | None = None, ids: Tensor | None = None) -> Outputs:
        """The outputs of a network with one head, its logits."""
        return cls({"logits": logits}, features or {}, ids)


class Taps(NamedTuple):
    """Which features a method reads of either network.

    A sequence of names of submodules of the network (`"layer2"`; its output) or with `:in` behind it (`"layer2.0.relu:in"`;
    its input), or one of the words that `litdistill.features.feature_extractor.resolve_taps` resolves on any network:
    `"stages"` (the end of each stage: the last map of each spatial size), `"stages:pre"` (the same before their last
    activation), `"last"` (the last of the stages), `"pooled"` (the input of the classifier, (N, C)), `"pyramid"` (the levels
    of a feature pyramid network, finest first).
    """

    student: Sequence[str] | str = ()
    teacher: Sequence[str] | str = ()


def has_label(targets: Tensor) -> Tensor:
    """Returns which of the targets (N, ...) are labels, (N,) booleans: a class of -1 is none, nor is a row with NaN."""
    known = ~targets.isnan() if targets.is_floating_point() else targets >= 0
    return known if known.ndim == 1 else known.flatten(1).all(1)
