"""`TensorData`: samples in memory of any kind but images: rows of tables, texts as token ids, sounds as waveforms.

A data set is a function that returns a `TensorData` with a reader of its own, such as `litdistill.data.tables.diabetes`:

    def diabetes(**options) -> TensorData:
        return TensorData(read_diabetes, "diabetes", "regression", standardize=True, **options)

Its yaml in `conf/data/` names the function as `_target_`. Options that belong to the reader are the function's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from lightning import LightningDataModule
from torch import Tensor

from litdistill.data import augment as aug
from litdistill.data import geometry, splits
from litdistill.data.loading import IndexLoader, Rows
from litdistill.data.named import augmentations
from litdistill.data.protocol import split_ids
from litdistill.types import Batch, Group, has_label
from litdistill.utils.errors import UserError
from litdistill.utils.hashing import stable_repr, weights_sha256
from litdistill.utils.modality import PADDING, Modality

TEST_SHARE = 0.2
TEST_SEED, VAL_SEED = -2, -1  # of the test and validation splits, independent of the run's seed


class TensorSplit(NamedTuple):
    """The samples of one file or set of files."""

    inputs: Tensor  # (N, ...) of any dtype
    targets: Tensor  # (N,) int64 classes, -1 without a label; (N, outputs) float32; (N, T) int64 tokens; boxes or masks

    def rows(self, ids: Tensor) -> TensorSplit:
        """Returns some of the samples."""
        return TensorSplit(self.inputs[ids], self.targets[ids])


class TensorSource(NamedTuple):
    """A data set in memory, as a reader returns it."""

    train: TensorSplit  # the validation set included
    test: TensorSplit | None  # None: `TEST_SHARE` of `train` is held out at random, the same for every seed
    names: tuple[str, ...]  # of the classes, labels or values
    modality: Modality
    validation: Tensor | None = None  # ids of `train` that are the validation set; None: `val_size` at random
    facts: Mapping[str, Any] = {}  # further facts that a network's function may name as parameters, such as vocab_size
    show: Callable[[str, int], str] | None = None  # (split, id) -> the sample in words
    geometry: geometry.Geometry | None = None  # whether targets are boxes (N, M, 6) or masks (N, H, W)


def held_out_test(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the ids of `TEST_SHARE` of the samples, of each class where there are classes, and of the others; sorted."""
    ids = torch.arange(len(targets))
    if targets.ndim == 1 and not targets.is_floating_point() and bool((targets >= 0).any()):
        tested, rest = splits.hold_out(ids[targets >= 0], targets, TEST_SHARE, "A fifth to test on")
        return tested, torch.cat([rest, ids[targets < 0]]).sort().values
    order, count = aug.order(TEST_SEED, 0, ids), round(TEST_SHARE * len(ids))
    return order[:count].sort().values, order[count:].sort().values


