"""Folders of images as people have them: what is read, what is left out and said so, and which images are which split's."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from litdistill.data import decode, folder, listing
from litdistill.data.datamodule import ImageData
from litdistill.data.duplicates import SAMPLE, copies
from litdistill.data.folder import read_splits
from litdistill.data.layout import split_name
from litdistill.data.listing import ImageFile, describe_skipped, list_images
from litdistill.data.sources import load
from litdistill.utils.errors import UserError


def paint(root: Path, layout: dict[str, int], extension: str = "png", seed: int = 0) -> None:
    """Different images of 8 x 6 pixels, `layout`: how many in each folder."""
    for name, count in layout.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = np.random.default_rng([seed, i, *name.encode()]).integers(0, 256, (6, 8, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.{extension}")


def names(files: list, root: Path) -> list[str]:
    return [file.path.relative_to(root).as_posix() for file, _ in files]


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


@pytest.fixture(autouse=True)
def log_level(caplog):
    caplog.set_level(logging.INFO)


# -- files -------------------------------------------------------------------------------------------------------------


def test_what_is_skipped_is_counted_by_reason_in_one_line(tmp_path, caplog):
    paint(tmp_path, {"a": 4, "b": 4, "a/deeper": 1})
    paint(tmp_path, {"a": 2}, "gif")
    paint(
        tmp_path, {"b/.ipynb_checkpoints": 3, "a/.cache/x": 2, "b/@eaDir/1.jpg": 2, "__MACOSX": 1, "a/$RECYCLE.BIN": 1}
    )
    for name in ("a/1.txt", "a/2.TXT", "b/clip.mp4", "b/LICENSE", "a/.DS_Store", "b/Thumbs.db", "b/desktop.ini"):
        (tmp_path / name).write_text("text")
    Image.new("L", (4, 4)).save(tmp_path / "a" / "._0.png")
    Image.new("L", (4, 4)).save(tmp_path / "cover.png")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    found = read_splits(tmp_path)
    kept = names(found.train + found.test, tmp_path)
    assert sorted(kept) == sorted(
        [f"{c}/{i}.png" for c in "ab" for i in range(4)] + ["a/deeper/0.png", "a/0.gif", "a/1.gif"]
    )
    (line,) = [record for record in caplog.records if "skipped: " in record.getMessage()]
    assert line.levelname == "WARNING"
    parts = dict(part.split(" ", 1)[::-1] for part in line.getMessage().rstrip(".").split(": ", 1)[1].split(", "))
    assert {parts[reason] for reason in ("in .cache", "in @eaDir", ".txt")} == {"2"}
    assert {parts[reason] for reason in ("in __MACOSX", "in $RECYCLE.BIN", "images beside the class folders")} == {"1"}
    assert sum(map(int, parts.values())) == 16  # .mp4, no extension, hidden, a pipe


def test_the_file_browsers_copies_of_the_report_are_no_data(tmp_path):
    """Forty images a class and a copy of each in a hidden folder: 160 images, none of them in training and test."""
    paint(tmp_path, dict.fromkeys("abcd", 40))
    for path in sorted(tmp_path.glob("*/*.png")):
        copy = path.parent / ".ipynb_checkpoints" / f"{path.stem}-checkpoint.png"
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    found = read_splits(tmp_path)
    assert (len(found.train), len(found.test)) == (128, 32)
    content = [{file.path.read_bytes() for file, _ in files} for files in (found.train, found.test)]
    assert not content[0] & content[1]


@pytest.mark.parametrize("extension", ["gif", "jfif", "JPG", "webp", "tiff", "bmp", "tga", "jp2"])
def test_whatever_pillow_reads_is_read(tmp_path, extension):
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(5):
            pixels = np.random.default_rng([i, ord(label)]).integers(0, 256, (8, 8), np.uint8)
            kind = {"jfif": "JPEG", "jp2": "JPEG2000"}.get(extension)
            Image.fromarray(pixels).save(tmp_path / label / f"{i}.{extension}", kind)
    source = load("folder", tmp_path, 8)
    assert (len(source.train.targets), len(source.test.targets)) == (8, 2)


def test_heic_needs_a_package_and_says_so(tmp_path, caplog, monkeypatch):
    paint(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "a" / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    monkeypatch.setattr(listing, "extensions", lambda: decode.extensions() - {".heic"})
    read_splits(tmp_path)
    assert "1 file is skipped: 1 .heic (pip install pillow-heif)." in said(caplog)


def test_links_are_followed_and_no_file_is_counted_twice(tmp_path):
    paint(tmp_path / "elsewhere", {"more": 3, "more/deep": 1})
    cat = tmp_path / "data" / "cat"
    paint(tmp_path / "data", {"cat": 2, "cat/inner": 1})
    (cat / "linked").symlink_to(tmp_path / "elsewhere" / "more")
    (cat / "again").symlink_to(tmp_path / "elsewhere" / "more" / "deep")  # in what is linked to already
    (cat / "inner" / "circle").symlink_to(cat)
    (cat / "a.png").symlink_to(cat / "0.png")
    (cat / "broken.png").symlink_to(tmp_path / "nowhere.png")
    (cat / "loop.png").symlink_to(cat / "loop.png")
    files, skipped = list_images(cat)
    kept = sorted(file.path.resolve().relative_to(tmp_path).as_posix() for file in files)
    assert kept == [
        *("data/cat/0.png", "data/cat/1.png", "data/cat/inner/0.png"),
        *("elsewhere/more/0.png", "elsewhere/more/1.png", "elsewhere/more/2.png", "elsewhere/more/deep/0.png"),
    ]
    assert cat / "0.png" in [file.path for file in files]  # and not the link to it
    assert skipped["broken links"] == 2
    assert skipped["links to what is read already"] == 3  # a.png, the circle, and deep/ a second time


@pytest.mark.parametrize("target", [".", ".."])
def test_a_link_to_the_folder_that_it_lies_in_is_no_class(tmp_path, caplog, target):
    paint(tmp_path / "data", {"a": 5, "b": 5})
    (tmp_path / "data" / "loop").symlink_to(target, target_is_directory=True)
    assert read_splits(tmp_path / "data").classes == ("a", "b")
    assert "1 file is skipped: 1 links to the folder that they lie in." in caplog.messages


def test_reasons_beyond_eight_are_summed_up():
    skipped = listing.Counter({f".k{i}": 20 - i for i in range(10)} | {"none": 0})
    assert describe_skipped(skipped).endswith(".k7, 23 of 2 other kinds")
    assert describe_skipped(listing.Counter(a=0)) == ""


# -- splits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("Training", "train"), ("TRAIN", "train"), ("training_set", "train"), ("train-images", "train"), ("trainset", "train"),
        ("Testing", "test"), ("test_set", "test"), ("valid", "val"), ("Validation", "val"), ("val", "val"),
        ("trains", None), ("contest", None), ("dataset", None), ("images", None), ("test tubes", None), ("training2", "train"),
    ],
)  # fmt: skip
def test_splits_are_known_by_their_names(name, split):
    assert split_name(name) == split


@pytest.mark.parametrize(("train", "test"), [("Training", "Testing"), ("TRAIN", "TEST"), ("training_set", "test_set")])
def test_splits_of_any_case_are_no_classes(tmp_path, caplog, train, test):
    shapes = ("cross", "disk", "square", "triangle")
    paint(tmp_path, {f"{train}/{c}": 5 for c in shapes} | {f"{test}/{c}": 2 for c in shapes})
    found = read_splits(tmp_path)
    assert found.classes == shapes
    assert {name.split("/")[0] for name in names(found.train, tmp_path)} == {train}
    assert {name.split("/")[0] for name in names(found.test, tmp_path)} == {test}
    assert said(caplog) == [
        f"Read {tmp_path}: 28 images (28 .png; sides of 6 to 8 pixels), 4 classes: cross 7, disk 7, square 7, triangle 7.",
        f"Splits: 20 of {train} to train on and validate (data.val_size), 8 of {test} to test.",
    ]


def test_a_validation_folder_is_for_validation(tmp_path, caplog):
    paint(tmp_path, {f"{split}/{c}": n for split, n in (("train", 10), ("val", 3), ("test", 2)) for c in "ab"})
    data = ImageData("folder", tmp_path, image_size=6, val_size=0.5)
    data.setup()
    assert (len(data.train_ids), len(data.val_ids), len(data.test_ids)) == (20, 6, 4)
    expected = [
        np.asarray(Image.open(tmp_path / "val" / c / f"{i}.png").resize((8, 6))) for c in "ab" for i in range(3)
    ]
    val = data.get_batch("val", data.val_ids)
    assert torch.equal(val.inputs, torch.from_numpy(np.stack(expected)[:, :, 1:7]).permute(0, 3, 1, 2))
    assert val.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert (
        "20 of train to train on, 6 of val to validate (data.val_size is not used), 4 of test to test."
        in said(caplog)[1]
    )
    one = ImageData("folder", tmp_path, image_size=6, per_class=1)
    one.setup()
    assert (len(one.train_ids), len(one.val_ids)) == (2, 6)


def test_a_validation_folder_is_not_the_test_set(tmp_path, caplog):
    paint(tmp_path, {f"{split}/{c}": 10 for split in ("train", "valid") for c in "ab"})
    found = read_splits(tmp_path)
    assert {name.split("/")[0] for name in names(found.test, tmp_path)} == {"train"}
    assert {name.split("/")[0] for name in names(found.val, tmp_path)} == {"valid"}
    assert (len(found.train), len(found.val), len(found.test)) == (16, 20, 4)
    assert "4 of train to test (20% of each class: there is no test folder)" in said(caplog)[1]


@pytest.mark.parametrize("resident", [True, False])
def test_a_validation_folder_is_kept_in_shards(tmp_path, resident):
    shards = pytest.importorskip("litdistill.data.shards")
    pytest.importorskip("litdata")
    paint(tmp_path / "in", {f"{split}/{c}": n for split, n in (("train", 4), ("val", 3), ("test", 2)) for c in "ab"})
    shards.write(tmp_path / "in", tmp_path / "out")
    both = [
        ImageData(name, tmp_path / place, image_size=6, resident=resident, workers=0)
        for name, place in (("folder", "in"), ("shards", "out"))
    ]
    for data in both:
        data.setup()
    one, other = (data.get_batch("val", data.val_ids) for data in both)
    assert torch.equal(one.inputs, other.inputs)
    assert len(one.inputs) == 6


def test_classes_may_be_called_as_splits_are(tmp_path):
    paint(tmp_path, {"apple": 5, "test": 5, "train": 5})
    assert read_splits(tmp_path).classes == ("apple", "test", "train")
    paint(tmp_path, {"test/small": 2, "test/large": 2})  # subfolders that are no classes
    assert read_splits(tmp_path).classes == ("apple", "test", "train")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            ["first/cat", "first/dog", "second/cat", "second/dog"],
            "first and second .* look like data sets side by side.*Rename",
        ),
        (["cat/train", "cat/test", "dog/train", "dog/test"], "splits lie outside and classes inside"),
        (["cat", "dog", "test/cat", "test/dog"], "has a folder test with classes in it and none called train"),
        (["val/cat", "val/dog"], "none called train"),
        (["train/a", "train/b", "Training/a", "Training/b"], "two folders for one split: Training and train"),
        (["train", "test"], "look like splits and hold no class folders"),
        (["flowers/a", "flowers/b"], "has 1 class folder;.*Or is .*flowers the data set"),
        (["train/a", "train/b", "val/a", "val/c"], "only in train b, only in val c"),
    ],
)
def test_layouts_that_cannot_be_right_are_refused_with_what_to_do(tmp_path, layout, message):
    paint(tmp_path, dict.fromkeys(layout, 3))
    with pytest.raises(UserError, match=message):
        read_splits(tmp_path)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("flowrs", r"classes\. Did you mean .*/flowers\?$"),
        ("my photos", r"Did you mean '.*/my photos ', with a space .* 'data\.root=\".*/my photos \"'$"),
        ("xyz", r"or the classes\.$"),
        ("none/xyz", r"or the classes\.$"),
    ],
)
def test_a_missing_folder_is_answered_with_the_nearest(tmp_path, typed, said):
    for name in ("flowers", "my photos "):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=said):
        read_splits(tmp_path / typed)


def test_an_archive_is_refused_as_a_file(tmp_path):
    (tmp_path / "photos.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"photos\.zip is a file\. Unpack it"):
        read_splits(tmp_path / "photos.zip")


def test_what_lies_beside_the_splits_is_named(tmp_path, caplog):
    paint(tmp_path, {"train/a": 5, "train/b": 5, "test": 7, "extra/x": 3})
    assert len(read_splits(tmp_path).test) == 2
    assert "10 files are skipped: 7 in test without class folders, 3 in extra beside train." in said(caplog)


def test_a_run_says_it_once(tmp_path, caplog):
    paint(tmp_path, {"a": 5, "b": 5})
    (tmp_path / "a" / "notes.txt").write_text("x")
    read_splits(tmp_path)
    assert len(said(caplog)) == 3
    read_splits(tmp_path)
    assert len(said(caplog)) == 3
    paint(tmp_path, {"a": 6})
    read_splits(tmp_path)
    assert len(said(caplog)) == 6


def test_many_classes_are_counted_and_ten_named(tmp_path, caplog):
    paint(tmp_path, {f"{i:02}": 2 + i % 2 for i in range(100)})
    read_splits(tmp_path)
    assert said(caplog)[0].endswith(
        "100 classes: " + ", ".join(f"{i:02} {2 + i % 2}" for i in range(10)) + " and 90 more, of 2 to 3."
    )


def test_a_teacher_sees_the_images_that_its_student_has_decoded(tmp_path, monkeypatch):
    paint(tmp_path, {"a": 5, "b": 5})
    student = load("folder", tmp_path, 6)
    monkeypatch.setattr(folder.Encoded, "decode", lambda *_, **__: pytest.fail("decoded twice"))
    assert load("folder", tmp_path, 6).train.images is student.train.images


# -- copies ------------------------------------------------------------------------------------------------------------


def test_copies_are_found_by_their_bytes(tmp_path):
    def put(name: str, content: bytes) -> ImageFile:
        (tmp_path / name).write_bytes(content)
        return ImageFile(tmp_path / name, len(content), 0)

    long = bytes(SAMPLE * 3)
    files = [put("a", b"one"), put("b", b"two"), put("c", b"one"), put("d", b"three"), put("e", long), put("f", long)]
    files += [put("g", b"\1" + long[1:]), ImageFile(tmp_path / "gone", 3, 0)]  # g: a different head alone
    assert [[file.path.name for file in group] for group in copies(files)] == [["a", "c"], ["e", "f"]]


def test_files_of_different_sizes_are_not_opened(tmp_path):
    assert copies([ImageFile(tmp_path / "gone", size, 0) for size in range(100)]) == []


def test_where_the_test_set_is_drawn_copies_are_read_once(tmp_path, caplog):
    paint(tmp_path, {"a": 10, "b": 10})
    for i in range(10):
        (tmp_path / "a" / f"copy {i}.png").write_bytes((tmp_path / "a" / f"{i}.png").read_bytes())
    (tmp_path / "a" / "both.png").write_bytes((tmp_path / "b" / "3.png").read_bytes())
    found = read_splits(tmp_path)
    kept = [file.path.read_bytes() for file, _ in found.train + found.test]
    assert len(kept) == len(set(kept)) == 19  # neither label of both.png can be trusted
    expected = "12 files are skipped: 10 copies of other images, 2 that lie in two classes with the same bytes."
    assert expected in said(caplog)


def test_a_test_set_with_training_images_is_told_loudly(tmp_path, caplog):
    paint(tmp_path, {f"{split}/{c}": 5 for split in ("train", "test") for c in "ab"})
    for i in (0, 2, 4):
        (tmp_path / "test" / "b" / f"{i}.png").write_bytes((tmp_path / "train" / "b" / f"{i}.png").read_bytes())
    read_splits(tmp_path)
    (line,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert line.getMessage().startswith(
        f"3 of 10 test images are training images too, byte by byte: {tmp_path}/test/b/0.png is {tmp_path}/train/b/0.png, "
        f"{tmp_path}/test/b/2.png is {tmp_path}/train/b/2.png. "
    )


@pytest.mark.parametrize("split", ["test", "val"])
def test_a_split_that_is_a_copy_of_the_training_set_is_refused(tmp_path, split):
    paint(tmp_path / "train", {"a": 3, "b": 3})
    (tmp_path / split).symlink_to(tmp_path / "train")
    with pytest.raises(UserError, match=rf"All 6 images of {tmp_path}/{split} lie in {tmp_path}/train too"):
        read_splits(tmp_path)


def test_images_are_read_under_one_bar(tmp_path, capsys, monkeypatch):
    paint(tmp_path, {"a": 5, "b": 5})
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    first = load("folder", tmp_path, 6)
    shown = capsys.readouterr().err
    assert len([line for line in shown.split("\n") if "Reading images" in line and "100%" in line]) == 1
    load("folder", tmp_path, 6)  # a teacher's: nothing is read, so nothing is shown
    assert "Reading" not in capsys.readouterr().err
    del first
