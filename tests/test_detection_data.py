"""Data of object detection: boxes that are exact, scenes to test on that share nothing with those to train on."""

import itertools

import numpy as np
import pytest
import torch

from litdistill.data.sources import load
from litdistill.tasks.detection import scenes
from litdistill.tasks.detection.scenes import CONTRAST, compose, digit_scenes, grounds
from litdistill.utils.errors import UserError


def there(targets: torch.Tensor) -> torch.Tensor:
    return targets[..., 4] >= 0


# -- scenes of digits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "split"), [(64, "train"), (64, "test"), (33, "train"), (160, "test")])
def test_boxes_are_tight_around_what_is_drawn_and_nothing_else_is_changed(size, split):
    found = compose(40, size, split)
    behind = torch.from_numpy(grounds(torch.arange(40), size, split)).permute(0, 3, 1, 2)
    for image, ground, targets, mask in zip(found.images, behind, found.targets, found.masks, strict=True):
        seen = torch.zeros(size, size, dtype=torch.int64)
        for x1, y1, x2, y2, label, crowd in targets[there(targets)].int().tolist():
            inside = mask[y1:y2, x1:x2]
            assert crowd == 0
            assert set(inside.unique().tolist()) <= {0, 1 + label}
            drawn = inside > 0
            assert drawn[0].any()
            assert drawn[-1].any()
            assert drawn[:, 0].any()
            assert drawn[:, -1].any()
            seen[y1:y2, x1:x2] += 1
        assert seen.max() == 1  # no two overlap
        assert not mask[seen == 0].any()
        assert torch.equal(image[:, mask == 0], ground[:, mask == 0])
        assert (image[:, mask > 0] != ground[:, mask > 0]).any(0).float().mean() > 0.9


def test_boxes_are_where_a_picture_differs_from_its_ground(monkeypatch):
    monkeypatch.setattr(scenes, "grounds", lambda ids, size, split: np.zeros((len(ids), size, size, 3), np.uint8))
    compose.cache_clear()
    found = compose(30, 64, "train")
    compose.cache_clear()
    for image, targets in zip(found.images, found.targets, strict=True):
        boxes = targets[there(targets), :4].int().tolist()
        changed = image.amax(0) > 0
        for x1, y1, x2, y2 in boxes:
            rows, columns = changed[y1:y2, x1:x2].nonzero().T
            assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, y2 - y1 - 1, 0, x2 - x1 - 1)
            changed[y1:y2, x1:x2] = False
        assert not changed.any()


def test_digits_are_lighter_than_their_ground():
    luminance = torch.tensor([0.299, 0.587, 0.114])
    found = compose(60, 64, "train")
    behind = torch.from_numpy(grounds(torch.arange(60), 64, "train"))
    differences = []
    for image, ground, targets, mask in zip(found.images, behind, found.targets, found.masks, strict=True):
        for x1, y1, x2, y2 in targets[there(targets), :4].int().tolist():
            drawn = mask[y1:y2, x1:x2] > 0
            own, under = ((p.float() @ luminance)[y1:y2, x1:x2][drawn] for p in (image.permute(1, 2, 0), ground))
            differences.append(float(own.mean() - under.mean()))
    # What is drawn is between a quarter and all of the digit's color.
    assert min(differences) > CONTRAST / 2
    assert np.median(differences) > CONTRAST * 0.75


def test_there_are_one_to_three_digits_of_every_class_inside_the_picture():
    found = compose(500, 64, "train")
    numbers = there(found.targets).sum(1)
    assert set(numbers.tolist()) == {1, 2, 3}
    boxes = found.targets[there(found.targets)]
    assert len(boxes[:, 4].unique()) == 10
    assert boxes[:, 4].long().bincount().min() > 0.5 * len(boxes) / 10
    assert boxes[:, :4].min() >= 0
    assert boxes[:, :4].max() == 64  # edges, not centers of pixels
    assert (boxes[:, 2:4] > boxes[:, :2]).all()
    assert (boxes[:, 3] - boxes[:, 1]).max() <= 28


def test_train_and_test_share_neither_digits_nor_photographs(monkeypatch):
    used: dict[str, set[bytes]] = {"train": set(), "test": set()}
    drawn = scenes._drawn
    for split in used:
        monkeypatch.setattr(
            scenes,
            "_drawn",
            lambda glyphs, *rest, split=split: used[split].update(g.tobytes() for g in glyphs) or drawn(glyphs, *rest),
        )
        compose.cache_clear()
        compose(900, 32, split)
    compose.cache_clear()
    source = load("digits", None, None, False)
    assert used["test"] <= {image.numpy()[0].tobytes() for image in source.test.images}
    assert not used["train"] & used["test"]
    assert len(used["train"]) > 800
    # Photographs whose pixels say their column: a crop's pixels are then of one part alone.
    columns = np.broadcast_to(np.arange(640)[None, :, None] * 255 // 640, (427, 640, 3)).astype(np.uint8)
    monkeypatch.setattr(scenes, "load_sample_images", lambda: type("Photos", (), {"images": [columns, columns]}))
    last, first = (grounds(torch.arange(300), 64, split) for split in ("train", "test"))
    assert last.max() == 463 * 255 // 640 // 2
    assert first.min() == 464 * 255 // 640 // 2


def test_scenes_are_the_same_however_many_there_are_and_differ_from_each_other():
    few, many = compose(270, 64, "train"), compose(300, 64, "train")
    for part, whole in zip(few, many, strict=True):
        assert torch.equal(part, whole[:270])
    compose.cache_clear()
    assert torch.equal(compose(300, 64, "train").images, many.images)
    for a, b in itertools.combinations(many.images[:20], 2):
        assert not torch.equal(a, b)
    assert not torch.equal(there(compose(270, 64, "test").targets), there(few.targets))


def test_the_data_set_is_uint8_pictures_with_padded_boxes():
    data = digit_scenes(count=40, val_size=8)
    data.setup()
    assert (data.input_shape, data.input_dtype, data.num_classes) == ((3, 64, 64), torch.uint8, 10)
    assert (len(data.train_ids), len(data.val_ids), len(data.test_ids)) == (32, 8, 40)
    batch = data.get_batch("train", torch.arange(4))
    assert batch.inputs.shape == (4, 3, 64, 64)
    assert (batch.targets.shape, batch.targets.dtype) == ((4, 3, 6), torch.float32)
    assert set(data.show("train", 0)) <= set("0123456789 and")


@pytest.mark.parametrize("option", [{"count": 1}, {"size": 31}, {"size": 161}])
def test_scenes_that_cannot_be_made_are_refused(option):
    with pytest.raises(UserError, match=rf"^data\.{next(iter(option))}="):
        digit_scenes(**option)


def test_channels_are_standardized_by_the_pictures_that_are_not_held_out():
    data = digit_scenes(count=60, val_size=20, fraction=0.5)
    data.setup()
    rest = torch.ones(60, dtype=torch.bool)
    rest[data.val_ids] = False
    pixels = data.source.train.inputs[rest].double() / 255
    torch.testing.assert_close(torch.tensor(data.mean).double(), pixels.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.tensor(data.std).double(), pixels.std((0, 2, 3), correction=0), rtol=1e-6, atol=0)
