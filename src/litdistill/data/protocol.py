"""The interface of a data module whose samples have ids.

With a `LightningDataModule` that implements it, the teacher's outputs are cached and replayed exactly, and a run resumes
within an epoch. With any other data module the teacher runs in every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from litdistill.data.loading import IndexLoader, Rows
from litdistill.types import Batch, Group
from litdistill.utils.errors import UserError


class IndexedData(Protocol):
    """Data whose samples have an id and, where they are augmented, numbered views.

    An id is a sample's index in its split's files, for any training subset; "train" and "val" share their files. The inputs of
    a sample in a view are the same in every epoch, process and batch.
    """

    batch_size: int  # of a minibatch in each process
    epoch_size: int | None  # samples of an epoch; None: as many as `train_ids`
    smallest_batch: int  # samples of each process in a training step: see `IndexLoader`; a run sets it
    train_ids: Tensor  # (n,) int64: training samples
    val_ids: Tensor
    test_ids: Tensor

    @property
    def train_targets(self) -> Tensor:
        """Returns the (M, ...) targets of all samples of the training files, by id."""
        ...

    @property
    def draws_views(self) -> bool:
        """Returns whether training samples are augmented."""
        ...

    @property
    def views(self) -> int | None:
        """Returns the number of distinct views of a sample; None where every pass through the data has a new one."""
        ...

    def view_count(self, rounds: int) -> int:
        """Returns the number of views of a sample in `rounds` passes through the training set; views count from 0."""
        ...

    def identity(self, split: str) -> str:
        """Returns a hash of all that determines a split's inputs by id and view; equal in every process."""
        ...

    def get_batch(self, split: str, ids: Tensor, views: Tensor | None = None) -> Batch:
        """Returns the samples of `ids` (N,), on the device of `ids`, in `views` (N,) or without augmentation."""
        ...

    def train_loader(self, rank: int = 0, world_size: int = 1, group: int = 0, log_every: int = 0) -> IndexLoader:
        """Returns the training loader of one process, with groups of minibatches where `group` is above 0."""
        ...

    def eval_loader(self, split: str, rank: int = 0, world_size: int = 1) -> IndexLoader:
        """Returns the loader of one process for "val" or "test", in order."""
        ...

    def make_batch(self, rows: Rows) -> Batch | Group:
        """Returns the samples of `rows`, on the device of `rows.ids`."""
        ...

    def batches(self, split: str, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """Yields a split's batches in order, without augmentation or a trainer, in this process alone."""
        ...


def as_indexed(module: Any) -> IndexedData | None:
    """Returns `module` if it implements `IndexedData`, else None."""
    needed = ("get_batch", "make_batch", "train_loader", "eval_loader", "identity", "view_count", "batches")
    return module if all(callable(getattr(type(module), name, None)) for name in needed) else None


def input_dtype(data: Any) -> torch.dtype:
    """Returns the type of a network's inputs, integers of token ids or float32, as the attribute `input_dtype` says."""
    found: torch.dtype = getattr(data, "input_dtype", torch.float32)
    return found


def facts_of(data: Any) -> dict[str, Any]:
    """Returns further facts of the data that a network's function may name as parameters, such as `vocab_size`."""
    return dict(getattr(data, "facts", None) or {})


def split_ids(data: IndexedData, split: str) -> Tensor:
    """Returns the ids (n,) of "train", "val" or "test"."""
    return {"train": data.train_ids, "val": data.val_ids, "test": data.test_ids}[split]


def training_labels(data: Any) -> Literal["all", "some", "none"]:
    """Returns which of the samples that are trained on have labels, as their attribute `train_labels` says; all without it.

    Raises `UserError` for another word.
    """
    found: Literal["all", "some", "none"] = getattr(data, "train_labels", "all")
    if found not in ("all", "some", "none"):
        raise UserError(f"{type(data).__name__}.train_labels={found!r} must be all, some or none.")
    return found
