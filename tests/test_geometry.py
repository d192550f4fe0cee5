"""Boxes and masks follow augmented images: the drawn object is where its moved box and mask say it is."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from litdistill.data.augment import Crop, Cutout, Flip, apply_views, draw_views
from litdistill.data.colors import ColorJitter
from litdistill.data.crops import RandomErasing, RandomResizedCrop
from litdistill.data.geometry import IGNORED, Moves, move_boxes, move_masks, moves_of
from litdistill.data.randaugment import RandAugment
from litdistill.data.tensors import TensorData, TensorSource, TensorSplit
from litdistill.tasks.detection.boxes import LABEL, as_dicts, padded, present
from litdistill.types import has_label
from litdistill.utils.errors import UserError
from litdistill.utils.modality import Modality

H, W = 40, 56
STEPS = {
    "flip": [Flip()],
    "crop": [Crop(6)],
    "both": [Crop(3), Flip()],
    "resized": [RandomResizedCrop((0.4, 1.0))],
    "all": [Flip(), RandomResizedCrop((0.5, 1.0), size=(48, 32)), Crop(4), ColorJitter(0.1), Cutout(2, (48, 32))],
}


def scenes(count: int) -> tuple[Tensor, Tensor]:
    """One white rectangle of at least 8 pixels a side on black in each image, and its box."""
    g = torch.Generator().manual_seed(0)
    images, boxes = torch.zeros(count, 3, H, W, dtype=torch.uint8), []
    for image in images:
        x1, y1 = int(torch.randint(0, W - 20, (), generator=g)), int(torch.randint(0, H - 20, (), generator=g))
        x2, y2 = x1 + int(torch.randint(8, 20, (), generator=g)), y1 + int(torch.randint(8, 20, (), generator=g))
        image[:, y1:y2, x1:x2] = 255
        boxes.append(torch.tensor([[x1, y1, x2, y2, 3, 0]], dtype=torch.float32))
    return images, padded(boxes, 2)


@pytest.mark.parametrize("name", STEPS)
def test_a_moved_box_bounds_the_moved_object(name: str) -> None:
    steps, (images, targets), ids = STEPS[name], scenes(60), torch.arange(60)
    if name == "all":  # a cutout may cut the object; its place is tested by the others
        steps = [step for step in steps if not isinstance(step, (Cutout, ColorJitter))]
    views = draw_views(steps, 7, 5, ids)
    seen = apply_views(steps, images, views, 7, ids)
    moved = move_boxes(targets, moves_of(steps, views, 7, ids, (H, W)))
    kept = 0
    for image, box in zip(seen, moved, strict=True):
        bright = image[0] > 127
        if box[0, LABEL] < 0:
            assert bright.float().mean() < 0.25 * 20 * 20 / (H * W) * 2.5
            continue
        kept += 1
        ys, xs = bright.nonzero().unbind(1)
        found = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert (found - box[0, :4]).abs().max() <= 1  # antialiasing moves an edge by at most a pixel
        assert box[1, LABEL] == -1
    assert kept > 30


@pytest.mark.parametrize("name", STEPS)
def test_a_moved_mask_covers_the_moved_object(name: str) -> None:
    steps, (images, _), ids = [s for s in STEPS[name] if getattr(s, "moves", True)], scenes(30), torch.arange(30)
    views = draw_views(steps, 7, 5, ids)
    seen = apply_views(steps, images, views, 7, ids)
    masks = (images[:, 0] > 127).long()
    moves = moves_of(steps, views, 7, ids, (H, W))
    assert moves.size == tuple(seen.shape[2:])
    moved = move_masks(masks, moves)
    inside = moved != IGNORED
    same = (moved == 1) == (seen[:, 0] > 127)
    assert same[inside].float().mean() > 0.98
    exact = {"flip", "crop", "both"}
    assert name not in exact or bool(same[inside].all())
    assert bool((seen[:, 0][~inside] == 0).all())  # what is outside of the image is black, and counts for nothing
    assert not has_label(move_masks(torch.full_like(masks, -1), moves)).any()


def test_right_values_of_moved_boxes() -> None:
    targets = padded([torch.tensor([[2.0, 3, 10, 9, 1, 0], [0, 0, 4, 4, 2, 1]])], 3)
    in_20 = lambda affine: Moves(affine, torch.tensor([[0.0, 0, 20, 20]]), (20, 20))  # noqa: E731
    flip = torch.tensor([[-1.0, 20, 1, 0]])
    assert move_boxes(targets, in_20(flip))[0].tolist() == [
        [10, 3, 18, 9, 1, 0],
        [16, 0, 20, 4, 2, 1],
        [0, 0, 0, 0, -1, 0],
    ]
    left = torch.tensor([[1.0, -3, 1, 0]])  # a quarter of the second box is left, and the first is clipped
    assert move_boxes(targets, in_20(left))[0, :, :5].tolist()[:2] == [[0, 3, 7, 9, 1], [0, 0, 1, 4, 2]]
    further = torch.tensor([[1.0, -3.5, 1, 0]])
    assert move_boxes(targets, in_20(further))[0, :, LABEL].tolist() == [1, -1, -1]
    unlabelled = torch.full_like(targets, torch.nan)
    assert not has_label(move_boxes(unlabelled, in_20(flip))).any()


def read(geometry: str = "boxes") -> TensorSource:
    images, targets = scenes(50)
    targets = targets if geometry == "boxes" else (images[:, 0] > 127).long()
    split = TensorSplit(images, targets)
    return TensorSource(split, split, tuple("abcd"), Modality(), geometry=geometry)  # type: ignore[arg-type]


@pytest.mark.parametrize("geometry", ["boxes", "mask"])
def test_labels_of_pictures_can_be_hidden(geometry: str) -> None:
    make = functools.partial(TensorData, functools.partial(read, geometry), "scenes", "detection", seed=1)
    data = make(labels=9)
    data.setup()
    known = has_label(data.train_targets[data.train_ids])
    assert int(known.sum()) == 9
    assert data.train_labels == "some"
    assert has_label(data.train_targets[data.val_ids]).all()
    first = has_label(data.train_targets[data._epoch(0).ids])
    assert not first[:9].all()  # the seed of both would have them first
    alone = make(labels=9, only_labelled=True)
    alone.setup()
    assert torch.equal(alone.train_ids, data.train_ids[known])
    assert alone.train_labels == "all"
    with pytest.raises(UserError, match="there are 45 training samples with a label"):
        make(labels=46).setup()


def test_views_of_data_have_moved_targets_whatever_the_batch() -> None:
    data = TensorData(read, "scenes", "detection", augment=["Flip", {"Crop": {"pad": 4}}], seed=3)
    data.setup()
    rows = data._epoch(2)
    assert rows.views is not None
    whole = data.get_batch("train", rows.ids, rows.views)
    one = data.get_batch("train", rows.ids[5:6], rows.views[5:6])
    assert torch.equal(whole.targets[5:6], one.targets)
    assert not torch.equal(whole.targets, data.get_batch("train", rows.ids).targets)
    ys, xs = (one.inputs[0, 0] > 127).nonzero().unbind(1)
    assert one.targets[0, 0, :4].tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_what_boxes_cannot_follow_is_refused() -> None:
    with pytest.raises(UserError, match="RandAugment, and nothing says how boxes follow it"):
        TensorData(read, "scenes", "detection", augment=[RandAugment()]).setup()
    TensorData(read, "scenes", "detection", augment=[RandomErasing(), ColorJitter(0.1)]).setup()


def test_objects_of_pictures() -> None:
    targets = padded([torch.tensor([[0.0, 0, 5, 5, 1, 0], [1, 1, 4, 4, 2, 1], [3, 3, 3, 9, 0, 0]]), torch.zeros(0, 6)])
    assert present(targets).tolist() == [[True, False, False], [False, False, False]]
    assert present(targets, crowds=True)[0].tolist() == [True, True, False]
    found = as_dicts(targets)
    assert found[0]["boxes"].tolist() == [[0, 0, 5, 5]]
    assert found[0]["labels"].tolist() == [1]
    assert len(found[1]["labels"]) == 0
    assert has_label(targets).all()
