"""Data with masks: scenes of digits, folders of one's own, masks that follow their views, and bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from litdistill.data.augment import Crop, Flip
from litdistill.tasks.detection.scenes import compose
from litdistill.tasks.segmentation.data import digit_masks, masks
from litdistill.utils.errors import UserError


def test_scenes_have_the_masks_of_their_boxes():
    data = digit_masks(40, 64, val_size=10)
    data.setup()
    batch = data.get_batch("train", torch.arange(40))
    assert batch.targets.shape == (40, 64, 64)
    assert data.class_names == ("ground", *map(str, range(10)))
    boxes = compose(40, 64, "train").targets
    for mask, found in zip(batch.targets, boxes, strict=True):
        outside = torch.ones(64, 64, dtype=torch.bool)
        for x1, y1, x2, y2, label, _ in found[found[:, 4] >= 0].int().tolist():
            part = mask[y1:y2, x1:x2]
            assert set(part.unique().tolist()) <= {0, label + 1}
            for edge in (part[0], part[-1], part[:, 0], part[:, -1]):
                assert bool((edge == label + 1).any())
            outside[y1:y2, x1:x2] = False
        assert bool((mask[outside] == 0).all())


def test_masks_follow_their_views_pixel_by_pixel():
    """Pictures whose red is their class: after any view it still is, and 255 is where nothing of the picture is seen."""
    plain, viewed = digit_masks(20, 32, val_size=4), digit_masks(20, 32, val_size=4, augment=[Flip(), Crop(5)])
    for data in (plain, viewed):
        data.setup()
    source = viewed.source
    images = source.train.targets.add(1)[:, None].expand(-1, 3, -1, -1).to(torch.uint8)
    viewed.source = source._replace(train=source.train._replace(inputs=images))
    ids = torch.arange(20)
    views = torch.arange(20) * 11 % 242
    batch = viewed.get_batch("train", ids, views)
    seen = batch.inputs[:, 0].long()
    assert torch.equal(batch.targets, torch.where(seen == 0, 255, seen - 1))
    assert bool((batch.targets == 255).any())
    assert not torch.equal(batch.targets, plain.get_batch("train", ids).targets)


def test_labels_of_so_many_pictures_are_kept():
    data = digit_masks(40, 32, val_size=10, labels=8)
    data.setup()
    known = (data.train_targets[data.train_ids] >= 0).flatten(1)
    assert int(known.all(1).sum()) == 8
    assert int(known.any(1).sum()) == 8
    assert data.train_labels == "some"
    few = digit_masks(40, 32, val_size=10, labels=8, only_labelled=True)
    few.setup()
    assert torch.equal(few.train_ids, data.train_ids[known.all(1)])
    assert few.train_labels == "all"


# -- folders -----------------------------------------------------------------------------------------------------------


def write(root, name, size=(12, 8), mask_size=None, values=(0, 1, 2), split="", mode="L", picture=".jpg"):
    for kind in ("images", "masks"):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([*f"{split}/{name}".encode()])  # no picture twice
    wide, tall = size
    Image.fromarray(rng.integers(0, 255, (tall, wide, 3)).astype(np.uint8)).save(
        root / "images" / split / (name + picture)
    )
    wide, tall = mask_size or size
    found = rng.choice(values, (tall, wide)).astype(np.uint8)
    found.flat[: len(values)] = values
    image = Image.fromarray(found)
    if mode == "P":
        image.putpalette([i % 256 for i in range(768)])
    image.convert(mode) if mode not in ("L", "P") else image
    (image if mode in ("L", "P") else image.convert(mode)).save(root / "masks" / split / f"{name}.png")
    return found


@pytest.mark.parametrize("mode", ["L", "P"])
def test_a_folder_gives_the_values_of_its_masks(tmp_path, mode):
    expected = {f"p{i}": write(tmp_path, f"p{i}", mode=mode, values=(0, 1, 3, 255)) for i in range(10)}
    data = masks(tmp_path, val_size=2)
    data.setup()
    assert data.class_names == ("class 0", "class 1", "class 2", "class 3")
    assert (data.count("train"), data.count("val"), data.count("test")) == (6, 2, 2)
    found = torch.cat([data.source.train.targets, data.source.test.targets])
    assert sorted(map(tuple, found.flatten(1).tolist())) == sorted(
        tuple(v.flatten().tolist()) for v in expected.values()
    )


def test_the_folders_of_splits_are_those_of_the_data(tmp_path):
    for split, count in (("train", 5), ("val", 3), ("test", 2)):
        for i in range(count):
            write(tmp_path, f"{split}{i}", split=split)
    data = masks(tmp_path, classes=["road", "car", "tree"])
    data.setup()
    assert (data.count("train"), data.count("val"), data.count("test")) == (5, 3, 2)
    assert data.val_ids.tolist() == [5, 6, 7]


def test_pictures_of_other_sizes_are_fitted_and_what_is_beside_them_does_not_count(tmp_path):
    found = write(tmp_path, "wide", size=(20, 10), picture=".png")
    for i in range(5):
        write(tmp_path, f"p{i}", size=(10, 10))
    data = masks(tmp_path, size=[10, 10], val_size=1)
    whole = torch.cat([data.source.train.targets, data.source.test.targets])
    beside = (whole == 255).flatten(1).sum(1)
    assert sorted(beside.tolist()) == [0, 0, 0, 0, 0, 50]
    own = whole[int(beside.argmax())][:5]
    assert bool((own >= 0).all())
    assert all(int(own[y, x]) in found[2 * y : 2 * y + 2, 2 * x : 2 * x + 2] for y in range(5) for x in range(10))


def test_pictures_without_a_mask_have_no_label_where_that_is_allowed(tmp_path):
    for i in range(12):
        write(tmp_path, f"p{i}")
    for i in range(4):
        (tmp_path / "masks" / f"p{i}.png").unlink()
    with pytest.raises(UserError, match=r"4 pictures of 12 .* lack a mask of the same name: p0.jpg, .*data.unlabelled"):
        masks(tmp_path).setup()
    data = masks(tmp_path, unlabelled=True, val_size=2)
    data.setup()
    assert data.train_labels == "some"
    assert int((data.train_targets[data.train_ids] == -1).flatten(1).all(1).sum()) == 4
    assert bool((data.train_targets[data.val_ids] >= 0).all())
    assert bool((data.source.test.targets >= 0).all())


def test_masks_without_a_picture_are_left_out_with_a_line(tmp_path, caplog):
    for i in range(6):
        write(tmp_path, f"p{i}")
    (tmp_path / "images" / "p5.jpg").unlink()
    with caplog.at_level("WARNING"):
        masks(tmp_path, val_size=1).setup()
    assert "Masks without a picture, left out: 1 (p5.png)." in caplog.text


def bad_size(root):
    write(root, "x", mask_size=(8, 8))


def bad_class(root):
    write(root, "x", values=(0, 7))


def colors(root):
    write(root, "x", mode="RGB")


def other_size(root):
    write(root, "x", size=(9, 9))


def twice(root):
    write(root, "p1", picture=".png")


def damaged(root):
    (root / "masks" / "p1.png").write_bytes(b"no picture")


def damaged_thrice(root):
    for name in ("p1", "p2"):
        (root / "masks" / f"{name}.png").write_bytes(b"")
    (root / "images" / "p4.jpg").write_bytes(b"no picture")


def below_0(root):
    write(root, "x", picture=".png")
    Image.fromarray(np.full((8, 12), -5, np.int32)).save(root / "masks" / "x.tif")
    (root / "masks" / "x.png").unlink()


def uncounted(root):
    for path in (root / "masks").iterdir():
        Image.fromarray(np.full((8, 12), 255, np.uint8)).save(path)


def unprintable(root):
    (root / "masks" / "p1.png").rename(root / "masks" / "p\x1b[31m.png")
    (root / "images" / "p1.jpg").rename(root / "images" / "p\x1b[31m.jpg")
    damaged(root)
    (root / "masks" / "p1.png").rename(root / "masks" / "p\x1b[31m.png")


def empty(root):
    for path in (root / "images").iterdir():
        path.unlink()


def no_masks(root):
    (root / "masks").rename(root / "labels")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (bad_size, r"1 mask of 7 have another size than their picture: .*x.png is 8x8, and its picture 12x8"),
        (
            bad_class,
            r"1 mask hold a class beyond the 3 of data.classes, which count from 0: x \(7\)\. Name all; 255 is",
        ),
        (colors, r"x.png is a picture of colors \(RGB\), and a mask is a PNG of one channel"),
        (other_size, r"Pictures are of 2 sizes \(6 of 12x8, 1 of 9x9\): set data.size"),
        (twice, r"p1.jpg and p1.png have the same name but for the suffix"),
        (damaged, r"The mask .*p1.png cannot be read"),
        (damaged_thrice, r"The mask .*p1.png cannot be read .* Others that cannot be used: 2 \(p2.jpg, p4.jpg\)"),
        (below_0, r"The mask .*x.tif cannot be read \(it holds numbers below 0\)"),
        (uncounted, r"No pixel of the masks in .* \(train\) has a class: all are 255"),
        (unprintable, r"The mask .*p\?\[31m.png cannot be read"),
        (empty, r"images holds no picture"),
        (no_masks, r"There is no folder .*masks: data.root is one that holds images/ and masks/"),
    ],
)
def test_bad_input_is_one_line(tmp_path, change, said):
    for i in range(6):
        write(tmp_path, f"p{i}")
    change(tmp_path)
    with pytest.raises(UserError, match=said):
        masks(tmp_path, classes=["a", "b", "c"], val_size=1).setup()


def test_a_root_is_needed():
    with pytest.raises(UserError, match=r"data=masks needs the folder that holds images/"):
        masks().setup()


@pytest.mark.parametrize(
    "size", [10**6, [10**6, 32], True, [1.5, 2], [float("nan")] * 2, ["a", "b"], "big", [0, 5], [1, 2, 3]]
)
def test_a_size_is_whole_numbers_of_pixels(tmp_path, size):
    with pytest.raises(UserError, match=r"must be a number of pixels, or height and width, up to 8192 each"):
        masks(tmp_path, size=size)


@pytest.mark.parametrize("classes", [[], ["a"], "ab", ["a", "a"]])
def test_classes_are_two_names_at_least(tmp_path, classes):
    with pytest.raises(UserError, match=r"must be the names of two classes at least, each once"):
        masks(tmp_path, classes=classes)


def test_pictures_beyond_the_memory_are_refused(tmp_path, monkeypatch):
    for i in range(6):
        write(tmp_path, f"p{i}")
    monkeypatch.setattr("os.sysconf", lambda name: 40)  # bytes of a page, and pages
    with pytest.raises(UserError, match=r"6 pictures of 64 x 64 pixels take .* GB of memory"):
        masks(tmp_path, size=64).setup()
