"""`ImageData`: splits, subsets, batches; the same views for any batch size and world size."""

import tracemalloc

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer

from litdistill.data import sources
from litdistill.data.augment import Crop, Flip
from litdistill.data.datamodule import ImageData
from litdistill.data.loading import IndexLoader, Rows, group_ends
from litdistill.data.splits import class_indices, hold_out
from litdistill.utils.errors import UserError


def digits(**options) -> ImageData:
    data = ImageData("digits", **options)
    data.setup()
    return data


def test_validation_is_held_out_stratified_and_the_same_for_every_seed():
    a, b = digits(seed=0), digits(seed=5)
    assert torch.equal(a.val_ids, b.val_ids)
    assert not set(a.val_ids.tolist()) & set(a.train_ids.tolist())
    assert len(a.val_ids) + len(a.train_ids) == len(a.train_targets)
    share = torch.bincount(a.train_targets[a.val_ids]) / torch.bincount(a.train_targets)
    assert ((share - 0.1).abs() < 0.01).all()
    assert 128 <= len(digits(val_size=130).val_ids) <= 132  # a count, rounded class by class


def test_per_class_and_fraction_choose_of_what_is_not_held_out():
    few = digits(per_class=7, seed=1)
    assert torch.bincount(few.train_targets[few.train_ids]).tolist() == [7] * 10
    assert not set(few.val_ids.tolist()) & set(few.train_ids.tolist())
    assert not torch.equal(few.train_ids, digits(per_class=7, seed=2).train_ids)
    assert torch.equal(few.train_ids, digits(per_class=7, seed=2, subset_seed=1).train_ids)
    tenth = digits(fraction=0.1)
    assert abs(len(tenth.train_ids) - 0.1 * len(digits().train_ids)) <= 5


def test_classes_are_renumbered_and_ids_stay():
    full, two = digits(), digits(classes=[7, 1])
    assert two.num_classes == 2
    assert two.class_names == ("7", "1")
    ids = two.train_ids
    assert torch.equal(two.train_targets[ids] == 0, full.train_targets[ids] == 7)
    assert set(full.train_targets[ids].tolist()) == {1, 7}
    assert set(two.source.test.targets[two.test_ids].tolist()) == {0, 1}
    assert torch.equal(two.source.train.images[ids], full.source.train.images[ids])


def test_classes_are_taken_by_name_too():
    """Quoted digits are names; of the classes that are chosen, those to omit are numbered anew."""
    for classes, omit in (([7, 1], [0]), (["7", "1"], ["7"]), (["7", "1"], [0]), ([7, 1], "7"), ([7, 1], 0)):
        data = digits(classes=classes, omit=omit)
        assert data.class_names == ("7", "1")
        assert torch.equal(data.train_ids, digits(classes=[7, 1], omit=[0]).train_ids)
        assert set(data.train_targets[data.train_ids].tolist()) == {1}
    assert torch.equal(digits(omit=["3", "5"]).train_ids, digits(omit=[3, 5]).train_ids)


def test_a_class_that_is_misspelled_is_corrected():
    with pytest.raises(UserError, match=r"data\.classes: there is no class katze; did you mean katzen\?"):
        class_indices("data.classes", ["katze", "hund"], ("hund", "katzen"))


def test_of_few_images_each_class_validates_one(caplog):
    caplog.set_level("INFO")
    targets = torch.tensor([0] * 4 + [1] * 4 + [2] * 30 + [3])
    held, rest = hold_out(torch.arange(39), targets, 0.1)
    assert targets[held].bincount(minlength=4).tolist() == [1, 1, 3, 0]  # one image is needed to train on
    assert targets[rest].bincount().tolist() == [3, 3, 27, 1]
    assert (
        "data.val_size=0.1 is less than one sample for 2 of 4 classes: 5 of 39 training samples are held out"
        in caplog.text
    )
    caplog.clear()
    hold_out(torch.arange(38), targets[:38], 0.2)
    assert not caplog.text  # nothing was adapted


