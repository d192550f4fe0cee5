"""`ImageData`: any of the data sets as one LightningDataModule whose images live on the device as uint8.

A loader yields sample ids only; the images are gathered, augmented and normalised in batches where they lie. Other
loaders work too: whatever yields `(images, targets)` can train a `Distiller`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import LightningDataModule
from torch import Tensor

from litdistill.data import augment as aug
from litdistill.data.sources import Source, Split, load
from litdistill.errors import UserError


class Batch(NamedTuple):
    """What a step gets. Ids count through the official training (or test) set, whatever subset is used of it."""

    images: Tensor  # (N, C, H, W) float, normalised
    targets: Tensor  # (N,) int64
    ids: Tensor | None = None  # (N,) int64
    views: Tensor | None = None  # (N,) int64, which view of each image this is; None where nothing was augmented


class Ids(NamedTuple):
    """What a loader yields: which images, of which files, and for training which round's views of them."""

    split: str  # "train" or "test": the files
    ids: Tensor  # (N,) int64
    rounds: Tensor | None = None  # (N,) int64; None: as they are


class IdLoader:
    """Yields the `Ids` of one batch after the other, in the order that `rows_of_epoch(epoch)` gives.

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
    ):
        self.rows_of_epoch, self.count, self.position = rows_of_epoch, count, position
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.pad = pad  # every rank must make the same number of training steps; evaluation must count no sample twice

    def __len__(self) -> int:
        return -(-self.count // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Ids]:
        epoch, done = self.position()
        split, ids, rounds = self.rows_of_epoch(epoch)
        for chunk in torch.arange(self.count).split(self.batch_size * self.world_size)[done:]:
            if self.world_size > 1:
                if self.pad and len(chunk) % self.world_size:
                    chunk = torch.cat([chunk, torch.arange(-len(chunk) % self.world_size)])
                chunk = chunk.tensor_split(self.world_size)[self.rank]
            yield Ids(split, ids[chunk], None if rounds is None else rounds[chunk])

    def state_dict(self) -> dict[str, Any]:
        """Empty: Lightning asks for it before it believes that a loader can be resumed."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load: see `position`."""