class TensorData(LightningDataModule):
    """Samples in memory; an `IndexedData`.

    Args:
        read: returns the data set; it is called once.
        name: of the data set, for folders and messages. task: the name of its task.
        augment: objects as `litdistill.data.augment` defines them, which take the inputs (N, ...) on the device.
        standardize: whether networks standardize each feature of inputs (N, F), or each channel of uint8 images, by `mean` and
            `std`, which are measured over all samples that are not held out unless given; or which of the features.
        val_size: validation samples, a fraction (below 1) or a number of the training set; the same for every `seed`.
        fraction: the fraction of the other samples to train on, of each class.
        labels: how many of these keep their label; None: all. only_labelled: whether to leave the others out,
            which are else trained on with a target of -1, in the order of ~`seed` if `seed` chose the labels: not these first.
        subset_seed: the seed that selects both; the run's seed unless given.
        epoch_size: samples of an epoch; None: every training sample once.
        batch_size: samples per training step on each device. eval_batch_size: the same for evaluation.
        seed: of order and augmentation. view_seed: of augmentation alone; `seed` unless given.
        fixed_views: number of views of each sample, those of the first rounds, repeated.
    """

    smallest_batch = 1  # samples of each process in a training step: a run sets 2 for networks that need them

    def __init__(
        self,
        read: Callable[[], TensorSource],
        name: str,
        task: str,
        augment: Sequence[aug.Augmentation | str | Mapping[str, Any]] | None = (),
        standardize: bool | Sequence[bool] = False,
        val_size: float = 0.1,
        fraction: float | None = None,
        labels: int | None = None,
        only_labelled: bool = False,
        subset_seed: int | None = None,
        epoch_size: int | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 512,
        seed: int = 0,
        view_seed: int | None = None,
        fixed_views: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        super().__init__()
        if fraction is not None and not 0 < fraction <= 1:
            raise UserError(f"fraction={fraction} must be above 0 and at most 1.")
        if min(batch_size, eval_batch_size, epoch_size or 1, fixed_views or 1) < 1:
            raise UserError("batch_size, eval_batch_size, epoch_size and fixed_views must be at least 1.")
        if labels is not None and labels < 1:
            raise UserError(f"labels={labels} must be at least 1: how many training samples keep their label.")
        self.read, self.name, self.task, self.standardize = read, name, task, standardize
        self.augment = augmentations(() if augment is None else augment)
        self.val_size, self.fraction, self.labels, self.only_labelled = val_size, fraction, labels, only_labelled
        self.subset_seed = seed if subset_seed is None else subset_seed
        self.order_seed = ~seed if labels and not only_labelled and seed == self.subset_seed else seed
        self.epoch_size, self.batch_size, self.eval_batch_size = epoch_size, batch_size, eval_batch_size
        self.seed, self.view_seed = seed, seed if view_seed is None else view_seed
        self.fixed_views, self.mean, self.std = fixed_views, mean, std
        self._on_device: dict[tuple[str, torch.device], TensorSplit] = {}
        self._held_out_rows: dict[str, Tensor] = {}  # of both splits, where the test set is held out of what was read
        self._ready = False

    # -- the facts ---------------------------------------------------------------------------------------------------

    @cached_property
    def source(self) -> TensorSource:
        """Returns the data set with a test set. An id is an index into its split, "train" (validation included) or "test"."""
        found = self.read()
        if found.test is not None:
            return found
        tested, rest = held_out_test(found.train.targets)
        show = found.show
        self._held_out_rows = place = {"test": tested, "train": rest}
        moved = None if show is None else (lambda split, i: show("train", int(place[split][i])))
        return found._replace(train=found.train.rows(rest), test=found.train.rows(tested), show=moved)

    def prepare_data(self) -> None:
        """Reads the data set, and so fetches its files, on one process of each machine."""
        _ = self.source

    def setup(self, stage: str | None = None) -> None:
        """Draws the splits, which are the same for every stage."""
        if self._ready:
            return
        train, validation = self.source.train, self.source.validation
        geometry.check_followed(self.augment, self.source.geometry)
        if validation is not None:
            every = torch.arange(len(train.inputs))
            self.val_ids, rest = validation.sort().values, every[~torch.isin(every, validation)]
        else:
            self.val_ids, rest = self._held_out(train.targets)
        self.test_ids = torch.arange(len(self._split("test").inputs))
        self.train_ids = self._subset(rest, train.targets)
        self._hide_labels()
        if self.standardize and (self.mean is None or self.std is None):
            self.mean, self.std = splits.measured(train.inputs, rest, self.standardize)
        self._ready = True

    def _held_out(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the ids of the validation set and of the others, sorted."""
        if self._are_classes(targets) and bool((targets >= 0).any()):
            held, rest = splits.hold_out(torch.arange(len(targets))[targets >= 0], targets, self.val_size)
            return held, torch.cat([rest, torch.arange(len(targets))[targets < 0]]).sort().values
        every = torch.arange(len(targets))
        labelled = every if self.source.geometry is None else every[has_label(targets)]
        ids = aug.order(VAL_SEED, 0, labelled)
        count = round(self.val_size * len(ids)) if self.val_size < 1 else int(self.val_size)
        if not 0 < count < len(ids):
            raise UserError(
                f"val_size={self.val_size} of {len(ids)} samples leaves {len(ids) - count} to train on and {count} to "
                "validate on. Choose another size, such as 0.1."
            )
        held = ids[:count].sort().values
        return held, every[~torch.isin(every, held)]

    def _subset(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Returns the ids to train on, sorted: `fraction` of each class, or of all samples where there are none."""
        if self.fraction is None:
            return ids
        if self._are_classes(targets) and bool((targets >= 0).any()):
            return splits.subset(ids, targets, self.fraction, None, self.subset_seed)
        count = max(1, round(len(ids) * self.fraction))
        return aug.order(self.subset_seed, 0, ids)[:count].sort().values

    def _hide_labels(self) -> None:
        """Keeps the labels of `labels` training samples, of each class its share, and makes the others −1, or NaN of boxes."""
        targets = self._targets = self.source.train.targets
        if not self._hides_labels and self.labels is not None:
            raise UserError("data.labels hides labels of classes, and these targets are numbers: use data.fraction.")
        if not self._hides_labels or (self.labels is None and not self.only_labelled):
            return
        kept = labelled = self.train_ids[has_label(targets[self.train_ids])]
        if self.labels is not None:
            if self.labels > len(labelled):
                raise UserError(f"labels={self.labels}, and there are {len(labelled)} training samples with a label.")
            if self._are_classes(targets):
                kept = splits.subset(labelled, targets, self.labels / len(labelled), None, self.subset_seed)
            else:
                kept = aug.order(self.subset_seed, 0, labelled)[: self.labels].sort().values
            hidden = self.train_ids[~torch.isin(self.train_ids, kept)]
            self._targets = targets.clone()
            self._targets[hidden] = torch.nan if targets.is_floating_point() else -1
        if self.only_labelled:
            self.train_ids = kept

    @property
    def _hides_labels(self) -> bool:  # whether targets are such that a sample may have none
        return self._are_classes(self.source.train.targets) or self.source.geometry is not None

    @staticmethod
    def _are_classes(targets: Tensor) -> bool:
        return targets.ndim == 1 and not targets.is_floating_point()

    @property
    def modality(self) -> Modality:
        """Returns what kind of data a sample is."""
        return self.source.modality

    @property
    def facts(self) -> Mapping[str, Any]:
        """Returns further facts that a network's function may name as parameters."""
        return self.source.facts

    @property
    def class_names(self) -> tuple[str, ...]:
        """Returns the names of the outputs."""
        return self.source.names

    @property
    def num_classes(self) -> int:
        """Returns the number of a network's outputs."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Returns the shape of a sample's input."""
        return tuple(self.source.train.inputs.shape[1:])

    @property
    def input_dtype(self) -> torch.dtype:
        """Returns the type of a network's inputs."""
        return self.source.train.inputs.dtype

    @property
    def train_targets(self) -> Tensor:
        """Returns the targets of the training and validation samples, by id; -1 for a label that is hidden or missing."""
        self.setup()
        return self._targets

    @property
    def train_labels(self) -> Literal["all", "some", "none"]:
        """Returns which of the samples that are trained on have labels; the others have a target of -1."""
        targets = self.train_targets
        if not self._hides_labels:
            return "all"
        without = int((~has_label(targets[self.train_ids])).sum())
        return "all" if not without else "some" if without < len(self.train_ids) else "none"

    def show(self, split: str, index: int) -> str | None:
        """Returns a sample in words, by its split ("train" or "test") and id; None where the data set does not say."""
        return None if self.source.show is None else self.source.show(split, index)

    def sample_names(self, split: str) -> tuple[str, ...]:
        """Returns for each sample of "train" or "test", by id, the number of its row in what was read, counted from 0, as text:
        the test set may be held out of the same rows. A file of outputs can name samples by it."""
        kept = "test" if split == "test" else "train"
        count = len(self._split(kept).inputs)  # reads the data, and so knows the rows
        return tuple(map(str, self._held_out_rows[kept].tolist() if self._held_out_rows else range(count)))

    # -- IndexedData -------------------------------------------------------------------------------------------------

    @property
    def draws_views(self) -> bool:
        """Returns whether training samples are augmented."""
        return bool(self.augment)

    @property
    def by_round(self) -> bool:
        """Returns whether views are numbered by round although the augmentations alone could number them."""
        return bool(self.augment) and self.fixed_views is not None

    @property
    def views(self) -> int | None:
        """Returns the number of distinct views of a sample; None where every pass through the data has a new one."""
        return None if self.by_round else aug.count_views(self.augment)

    def count(self, split: str) -> int:
        """Returns the number of samples of "train", "val" or "test"."""
        return len(split_ids(self, split))

    def view_count(self, rounds: int) -> int:
        """See `litdistill.data.protocol.IndexedData`."""
        return self.views or min(rounds, self.fixed_views or rounds)

    def identity(self, split: str) -> str:
        """See `litdistill.data.protocol.IndexedData`."""
        kept = "test" if split == "test" else "train"
        facts: list[Any] = [self._sha256(kept), self.class_names]
        if split == "train" and self.augment:
            facts += [[stable_repr(a) for a in self.augment], None if self.views is not None else self.view_seed]
        return hashlib.sha256(repr(tuple(facts)).encode()).hexdigest()

    def _sha256(self, split: str) -> str:
        """Returns a hash of the split's samples, whatever labels are hidden: a teacher's outputs do not depend on them."""
        if split not in self._hashes:
            self._hashes[split] = weights_sha256(self._split(split)._asdict())
        return self._hashes[split]

    @cached_property
    def _hashes(self) -> dict[str, str]:
        return {}

    def _split(self, split: str) -> TensorSplit:
        found = self.source.test if split == "test" else self.source.train
        assert found is not None
        return found

    def _split_on(self, split: str, device: torch.device) -> TensorSplit:
        if (split, device) not in self._on_device:
            self.setup()
            inputs, targets = self._split(split)
            targets = self._targets if split != "test" else targets
            self._on_device[split, device] = TensorSplit(inputs.to(device), targets.to(device))
        return self._on_device[split, device]

    def get_batch(self, split: str, ids: Tensor, views: Tensor | None = None) -> Batch:
        """Returns the samples of `ids` (N,), on the device of `ids`, in `views` (N,) or without augmentation."""
        found = self._split_on("test" if split == "test" else "train", ids.device)
        inputs, targets = found.inputs.index_select(0, ids), found.targets.index_select(0, ids)
        if views is not None and self.augment:
            codes, plain = aug.draw_views(self.augment, self.view_seed, views, ids) if self.by_round else views, inputs
            inputs = aug.apply_views(self.augment, plain, codes, self.view_seed, ids)
            if self.source.geometry is not None:
                moves = geometry.moves_of(self.augment, codes, self.view_seed, ids, plain.shape[2:])
                targets = geometry.follow(self.source.geometry, targets, moves)
        return Batch(inputs, targets, ids, views)

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
        return IndexLoader(self._epoch, count, self.batch_size, *shares, self.smallest_batch, places=self._places())

    def _places(self) -> Tensor | None:
        """Returns how many targets each sample has, by id, where they are tokens; else None."""
        targets = self.source.train.targets
        return (targets != PADDING).sum(1) if targets.ndim == 2 and not targets.is_floating_point() else None

    def _epoch(self, epoch: int) -> Rows:
        ids, rounds = aug.epoch_order(self.order_seed, epoch, self.train_ids, self.epoch_size)
        if not self.augment:
            return Rows("train", ids)
        rounds = rounds if self.fixed_views is None else rounds % self.fixed_views
        views = rounds if self.by_round else aug.draw_views(self.augment, self.view_seed, rounds, ids)
        return Rows("train", ids, views)

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
        batch = self.get_batch(rows.split, rows.ids, rows.views)
        if rows.sizes is None:
            return batch._replace(weight=rows.weights[0])
        return Group(batch, rows.sizes, rows.weights, rows.first, rows.logs)
