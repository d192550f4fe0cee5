"""Pictures with boxes of one's own in PASCAL VOC's XML, and BCCD, which is such a tree; faults are counted and named."""

import io
import logging
import os
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from litdistill.config import recipes
from litdistill.data import archives, fetch
from litdistill.data.archives import BLOOD_CELLS
from litdistill.data.listing import contents_digest
from litdistill.tasks.detection import bccd as bccd_module
from litdistill.tasks.detection import voc
from litdistill.tasks.detection.bccd import bccd
from litdistill.utils.errors import UserError
from tests.conftest import compose_config
from tests.test_detection_files import TALL, WIDE, listed, picture, read, root, rows, unsaid, warnings, written  # noqa: F401

PUBLISHED = Path(os.environ.get("BCCD_ARCHIVE", "bccd.tar.gz"))  # a copy of the repository's archive


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
    sha = archives.digest(archives.to_tar(files, BLOOD_CELLS.folder))
    monkeypatch.setattr(bccd_module, "BLOOD_CELLS", BLOOD_CELLS._replace(sha256=sha))
    monkeypatch.setattr(archives, "download", lambda url: made.getvalue())
    monkeypatch.setitem(fetch.DATASETS, "bccd", fetch.DATASETS["bccd"]._replace(digests={"bccd.tar": sha}))
    return made.getvalue()


def test_blood_cells_are_fetched_once_verified_and_split_officially(cells, tmp_path, monkeypatch):
    data = read(tmp_path, bccd)
    assert (len(data.train_ids), len(data.val_ids), len(data.test_ids)) == (5, 2, 2)
    assert [p.name for p in (tmp_path / "bccd").iterdir()] == ["bccd.tar"]
    monkeypatch.setattr(archives, "download", lambda url: pytest.fail("fetched again"))
    assert torch.equal(read(tmp_path, bccd).source.train.inputs, data.source.train.inputs)


def test_a_copy_of_the_blood_cells_is_used_if_it_is_unaltered(cells, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(archives, "download", lambda url: pytest.fail("fetched"))
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
    with pytest.raises(ValueError, match="holds no files of BCCD"):
        archives.unpacked(BLOOD_CELLS, _tar({"other/x.xml": b""}))
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        link = tarfile.TarInfo("BCCD/Annotations/a.xml")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(ValueError, match="plausible size"):
        archives.unpacked(BLOOD_CELLS, made.getvalue())


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


def test_a_change_of_boxes_alone_is_another_data_set_to_a_teacher(tree, tmp_path):
    def hashed() -> str:
        return recipes.recipe_hash(compose_config(tmp_path / "run", "data=voc", f"data.root={tree}"))

    before = hashed()
    assert hashed() == before
    written(tree, xml("cat", (1, 1, 21, 10)), "Annotations/1.xml")  # as long as before
    assert hashed() != before
    assert contents_digest(tree) == contents_digest(tree, ())
