"""The loader of data with sample ids: its output is a function of its position, which it saves and restores.

It yields `Rows` of ids; the data module creates the inputs from them on the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """The sample ids that the loader yields, their split and, for training, their views."""

    split: str  # "train" or "test", the files that the ids refer to
    ids: Tensor  # (N,) int64
    views: Tensor | None = None  # (N,) int64; None: without augmentation
    sizes: tuple[int, ...] | None = None  # of the consecutive minibatches in a group; None: a single minibatch
    weights: tuple[float, ...] = (1.0,)  # of each minibatch: see `Batch.weight`
    first: int = 0  # the index of the first minibatch in its epoch
    logs: bool = False  # whether metrics are logged after the last minibatch of the group
    images: Tensor | None = None  # (M, C, H, W) uint8, if decoded in advance


class IndexLoader:
    """Yields the `Rows` of single minibatches or of groups of them, in the order of `rows_of_epoch(epoch)`.

    Each process takes its part of every global batch of `batch_size · world_size` samples, so a global batch holds the same
    samples for any number of processes. The position is the loader's state, which Lightning saves in checkpoints: a run
    resumes within an epoch at the next minibatch. Lightning calls `sampler.set_epoch`.

    Args:
        rows_of_epoch: returns all samples of an epoch in order.
        count: samples of an epoch. batch_size: samples of a minibatch in each process.
        pad: gives every process at least two samples of each minibatch: all processes must make the same number of training
            steps, and BatchNorm needs two samples. Off for evaluation, which must count no sample twice.
        group: minibatches per group; 0: single minibatches. log_every: a group also ends at every multiple of this number of
            minibatches and at the end of the epoch; 0: nothing is logged. All epochs have the same groups.
        smallest: 2 leaves the last minibatch out of an epoch where it has fewer than two samples for some process.
        places: (M,) of each sample by its id, how many predictions it has, such as the tokens of a sequence; None: one each.
            The means of all processes are weighted by them.
        fetch: maps an iterator of `Rows` to one of the same `Rows` with prefetched images.
    """

    def __init__(
        self,
        rows_of_epoch: Callable[[int], Rows],
        count: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        pad: bool = False,
        group: int = 0,
        log_every: int = 0,
        smallest: int = 1,
        fetch: Callable[[Iterable[Rows]], Iterator[Rows]] | None = None,
        places: Tensor | None = None,
    ):
        self.rows_of_epoch, self.batch_size = rows_of_epoch, batch_size
        self.count = count = trained_samples(count, batch_size, world_size, smallest)
        self.rank, self.world_size, self.pad = rank, world_size, pad
        self.group, self.fetch, self.places = group, fetch, places
        self.minibatches = -(-count // (batch_size * world_size))
        self.log_every = min(log_every, self.minibatches)
        self.ends = group_ends(self.minibatches, group or 1, self.log_every)
        self.epoch = self.done = 0  # minibatches of the epoch that were yielded
        self.restored: dict[str, int] | None = None

    @property
    def sampler(self) -> IndexLoader:
        """Returns the loader itself, since Lightning calls `set_epoch` of a loader's sampler."""
        return self

    batch_sampler = None  # Lightning reads it beside `sampler`, to see whether an evaluation is shuffled

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch; Lightning calls it before the iteration."""
        if epoch != self.epoch:
            self.epoch, self.done = epoch, 0

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[Rows]:
        # Lightning creates the iterator before it sets the epoch: a generator reads the epoch at the first batch.
        done = 0
        if self.restored is not None and self.restored["epoch"] == self.epoch:
            done = self.restored["done"]
        self.restored = None
        rows = self._rows(self.epoch, done)
        for group in self.fetch(rows) if self.fetch is not None else rows:
            self.done = group.first + len(group.weights)
            yield group

    def _rows(self, epoch: int, done: int) -> Iterator[Rows]:
        split, ids, views = self.rows_of_epoch(epoch)[:3]
        chunks = [self._share(chunk) for chunk in torch.arange(self.count).split(self.batch_size * self.world_size)]
        # Gathered once for the whole epoch, so that a batch is a cheap slice.
        order, sizes = torch.cat(chunks), [len(chunk) for chunk in chunks]
        places = None if self.places is None else self.places[ids]
        at, ids = [0, *itertools.accumulate(sizes)], ids[order]
        views = None if views is None else views[order]
        for first, end in itertools.pairwise([0, *self.ends]):
            if end <= done:
                continue
            first = max(first, done)
            cut = slice(at[first], at[end])
            parts = tuple(sizes[first:end]) if self.group else None
            logs = self.log_every > 0 and (end % self.log_every == 0 or end == self.minibatches)
            weights = tuple(self.weight(batch, places) for batch in range(first, end))
            yield Rows(split, ids[cut], None if views is None else views[cut], parts, weights, first, logs)

    def _share(self, chunk: Tensor) -> Tensor:
        """Returns this process's part of a global batch."""
        if self.world_size == 1:
            return chunk
        mine = chunk.tensor_split(self.world_size)[self.rank]
        if self.pad and len(mine) < 2:  # a repeated sample leaves the mean as it is; an empty part has weight 0
            mine = chunk[:1].repeat(2) if len(mine) == 0 else mine.repeat(2)
        return mine

    def weight(self, batch: int, places: Tensor | None = None) -> float:
        """Returns the weight of this process's mean over its part in the mean over processes: 1 for equal parts.

        `places`: of each sample of the epoch in order; None: one each.
        """
        whole = self.batch_size * self.world_size
        size = min(whole, self.count - batch * whole)
        mine = size // self.world_size + (self.rank < size % self.world_size)
        if places is not None and self.world_size > 1:
            all_of_it = places[batch * whole : batch * whole + size]
            return (
                float(all_of_it.tensor_split(self.world_size)[self.rank].sum())
                * self.world_size
                / float(all_of_it.sum())
            )
        return mine * self.world_size / size

    def state_dict(self) -> dict[str, Any]:
        """Returns the position: the epoch, and the number of its minibatches already yielded."""
        return self.restored or {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the position for the next iteration, if that is in the same epoch."""
        self.restored = {"epoch": int(state["epoch"]), "done": int(state["done"])}


def trained_samples(count: int, batch_size: int, world_size: int, smallest: int) -> int:
    """Returns how many of an epoch's `count` samples are trained on: without a last minibatch that has fewer than `smallest`
    samples for some process, where `smallest` is above 1."""
    last = count % (batch_size * world_size)
    return count - last if smallest > 1 and last < smallest * world_size else count


def group_ends(count: int, group: int, log_every: int) -> list[int]:
    """Returns the cumulative number of minibatches at the end of each group of at most `group` minibatches.

    A group also ends at every multiple of `log_every`, and at the end of the epoch (`count`).
    """
    ends, start = [], 0
    for end in range(1, count + 1):
        if end - start == group or end == count or (log_every and end % log_every == 0):
            ends.append(end)
            start = end
    return ends
