"""The batches of groups of minibatches as CUDA graphs: gather and augmentation of all samples, launched as one operation.

Augmentations are pure functions of (seed, view, id) on the device, but some are hundreds of operations. What one gather does
(crops and flips) is launched as it is. A graph is recorded for each cut of samples into minibatches, when it comes up for the
third time: the first fills tables on the device, the second is watched for what no graph can hold.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from litdistill.data.loading import Rows
from litdistill.data.protocol import IndexedData
from litdistill.distillation.cuda_graphs import Recorder, random_states
from litdistill.types import Batch, Group

log = logging.getLogger(__name__)

SAID = "Augmented batches are launched operation by operation, not as CUDA graphs: %s."
GRAPHS = 8  # at most: all cuts of an epoch are few


class Made(NamedTuple):
    """A recorded batch: the rows that a replay reads, the batch that it writes, and how it is run."""

    rows: Rows
    batch: Batch
    replay: Callable[[], Any]


class CapturedBatches:
    """Makes the batches of `data` by graphs where that is worth it and possible; else as `data` makes them."""

    def __init__(self, data: IndexedData, recorder: Recorder):
        self.data, self.recorder = data, recorder
        self.reason: str | None = None  # why nothing is recorded any more
        self.replayed = 0  # batches
        self._wanted = worth_a_graph(data)
        self._seen: dict[tuple[int, ...], int] = {}  # by cut: how often it came up
        self._made: dict[tuple[int, ...], Made] = {}

    def make_batch(self, rows: Rows) -> Batch | Group:
        """Returns the samples of `rows`, which are on the device."""
        if not self._wanted or self.reason is not None or rows.sizes is None or rows.views is None:
            return self.data.make_batch(rows)
        if (reason := reason_for_launching(self.data, rows)) is not None:
            return self._launched(rows, reason)
        seen = self._seen[rows.sizes] = self._seen.get(rows.sizes, 0) + 1
        if rows.sizes not in self._made and (seen == 1 or len(self._made) == GRAPHS):
            return self.data.make_batch(rows)
        if seen == 2:
            return self._watched(rows)
        if rows.sizes not in self._made:
            try:
                self._made[rows.sizes] = self._record(rows)
            except RuntimeError as error:  # no memory for it, or an operation that no graph takes
                return self._launched(rows, str(error).partition("\n")[0])
        return self._replayed(rows)

    def _launched(self, rows: Rows, reason: str) -> Batch | Group:
        self.reason = reason
        self._made.clear()
        log.info(SAID, reason)
        return self.data.make_batch(rows)

    def _watched(self, rows: Rows) -> Batch | Group:
        """Makes a batch as it is launched, and finds out whether it can be recorded."""
        before = random_states(rows.ids.device)
        made, reason = self.recorder.watch(lambda: self.data.make_batch(rows))
        if reason is None and not all(map(torch.equal, before, random_states(rows.ids.device))):
            reason = "an augmentation draws from torch's generator"
        if reason is not None:
            self.reason = reason
            log.info(SAID, reason)
        return made

    def _record(self, rows: Rows) -> Made:
        assert rows.views is not None
        read = rows._replace(ids=rows.ids.clone(), views=rows.views.clone())
        made, replay = self.recorder.record(lambda: self.data.make_batch(read))
        assert isinstance(made, Group)
        return Made(read, made.batch, replay)

    def _replayed(self, rows: Rows) -> Group:
        """Returns copies of what a replay has written, since losses and statistics hold batches for longer."""
        made = self._made[rows.sizes or ()]
        assert isinstance(made.rows.views, Tensor)
        made.rows.ids.copy_(rows.ids)
        made.rows.views.copy_(rows.views)  # type: ignore[arg-type]
        made.replay()
        self.replayed += 1
        batch = Batch(made.batch.inputs.clone(), made.batch.targets.clone(), rows.ids, rows.views)
        return Group(batch, rows.sizes or (), rows.weights, rows.first, rows.logs)


def steps_of(data: IndexedData) -> list[Any]:
    """Returns the augmentations of the data, and how they are mixed."""
    mix = getattr(data, "mix", None)
    return [*getattr(data, "augment", ()), *([mix] if mix is not None else [])]


def worth_a_graph(data: IndexedData) -> bool:
    """Returns whether the data are augmented by more than one gather: with crops and flips alone a batch is six operations,
    and a graph needs five beside it."""
    return any(not hasattr(step, "axes") for step in steps_of(data))


def reason_for_launching(data: IndexedData, rows: Rows) -> str | None:
    """Returns why batches cannot be recorded, in words; None where nothing is known against it."""
    if rows.images is not None:
        return "images are decoded anew for each use"
    for part in (data, *steps_of(data)):
        if not (getattr(part, "recordable", False) or type(part).__module__.startswith("litdistill.")):
            return f"{type(part).__name__} may change with each batch in Python; if not, it says recordable = True"
    return None
