"""Data that know their samples by id, and a teacher of several heads: what the cache asks of either, and nothing else."""

import pytest
import torch

from litdistill.data.augment import Flip
from litdistill.data.datamodule import ImageData
from litdistill.data.protocol import as_indexed
from litdistill.distillation.teacher_cache import TeacherCache
from litdistill.types import Batch, Outputs


class Boxes:
    """A teacher with two heads and a feature, of inputs that are no images."""

    taps, mode, sha256 = ("layer",), None, "0"

    def __call__(self, batch):
        x, y = batch.inputs["x"], batch.inputs["y"]
        return Outputs({"cls": x * 2, "box": torch.stack([x, y], 2)}, {"layer": y[:, None]})


class Table:
    batch_size, epoch_size, draws_views, views = 4, None, False, 1
    train_ids, val_ids, test_ids = torch.arange(6), torch.arange(6, 8), torch.arange(8, 10)
    train_targets = torch.zeros(10)

    def view_count(self, rounds):
        return 1

    def identity(self, split):
        return "table"

    def get_batch(self, split, ids, views=None):
        numbers = ids[:, None] + torch.tensor([0.0, 0.5, 0.25])
        return Batch({"x": numbers, "y": -numbers}, self.train_targets[ids], ids, views)

    def make_batch(self, rows):
        return self.get_batch(rows.split, rows.ids)

    def batches(self, split, device="cpu"):
        yield self.get_batch(split, getattr(self, f"{split}_ids"))

    def train_loader(self, *_): ...

    def eval_loader(self, *_): ...


@pytest.mark.parametrize("folder", [False, True])
def test_the_heads_of_any_teacher_on_any_data_with_ids_are_kept(tmp_path, folder):
    data, teacher = Table(), Boxes()
    assert as_indexed(data) is data
    assert as_indexed(object()) is None
    cache = TeacherCache(teacher, data, torch.device("cpu"), tmp_path if folder else None)
    batch = data.get_batch("train", torch.tensor([3, 0, 5]))
    for _ in range(2):
        kept, live = cache.outputs(batch), teacher(batch)
        assert [*kept.heads] == ["cls", "box"]
        assert all(torch.equal(kept.heads[k], v) for k, v in live.heads.items())
        assert torch.equal(kept.features["layer"], live.features["layer"])
    assert (cache.computed, cache.requested) == (3, 6)
    assert cache.bytes() == (10 if folder else 6) * (4 * (3 + 6 + 3) + 8)


def test_an_image_data_module_knows_its_samples_by_id():
    data, flipped = (ImageData("digits", augment=augment) for augment in ([], [Flip()]))
    data.setup()
    flipped.setup()
    assert as_indexed(data) is data
    assert data.identity("val") != data.identity("test")
    assert flipped.identity("val") == data.identity("val")  # whose images are as they are
    assert flipped.identity("train") != data.identity("train")