@pytest.mark.parametrize("size", [0.9, 16])
def test_the_size_that_an_error_names_works(size):
    targets = torch.arange(4).repeat_interleave(4)
    with pytest.raises(UserError, match=r"Set it to 0\.75 at most, or to 4, one sample of each class") as error:
        hold_out(torch.arange(16), targets, size)
    assert "leaves 0 to train on and 16 to validate on" in str(error.value)
    assert len(hold_out(torch.arange(16), targets, 0.75)[1]) == 4
    assert len(hold_out(torch.arange(16), targets, 4)[0]) == 4
    with pytest.raises(UserError, match="each of the 3 classes has one training sample"):
        hold_out(torch.arange(3), torch.arange(3), 0.1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"val_size": 0}, "val_size"),
        ({"val_size": 0.9999}, "leaves 0 to train on"),
        ({"val_size": 1297}, "leaves 0 to train on"),
        ({"fraction": 0.5, "per_class": 3}, "one of them"),
        ({"fraction": 1.5}, "at most 1"),
        ({"per_class": 0}, "at least 1"),
        ({"per_class": 500}, "smallest class"),
        ({"classes": [0, 12]}, "0 to 9"),
        ({"classes": [3]}, "at least two"),
        ({"batch_size": 0}, "batch_size"),
        ({"classes": [3, "5"]}, "data.classes takes either names of classes or numbers: 3, '5'"),
        ({"classes": [True, False]}, "takes either names of classes or numbers: True, False"),
        ({"classes": [3.0, 5.0]}, "takes either names of classes or numbers: 3.0, 5.0"),
        ({"classes": ["3", "x"]}, "data.classes: there is no class x; the classes are 0, 1, 2"),
        ({"classes": ["3", "3"]}, "names a class twice: 3, 3"),
        ({"classes": "3"}, "at least two"),
        ({"omit": [10]}, "data.omit has the number 10, and the classes are 0 to 9"),
        ({"omit": ["3", 3]}, "data.omit takes either"),
        ({"omit": list(range(10))}, "names all classes"),
        ({"omit": list("0123456789")}, "names all classes"),
    ],
)
def test_impossible_options_are_refused_with_words(options, words):
    with pytest.raises(UserError, match=words):
        digits(**options)


def test_mean_and_deviation_are_those_of_the_training_images():
    data = digits()
    images = torch.cat([b.inputs for b in data.batches("train")]).double() / 255
    assert data.mean == pytest.approx([images.mean().item()], abs=1e-6)
    assert data.std == pytest.approx([images.std(correction=0).item()], abs=1e-6)
    given = digits(mean=[0.5], std=[0.25])
    assert (given.mean, given.std) == ([0.5], [0.25])


def test_batches_are_the_images_as_they_were_read():
    data = digits()
    batch = data.make_batch(Rows("train", torch.tensor([5, 0])))
    assert batch.inputs.dtype == torch.uint8
    assert torch.equal(batch.inputs, data.source.train.images[[5, 0]])
    assert torch.equal(batch.targets, data.train_targets[[5, 0]])
    assert batch.ids.tolist() == [5, 0]


