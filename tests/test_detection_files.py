"""Pictures with boxes of one's own: COCO's JSON, VOC's XML, BCCD; what is wrong with them is counted and named."""

import io
import json
import logging
import math
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from litdistill.config import recipes
from litdistill.data import blood_cells, fetch, folder
from litdistill.data.listing import contents_digest
from litdistill.tasks.detection import annotated, voc
from litdistill.tasks.detection.annotated import Box, Faults, Picture, check_memory, clean
from litdistill.tasks.detection.bccd import bccd
from litdistill.tasks.detection.coco import coco, find_files
from litdistill.training.train import train
from litdistill.types import has_label
from litdistill.utils.errors import UserError
from tests.conftest import compose_config

PUBLISHED = Path(os.environ.get("BCCD_ARCHIVE", "bccd.tar.gz"))  # a copy of the repository's archive
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


# -- VOC -----------------------------------------------------------------------------------------------------------------


def xml(label: str = "cat", box=(1, 1, 20, 10), difficult: int = 0, size=(WIDE, TALL), before: str = "") -> str:
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return (
        f"{before}<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size><object><name>{label}</name>"
        f"<difficult>{difficult}</difficult><bndbox>{corners}</bndbox></object></annotation>"
    )


@pytest.fixture
def tree(tmp_path):
    """A VOC tree below VOCdevkit/VOC2007, of ten pictures."""
    place = tmp_path / "VOCdevkit" / "VOC2007"
    for i in range(10):
        picture(place / "JPEGImages" / f"{i}.jpg", 20 * i)
        written(place, xml("cat" if i % 2 else "dog"), f"Annotations/{i}.xml")
    return place


def test_a_voc_tree_counts_pixels_from_one_and_includes_the_last(tree, caplog):
    caplog.set_level(logging.INFO)
    written(tree, xml("cat", (1, 1, WIDE, TALL), 1), "Annotations/1.xml")
    data = read(tree.parents[1], voc.voc)
    assert data.class_names == ("cat", "dog")
    assert rows(data, "1").tolist() == [pytest.approx([0, 0, 32, 16, 0, 1])]
    assert rows(data, "2").tolist() == [pytest.approx([0, 0, 16, 8, 1, 0])]
    assert not warnings(caplog)
    written(tree, xml("cat", (0, 0, WIDE, TALL)), "Annotations/1.xml")  # somebody counts from 0, all along
    data = read(tree, voc.voc)
    assert rows(data, "2").tolist() == [pytest.approx([0.8, 0.8, 16, 8, 1, 0])]


def test_voc_lists_say_the_splits(tree, caplog):
    for name, members in (("trainval", range(7)), ("train", range(5)), ("val", range(5, 7)), ("test", range(7, 10))):
        written(tree, "".join(f"{i}\n" for i in members), f"ImageSets/Main/{name}.txt")
    written(tree, "0 1\n1 -1\n", "ImageSets/Main/cat_train.txt")
    data = read(tree, voc.voc)
    assert (len(data.train_ids), len(data.val_ids), len(data.test_ids)) == (5, 2, 3)
    assert read(tree, voc.voc, train="trainval", validation="cat_train").val_ids.tolist() == [7, 8]
    with pytest.raises(UserError, match=r"data\.test=tset is no list of .*there are cat_train, test, train, …"):
        read(tree, voc.voc, test="tset")


def test_what_is_wrong_with_a_voc_tree_is_named(tree, caplog):
    (tree / "JPEGImages" / "3.jpg").unlink()
    (tree / "Annotations" / "4.xml").unlink()
    written(tree, "".join(f"{i}\n" for i in range(12)), "ImageSets/Main/train.txt")
    written(tree, xml("cat", (5, 5, 5, 5)), "Annotations/5.xml")
    written(tree, xml("cat", (9, 5, 5, 7)), "Annotations/6.xml")
    read(tree, voc.voc)
    for line in (
        "Annotations without a picture, left out: 1 (3).",
        "Pictures that are listed and have no annotation, left out: 3 (4, 10, 11).",
        "Pictures without an annotation, left out (data.unlabelled=<folder>): 1 (4).",
        "Boxes of no area, left out: 1 (5).",
        "Boxes with x2 < x1 or y2 < y1, left out: 1 (6).",
    ):
        assert line in warnings(caplog)


