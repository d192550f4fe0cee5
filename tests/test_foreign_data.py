"""Data modules of a stranger: with and without validation, endless, and what is read of them."""

from __future__ import annotations

import pytest
import torch
from lightning import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from litdistill import KD, BinaryKD, distill
from litdistill.data import tables
from litdistill.data.datamodule import ImageData
from litdistill.data.foreign import ForeignData, offers, output_names, sample, training_inputs
from litdistill.models.preprocess import Preprocess, Preprocessed
from litdistill.tasks.base import to_batch
from litdistill.utils.errors import UserError
from tests.foreigners import QUIET, loader, mlp, points, teacher_of_points

# -- data modules ------------------------------------------------------------------------------------------------------


class Foreign(LightningDataModule):
    """Yields tuples, and shifts its inputs on their way to the device, as some do with a GPU's help."""

    def __init__(self, batch_size: int = 32, shift: float = 0.0):
        super().__init__()
        self.batch_size, self.shift = batch_size, shift

    def setup(self, stage=None):
        x, y = points(192)
        self.parts = TensorDataset(x[:96], y[:96]), TensorDataset(x[96:144], y[96:144]), TensorDataset(x[144:], y[144:])

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + self.shift, batch[1]]

    def train_dataloader(self):
        return DataLoader(self.parts[0], self.batch_size)

    def val_dataloader(self):
        return DataLoader(self.parts[1], self.batch_size)

    def test_dataloader(self):
        return DataLoader(self.parts[2], self.batch_size)


class OnlyTrain(LightningDataModule):
    def train_dataloader(self):
        return loader()


class Endless(IterableDataset):
    def __iter__(self):
        x, y = points()
        while True:
            yield from zip(x, y, strict=True)


class EndlessData(Foreign):
    def train_dataloader(self):
        return DataLoader(Endless(), 8)


def test_distill_takes_a_foreign_data_module_with_and_without_a_validation_set(tmp_path):
    found = distill(mlp(6), teacher_of_points(), Foreign(), max_epochs=2, out=tmp_path, trainer=QUIET)
    assert (tmp_path / "best.ckpt").is_file()
    assert found.cache is None
    distill(mlp(6), None, OnlyTrain(), max_epochs=1, out=tmp_path / "b", trainer=QUIET)
    assert not (tmp_path / "b" / "best.ckpt").exists()
    with pytest.raises(UserError, match="leave val out"):
        distill(mlp(6), None, Foreign(), loader())


@pytest.mark.parametrize("name", ["digits", "multilabel"])
def test_data_that_know_their_samples_bring_groups_and_a_cache(tmp_path, name):
    torch.manual_seed(0)
    if name == "digits":
        data = ImageData(name="digits", per_class=12, batch_size=32, val_size=100)
        nets = [Preprocessed(nn.Sequential(nn.Flatten(), mlp(w, 64, 10)), Preprocess([0.3], [0.3])) for w in (8, 16)]
        method, task = KD(), "classification"
    else:
        data = tables.multilabel(fraction=0.1)
        nets, method, task = [mlp(w, 40, 10) for w in (8, 16)], BinaryKD(), "multilabel"
    found = distill(
        *nets, data, None, method, task, 3, tmp_path, trainer=QUIET | {"gradient_clip_val": 0.5}, allow_chance=True
    )  # fmt: skip
    assert not found.automatic_optimization
    assert found.clip == (0.5, "norm")
    assert found.cache is not None
    assert found.cache.computed < found.cache.requested
    assert found.trainer.global_step == 3 * -(-len(data.train_ids) // data.batch_size)
    assert found.trainer.fit_loop.epoch_progress.current.completed == 3


def test_foreign_data_are_read_as_a_trainer_would_give_them():
    module = Foreign(batch_size=20, shift=5.0)
    module.setup()
    data = ForeignData(module, to_batch)
    x, y = points(192)
    assert torch.equal(data.example.inputs, x[:20] + 5)
    assert torch.equal(torch.cat([b.inputs for b in data.batches("val")]), x[96:144] + 5)
    assert torch.equal(torch.cat([b.targets for b in data.batches("test")]), y[144:])
    assert torch.equal(sample(data, "val", 37), x[96 + 37] + 5)
    assert torch.equal(training_inputs(data, 2), data.example.inputs)
    assert data.input_shape == (4,)
    assert (data.num_classes, data.class_names, output_names(data, 3)) == (None, (), ("0", "1", "2"))
    assert [data.count(split) for split in ("train", "val", "test")] == [96, 48, 48]
    module.class_names = ["a", "b", "c"]
    assert (data.num_classes, output_names(data, 3)) == (3, ("a", "b", "c"))


def test_a_data_module_that_cannot_be_measured_is_refused_before_the_training():
    module = OnlyTrain()
    with pytest.raises(UserError, match=r"OnlyTrain has no val_dataloader.*litdistill\.distill"):
        ForeignData(module, to_batch)


def test_a_data_module_made_of_data_sets_has_the_loaders_that_it_was_given():
    rows = torch.utils.data.TensorDataset(*points(8))
    assert [offers(LightningDataModule.from_datasets(rows, rows), split) for split in ("val", "test")] == [True, False]
    assert not offers(LightningDataModule.from_datasets(rows), "val")
