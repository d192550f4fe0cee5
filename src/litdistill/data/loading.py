"""What a loader yields, what a step gets, and the loader between them, which is a pure function of its position."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Ids(NamedTuple):
    """What a loader yields: which images, of which files, and for training in which views."""

    split: str  # "train" or "test": the files
    ids: Tensor  # (N,) int64
    views: Tensor | None = None  # (N,) int64; None: as they are
    sizes: tuple[int, ...] | None = None  # see Batch
    skip: int = 0
    images: Tensor | None = None  # (M, C, H, W) uint8, where they were decoded ahead: see `ImageData.needed`


class IdLoader:
    """Yields the `Ids` of one batch after the other, in the order that `rows_of_epoch(epoch)` gives.

    With `ends`, those of several batches at once, a window: `ends(position)` gives how many batches of the epoch are done
    at the end of each. Windows lie where they lie, wherever a run goes on: of the first, `skip` batches are done then.

    `position()` says where training stands, as (epoch, batches done in it): the loader itself has no state, so that a
    resumed run continues in the middle of an epoch with the very batch that came next. Of every global batch of
    `batch_size · world_size` samples each rank takes its share, so the same samples meet at any world size.
    """

    def __init__(
        self,
        rows_of_epoch: Callable[[int], Ids],
        count: int,
        batch_size: int,
        position: Callable[[], tuple[int, int]] = lambda: (0, 0),
        rank: int = 0,
        world_size: int = 1,
        pad: bool = False,
        ends: Callable[[int], Sequence[int]] | None = None,
    ):
        self.rows_of_epoch, self.count, self.position = rows_of_epoch, count, position
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.pad = pad  # every rank must make the same number of training steps; evaluation must count no sample twice
        self.ends = ends

    def __len__(self) -> int:
        return -(-self.count // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Ids]:
        epoch, done = self.position()
        split, ids, views = self.rows_of_epoch(epoch)[:3]
        chunks = [self._share(chunk) for chunk in torch.arange(self.count).split(self.batch_size * self.world_size)]
        # Gathered once, for all of the epoch: a batch is a slice then, which costs next to nothing.
        rows, sizes = torch.cat(chunks), [len(chunk) for chunk in chunks]
        at, ids = [0, *itertools.accumulate(sizes)], ids[rows]
        views = None if views is None else views[rows]
        start = 0
        for end in self.ends(done) if self.ends is not None else range(1, len(chunks) + 1):
            skip, cut, first = max(0, done - start), slice(at[start], at[end]), start
            start = end
            if skip < end - first:
                of = tuple(sizes[first:end]) if self.ends is not None else None
                yield Ids(split, ids[cut], None if views is None else views[cut], of, skip)

    def _share(self, chunk: Tensor) -> Tensor:
        """This rank's part of a global batch."""
        if self.world_size == 1:
            return chunk
        mine = chunk.tensor_split(self.world_size)[self.rank]
        if self.pad and len(mine) < 2:  # twice, which no mean sees, for BatchNorm; of no share it is to count nothing
            mine = chunk[:1].repeat(2) if len(mine) == 0 else mine.repeat(2)
        return mine

    def weight(self, batch: int) -> float:
        """What this rank's mean over its part of a global batch counts in the mean of all ranks' means."""
        whole = self.batch_size * self.world_size
        size = min(whole, self.count - batch * whole)
        mine = size // self.world_size + (self.rank < size % self.world_size)
        return mine * self.world_size / size

    def state_dict(self) -> dict[str, Any]:
        """Empty: Lightning asks for it before it believes that a loader can be resumed."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load: see `position`."""
