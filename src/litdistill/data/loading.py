"""The loader of data that know their samples by id: a pure function of its position, which it keeps and restores.

It yields `Rows`, which are ids; the data module makes inputs of them where they are needed, on the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """What the loader yields: which samples, of which split, and for training in which views."""

    split: str  # "train" or "test": the files
    ids: Tensor  # (N,) int64
    views: Tensor | None = None  # (N,) int64; None: as they are
    sizes: tuple[int, ...] | None = None  # of the minibatches that these are, one after the other; None: a single one
    weights: tuple[float, ...] = (1.0,)  # of each minibatch: see `Batch.weight`
    first: int = 0  # the place of the first minibatch in its epoch
    logs: bool = False  # whether something is logged after the last of several
    images: Tensor | None = None  # (M, C, H, W) uint8, where they were decoded ahead


class IndexLoader:
    """Yields the `Rows` of one minibatch after the other, or of several at once, in the order of `rows_of_epoch(epoch)`.

    Of every global batch of `batch_size · world_size` samples each process takes its share, so the same samples meet at
    any number of processes. Where the loader stands is its state, which Lightning keeps in checkpoints: a run goes on in
    the middle of an epoch with the very minibatch that came next. Lightning tells `sampler` which epoch it is.

    Args:
        rows_of_epoch: gives all samples of an epoch in order.
        count: samples of an epoch. batch_size: of a minibatch, in each process.
        pad: every process gets at least two samples of each minibatch: all must make equally many training steps, and
            BatchNorm needs two; evaluation must count no sample twice.
        group: how many minibatches are yielded at once, as a group; 0: one by one. log_every: a group also ends after so many
            minibatches of an epoch, and at its end; 0: nothing is logged. All epochs have the same groups.
        fetch: turns an iterator of `Rows` into one of the same `Rows` with what was read ahead.
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
        fetch: Callable[[Iterable[Rows]], Iterator[Rows]] | None = None,
    ):
        self.rows_of_epoch, self.count, self.batch_size = rows_of_epoch, count, batch_size
        self.rank, self.world_size, self.pad = rank, world_size, pad
        self.group, self.fetch = group, fetch
        self.minibatches = -(-count // (batch_size * world_size))
        self.log_every = min(log_every, self.minibatches)
        self.ends = group_ends(self.minibatches, group or 1, self.log_every)
        self.epoch = self.done = 0  # minibatches of the epoch that were yielded
        self.restored: dict[str, int] | None = None

    batch_sampler = None  # which Lightning looks for where there is a sampler

    @property
    def sampler(self) -> IndexLoader:
        """Itself, as Lightning calls `set_epoch` of a loader's sampler."""
        return self

    batch_sampler = None  # Lightning reads it beside `sampler`, to see whether an evaluation is shuffled

    def set_epoch(self, epoch: int) -> None:
        """Called before an epoch is iterated over."""
        if epoch != self.epoch:
            self.epoch, self.done = epoch, 0

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[Rows]:
        # Lightning makes an iterator before it tells the epoch: a generator asks when the first batch is drawn.
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
        # Gathered once, for all of the epoch: a batch is a slice then, which costs next to nothing.
        order, sizes = torch.cat(chunks), [len(chunk) for chunk in chunks]
        at, ids = [0, *itertools.accumulate(sizes)], ids[order]
        views = None if views is None else views[order]
        for first, end in itertools.pairwise([0, *self.ends]):
            if end <= done:
                continue
            first = max(first, done)
            cut = slice(at[first], at[end])
            parts = tuple(sizes[first:end]) if self.group else None
            logs = self.log_every > 0 and (end % self.log_every == 0 or end == self.minibatches)
            weights = tuple(self.weight(batch) for batch in range(first, end))
            yield Rows(split, ids[cut], None if views is None else views[cut], parts, weights, first, logs)

    def _share(self, chunk: Tensor) -> Tensor:
        """This process's part of a global batch."""
        if self.world_size == 1:
            return chunk
        mine = chunk.tensor_split(self.world_size)[self.rank]
        if self.pad and len(mine) < 2:  # twice, which no mean sees; of no share it is to count nothing
            mine = chunk[:1].repeat(2) if len(mine) == 0 else mine.repeat(2)
        return mine

    def weight(self, batch: int) -> float:
        """What this process's mean over its part of a global batch counts in the mean of all processes' means."""
        whole = self.batch_size * self.world_size
        size = min(whole, self.count - batch * whole)
        mine = size // self.world_size + (self.rank < size % self.world_size)
        return mine * self.world_size / size

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: the epoch, and how many of its minibatches were yielded."""
        return self.restored or {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on there when it is next iterated over, if that is in the same epoch."""
        self.restored = {"epoch": int(state["epoch"]), "done": int(state["done"])}


def group_ends(count: int, group: int, log_every: int) -> list[int]:
    """How many of an epoch's `count` minibatches are done at the end of each group of at most `group`.

    A group ends wherever something is logged, too, and with the epoch.
    """
    ends, start = [], 0
    for end in range(1, count + 1):
        if end - start == group or end == count or (log_every and end % log_every == 0):
            ends.append(end)
            start = end
    return ends
