"""`ImageData`: any of the data sets as one LightningDataModule whose images live on the device as uint8.

A loader yields sample ids only; the images are gathered and augmented in batches where they lie. They stay uint8: each
network normalizes them its own way (`litdistill.models.preprocess`).
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor

from litdistill.data import augment as aug
from litdistill.data import mixing, splits
from litdistill.data.loading import IndexLoader, Rows
from litdistill.data.protocol import split_ids
from litdistill.data.sources import STREAMED, Source, Split, fingerprint, load
from litdistill.data.streaming import Encoded, Prefetched
from litdistill.types import Batch, Group
from litdistill.utils.hashing import stable_repr, weights_sha256

log = logging.getLogger(__name__)


class ImageData(LightningDataModule):
    """One of the data sets, a validation split held out of its training set, batches on the device.

    Args:
        name: digits, mnist, fashion_mnist, cifar10, cifar100, folder or shards.
        root: where the files are or are put; for `folder` and `shards` the place itself.
        image_size: side in pixels to which the images of a folder or of shards are resized and cropped.
        classes: use these classes only, renumbered from 0.
        val_size: how much of the training set is held out, a fraction below 1 or a count; stratified, and the same
            for every `seed`, so that no student is validated on what its teacher was trained on.
        fraction, per_class: train on that share, or on so many images of each class (at most one of the two).
        omit: classes whose images are not trained on; the network, validation and test keep them.
        subset_seed: which images these are; the run's seed unless given.
        epoch_size: samples of an epoch, so that a small training set has as many steps as a large one; all of the set,
            once, where null.
        batch_size: samples of a training step on each device. eval_batch_size: likewise without gradients.
        augment: augmentations of `litdistill.data.augment`, applied in this order.
        mix: mixes each image and its label with another's after that (`litdistill.data.mixing`).
        mean, std: of each channel on the scale 0 to 1, by which networks without a preprocessing of their own normalize;
            measured on the training set where null.
        seed: of order and augmentation. view_seed: of augmentation alone, where runs that differ in their seed are to see each
            image in the same views, and their teacher is to be asked once for all of them; `seed` where null.
        download: whether files that are missing may be fetched.
        fixed_views: every image is seen in so many views only, those of the first rounds, over and over: so a teacher's
            outputs can be kept however many views there are.
        resident: whether the images of a folder or of shards are decoded once and kept in memory; "auto": if they take no
            more than `memory_gb` (10⁹ bytes). If not, `workers` processes decode them ahead of every use.
    """

    name: str

    def __init__(
        self,
        name: str,
        root: str | Path | None = "data_files",
        image_size: int | None = None,
        classes: Sequence[int] | None = None,
        val_size: float = 0.1,
        fraction: float | None = None,
        per_class: int | None = None,
        omit: Sequence[int] | None = None,
        subset_seed: int | None = None,
        epoch_size: int | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 512,
        augment: Sequence[aug.Augmentation] = (),
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
    ):
        super().__init__()
        splits.check_options(
            val_size, fraction, per_class, min(batch_size, eval_batch_size, epoch_size or 1, fixed_views or 1)
        )
        self.name, self.root, self.image_size, self.download = name, root, image_size, download
        self.val_size, self.fraction, self.per_class = val_size, fraction, per_class
        self.subset_seed = seed if subset_seed is None else subset_seed
        self.epoch_size, self.batch_size, self.eval_batch_size = epoch_size, batch_size, eval_batch_size
        self.augment, self.mix, self.mean, self.std = list(augment), mix, mean, std
        self.seed, self.view_seed = seed, seed if view_seed is None else view_seed
        self.memory, self.workers = splits.budget(resident, memory_gb), workers
        self.omit, self.fixed_views = list(omit or ()), fixed_views
        self.only = list(classes) if classes is not None else None
        self._source: Source | None = None
        self._resident: dict[tuple[str, torch.device], Split] = {}
        self._trained: dict[torch.device, Tensor] = {}

    # -- the facts ---------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Fetches and verifies the files, on one process of each machine."""
        if self.name not in STREAMED:  # those are where they are
            self._load()

    def _load(self) -> Source:
        what = (self.name, self.root, self.image_size, self.download)
        return load(*what, memory=self.memory) if self.name in STREAMED else load(*what)

    def setup(self, stage: str | None = None) -> None:
        """Reads the files and draws the splits; the same ones whatever the stage."""
        if self._source is not None:
            return
        source = self._load()
        names = source.classes
        train, test = source.train, source.test
        if self.only is not None:
            train, test, names = (
                splits.only(train, self.only),
                splits.only(test, self.only),
                splits.names(names, self.only),
            )
        self._source = Source(train, test, names)
        labeled = torch.arange(len(train.targets))[train.targets >= 0]
        self.val_ids, rest = splits.hold_out(labeled, train.targets, self.val_size)
        kept = splits.without(rest, train.targets, self.omit, len(names))
        self.train_ids = splits.subset(kept, train.targets, self.fraction, self.per_class, self.subset_seed)
        self.test_ids = torch.arange(len(test.targets))[test.targets >= 0]
        if self.mean is None or self.std is None:
            self.mean, self.std = self._measure(rest)

    def _measure(self, ids: Tensor) -> tuple[list[float], list[float]]:
        """Mean and deviation of each channel over these training images."""
        rows = [Rows("train", chunk) for chunk in ids.split(1024)]
        if isinstance(self.source.train.images, Encoded):
            log.info(
                "Reading %d images once, for their mean and deviation: data.mean and data.std save that.", len(ids)
            )
            fetch = self._prefetched("train")
            assert fetch is not None
            mean, std = splits.mean_std(batch.images for batch in fetch(rows) if batch.images is not None)
            log.info("data.mean=%s data.std=%s", mean, std)
            return mean, std
        images = self.source.train.images
        return splits.mean_std(images[batch.ids] for batch in rows)

    @property
    def source(self) -> Source:
        """Images and targets as read, target -1 for what `classes` leaves out."""
        self.setup()
        assert self._source is not None
        return self._source

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.classes

    @property
    def num_classes(self) -> int:
        return len(self.source.classes)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return tuple(self.source.train.images.shape[1:])  # type: ignore[return-value]

    @property
    def train_targets(self) -> Tensor:
        """(M,) the label of every image of the official training set, by id."""
        return self.source.train.targets

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
        return self.views or min(rounds, self.fixed_views or rounds)

    @cached_property
    def sha256(self) -> str:
        """Of all images, targets and the classes' names: what makes this data these data."""
        found = (self.class_names, *(fingerprint(split) for split in (self.source.train, self.source.test)))
        return hashlib.sha256(repr(found).encode()).hexdigest()

    @property
    def views(self) -> int | None:
        """How many distinct views of an image training sees; None where they cannot be numbered, as `aug.count_views`.

        The number of a view is its round then, and means something for this view seed and these training ids only.
        """
        return None if self.by_round else aug.count_views(self.augment)

    @property
    def by_round(self) -> bool:
        """Whether a view is numbered by its round although augmentation alone could number it."""
        return self.mix is not None or (bool(self.augment) and self.fixed_views is not None)

    @property
    def draws_views(self) -> bool:
        """Whether training sees anything but the images as they are."""
        return bool(self.augment) or self.mix is not None

    # -- the batches -------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> IndexLoader:
        return self.train_loader(*self._world())

    def train_loader(self, rank: int = 0, world_size: int = 1, group: int = 0, log_every: int = 0) -> IndexLoader:
        """The loader of one process; `group`, `log_every`: see `IndexLoader`."""
        count, fetch = self.epoch_size or len(self.train_ids), self._prefetched("train", keep=True)
        shares = (rank, world_size, True, group, log_every)
        return IndexLoader(self._epoch, count, self.batch_size, *shares, fetch=fetch)

    def _epoch(self, epoch: int) -> Rows:
        """All samples of an epoch in order. Their views are drawn here, once, for all batches."""
        ids, rounds = aug.epoch_order(self.seed, epoch, self.train_ids, self.epoch_size)
        if self.fixed_views is not None:
            rounds = rounds % self.fixed_views
        if not self.draws_views:
            return Rows("train", ids)
        return Rows(
            "train", ids, rounds if self.by_round else aug.draw_views(self.augment, self.view_seed, rounds, ids)
        )

    def val_dataloader(self) -> IndexLoader:
        return self.eval_loader("val", *self._world())

    def test_dataloader(self) -> IndexLoader:
        return self.eval_loader("test", *self._world())

    def eval_loader(self, split: str, rank: int = 0, world_size: int = 1) -> IndexLoader:
        """The loader of one process over "val" or "test", in order; each sample is in one process."""
        rows = Rows("test", self.test_ids) if split == "test" else Rows("train", self.val_ids)
        fetch = self._prefetched(rows.split)
        return IndexLoader(lambda _: rows, len(rows.ids), self.eval_batch_size, rank, world_size, fetch=fetch)

    def _prefetched(self, split: str, keep: bool = False) -> Prefetched | None:
        """What reads images ahead that lie encoded; None where they are in memory."""
        if not isinstance(self._split(split).images, Encoded):
            return None
        images = {name: self._split(name).images for name in ("train", "test")}
        trained = self.train_ids if self.mix is not None else None
        return Prefetched(images, functools.partial(needed, self.view_seed, trained), self.workers, keep)

    def on_after_batch_transfer(self, batch: Rows, dataloader_idx: int) -> Batch | Group:
        """Lightning's hook: ids that lie on the device become the batch."""
        return self.make_batch(batch)

    def batches(self, split: str, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """All of "train", "val" or "test" in order, unaugmented, without a trainer and on this process alone."""
        self.setup()
        ids = split_ids(self, split)
        files = "test" if split == "test" else "train"
        rows = [Rows(files, chunk) for chunk in ids.split(self.eval_batch_size)]
        fetch = self._prefetched(files)
        for batch in fetch(rows) if fetch is not None else rows:
            found = self.make_batch(batch._replace(ids=batch.ids.to(device)))
            assert isinstance(found, Batch)
            yield found

    def make_batch(self, rows: Rows) -> Batch | Group:
        """The images of these ids, in these views or as they are: a batch, or a group of several."""
        batch = self.get_batch(rows.split, rows.ids, rows.views, rows.images)
        if rows.sizes is None:
            return batch._replace(weight=rows.weights[0])
        return Group(batch, rows.sizes, rows.weights, rows.first, rows.logs)

    def get_batch(self, split: str, ids: Tensor, views: Tensor | None = None, images: Tensor | None = None) -> Batch:
        """The images (N, C, H, W) of these ids in the given views (N,), or as they are: uint8, or floats from 0 to 1 where
        they are mixed.

        `images`: those that are `needed`, where they were decoded before.
        """
        data = self._on(split, ids.device)
        mix = self.mix if views is not None else None
        everyone = needed(self.view_seed, self._trained_on(ids.device) if mix else None, Rows(split, ids, views))
        if images is None:
            here = data.images
            images = here[everyone.cpu()] if isinstance(here, Encoded) else here.index_select(0, everyone)
        images, targets = images.to(ids.device), data.targets.index_select(0, everyone)
        if views is not None and self.augment:
            codes = views
            if self.by_round:
                codes = aug.draw_views(self.augment, self.view_seed, views.repeat(2) if mix else views, everyone)
            images = aug.apply_views(self.augment, images, codes, self.view_seed, everyone)
        if mix:
            assert views is not None
            pairs = (images.tensor_split(2), targets.tensor_split(2))
            images, targets = mixing.mix(mix, self.view_seed, views, ids, *pairs, self.num_classes)
        return Batch(images, targets, ids, views)

    def _split(self, split: str) -> Split:
        return self.source.test if split == "test" else self.source.train

    def _on(self, split: str, device: torch.device) -> Split:
        if (split, device) not in self._resident:
            images, targets = self._split(split)
            near = images if isinstance(images, Encoded) else images.to(device)
            self._resident[split, device] = Split(near, targets.to(device))
        return self._resident[split, device]

    def _trained_on(self, device: torch.device) -> Tensor:
        if device not in self._trained:
            self._trained[device] = self.train_ids.to(device)
        return self._trained[device]

    def _world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)


def needed(seed: int, trained: Tensor | None, rows: Rows) -> Tensor:
    """The ids of the images that a batch is made of: its own, and, where training mixes, their partners' after them.

    `trained`: whom an image may be mixed with; None where nothing is mixed.
    """
    if trained is None or rows.views is None:
        return rows.ids
    return torch.cat([rows.ids, mixing.partners(seed, rows.views, rows.ids, trained)])
