"""`ArrayData`: features in memory with targets of any kind, for tasks that are not about images.

    python scripts/train.py data=diabetes task=regression net@student=mlp net@teacher=mlp
    python scripts/train.py data=multilabel task=multilabel net@student=mlp net@teacher=mlp

Inputs are (N, F) float32, as they are read, in every epoch: a teacher's outputs are known after one of them. Networks
standardize them by `mean` and `std` (`litdistill.models.preprocess`): an exported file takes them as they are read, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from lightning import LightningDataModule
from sklearn.datasets import load_diabetes, make_multilabel_classification
from torch import Tensor

from litdistill.data import augment as aug
from litdistill.data.loading import IndexLoader, Rows
from litdistill.data.protocol import split_ids
from litdistill.types import Batch, Group
from litdistill.utils.errors import UserError
from litdistill.utils.hashing import weights_sha256

TEST_SHARE = 0.2
TEST_SEED, VAL_SEED = -2, -1  # of who is tested and validated on, whatever the run's seed


class Arrays(NamedTuple):
    """A data set in memory."""

    inputs: Tensor  # (N, F) float32
    targets: Tensor  # (N, outputs) float32
    names: tuple[str, ...]  # of the outputs: values or labels


def diabetes() -> Arrays:
    """scikit-learn's 442 patients: ten measurements, and the progression of the disease a year later, 25 to 346.

    Efron et al. 2004 (arXiv math/0406456). Targets are as published; a task of regression standardizes them itself.
    """
    found = load_diabetes(scaled=False)
    return Arrays(_float(found.data), _float(found.target)[:, None], ("disease progression",))


def multilabel() -> Arrays:
    """2,000 drawn samples of 40 features (counts of words) with any number of 10 labels; the same on every machine.

    `sklearn.datasets.make_multilabel_classification` with `random_state=0`.
    """
    inputs, targets = make_multilabel_classification(
        n_samples=2000, n_features=40, n_classes=10, n_labels=3, length=60, random_state=0
    )
    return Arrays(_float(inputs), _float(targets), tuple(f"label {i}" for i in range(10)))


def _float(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


READERS: dict[str, Callable[[], Arrays]] = {"diabetes": diabetes, "multilabel": multilabel}


class ArrayData(LightningDataModule):
    """One of `READERS`, split at random into training, validation and test set; an `IndexedData`.

    Args:
        name: diabetes or multilabel.
        val_size: how much is held out of the training set, a fraction below 1 or a count; the same samples for every `seed`.
        fraction: train on that share of the rest.
        subset_seed: which samples these are; the run's seed unless given.
        epoch_size: samples of an epoch; all that is trained on, once, where null.
        batch_size: samples of a training step on each device. eval_batch_size: likewise without gradients.
        seed: of the order.
        mean, std: of each feature, by which networks standardize; measured over all that is not held out unless given.
    """

    name: str

    def __init__(
        self,
        name: str,
        val_size: float = 0.1,
        fraction: float | None = None,
        subset_seed: int | None = None,
        epoch_size: int | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 512,
        seed: int = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        super().__init__()
        if name not in READERS:
            raise UserError(f"name={name} is unknown. Choose one of {', '.join(READERS)}.")
        if fraction is not None and not 0 < fraction <= 1:
            raise UserError(f"fraction={fraction} must be above 0 and at most 1.")
        if min(batch_size, eval_batch_size, epoch_size or 1) < 1:
            raise UserError("batch_size, eval_batch_size and epoch_size must be at least 1.")
        self.name, self.val_size, self.fraction = name, val_size, fraction
        self.subset_seed = seed if subset_seed is None else subset_seed
        self.epoch_size, self.batch_size, self.eval_batch_size = epoch_size, batch_size, eval_batch_size
        self.seed, self.mean, self.std = seed, mean, std

    # -- the facts ---------------------------------------------------------------------------------------------------

    @cached_property
    def arrays(self) -> dict[str, Arrays]:
        """By split: "train", which the validation set is of, and "test". An id is a place in either."""
        inputs, targets, names = READERS[self.name]()
        ids = aug.order(TEST_SEED, 0, torch.arange(len(inputs)))
        tested = round(TEST_SHARE * len(ids))
        both = {"test": ids[:tested].sort().values, "train": ids[tested:].sort().values}
        return {split: Arrays(inputs[rows], targets[rows], names) for split, rows in both.items()}

    def setup(self, stage: str | None = None) -> None:
        """Reads the data; the same whatever the stage."""
        inputs = self.arrays["train"].inputs
        ids = aug.order(VAL_SEED, 0, torch.arange(len(inputs)))
        held = round(self.val_size * len(ids)) if self.val_size < 1 else int(self.val_size)
        if not 0 < held < len(ids):
            raise UserError(
                f"val_size={self.val_size} of {len(ids)} samples leaves {len(ids) - held} to train on and {held} to "
                "validate on. Choose another size, such as 0.1."
            )
        self.val_ids, rest = ids[:held].sort().values, ids[held:].sort().values
        self.test_ids = torch.arange(len(self.arrays["test"].inputs))
        count = max(1, round(len(rest) * (1 if self.fraction is None else self.fraction)))
        self.train_ids = aug.order(self.subset_seed, 0, rest)[:count].sort().values
        if self.mean is None or self.std is None:
            inputs = inputs[rest].double()
            deviation = inputs.std(0, correction=0)
            self.mean, self.std = inputs.mean(0).tolist(), torch.where(deviation > 0, deviation, 1.0).tolist()

    @property
    def task(self) -> str:
        """The task that these data are for."""
        return {"diabetes": "regression", "multilabel": "multilabel"}[self.name]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the outputs."""
        return self.arrays["train"].names

    @property
    def num_classes(self) -> int:
        """How many outputs a network has."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(F,)."""
        return tuple(self.arrays["train"].inputs.shape[1:])

    @property
    def train_targets(self) -> Tensor:
        """(M, outputs) the targets of all that is not tested, by id."""
        return self.arrays["train"].targets

    # -- IndexedData -------------------------------------------------------------------------------------------------

    @property
    def draws_views(self) -> bool:
        """Nothing is augmented."""
        return False

    @property
    def views(self) -> int:
        """Each sample as it is."""
        return 1

    def count(self, split: str) -> int:
        """Samples of "train", "val" or "test"."""
        return len(split_ids(self, split))

    def view_count(self, rounds: int) -> int:
        """See `litdistill.data.protocol.IndexedData`."""
        return 1

    def identity(self, split: str) -> str:
        """See `litdistill.data.protocol.IndexedData`."""
        inputs, targets, names = self.arrays["test" if split == "test" else "train"]
        found = weights_sha256({"inputs": inputs, "targets": targets})
        return hashlib.sha256(repr((found, names)).encode()).hexdigest()

    def get_batch(self, split: str, ids: Tensor, views: Tensor | None = None) -> Batch:
        """The samples of these ids (N,), on their device."""
        arrays, rows = self.arrays["test" if split == "test" else "train"], ids.cpu()
        return Batch(arrays.inputs[rows].to(ids.device), arrays.targets[rows].to(ids.device), ids)

    def batches(self, split: str, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """All of a split in order, without a trainer and on this process alone."""
        self.setup()
        for ids in split_ids(self, split).split(self.eval_batch_size):
            yield self.get_batch(split, ids.to(device))

    # -- the loaders -------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> IndexLoader:
        return self.train_loader(*self._world())

    def train_loader(self, rank: int = 0, world_size: int = 1, group: int = 0, log_every: int = 0) -> IndexLoader:
        """The loader of one process; `group`, `log_every`: see `IndexLoader`."""
        count = self.epoch_size or len(self.train_ids)
        return IndexLoader(self._epoch, count, self.batch_size, rank, world_size, True, group, log_every)

    def _epoch(self, epoch: int) -> Rows:
        return Rows("train", aug.epoch_order(self.seed, epoch, self.train_ids, self.epoch_size)[0])

    def val_dataloader(self) -> IndexLoader:
        return self.eval_loader("val", *self._world())

    def test_dataloader(self) -> IndexLoader:
        return self.eval_loader("test", *self._world())

    def eval_loader(self, split: str, rank: int = 0, world_size: int = 1) -> IndexLoader:
        """The loader of one process over "val" or "test", in order; each sample is in one process."""
        rows = Rows(split, split_ids(self, split))
        return IndexLoader(lambda _: rows, len(rows.ids), self.eval_batch_size, rank, world_size)

    def _world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def on_after_batch_transfer(self, batch: Rows, dataloader_idx: int) -> Batch | Group:
        """Lightning's hook: ids that lie on the device become the batch."""
        return self.make_batch(batch)

    def make_batch(self, rows: Rows) -> Batch | Group:
        """The samples of these ids: a batch, or a group of several."""
        batch = self.get_batch(rows.split, rows.ids)
        if rows.sizes is None:
            return batch._replace(weight=rows.weights[0])
        return Group(batch, rows.sizes, rows.weights, rows.first, rows.logs)
