"""A last minibatch of one sample: left out of the epoch where the student cannot be trained on it, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from litdistill.data import tables
from litdistill.data.datamodule import ImageData
from litdistill.data.loading import IndexLoader, Rows, trained_samples
from litdistill.methods.supervised import Supervised
from litdistill.tasks.classification import Classification
from litdistill.training.distill import distill
from litdistill.training.last_batch import fails_on_one, require_two_samples, say_what_is_left_out
from litdistill.training.train import train
from litdistill.utils.errors import UserError
from tests.conftest import compose_config


class OneByOne(nn.Module):
    """Batch normalization on maps of 1x1, and a dropout that draws."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(), nn.Linear(4, 10))

    def forward(self, x):
        return self.layers(x.float() / 255)


class Wide(OneByOne):
    """The same on maps of 6x6, where one sample has a deviation."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))


COUNT = 118  # images of a tenth of the digits, rounded class by class


def digits(**options) -> ImageData:
    data = ImageData("digits", **{"batch_size": 389, **options})  # 1168 = 3 x 389 + 1
    data.setup()
    return data


@pytest.mark.parametrize(
    ("count", "batch", "processes", "smallest", "kept"),
    [
        (1168, 389, 1, 2, 1167), (1168, 389, 1, 1, 1168), (1169, 389, 1, 2, 1169), (1167, 389, 1, 2, 1167), (1, 389, 1, 2, 0),
        (17, 4, 2, 2, 16), (19, 4, 2, 2, 16), (20, 4, 2, 2, 20), (19, 4, 2, 1, 19),
    ],
)  # fmt: skip
def test_samples_of_an_epoch(count, batch, processes, smallest, kept):
    assert trained_samples(count, batch, processes, smallest) == kept
    loaders = [
        IndexLoader(
            lambda _: Rows("train", torch.arange(count)), count, batch, rank, processes, True, smallest=smallest
        )
        for rank in range(processes)
    ]
    parts = [[len(rows.ids) for rows in loader] for loader in loaders]
    assert all(len(part) == loaders[0].minibatches == -(-kept // (batch * processes)) for part in parts)
    if smallest == 2:
        assert sum(map(sum, parts)) == kept
        assert all(size > 1 for part in parts for size in part)


@pytest.mark.parametrize("group", [0, 2])
def test_other_samples_are_left_out_in_each_epoch_and_the_rest_keeps_its_order(group):
    data = digits()
    whole = [data._epoch(epoch).ids for epoch in range(3)]
    data.smallest_batch = 2
    loader = data.train_loader(group=group)
    for epoch in range(3):
        loader.set_epoch(epoch)
        assert torch.equal(torch.cat([rows.ids for rows in loader]), whole[epoch][:-1])
    assert len({int(ids[-1]) for ids in whole}) == 3
    loader.load_state_dict({"epoch": 2, "done": 2})  # a resumed run goes on at the next minibatch
    assert torch.equal(torch.cat([rows.ids for rows in loader]), whole[2][778:-1])


@pytest.mark.parametrize(
    ("net", "options", "several", "smallest"),
    [
        (OneByOne, {}, False, 2), (Wide, {}, False, 1), (OneByOne, {"batch_size": 388}, False, 1),
        (OneByOne, {"batch_size": 388}, True, 2), (OneByOne, {"epoch_size": 779}, False, 2),
        (OneByOne, {"per_class": 7, "batch_size": 23}, False, 2),
        (OneByOne, {"fraction": 0.1, "batch_size": COUNT - 1}, False, 2),
    ],
)  # fmt: skip
def test_it_is_known_before_the_first_step(net, options, several, smallest):
    data = digits(**options)
    require_two_samples(net, data, Classification(), several)
    assert data.smallest_batch == smallest


def test_nothing_is_left_of_the_trial():
    data, net, wide = digits(), OneByOne(), Wide()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert fails_on_one(net, data.get_batch("train", data.train_ids[:1]), Classification())
    assert not fails_on_one(wide, data.get_batch("train", data.train_ids[:1]), Classification())
    assert not fails_on_one(net, data.get_batch("train", data.train_ids[:2]), Classification())
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert net.training


def test_where_no_minibatch_has_two_samples_it_is_an_error():
    for options in ({"batch_size": 1}, {"epoch_size": 1}):
        data = digits(**options)
        require_two_samples(OneByOne, data, Classification(), False)
        with pytest.raises(UserError, match=r"takes two samples in each process.*Set data\.batch_size to 2 or more"):
            say_what_is_left_out(data, Supervised(), 1)


def test_a_run_of_a_network_of_1x1_maps_trains(tmp_path, caplog):
    """vgg8 halves digits to 1x1; 120 training samples are 119 and one."""
    options = ("net@student=vgg8", "data.per_class=12", "data.batch_size=119", "method=supervised", "teacher=null")
    cfg = compose_config(tmp_path / "run", *options, "trainer=cpu", "trainer.max_epochs=2")
    caplog.set_level("INFO")
    train(cfg)
    assert "The last 1 of the 120 samples of each epoch are left out, others every time" in caplog.text
    assert json.loads((Path(cfg.folder) / "summary.json").read_text())["steps"] == 2  # one an epoch, and not two


def test_tables_too(caplog):
    caplog.set_level("INFO")
    data = tables.multilabel(batch_size=23)
    data.setup()
    data.smallest_batch = 2
    count = len(data.train_ids)
    data.batch_size = count - 1
    assert [len(rows.ids) for rows in data.train_loader()] == [count - 1]


def test_distill_leaves_it_out_of_its_own_data_and_refuses_it_in_a_strangers_loader(tmp_path, caplog):
    caplog.set_level("INFO")
    data = digits(per_class=3, batch_size=29)
    distill(OneByOne(), None, data, max_epochs=1, out=tmp_path, trainer={"accelerator": "cpu", "logger": False})
    assert "The last 1 of the 30 samples of each epoch are left out" in caplog.text
    samples = TensorDataset(torch.zeros(9, 1, 8, 8), torch.zeros(9, dtype=torch.long))
    with pytest.raises(UserError, match=r"last batch has one sample \(9 in batches of 4\).*drop_last=True"):
        distill(OneByOne(), None, DataLoader(samples, batch_size=4), max_epochs=1, out=tmp_path)
    options = {"max_epochs": 1, "out": tmp_path, "trainer": {"accelerator": "cpu", "logger": False}}
    distill(Wide(), None, DataLoader(samples, batch_size=4), **options)
    distill(OneByOne(), None, DataLoader(samples, batch_size=4, drop_last=True), **options)