class ImageData(LightningDataModule):
    """One of the data sets, a validation split held out of its training set, batches on the device.

    Args:
        name: digits, mnist, fashion_mnist, cifar10, cifar100 or folder.
        root: where the files are or are put; for `folder` the folder itself.
        image_size: side in pixels to which a folder's images are resized and cropped.
        classes: use these classes only, renumbered from 0.
        val_size: how much of the training set is held out, a fraction below 1 or a count; stratified, and the same
            for every `seed`, so that no student is validated on what its teacher was trained on.
        fraction, per_class: train on that share, or on so many images of each class (at most one of the two).
        subset_seed: which images these are; the run's seed unless given.
        epoch_size: samples of an epoch, so that a small training set has as many steps as a large one; all of the set,
            once, where null.
        batch_size: samples of a training step on each device. eval_batch_size: likewise without gradients.
        augment: augmentations of `litdistill.data.augment`, applied in this order.
        mean, std: of each channel on the scale 0 to 1, for normalisation; measured on the training set where null.
        seed: of order and augmentation.
        download: whether files that are missing may be fetched.
    """

    name: str

    def __init__(
        self,
        name: str,
        root: str | Path = "data_files",
        image_size: int | None = None,
        classes: Sequence[int] | None = None,
        val_size: float = 0.1,
        fraction: float | None = None,
        per_class: int | None = None,
        subset_seed: int | None = None,
        epoch_size: int | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 512,
        augment: Sequence[aug.Augmentation] = (),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        seed: int = 0,
        download: bool = True,
    ):
        super().__init__()
        _check_options(val_size, fraction, per_class, min(batch_size, eval_batch_size, epoch_size or 1))
        self.name, self.root, self.image_size, self.download = name, root, image_size, download
        self.val_size, self.fraction, self.per_class = val_size, fraction, per_class
        self.subset_seed = seed if subset_seed is None else subset_seed
        self.epoch_size, self.batch_size, self.eval_batch_size = epoch_size, batch_size, eval_batch_size
        self.augment, self.mean, self.std, self.seed = list(augment), mean, std, seed
        self.only = list(classes) if classes is not None else None
        self._source: Source | None = None
        self._resident: dict[tuple[str, torch.device], Split] = {}

    # -- the facts ---------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Fetches and verifies the files, on one process of each machine."""
        load(self.name, self.root, self.image_size, self.download)

    def setup(self, stage: str | None = None) -> None:
        """Reads the files and draws the splits; the same ones whatever the stage."""
        if self._source is not None:
            return
        source = load(self.name, self.root, self.image_size, self.download)
        names = source.classes
        train, test = source.train, source.test
        if self.only is not None:
            train, test, names = _only(train, self.only), _only(test, self.only), _names(names, self.only)
        self._source = Source(train, test, names)
        labelled = torch.arange(len(train.targets))[train.targets >= 0]
        self.val_ids, rest = _hold_out(labelled, train.targets, self.val_size)
        self.train_ids = _subset(rest, train.targets, self.fraction, self.per_class, self.subset_seed)
        self.test_ids = torch.arange(len(test.targets))[test.targets >= 0]
        if self.mean is None or self.std is None:
            self.mean, self.std = _mean_std(train.images[rest])
        self._scale = torch.tensor([1 / (255 * s) for s in self.std]).view(-1, 1, 1)
        self._shift = torch.tensor([-m / s for m, s in zip(self.mean, self.std, strict=True)]).view(-1, 1, 1)

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

    # -- the batches -------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> IdLoader:
        rows = lambda epoch: Ids("train", *aug.epoch_order(self.seed, epoch, self.train_ids, self.epoch_size))  # noqa: E731
        count = self.epoch_size or len(self.train_ids)
        return IdLoader(rows, count, self.batch_size, self._position, *self._world(), pad=True)

    def val_dataloader(self) -> IdLoader:
        return self._evaluation(Ids("train", self.val_ids))

    def test_dataloader(self) -> IdLoader:
        return self._evaluation(Ids("test", self.test_ids))

    def _evaluation(self, rows: Ids) -> IdLoader:
        return IdLoader(lambda _: rows, len(rows.ids), self.eval_batch_size, lambda: (0, 0), *self._world())

    def on_after_batch_transfer(self, batch: Ids, dataloader_idx: int) -> Batch:
        """Lightning's hook: ids that lie on the device become the batch."""
        return self.batch(batch)

    def batches(self, split: str, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """All of "train", "val" or "test" in order, unaugmented, without a trainer and on this process alone."""
        self.setup()
        ids = {"train": self.train_ids, "val": self.val_ids, "test": self.test_ids}[split]
        for chunk in ids.split(self.eval_batch_size):
            yield self.batch(Ids("test" if split == "test" else "train", chunk.to(device)))

    def batch(self, rows: Ids) -> Batch:
        """The images of these ids, in the views of their rounds or as they are."""
        split, ids, rounds = rows
        if rounds is None or not self.augment:
            return self.seen(split, ids, None)
        return self.seen(split, ids, aug.draw_views(self.augment, self.seed, rounds, ids))

    def seen(self, split: str, ids: Tensor, views: Tensor | None) -> Batch:
        """The images of these ids in the given views (N,), or as they are."""
        data = self._on(split, ids.device)
        images = data.images[ids]
        if views is not None:
            images = aug.apply_views(self.augment, images, views)
        return Batch(self.normalise(images), data.targets[ids], ids, views)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 on the scale 0 to 255 -> float with mean 0 and deviation 1 over the training set."""
        return torch.addcmul(self._shift.to(images.device), images.float(), self._scale.to(images.device))

    def _on(self, split: str, device: torch.device) -> Split:
        if (split, device) not in self._resident:
            data = self.source.test if split == "test" else self.source.train
            self._resident[split, device] = Split(data.images.to(device), data.targets.to(device))
        return self._resident[split, device]

    def _position(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 0
        return self.trainer.current_epoch, self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def _world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)


# -- splits: pure functions of the labels ------------------------------------------------------------------------------


def _check_options(val_size: float, fraction: float | None, per_class: int | None, smallest: int) -> None:
    if fraction is not None and per_class is not None:
        raise UserError(
            "data.fraction and data.per_class both choose a subset: set one of them, and the other to null."
        )
    if fraction is not None and not 0 < fraction <= 1:
        raise UserError(f"data.fraction={fraction} must be above 0 and at most 1.")
    if per_class is not None and per_class < 1:
        raise UserError(f"data.per_class={per_class} must be at least 1.")
    if val_size <= 0:
        raise UserError(
            f"data.val_size={val_size} leaves nothing to choose the best epoch on. "
            "Give a fraction below 1 (0.1) or a number of images (5000)."
        )
    if smallest < 1:
        raise UserError("data.batch_size, data.eval_batch_size and data.epoch_size must be at least 1.")


def _only(split: Split, classes: Sequence[int]) -> Split:
    """Targets renumbered in the order of `classes`, -1 for the rest; no image moves, so that ids stay what they are."""
    new = torch.full((int(split.targets.max()) + 1,), -1, dtype=torch.int64)
    for i, c in enumerate(classes):
        if 0 <= c < len(new):
            new[c] = i
    return Split(split.images, new[split.targets])


def _names(names: Sequence[str], classes: Sequence[int]) -> tuple[str, ...]:
    wrong = [c for c in classes if not 0 <= c < len(names)]
    if wrong or len(set(classes)) != len(classes) or len(classes) < 2:
        raise UserError(
            f"data.classes={list(classes)} must name at least two different classes out of 0 to {len(names) - 1}."
        )
    return tuple(names[c] for c in classes)


def _shuffled_classes(ids: Tensor, targets: Tensor, seed: int) -> list[Tensor]:
    """The ids of each class, each in a random order that depends on the seed and the ids alone."""
    ids = aug.order(seed, 0, ids)
    return [ids[targets[ids] == c] for c in targets[ids].unique()]


def _hold_out(ids: Tensor, targets: Tensor, val_size: float) -> tuple[Tensor, Tensor]:
    """Stratified (held out, rest), both sorted; the same for every seed."""
    share = val_size if val_size < 1 else val_size / len(ids)
    classes = _shuffled_classes(ids, targets, seed=-1)
    counts = [round(len(c) * share) for c in classes]
    held, rest = (torch.cat(parts).sort().values for parts in _cut(classes, counts))
    if len(rest) == 0 or len(held) == 0 or min(len(c) - n for c, n in zip(classes, counts, strict=True)) == 0:
        raise UserError(
            f"data.val_size={val_size} of {len(ids)} training images leaves {len(rest)} to train on and {len(held)} to "
            "validate on, and each class needs at least one on either side. Choose another size, such as 0.1."
        )
    return held, rest


def _subset(ids: Tensor, targets: Tensor, fraction: float | None, per_class: int | None, seed: int) -> Tensor:
    """The part of the training ids that is trained on, the same number or share of each class; sorted."""
    if fraction is None and per_class is None:
        return ids
    classes = _shuffled_classes(ids, targets, seed)
    if per_class is not None:
        few = min(len(c) for c in classes)
        if per_class > few:
            raise UserError(f"data.per_class={per_class}, but the smallest class has {few} images to train on.")
        counts = [per_class] * len(classes)
    else:
        counts = [max(1, round(len(c) * (fraction or 1))) for c in classes]
    return torch.cat(_cut(classes, counts)[0]).sort().values


def _cut(classes: list[Tensor], counts: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    pairs = list(zip(classes, counts, strict=True))
    return [c[:n] for c, n in pairs], [c[n:] for c, n in pairs]


def _mean_std(images: Tensor) -> tuple[list[float], list[float]]:
    """Of each channel of uint8 images (N, C, H, W), on the scale 0 to 1, from a histogram: exact and without a float copy."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for c in range(images.shape[1]):
        p = torch.bincount(images[:, c].flatten().long(), minlength=256).double()
        p /= p.sum()
        m = (p * levels).sum()
        mean.append(float(m))
        std.append(float((p * (levels - m) ** 2).sum().sqrt()) or 1.0)
    return mean, std
