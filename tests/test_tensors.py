"""`TensorData`: samples in memory, split and standardized the same way everywhere, with ids that a cache can go by."""

import pytest
import torch
from sklearn.datasets import load_diabetes

from litdistill.data import tables
from litdistill.data.protocol import as_indexed
from litdistill.data.tensors import TensorData, TensorSource, TensorSplit, held_out_test
from litdistill.models.small import mlp
from litdistill.utils.errors import UserError
from litdistill.utils.modality import TEXT, Modality


def read(name: str = "diabetes", **options) -> TensorData:
    data = getattr(tables, name)(**options)
    data.setup()
    return data


@pytest.mark.parametrize(
    ("name", "count", "features", "outputs"), [("diabetes", 442, 10, 1), ("multilabel", 2000, 40, 10)]
)
def test_every_sample_is_in_one_split_whatever_the_seed(name, count, features, outputs):
    data, other = read(name), read(name, seed=7)
    ids = torch.cat([data.train_ids, data.val_ids])
    assert torch.equal(ids.sort().values, torch.arange(count - len(data.test_ids)))
    whole = torch.cat([data.source.train.inputs, data.source.test.inputs])
    assert torch.equal(whole.unique(dim=0), data.read().train.inputs.unique(dim=0))
    assert len(data.test_ids) == round(0.2 * count)
    assert len(data.val_ids) == round(0.1 * (count - len(data.test_ids)))
    assert all(torch.equal(getattr(data, k), getattr(other, k)) for k in ("train_ids", "val_ids", "test_ids"))
    assert (data.input_shape, data.num_classes) == ((features,), outputs)
    batch = data.get_batch("train", data.train_ids[:3])
    assert (
        mlp(data.num_classes, data.input_shape, widths=[5])(batch.inputs).shape == batch.targets.shape == (3, outputs)
    )


def test_mean_and_deviation_are_of_what_is_not_held_out_and_numbers_are_as_published():
    data, raw = read(fraction=0.5), load_diabetes(scaled=False)
    rest = read()
    inputs = torch.cat([b.inputs for b in rest.batches("train")])
    torch.testing.assert_close(torch.tensor(data.mean), inputs.mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.tensor(data.std), inputs.std(0, correction=0), rtol=1e-5, atol=0)
    assert len(data.train_ids) == round(len(rest.train_ids) / 2)
    assert set(data.train_ids.tolist()) < set(rest.train_ids.tolist())
    assert (data.mean, data.std) == (rest.mean, rest.std)  # a teacher of all the samples sees the same numbers
    published = {tuple(row): y for row, y in zip(torch.tensor(raw.data).float().tolist(), raw.target, strict=True)}
    for split in ("train", "test"):
        batch = data.get_batch(split, torch.tensor([3, 0]))
        assert batch.targets[:, 0].tolist() == [published[tuple(row)] for row in batch.inputs.tolist()]


def test_labels_are_zero_or_one_and_differ_in_number():
    targets = read("multilabel").train_targets
    assert set(targets.unique().tolist()) == {0.0, 1.0}
    assert len(targets.sum(1).unique()) > 3
    assert 0.1 < targets.mean() < 0.9
    assert torch.equal(read("multilabel").source.train.inputs, read("multilabel").source.train.inputs)


def test_a_loader_gives_each_sample_once_and_in_another_order_each_epoch():
    data = read(batch_size=50)
    loader, epochs = data.train_loader(), []
    for epoch in range(2):
        loader.set_epoch(epoch)
        epochs.append(torch.cat([data.make_batch(rows).ids for rows in loader]))
    assert torch.equal(epochs[0].sort().values, data.train_ids)
    assert not torch.equal(epochs[0], epochs[1])
    ranks = [torch.cat([rows.ids for rows in data.eval_loader("val", rank, 2)]) for rank in range(2)]
    assert torch.equal(torch.cat(ranks).sort().values, data.val_ids)


def test_it_knows_its_samples_by_id():
    data = read()
    assert as_indexed(data) is data
    assert data.identity("train") == read(seed=3).identity("train") != read("multilabel").identity("train")
    assert (data.views, data.view_count(5), data.draws_views) == (1, 1, False)


@pytest.mark.parametrize(
    "options",
    [{"labels": 5}, {"fraction": 0}, {"fraction": 2}, {"val_size": 0}, {"val_size": 400}, {"batch_size": 0}],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        read(**options)


# -- classes, hidden labels, views ---------------------------------------------------------------------------------------


class Add:
    """Adds one to four to every value."""

    views = 4

    def draw(self, bits):
        return bits % 4

    def apply(self, inputs, code):
        return inputs + 1 + code[:, None]


def words(**options) -> TensorData:
    """120 samples of two classes as token ids; sample i of "train" is i, i, i."""

    def source() -> TensorSource:
        ids = torch.arange(120)
        split = TensorSplit(ids[:, None].repeat(1, 3), (ids % 3 == 0).long())
        say = lambda split, i: f"{split} {i}"  # noqa: E731
        return TensorSource(
            split, None, ("no", "yes"), Modality(TEXT, {"length": 3}), facts={"vocab_size": 200}, show=say
        )

    data = TensorData(source, "words", "classification", **options)
    data.setup()
    return data


def test_classes_are_split_by_their_shares_and_a_sample_keeps_its_words():
    data = words()
    assert [data.count(split) for split in ("train", "val", "test")] == [87, 9, 24]  # 6.4 of 64 and 3.2 of 32 validate
    assert data.source.test.targets.sum() == 8
    assert data.train_targets[data.val_ids].sum() == 3
    batch = data.get_batch("test", torch.tensor([4]))
    assert data.show("test", 4) == f"train {int(batch.inputs[0, 0])}"  # its place in what was read
    assert (data.input_dtype, data.facts["vocab_size"], data.train_labels) == (torch.int64, 200, "all")


def test_hidden_labels_are_minus_one_in_training_and_the_control_trains_on_the_same_labels():
    data, control = words(labels=12), words(labels=12, only_labelled=True)
    kept = data.train_targets[data.train_ids] >= 0
    assert kept.sum() == 12
    assert (data.train_labels, control.train_labels, len(data.train_ids)) == ("some", "all", 87)
    assert torch.equal(control.train_ids, data.train_ids[kept])
    assert (data.train_targets[data.val_ids] >= 0).all()
    assert data.identity("train") == words().identity("train")  # a teacher's outputs do not depend on it
    assert (data.get_batch("train", data.train_ids).targets >= 0).sum() == 12
    with pytest.raises(UserError, match="labels=500, and there are 87 training samples"):
        words(labels=500)


def test_a_view_is_the_same_in_every_batch_and_is_known_to_the_cache():
    data = words(augment=[Add()], fixed_views=2)
    assert (data.views, data.view_count(9), data.draws_views) == (None, 2, True)
    ids, views = torch.tensor([7, 8, 9]), torch.tensor([0, 1, 0])
    together = data.get_batch("train", ids, views).inputs
    alone = torch.cat([data.get_batch("train", ids[i : i + 1], views[i : i + 1]).inputs for i in range(3)])
    assert torch.equal(together, alone)
    assert not torch.equal(together, data.get_batch("train", ids).inputs)
    assert data.identity("train") != words().identity("train")
    assert data.identity("val") == words().identity("val")


def test_what_cannot_be_held_out_to_test_on_is_not_said_of_the_validation_set():
    with pytest.raises(UserError, match="A fifth to test on: each of the 3 classes has one training sample"):
        held_out_test(torch.arange(3))
