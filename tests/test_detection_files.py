"""Pictures with boxes of one's own in COCO's JSON; what is wrong with them is counted and named. VOC: test_detection_voc."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from litdistill.data import folder
from litdistill.tasks.detection import annotated
from litdistill.tasks.detection.annotated import Box, Faults, Picture, check_memory, clean
from litdistill.tasks.detection.coco import coco, find_files
from litdistill.training.train import train
from litdistill.types import has_label
from litdistill.utils.errors import UserError
from tests.conftest import compose_config

WIDE, TALL = 40, 20


def picture(path: Path, shade: int, size: tuple[int, int] = (WIDE, TALL), exif: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {}
    if exif is not None:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = exif
    Image.new("RGB", size, (shade % 256, 255 - shade % 256, 90)).save(path, quality=95, **options)


def listed(count: int = 10, first: int = 1) -> dict:
    """A file of pictures of two categories, one box each."""
    return {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": WIDE, "height": TALL} for i in range(first, first + count)
        ],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 7 if i % 2 else 3, "bbox": [4, 2, 20, 10], "iscrowd": 0}
            for i in range(first, first + count)
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
    }


@pytest.fixture
def root(tmp_path):
    """Ten pictures, of which the first is annotated wrongly by each test."""
    for i in range(1, 11):
        picture(tmp_path / "images" / f"{i}.jpg", 20 * i)
    return tmp_path


@pytest.fixture(autouse=True)
def unsaid():
    folder._SAID.clear()


def written(root: Path, content: object, name: str = "boxes.json") -> Path:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return root


def read(root: Path, make=coco, **options):
    data = make(root=root, **{"size": [32, 32], "val_size": 2, **options})
    data.setup()
    return data


def rows(data, name: str) -> torch.Tensor:
    """The boxes of a picture, (n, 6)."""
    for split in ("train", "test"):
        found = data.source.train if split == "train" else data.source.test
        for i in range(len(found.inputs)):
            if data.show(split, i) == name:
                return found.targets[i][found.targets[i, :, 4] >= 0]
    raise AssertionError(f"{name} is in no split")


def warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


# -- what is read --------------------------------------------------------------------------------------------------------


def test_boxes_follow_the_picture_into_its_place(root, caplog):
    caplog.set_level(logging.INFO)
    data = read(written(root, listed()))
    assert data.class_names == ("dog", "cat")  # by id
    assert (data.input_shape, data.input_dtype) == ((3, 32, 32), torch.uint8)
    # 40x20 fits at 32x16: 0.8 of it. x, y, width and height become edges.
    assert rows(data, "1.jpg").tolist() == [pytest.approx([3.2, 1.6, 19.2, 9.6, 1, 0])]
    assert rows(data, "2.jpg")[0, 4] == 0
    shades = {data.show("train", i): data.source.train.inputs[i, :, 2, 2] for i in range(len(data.source.train.inputs))}
    for name, color in shades.items():
        assert color.tolist() == pytest.approx([20 * int(name[:-4]), 255 - 20 * int(name[:-4]), 90], abs=4)
    assert (data.source.train.inputs[:, :, 17:] == 114).all()
    assert f"Read {root}: 10 pictures, 10 boxes: dog 5, cat 5." in caplog.messages
    assert not warnings(caplog)


def test_a_fifth_is_tested_by_the_hash_of_names_and_the_rest_split_into_two(root, caplog):
    caplog.set_level(logging.INFO)
    data, again = read(written(root, listed())), read(written(root, listed()), seed=5)
    assert (len(data.train_ids), len(data.val_ids), len(data.test_ids)) == (6, 2, 2)
    tested = [data.show("test", i) for i in range(2)]
    assert tested == [again.show("test", i) for i in range(2)]
    assert torch.equal(data.val_ids, again.val_ids)
    assert any("8 to train on, 2 to test (a fifth, by the hash of their names" in m for m in caplog.messages)
    fewer = listed()
    fewer["images"] = [one for one in fewer["images"] if one["file_name"] in tested or one["id"] % 2]
    fewer["annotations"] = [
        one for one in fewer["annotations"] if one["image_id"] in [i["id"] for i in fewer["images"]]
    ]
    kept = read(written(root, fewer))
    assert {kept.show("test", i) for i in range(len(kept.test_ids))} <= set(tested)


@pytest.mark.parametrize(
    "names",
    [
        {
            "train": "annotations/instances_train2017.json",
            "val": "annotations/instances_val2017.json",
            "test": "test.json",
        },
        {
            "train": "train/_annotations.coco.json",
            "val": "valid/_annotations.coco.json",
            "test": "test/_annotations.coco.json",
        },
    ],
)
def test_files_of_each_split_are_found_by_their_names(tmp_path, names):
    first = 1
    for part, name in names.items():
        written(tmp_path, listed(4, first), name)
        own = Path(name).parent if "_annotations" in name else Path(f"{part}2017" if part != "test" else "images")
        for i in range(first, first + 4):
            picture(tmp_path / own / f"{i}.jpg", i)
        first += 4
    if "annotations" in names["train"]:
        written(tmp_path, {"captions": []}, "annotations/captions_train2017.json")  # COCO's others are not read
    data = read(tmp_path)
    shown = {
        s: [data.show("train" if s != "test" else s, int(i)) for i in getattr(data, f"{s}_ids")]
        for s in ("train", "val", "test")
    }
    assert shown == {
        "train": ["1.jpg", "2.jpg", "3.jpg", "4.jpg"],
        "val": ["5.jpg", "6.jpg", "7.jpg", "8.jpg"],
        "test": ["9.jpg", "10.jpg", "11.jpg", "12.jpg"],
    }


def test_files_may_be_named_and_classes_chosen(root, caplog):
    written(root, listed(7), "a.json")
    written(root, listed(3, 8), "b.json")
    with pytest.raises(UserError, match=r"has 2 JSON files, and no name says which is to train on: data\.train="):
        read(root)
    data = read(root, train="a.json", test=str(root / "b.json"), images="images", classes=["cat"])
    assert (len(data.source.train.inputs), len(data.test_ids), data.class_names) == (7, 3, ("cat",))
    assert "Boxes of categories that data.classes leaves out: 5 (2.jpg, 4.jpg, 6.jpg, …)." in warnings(caplog)
    assert not len(rows(data, "2.jpg"))
    with pytest.raises(UserError, match=r"data\.classes: there is no class dgo; did you mean dog\?"):
        read(root, train="a.json", classes=["dgo"])


def test_pictures_without_labels_are_trained_on_and_never_validated(root):
    for i in range(5):
        picture(root / "more" / f"{i}.jpg", 31 * i)
    data = read(written(root, listed()), unlabelled="more")
    assert len(data.train_ids) == 6 + 5
    assert (~has_label(data.train_targets[data.train_ids])).sum() == 5
    assert has_label(data.train_targets[data.val_ids]).all()
    assert data.train_labels == "some"
    with pytest.raises(UserError, match=r"^data\.unlabelled=none: there is nothing of that name"):
        read(root, unlabelled="none")


# -- what is wrong with it -------------------------------------------------------------------------------------------------


def faulty(change) -> dict:
    content = listed()
    change(content, content["images"][0], content["annotations"][0])
    return content


FAULTS = {
    "Boxes that reach outside of their picture, clipped: 1 (1.jpg).": lambda c, i, a: a.update(bbox=[30, 10, 30, 30]),
    "Boxes outside of their picture, left out: 1 (1.jpg).": lambda c, i, a: a.update(bbox=[50, 10, 5, 5]),
    "Boxes of no area, left out: 1 (1.jpg).": lambda c, i, a: a.update(bbox=[3, 3, 5, 0]),
    "Boxes with x2 < x1 or y2 < y1, left out: 1 (1.jpg).": lambda c, i, a: a.update(bbox=[9, 3, -5, 4]),
    "Boxes whose numbers are not finite, left out: 1 (1.jpg).": lambda c, i, a: a.update(bbox=[math.nan, 3, 5, 4]),
    "Annotations without a bbox of four numbers, left out: 1 (1.jpg).": lambda c, i, a: a.update(bbox=["1", 2, 3]),
    "Boxes of pictures that their file does not list, left out: 1 (image_id 99).": lambda c, i, a: a.update(
        image_id=99
    ),
    "Boxes of categories that their file does not list, left out: 1 (1.jpg: 4).": lambda c, i, a: a.update(
        category_id=4
    ),
    "Pictures that are listed and are not there, left out: 1 (gone.jpg).": lambda c, i, a: i.update(
        file_name="gone.jpg"
    ),
    f"Pictures that are listed and are not there, left out: 1 ({'x' * 5000}).": lambda c, i, a: i.update(
        file_name="x" * 5000
    ),
    "Boxes that are listed twice, kept once: 1 (1.jpg).": lambda c, i, a: c["annotations"].append(dict(a, id=77)),
    "Boxes under an id that another has, kept: 1 (2.jpg).": lambda c, i, a: c["annotations"][1].update(id=1),
    "Pictures of another shape than their annotation states, left out: 1 (1.jpg).": lambda c, i, a: i.update(width=77),
    "Pictures of another size than their annotation states, whose boxes are scaled: 1 (1.jpg).": (
        lambda c, i, a: i.update(width=2 * WIDE, height=2 * TALL)
    ),
}


@pytest.mark.parametrize("line", FAULTS)
def test_each_fault_has_its_line_with_count_and_first_names(root, caplog, line):
    data = read(written(root, faulty(FAULTS[line])))
    assert line in warnings(caplog)
    assert (len(data.source.train.inputs) + len(data.test_ids) < 10) == ("Pictures" in line and "left out" in line)
    left_out = line.startswith(("Boxes", "Annotations")) and "left out" in line
    if "Pictures" not in line or "scaled" in line:
        assert len(rows(data, "1.jpg")) == (not left_out)
    if "clipped" in line:
        assert rows(data, "1.jpg")[0, :4].tolist() == pytest.approx([24, 8, 32, 16])
    if "scaled" in line:
        assert rows(data, "1.jpg")[0, :4].tolist() == pytest.approx([1.6, 0.8, 9.6, 4.8])


def test_a_picture_without_objects_trains_as_background_and_a_crowd_is_marked(root, caplog):
    caplog.set_level(logging.INFO)
    content = faulty(lambda c, i, a: a.update(iscrowd=1))
    del content["annotations"][1]
    data = read(written(root, content))
    assert rows(data, "1.jpg")[0, 5] == 1
    assert not len(rows(data, "2.jpg"))
    assert has_label(data.source.train.targets).all()
    assert any("1 without objects train as background" in m for m in caplog.messages)


def test_pictures_that_no_annotation_lists_or_that_cannot_be_read_are_named(root, caplog):
    picture(root / "images" / "extra.jpg", 9)
    (root / "images" / "3.jpg").write_bytes(b"no picture")
    data = read(written(root, listed()))
    assert len(data.source.train.inputs) + len(data.test_ids) == 9
    assert "Pictures that cannot be read, left out: 1 (3.jpg)." in warnings(caplog)
    assert "Pictures that no annotation lists, left out (data.unlabelled=<folder>): 1 (extra.jpg)." in warnings(caplog)


def test_a_test_picture_that_is_trained_on_is_warned_of(root, caplog):
    Image.open(root / "images" / "1.jpg").save(root / "images" / "9.jpg", quality=95)
    (root / "images" / "9.jpg").write_bytes((root / "images" / "1.jpg").read_bytes())
    written(root, listed(7), "train.json")
    written(root, listed(3, 8), "test.json")
    read(root)
    assert any(
        "1 test picture is a training picture too, pixel by pixel, such as 9.jpg and 1.jpg" in w
        for w in warnings(caplog)
    )


BAD = {
    "has no annotations: there is nothing to learn": lambda c: c.update(annotations=[]),
    "has no images": lambda c: c.update(images=[]),
    "has no list of categories": lambda c: c.pop("categories"),
    "has no list of annotations: it is no COCO file": lambda c: c.update(annotations=[1]),
    "which leads out of its folder": lambda c: c["images"][0].update(file_name="../secret.jpg"),
    r"/etc/passwd, which leads out of its folder": lambda c: c["images"][0].update(file_name="/etc/passwd"),
    r"a/\.\./b\.jpg, which leads out": lambda c: c["images"][0].update(file_name="a\\..\\b.jpg"),
    r"C:/x\.jpg, which leads out": lambda c: c["images"][0].update(file_name="C:\\x.jpg"),
    r"has two pictures of id 1: 1\.jpg and 2\.jpg": lambda c: c["images"][1].update(id=1),
    r"lists the picture 1\.jpg under two ids": lambda c: c["images"][1].update(file_name="1.jpg"),
    "has two categories of id 7: cat and dog": lambda c: c["categories"][1].update(id=7),
    "has two categories of the name cat": lambda c: c["categories"][1].update(name="cat"),
    "has a category without id and name": lambda c: c["categories"][0].pop("name"),
    "has a picture without id and file_name": lambda c: c["images"][0].update(id=[1]),
    "has a picture without a name, of id 1": lambda c: c["images"][0].update(file_name=""),
    "has no box to train on": lambda c: [a.update(bbox=[1, 1, 0, 0]) for a in c["annotations"]],
    "None of the pictures of": lambda c: [i.update(file_name=f"x{i['id']}.jpg") for i in c["images"]],
}


@pytest.mark.parametrize("line", BAD)
def test_a_file_from_which_nothing_can_be_learnt_is_refused_in_a_line(root, line):
    content = listed()
    BAD[line](content)
    with pytest.raises(UserError, match=line):
        read(written(root, content))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "nested deeper than any annotations"),
        ("[]", "has no list of images"),
        ("null", "has no list of images"),
        ('{"images": {}, "annotations": 5, "categories": "x"}', "has no list of images"),
        (b"\xff\xfe\x00".decode("latin1"), "cannot be read as JSON"),
    ],
)
def test_json_that_is_none_is_refused_in_a_line(root, text, line):
    with pytest.raises(UserError, match=line):
        read(written(root, text))


def test_a_side_without_end_is_no_crash(root):
    content = listed()
    content["images"][0]["width"] = 10**400
    assert read(written(root, content)).source is not None


def test_a_number_without_end_is_no_crash(root, caplog):
    text = json.dumps(listed()).replace('"bbox": [4, 2, 20, 10]', '"bbox": [4, 2, 1' + "0" * 400 + ", 10]", 1)
    read(written(root, text))
    assert any("not finite" in line for line in warnings(caplog))


def test_a_folder_that_is_none_or_has_no_file_is_refused(tmp_path):
    for options, line in (
        ({"root": None}, r"data=coco needs the folder"),
        ({"root": tmp_path / "none"}, r"There is no folder"),
        ({"root": tmp_path}, r"holds no JSON file"),
        ({"root": tmp_path, "size": [8, 8]}, r"^data\.size="),
        ({"root": tmp_path, "train": "x.json"}, r"^data\.train=x\.json: there is nothing of that name"),
    ):
        with pytest.raises(UserError, match=line):
            read(**options)
    written(tmp_path, listed(), "train_a.json")
    written(tmp_path, listed(), "train_b.json")
    with pytest.raises(UserError, match=r"are both of train by their names: name one of them, data\.train="):
        find_files(tmp_path)


def test_boxes_of_a_picture_that_lies_on_its_side_are_of_the_one_that_is_stated():
    found = clean(Picture("x", b"", [Box(0, 0, 10, 20, 1)], (20, 40)), (20, 40), Faults())
    assert found.tolist() == [[0, 0, 10, 20, 1, 0]]


@pytest.mark.parametrize(("stated", "inside"), [((WIDE, TALL), (32, 16)), ((TALL, WIDE), (16, 32))])
def test_a_turned_picture_is_read_as_its_annotation_states(root, stated, inside):
    picture(root / "images" / "1.jpg", 200, exif=6)
    content = faulty(lambda c, i, a: (i.update(width=stated[0], height=stated[1]), a.update(bbox=[0, 0, *stated])))
    assert rows(read(written(root, content)), "1.jpg")[0, :4].tolist() == [0, 0, *inside]


def test_what_takes_much_memory_is_said_with_the_remedy(caplog):
    check_memory(1000, (320, 320))
    assert not caplog.messages
    check_memory(20_000, (320, 320))
    assert (
        "20,000 pictures of 320 x 320 pixels take 6.1 GB of memory; data.size=[160, 160] takes a quarter" in caplog.text
    )
    with pytest.raises(UserError, match=r"and this machine has .* GB: data\.size=\[2048, 2048\] takes a quarter"):
        check_memory(10**6, (4096, 4096))


# -- a teacher of these ----------------------------------------------------------------------------------------------------


def test_many_threads_decode_to_the_same_pictures(root, monkeypatch):
    one = read(written(root, listed()))
    monkeypatch.setattr(annotated, "THREADS", 1)
    assert np.array_equal(read(root).source.train.inputs, one.source.train.inputs)


def test_the_first_of_five_commands_trains_a_detector_of_ones_own_boxes(root, tmp_path):
    written(root, listed())
    small = [
        "data.size=[64,64]",
        "data.val_size=2",
        "data.batch_size=4",
        "trainer=debug",
        "trainer.max_epochs=1",
        "logger=none",
    ]
    nets = ["student.width=8", "teacher.width=8", "teacher.depth=1", "teacher.fpn=32", "teacher.checkpoint=null"]
    cfg = compose_config(
        tmp_path / "run", "experiment=detection", f"data.root={root}", *small, *nets, "teacher.allow_chance=true"
    )
    train(cfg)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["task"], summary["metric"]["name"]) == ("Detection", "map")
    assert (summary["data"]["train"], summary["data"]["val"], summary["data"]["test"]) == (6, 2, 2)