BOMB = (
    '<!DOCTYPE a [<!ENTITY b "xxxxxxxxxx">'
    + "".join(f'<!ENTITY b{i} "{f"&b{i - 1 if i else str()};" * 10}">' for i in range(9))
    + "]>"
)
FILE = '<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]>'


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (xml("&b8;", before=BOMB), "declares a document type"),
        (xml("&e;", before=FILE), "declares a document type"),
        (xml(before='<?xml version="1.0" encoding="utf-16"?>' + FILE).encode("utf-16"), "declares a document type"),
        ("<a>" * 100 + "</a>" * 100, "nested deeper than any annotation"),
        ("<a>" + " " * 2**20 + "</a>", "has 1,048,583 bytes"),
        ("<annotation>", "no element found"),
        ("", "no element found"),
        ("<annotation><object/></annotation>", "an object has no name, or no bndbox"),
        (xml(box=("one", 2, 3, 4)), "could not convert"),
        (xml(size=("1e999", 4)), "cannot convert"),
    ],
)
def test_a_hostile_or_broken_annotation_is_refused_by_name(tree, content, line):
    (tree / "Annotations" / "7.xml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=rf"^The annotation 7\.xml cannot be read \(.*{line}"):
        read(tree, voc.voc)


def test_all_annotations_that_cannot_be_read_are_counted(tree):
    for name in ("3", "7", "8"):
        (tree / "Annotations" / f"{name}.xml").write_text("<annotation>")
    with pytest.raises(UserError, match=r"3\.xml cannot be read .* Others that cannot be used: 2 \(7, 8\)"):
        read(tree, voc.voc)


def test_a_folder_without_a_tree_is_refused(tmp_path):
    for options, line in (
        ({"root": None}, "data=voc needs a folder"),
        ({"root": tmp_path}, "holds none: set data.root"),
        ({"root": tmp_path / "x"}, "There is no folder"),
    ):
        with pytest.raises(UserError, match=line):
            read(make=voc.voc, **options)
    for year in ("2007", "2012"):
        (tmp_path / year / "Annotations").mkdir(parents=True)
    with pytest.raises(UserError, match=r"2 folders with Annotations \(2007, 2012\)"):
        read(tmp_path, voc.voc)
    with pytest.raises(UserError, match=r"has no Annotations/\*\.xml"):
        read(tmp_path / "2007", voc.voc)


# -- BCCD ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cells(tmp_path, monkeypatch):
    """An archive of the form of BCCD's, and the host that sends it."""
    files = {}
    for i in range(9):
        file = io.BytesIO()
        Image.new("RGB", (WIDE, TALL), (9 * i, 9, 9)).save(file, "JPEG")
        files |= {f"JPEGImages/B_{i}.jpg": file.getvalue(), f"Annotations/B_{i}.xml": xml().encode()}
    for name, members in (("train", range(5)), ("val", range(5, 7)), ("test", range(7, 9)), ("trainval", range(7))):
        files[f"ImageSets/Main/{name}.txt"] = "".join(f"B_{i}\n" for i in members).encode()
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for path, content in {
            **{f"BCCD_Dataset-d2/BCCD/{k}": v for k, v in files.items()},
            "BCCD_Dataset-d2/x.py": b"",
        }.items():
            about = tarfile.TarInfo(path)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    sha = blood_cells.digest(blood_cells.to_tar(files))
    monkeypatch.setattr(blood_cells, "SHA256", sha)
    monkeypatch.setattr(blood_cells, "download", lambda url: made.getvalue())
    monkeypatch.setitem(fetch.DATASETS, "bccd", fetch.DATASETS["bccd"]._replace(digests={"bccd.tar": sha}))
    return made.getvalue()


def test_blood_cells_are_fetched_once_verified_and_split_officially(cells, tmp_path, monkeypatch):
    data = read(tmp_path, bccd)
    assert (len(data.train_ids), len(data.val_ids), len(data.test_ids)) == (5, 2, 2)
    assert [p.name for p in (tmp_path / "bccd").iterdir()] == ["bccd.tar"]
    monkeypatch.setattr(blood_cells, "download", lambda url: pytest.fail("fetched again"))
    assert torch.equal(read(tmp_path, bccd).source.train.inputs, data.source.train.inputs)


def test_a_copy_of_the_blood_cells_is_used_if_it_is_unaltered(cells, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(blood_cells, "download", lambda url: pytest.fail("fetched"))
    (tmp_path / "bccd.tar.gz").write_bytes(cells)
    for place in (tmp_path, tmp_path / "bccd.tar.gz"):
        assert len(read(place, bccd).train_ids) == 5
    with tarfile.open(tmp_path / "bccd.tar.gz") as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    top = tmp_path / "unpacked" / "BCCD_Dataset-d2"
    assert len(read(top, bccd).train_ids) == 5
    (top / "BCCD" / "Annotations" / "B_0.xml").write_text(xml("virus"))
    with pytest.raises(UserError, match=r"The files of data=bccd are not in"):
        read(top, bccd, download=False)
    assert "22 files of BCCD, which are not the" in caplog.text


def test_an_archive_of_something_else_or_with_links_is_refused(cells):
    with pytest.raises(ValueError, match="holds no BCCD"):
        blood_cells.unpacked(_tar({"other/x.xml": b""}))
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        link = tarfile.TarInfo("BCCD/Annotations/a.xml")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(ValueError, match="plausible size"):
        blood_cells.unpacked(made.getvalue())


def _tar(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, content in files.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return made.getvalue()


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="BCCD_ARCHIVE names no copy of the published archive")
def test_the_published_blood_cells_are_as_published(caplog):
    caplog.set_level(logging.INFO)
    data = read(PUBLISHED, bccd, size=[96, 128])
    assert (len(data.train_ids), len(data.val_ids), len(data.test_ids)) == (205, 87, 72)
    assert "Read BCCD: 364 pictures, 4,886 boxes: Platelets 361, RBC 4,153, WBC 372." in caplog.messages
    assert warnings(caplog) == ["Boxes of no area, left out: 2 (BloodImage_00343, BloodImage_00338)."]


@pytest.mark.network
def test_the_blood_cells_are_at_their_place(tmp_path):
    assert len(read(tmp_path, bccd).train_ids) == 205


# -- a teacher of these ----------------------------------------------------------------------------------------------------


def test_a_change_of_boxes_alone_is_another_data_set_to_a_teacher(tree, tmp_path):
    def hashed() -> str:
        return recipes.recipe_hash(compose_config(tmp_path / "run", "data=voc", f"data.root={tree}"))

    before = hashed()
    assert hashed() == before
    written(tree, xml("cat", (1, 1, 21, 10)), "Annotations/1.xml")  # as long as before
    assert hashed() != before
    assert contents_digest(tree) == contents_digest(tree, ())


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