class Recorder(LightningModule):
    """Keeps what it is given, per epoch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.get_batch = []

    def training_step(self, batch, batch_idx):
        self.get_batch += [
            (self.current_epoch, int(i), int(v), x.numpy().tobytes())
            for i, v, x in zip(batch.ids, batch.views, batch.inputs, strict=True)
        ]
        return self.weight * 1.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def views_seen(tmp_path, **options) -> list:
    model = Recorder()
    data = ImageData("digits", per_class=4, augment=[Crop(1), Flip()], **options)
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, limit_val_batches=0, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    return model.get_batch


def test_the_same_views_in_any_batch_size(tmp_path):
    a, b = views_seen(tmp_path, batch_size=40), views_seen(tmp_path, batch_size=7)
    assert a == b  # order, views and pixels, to the bit
    assert len({(e, i) for e, i, _, _ in a}) == len(a) == 80
    assert [x[1:3] for x in a[:40]] != [x[1:3] for x in a[40:]]
    assert a != views_seen(tmp_path, batch_size=40, seed=1)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_batches_of_one_process(world_size):
    ids = torch.arange(100, 137)

    def loader(size, *shares, **options):
        found = IndexLoader(lambda epoch: Rows("train", ids.roll(epoch)), 37, size, *shares, **options)
        found.set_epoch(3)
        return found

    alone = [b.ids for b in loader(6 * world_size)]
    assert torch.equal(torch.cat(alone), ids.roll(3))
    ranks = [[b.ids for b in loader(6, r, world_size)] for r in range(world_size)]
    assert all(len(r) == len(alone) == len(loader(6, 0, world_size)) for r in ranks)
    for i, batch in enumerate(alone):
        assert torch.equal(torch.cat([r[i] for r in ranks]), batch)  # evaluation counts each sample exactly once
    training = [list(loader(6, r, world_size, pad=True)) for r in range(world_size)]
    for i, batch in enumerate(alone):
        parts = [(rows[i].ids.double(), rows[i].weights[0]) for rows in training]
        weighted = sum(weight * float(part.mean()) for part, weight in parts)
        assert weighted / world_size == pytest.approx(float(batch.double().mean()))
        assert min(len(part) for part, _ in parts) > 1  # BatchNorm needs two


# -- where a loader stands -------------------------------------------------------------------------------------------

ROWS = {e: Rows("train", torch.arange(20).roll(e), torch.arange(20).roll(e) * 2) for e in range(3)}


def loader(group: int = 0, log_every: int = 0, **options) -> IndexLoader:
    """Seven minibatches of three samples, of which the last has two; each epoch in another order."""
    return IndexLoader(ROWS.__getitem__, 20, 3, group=group, log_every=log_every, **options)


def drawn(one: IndexLoader, epoch: int = 0) -> list[list[int]]:
    one.set_epoch(epoch)
    return [rows.ids.tolist() for rows in one]


@pytest.mark.parametrize("group", [0, 2])
def test_a_loader_goes_on_with_the_minibatch_that_came_next(group):
    whole = drawn(loader(group), 1)
    for done in range(len(whole) + 1):
        first = loader(group)
        first.set_epoch(1)
        batches = iter(first)
        for _ in range(done):
            next(batches)
        again = loader(group)
        again.load_state_dict(first.state_dict())
        assert drawn(again, 1) == whole[done:]
        assert len(again) == len(whole)  # Lightning counts on from where it was
        assert drawn(again, 2) == drawn(loader(group), 2)  # the next epoch is complete
        assert drawn(again, 1) == whole  # and so is the same one, once more


def test_a_state_holds_in_its_own_epoch_alone():
    one = loader()
    one.load_state_dict({"epoch": 1, "done": 4})
    assert drawn(one, 2) == drawn(loader(), 2)
    assert drawn(one, 1) == drawn(loader(), 1)  # nor later


def test_an_iterator_that_is_made_and_not_drawn_takes_nothing():
    one = loader()
    one.load_state_dict({"epoch": 0, "done": 4})
    iter(one)
    iter(one)  # as Lightning does, before it tells the epoch
    assert one.state_dict() == {"epoch": 0, "done": 4}  # as saved before the first batch
    assert drawn(one) == drawn(loader())[4:]


def test_the_end_of_an_epoch_is_no_place_in_the_next():
    one = loader()
    drawn(one, 0)
    assert one.state_dict() == {"epoch": 0, "done": 7}
    again = loader()
    again.load_state_dict(one.state_dict())
    assert drawn(again, 1) == drawn(loader(), 1)
    one.set_epoch(1)  # nothing of it is drawn yet
    assert one.state_dict() == {"epoch": 1, "done": 0}


def test_what_was_read_ahead_was_not_yielded():
    read = []

    def ahead(rows):
        found = list(rows)  # everything at once
        read.append(len(found))
        yield from found

    one = loader(2, fetch=ahead)
    batches = iter(one)
    next(batches)
    assert read == [4]
    assert one.state_dict()["done"] == 2


def test_groups_end_wherever_something_is_logged_and_with_the_epoch():
    assert group_ends(12, 4, 0) == [4, 8, 12]
    assert group_ends(12, 4, 5) == [4, 5, 9, 10, 12]
    assert group_ends(7, 16, 50) == [7]
    assert group_ends(3, 1, 0) == [1, 2, 3]
    rows = list(loader(3, 4))
    assert [r.sizes for r in rows] == [(3, 3, 3), (3,), (3, 3, 2)]
    assert [r.first for r in rows] == [0, 3, 4]
    assert [r.logs for r in rows] == [False, True, True]
    assert torch.cat([r.ids for r in rows]).tolist() == list(range(20))
    assert [r.logs for r in loader(3, 50)] == [False, False, True]  # an epoch that is shorter is logged at its end
    assert not any(r.logs for r in loader(3, 0))


def test_a_group_is_its_minibatches_in_a_row():
    data = digits(batch_size=10, augment=[Crop(1)], per_class=4)
    single, many = data.train_loader(), data.train_loader(group=3)
    batches = [data.make_batch(rows) for rows in single]
    parts = [batch for rows in many for batch in data.make_batch(rows).minibatches()]
    assert len(parts) == len(batches) == 4
    for a, b in zip(parts, batches, strict=True):
        assert all(torch.equal(getattr(a, key), getattr(b, key)) for key in ("inputs", "targets", "ids", "views"))
        assert a.weight == b.weight == 1


def test_an_epoch_can_be_longer_than_the_training_set(tmp_path):
    seen = views_seen(tmp_path, batch_size=40, epoch_size=100)
    assert len(seen) == 200
    counts = [sum(i == j for _, j, _, _ in seen) for i in {j for _, j, _, _ in seen}]
    assert counts == [5] * 40  # every image as often as any other
    assert len({(i, v) for _, i, v, _ in seen}) > 150  # ... and each time in another view


def test_reading_a_data_set_takes_one_copy_of_it():
    """Beside the files' own bytes: peak memory is never more than twice the data set."""
    draw = np.random.default_rng(0)
    files = {name: draw.bytes(3073 * 500) for name in ("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin")}
    size = 3072 * 1500
    tracemalloc.start()
    source = sources._records_source(files, ("a", "b"), 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.1 * size
    assert source.train.images[700].numpy().tobytes() == files["data_batch_2.bin"][200 * 3073 + 1 : 201 * 3073]
