"""What a data module that knows its samples by id offers, and what its knowing them makes possible.

A teacher's outputs are kept and replayed exactly, and a run goes on in the middle of an epoch, for any `LightningDataModule`
that has all of these. Any other trains with a live teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from litdistill.data.loading import IndexLoader, Rows
from litdistill.types import Batch, Group


class IndexedData(Protocol):
    """Data whose samples have an id and, where they are augmented, numbered views.

    An id is a sample's place in its split's files, whatever subset is trained on; "train" and "val" share their files. The
    inputs of a sample in a view are the same whenever, wherever and in whatever batch they are asked for.
    """

    batch_size: int  # of a minibatch in each process
    epoch_size: int | None  # samples of an epoch; None: as many as `train_ids`
    train_ids: Tensor  # (n,) int64: what is trained on
    val_ids: Tensor
    test_ids: Tensor

    @property
    def train_targets(self) -> Tensor:
        """(M, ...) the target of every sample of the training files, by id."""
        ...

    @property
    def draws_views(self) -> bool:
        """Whether training sees anything but the samples as they are."""
        ...

    @property
    def views(self) -> int | None:
        """How many distinct views there are of a sample; None where they are numbered by the round, without an end."""
        ...

    def view_count(self, rounds: int) -> int:
        """How many views of a sample can be seen in so many passes through the training set: they are numbered from 0."""
        ...

    def identity(self, split: str) -> str:
        """A hash of all that decides the inputs of "train", "val" or "test" by id and view; equal in every process."""
        ...

    def get_batch(self, split: str, ids: Tensor, views: Tensor | None = None) -> Batch:
        """The samples of these ids (N,) on the device of `ids`, in these views (N,) or as they are."""
        ...

    def train_loader(self, rank: int = 0, world_size: int = 1, group: int = 0, log_every: int = 0) -> IndexLoader:
        """The training loader of one process, in groups of minibatches where `group` is above 0."""
        ...

    def eval_loader(self, split: str, rank: int = 0, world_size: int = 1) -> IndexLoader:
        """The loader of one process over "val" or "test", in order."""
        ...

    def make_batch(self, rows: Rows) -> Batch | Group:
        """What its loaders' rows stand for, on their device."""
        ...

    def batches(self, split: str, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """All of a split in order, as it is, without a trainer and on this process alone."""
        ...


def as_indexed(module: Any) -> IndexedData | None:
    """A data module that has all of these, after its setup; None for any other object."""
    needed = ("get_batch", "make_batch", "train_loader", "eval_loader", "identity", "view_count", "batches")
    return module if all(callable(getattr(type(module), name, None)) for name in needed) else None


def split_ids(data: IndexedData, split: str) -> Tensor:
    """The ids (n,) of "train", "val" or "test"."""
    return {"train": data.train_ids, "val": data.val_ids, "test": data.test_ids}[split]
