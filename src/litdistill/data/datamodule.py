"""`ImageData`: a LightningDataModule for every data set, whose images are on the device as uint8.

A loader yields sample ids only; whole batches of images are gathered and augmented on the device. They stay uint8: each
network normalizes its own inputs (`litdistill.models.preprocess`).
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from torch import Tensor

from litdistill.data import augment as aug
from litdistill.data import mixing, splits
from litdistill.data.loading import IndexLoader, Rows
from litdistill.data.named import augmentations
from litdistill.data.protocol import split_ids
from litdistill.data.sources import STREAMED, Source, Split, fingerprint, load
from litdistill.data.streaming import Encoded, Prefetched
from litdistill.types import Batch, Group
from litdistill.utils.errors import UserError
from litdistill.utils.hashing import stable_repr, weights_sha256

log = logging.getLogger(__name__)


class ImageData(LightningDataModule):
    """A data set with a validation split held out of its training set; batches are on the device.

    Args:
        name: digits, mnist, fashion_mnist, cifar10, cifar100, folder or shards.
        root: the folder of the files, downloaded or to be downloaded; for `folder` and `shards` the data set's own path.
        image_size: side in pixels to which the images of a folder or of shards are resized and cropped.
        classes: use these classes only, by number or by name, renumbered from 0 in this order.
        unlabelled: a folder of images without labels, at any depth: after those with labels they are trained on too, with a
            target of -1. The labels' loss leaves them out, and only a teacher says what they are. Validation and test are of
            labelled images.
        labelled: whether images with labels are trained on; False: those without alone.
        labels: a CSV, TSV or Parquet file of the labels of a folder's files (`litdistill.data.labels`): one class, several
            labels of 0 and 1, or numbers each. target: its columns of labels; null: all others. task: classification,
            multilabel or regression; null: found from these columns.
        val_size: size of the validation split, a fraction below 1 or a count; stratified, and the same for every `seed`, so
            that no student is validated on samples that its teacher was trained on.
        fraction, per_class: train on this fraction, or on this many images of each class (at most one of the two).
        omit: classes, by number or by name, whose images are not trained on; the network, validation and test keep them.
        subset_seed: seed of the choice of the subset; the run's seed unless given.
        epoch_size: samples of an epoch, so that a small training set has as many steps as a large one; null: one round.
        balanced: whether each class is drawn equally often: an epoch has as many samples of each, whatever their numbers of
            images, and `epoch_size` samples in all.
        batch_size: samples of a training step on each device. eval_batch_size: likewise without gradients.
        augment: augmentations, objects or names (`litdistill.data.named`), applied in this order.
        mix: mixing of images and labels in pairs, after the augmentations (`litdistill.data.mixing`).
        mean, std: per channel on the scale 0 to 1, for networks without a preprocessing of their own; null: computed from the
            training set.
        seed: of order and augmentation. view_seed: of augmentation alone, null: `seed`. With one view_seed, runs of different
            seeds get the same views of each image, and the teacher's outputs are computed once for all of them.
        download: whether missing files may be downloaded.
        fixed_views: number of views of each image, those of the first rounds, repeated: a teacher's outputs can then be cached
            whatever the number of views.
        resident: whether the images of a folder or of shards are decoded once and kept in memory; "auto": if they take at most
            `memory_gb` (10⁹ bytes). If not, `workers` processes decode them ahead of every use.
        decode: "scaled": JPEGs of twice the size or more to train and validate on are decoded at a fraction of it, which is
            faster and changes pixels a little; None, "exact": as `predict` decodes them, and as test images always are.
    """

    name: str
    smallest_batch = 1  # samples of each process in a training step: a run sets 2 for networks that need them

    def __init__(
        self,
        name: str,
        root: str | Path | None = "data_files",
        image_size: int | None = None,
        classes: Sequence[int | str] | None = None,
        val_size: float = 0.1,
        fraction: float | None = None,
        per_class: int | None = None,
        omit: Sequence[int | str] | None = None,
        subset_seed: int | None = None,
        epoch_size: int | None = None,
        balanced: bool | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 512,
        augment: Sequence[aug.Augmentation | str | Mapping[str, Any]] | None = (),
        mix: mixing.Mixing | None = None,
        fixed_views: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        seed: int = 0,
        view_seed: int | None = None,
        download: bool = True,
        resident: bool | str = "auto",
        memory_gb: float = 4.0,
        workers: int = 2,
        unlabelled: str | Path | None = None,
        labelled: bool | None = None,
        decode: Literal["exact", "scaled"] | None = None,
        labels: str | Path | None = None,
        target: str | Sequence[str] | None = None,
        task: str | None = None,
    ):
        super().__init__()
        splits.check_unlabelled(unlabelled, labelled, mixed=mix is not None, balanced=bool(balanced))
        splits.check_options(
            val_size, fraction, per_class, min(batch_size, eval_batch_size, epoch_size or 1, fixed_views or 1)
        )
        if labels is not None and name != "folder":
            raise UserError(f"data.labels={labels} goes with data=folder, and this is data={name}: leave it out.")
        self.name, self.root, self.image_size, self.download = name, root, image_size, download
        self.table = None if labels is None else (labels, [target] if isinstance(target, str) else target, task)
        self.val_size, self.fraction, self.per_class = val_size, fraction, per_class
        self.balanced, self.unlabelled, self.labelled = bool(balanced), unlabelled, labelled is not False
        self.subset_seed = seed if subset_seed is None else subset_seed
        self.epoch_size, self.batch_size, self.eval_batch_size = epoch_size, batch_size, eval_batch_size
        self.augment, self.mix, self.mean, self.std = augmentations(() if augment is None else augment), mix, mean, std
        self.seed, self.view_seed = seed, seed if view_seed is None else view_seed
        if decode not in (None, "exact", "scaled"):
            raise UserError(f"data.decode={decode} must be exact or scaled.")
        self.scaled = decode == "scaled"
        self.memory, self.workers = splits.budget(resident, memory_gb), workers
        self.omit, self.fixed_views = () if omit is None else omit, fixed_views
        self.only = classes
        self._source: Source | None = None
        self._resident: dict[tuple[str, torch.device], Split] = {}
        self._train_ids_by_device: dict[torch.device, Tensor] = {}

    # -- the data set ------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Downloads and verifies the files, on one process of each machine."""
        if self.name not in STREAMED:  # which are never downloaded
            self._load()

    def _load(self) -> Source:
        place = (self.name, self.root, self.image_size, self.download)
        return load(*place, memory=self.memory, unlabelled=self.unlabelled, scaled=self.scaled, table=self.table)

    def setup(self, stage: str | None = None) -> None:
        """Reads the files and draws the splits, which are the same for every stage."""
        if self._source is not None:
            return
        source = self._load()
        names = source.classes
        train, test = source.train, source.test
        splits.check_classes(
            source.task, classes=self.only, omit=self.omit, per_class=self.per_class, balanced=self.balanced
        )
        if self.only is not None:
            chosen = splits.class_indices("data.classes", self.only, names)
            if len(chosen) < 2:
                raise UserError(f"data.classes={self.only} has {len(chosen)} class and must name at least two.")
            train, test = splits.only(train, chosen), splits.only(test, chosen)
            names = tuple(names[c] for c in chosen)
        self._source = source._replace(train=train, test=test, classes=names)
        count = len(train.targets) - source.unlabelled  # of images with labels
        strata = splits.strata(train.targets)
        self.val_ids, rest = splits.validation(strata[:count], source.validation, self.val_size)
        omitted = splits.class_indices("data.omit", self.omit, names)
        kept = splits.without(rest, strata, omitted, len(names)) if omitted else rest
        self.train_ids = splits.subset(kept, strata, self.fraction, self.per_class, self.subset_seed)
        if source.unlabelled:
            without = torch.arange(count, len(train.targets))
            self.train_ids = torch.cat([self.train_ids, without]) if self.labelled else without
        self.test_ids = torch.arange(len(test.targets))[splits.strata(test.targets) >= 0]
        if self.mean is None or self.std is None:
            self.mean, self.std = self._mean_std(rest)
        splits.check_statistics(self.mean, self.std, train.images.shape[1])

    def _mean_std(self, ids: Tensor) -> tuple[list[float], list[float]]:
        """Returns mean and standard deviation of each channel over these training images."""
        rows = [Rows("train", chunk) for chunk in ids.split(1024)]
        if isinstance(self.source.train.images, Encoded):
            log.info(
                "Reading %d images once, for their mean and deviation: data.mean and data.std save that.", len(ids)
            )
            fetch = self._prefetcher("train")
            assert fetch is not None
            mean, std = splits.mean_std(batch.images for batch in fetch(rows) if batch.images is not None)
            log.info("data.mean=%s data.std=%s", mean, std)
            return mean, std
        images = self.source.train.images
        return splits.mean_std(images[batch.ids] for batch in rows)

    @property
    def source(self) -> Source:
        """Images and targets of the files; target -1 for classes that `classes` leaves out, and without a label."""
        self.setup()
        assert self._source is not None
        return self._source

    @property
    def task(self) -> str | None:
        """Name of the task of these labels; None for class folders, which suit a task of one's own, too.
        A folder without class folders is for "embedding"."""
        return None if self.table is None and self.source.task == "classification" else self.source.task

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.classes

    @property
    def num_classes(self) -> int:
        return len(self.source.classes)

    @property
    def train_labels(self) -> Literal["all", "some", "none"]:
        """Which of the samples that are trained on have labels; the others have a target of -1."""
        return "all" if not self.source.unlabelled else "some" if self.labelled else "none"

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an image."""
        return tuple(self.source.train.images.shape[1:])  # type: ignore[return-value]

    @property
    def train_targets(self) -> Tensor:
        """(M,) int64 or (M, outputs) float32, the label of every image of the official training set, by id."""
        return self.source.train.targets

    def sample_names(self, split: str) -> tuple[str, ...] | None:
        """Returns the names of the image files by id, below the data's folder, of "train" or "test"; None without files."""
        return self.source.names.get("test" if split == "test" else "train")

    def identity(self, split: str) -> str:
        """See `litdistill.data.protocol.IndexedData`."""
        facts: list[Any] = [self.sha256, "test" if split == "test" else "train"]
        if split == "train":
            mixed = [stable_repr(self.mix), weights_sha256({"": self.train_ids})] if self.mix is not None else None
            facts += [[stable_repr(a) for a in self.augment], mixed, None if self.views is not None else self.view_seed]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def count(self, split: str) -> int:
        """Samples of "train", "val" or "test"."""
        return len(split_ids(self, split))

    def view_count(self, rounds: int) -> int:
        """See `litdistill.data.protocol.IndexedData`."""
        if self.balanced:  # `rounds` times as many samples as there are, which show a small class more often
            counts = self.train_targets[self.train_ids].unique(return_counts=True)[1]
            rounds = 1 + math.ceil(rounds * len(self.train_ids) / len(counts) / int(counts.min()))
        return self.views or min(rounds, self.fixed_views or rounds)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 in hexadecimal of all images, targets and class names."""
        found = (self.class_names, *(fingerprint(split) for split in (self.source.train, self.source.test)))
        return hashlib.sha256(repr(found).encode()).hexdigest()

    @property
    def views(self) -> int | None:
        """Number of distinct views of an image in training; None where they cannot be numbered, as in `aug.count_views`.

        Then the number of a view is its round, and is valid for this view seed and these training ids only.
        """
        return None if self.by_round else aug.count_views(self.augment)

    @property
    def by_round(self) -> bool:
        """Whether views are numbered by round although the augmentations alone could number them."""
        return self.mix is not None or (bool(self.augment) and self.fixed_views is not None)

    @property
    def draws_views(self) -> bool:
        """Whether training augments or mixes images."""
        return bool(self.augment) or self.mix is not None

    # -- batches -----------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> IndexLoader:
        return self.train_loader(*self._rank_and_world_size())

    def train_loader(self, rank: int = 0, world_size: int = 1, group: int = 0, log_every: int = 0) -> IndexLoader:
        """Returns the training loader of one process; `group`, `log_every`: see `IndexLoader`."""
        count, fetch = self.epoch_size or len(self.train_ids), self._prefetcher("train", keep=True)
        shares = (rank, world_size, True, group, log_every)
        return IndexLoader(self._epoch, count, self.batch_size, *shares, self.smallest_batch, fetch)

    def _epoch(self, epoch: int) -> Rows:
        """Returns all samples of an epoch in order, with their views, which are drawn once for all batches."""
        if self.balanced:
            labels = self.train_targets[self.train_ids]
            ids, rounds = aug.balanced_epoch(self.seed, epoch, self.train_ids, labels, self.epoch_size)
        else:
            ids, rounds = aug.epoch_order(self.seed, epoch, self.train_ids, self.epoch_size)
        if self.fixed_views is not None:
            rounds = rounds % self.fixed_views
        if not self.draws_views:
            return Rows("train", ids)
        return Rows(
            "train", ids, rounds if self.by_round else aug.draw_views(self.augment, self.view_seed, rounds, ids)
        )

    def val_dataloader(self) -> IndexLoader:
        return self.eval_loader("val", *self._rank_and_world_size())

    def test_dataloader(self) -> IndexLoader:
        return self.eval_loader("test", *self._rank_and_world_size())

    def eval_loader(self, split: str, rank: int = 0, world_size: int = 1) -> IndexLoader:
        """Returns the loader of one process over "val" or "test", in order; each sample is in one process."""
        rows = Rows("test", self.test_ids) if split == "test" else Rows("train", self.val_ids)
        fetch = self._prefetcher(rows.split)
        return IndexLoader(lambda _: rows, len(rows.ids), self.eval_batch_size, rank, world_size, fetch=fetch)

    def _prefetcher(self, split: str, keep: bool = False) -> Prefetched | None:
        """Returns the prefetcher of encoded images; None where images are in memory."""
        if not isinstance(self._split(split).images, Encoded):
            return None
        images = {name: self._split(name).images for name in ("train", "test")}
        trained = self.train_ids if self.mix is not None else None
        return Prefetched(images, functools.partial(required_ids, self.view_seed, trained), self.workers, keep)

    def on_after_batch_transfer(self, batch: Rows, dataloader_idx: int) -> Batch | Group:
        """Lightning's hook: converts ids on the device to the batch."""
        return self.make_batch(batch)

    def batches(self, split: str, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """Yields all of "train", "val" or "test" in order, unaugmented, on this process alone; needs no trainer."""
        self.setup()
        ids = split_ids(self, split)
        files = "test" if split == "test" else "train"
        rows = [Rows(files, chunk) for chunk in ids.split(self.eval_batch_size)]
        fetch = self._prefetcher(files)
        for batch in fetch(rows) if fetch is not None else rows:
            made = self.make_batch(batch._replace(ids=batch.ids.to(device)))
            assert isinstance(made, Batch)
            yield made

    def make_batch(self, rows: Rows) -> Batch | Group:
        """Returns the batch of these ids and views, or the group of several minibatches."""
        batch = self.get_batch(rows.split, rows.ids, rows.views, rows.images)
        if rows.sizes is None:
            return batch._replace(weight=rows.weights[0])
        return Group(batch, rows.sizes, rows.weights, rows.first, rows.logs)

    def get_batch(self, split: str, ids: Tensor, views: Tensor | None = None, images: Tensor | None = None) -> Batch:
        """Returns the batch of these ids in the given views (N,), or unaugmented: images (N, C, H, W) are uint8, or floats from
        0 to 1 where they are mixed.

        `images`: those of `required_ids`, where they were decoded before.
        """
        data = self._split_on(split, ids.device)
        mix = self.mix if views is not None else None
        source_ids = required_ids(
            self.view_seed, self._train_ids_on(ids.device) if mix else None, Rows(split, ids, views)
        )
        if images is None:
            stored = data.images
            images = stored[source_ids.cpu()] if isinstance(stored, Encoded) else stored.index_select(0, source_ids)
        images, targets = images.to(ids.device), data.targets.index_select(0, source_ids)
        if views is not None and self.augment:
            codes = views
            if self.by_round:
                codes = aug.draw_views(self.augment, self.view_seed, views.repeat(2) if mix else views, source_ids)
            images = aug.apply_views(self.augment, images, codes, self.view_seed, source_ids)
        if mix:
            assert views is not None
            pairs = (images.tensor_split(2), targets.tensor_split(2))
            images, targets = mixing.mix(mix, self.view_seed, views, ids, *pairs, self.num_classes)
        return Batch(images, targets, ids, views)

    def _split(self, split: str) -> Split:
        return self.source.test if split == "test" else self.source.train

    def _split_on(self, split: str, device: torch.device) -> Split:
        if (split, device) not in self._resident:
            images, targets = self._split(split)
            images = images if isinstance(images, Encoded) else images.to(device)
            self._resident[split, device] = Split(images, targets.to(device))
        return self._resident[split, device]

    def _train_ids_on(self, device: torch.device) -> Tensor:
        if device not in self._train_ids_by_device:
            self._train_ids_by_device[device] = self.train_ids.to(device)
        return self._train_ids_by_device[device]

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)


def required_ids(seed: int, trained: Tensor | None, rows: Rows) -> Tensor:
    """Returns the ids of the images that a batch reads: its own, and, where training mixes, their partners' after them.

    `trained`: the ids that partners are drawn from; None where nothing is mixed.
    """
    if trained is None or rows.views is None:
        return rows.ids
    return torch.cat([rows.ids, mixing.partners(seed, rows.views, rows.ids, trained)])
