"""`ArrayData`: features in memory with targets of any kind, for tasks that are not about images.

    python scripts/train.py data=diabetes task=regression net@student=mlp net@teacher=mlp
    python scripts/train.py data=multilabel task=multilabel net@student=mlp net@teacher=mlp

Inputs are (N, F) float32 and the same in every epoch, so the teacher runs in one epoch only. Networks standardize them by
`mean` and `std` (`litdistill.models.preprocess`), so an exported file takes raw features, too.
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
TEST_SEED, VAL_SEED = -2, -1  # of the test and validation splits, independent of the run's seed


class Arrays(NamedTuple):
    """A data set in memory."""

    inputs: Tensor  # (N, F) float32
    targets: Tensor  # (N, outputs) float32
    names: tuple[str, ...]  # of the outputs (values or labels)


def diabetes() -> Arrays:
    """Returns scikit-learn's 442 patients: ten measurements, and the disease progression a year later, 25 to 346.

    Efron et al. 2004 (arXiv math/0406456). Targets are as published; the regression task standardizes them.
    """
    found = load_diabetes(scaled=False)
    return Arrays(_float(found.data), _float(found.target)[:, None], ("disease progression",))


def multilabel() -> Arrays:
    """Returns 2,000 synthetic samples of 40 word counts with any number of 10 labels; the same on every machine.

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
        val_size: validation samples, a fraction (below 1) or a number of the training set; the same for every `seed`.
        fraction: the fraction of the other samples to train on.
        subset_seed: the seed that selects this fraction; the run's seed unless given.
        epoch_size: samples of an epoch; null: every training sample once.
        batch_size: samples per training step on each device. eval_batch_size: the same for evaluation.
        seed: of the order.
        mean, std: of each feature, for standardization; computed over all samples that are not held out unless given.
    """

    name: str
    smallest_batch = 1  # samples of each process in a training step: a run sets 2 for networks that need them

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
        """Returns the arrays by split, "train" (validation set included) and "test". An id is an index into its split."""
        inputs, targets, names = READERS[self.name]()
        ids = aug.order(TEST_SEED, 0, torch.arange(len(inputs)))
        tested = round(TEST_SHARE * len(ids))
        both = {"test": ids[:tested].sort().values, "train": ids[tested:].sort().values}
        return {split: Arrays(inputs[rows], targets[rows], names) for split, rows in both.items()}

    def setup(self, stage: str | None = None) -> None:
        """Reads and splits the data, for any stage."""
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
        """Returns the name of the data's task."""
        return {"diabetes": "regression", "multilabel": "multilabel"}[self.name]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Returns the names of the outputs."""
        return self.arrays["train"].names

    @property
    def num_classes(self) -> int:
        """Returns the number of a network's outputs."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Returns (F,)."""
        return tuple(self.arrays["train"].inputs.shape[1:])

    @property
    def train_targets(self) -> Tensor:
        """Returns the (M, outputs) targets of the training and validation samples, by id."""
        return self.arrays["train"].targets

    # -- IndexedData -------------------------------------------------------------------------------------------------

    @property
    def draws_views(self) -> bool:
        """Returns False: there is no augmentation."""
        return False

    @property
    def views(self) -> int:
        """Returns 1: there is no augmentation."""
        return 1

    def count(self, split: str) -> int:
        """Returns the number of samples of "train", "val" or "test"."""
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
        """Returns the samples of `ids` (N,), on the device of `ids`."""
        arrays, rows = self.arrays["test" if split == "test" else "train"], ids.cpu()
        return Batch(arrays.inputs[rows].to(ids.device), arrays.targets[rows].to(ids.device), ids)

    def batches(self, split: str, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """Yields all batches of a split in order, without a trainer and in this process alone."""
        self.setup()
        for ids in split_ids(self, split).split(self.eval_batch_size):
            yield self.get_batch(split, ids.to(device))

    # -- the loaders -------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> IndexLoader:
        return self.train_loader(*self._world())

    def train_loader(self, rank: int = 0, world_size: int = 1, group: int = 0, log_every: int = 0) -> IndexLoader:
        """Returns the training loader of one process; `group`, `log_every`: see `IndexLoader`."""
        count = self.epoch_size or len(self.train_ids)
        shares = (rank, world_size, True, group, log_every)
        return IndexLoader(self._epoch, count, self.batch_size, *shares, self.smallest_batch)

    def _epoch(self, epoch: int) -> Rows:
        return Rows("train", aug.epoch_order(self.seed, epoch, self.train_ids, self.epoch_size)[0])

    def val_dataloader(self) -> IndexLoader:
        return self.eval_loader("val", *self._world())

    def test_dataloader(self) -> IndexLoader:
        return self.eval_loader("test", *self._world())

    def eval_loader(self, split: str, rank: int = 0, world_size: int = 1) -> IndexLoader:
        """Returns the loader of one process for "val" or "test", in order; each sample belongs to one process."""
        rows = Rows(split, split_ids(self, split))
        return IndexLoader(lambda _: rows, len(rows.ids), self.eval_batch_size, rank, world_size)

    def _world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def on_after_batch_transfer(self, batch: Rows, dataloader_idx: int) -> Batch | Group:
        """Lightning's hook: returns the batch of the ids, which are on the device."""
        return self.make_batch(batch)

    def make_batch(self, rows: Rows) -> Batch | Group:
        """Returns the samples of `rows`: a `Batch`, or a `Group` of several."""
        batch = self.get_batch(rows.split, rows.ids)
        if rows.sizes is None:
            return batch._replace(weight=rows.weights[0])
        return Group(batch, rows.sizes, rows.weights, rows.first, rows.logs)
