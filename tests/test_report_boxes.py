"""The sections of the page that only detectors have."""

from __future__ import annotations

import io
import re
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from litdistill.report import sections
from litdistill.report.blocks import Table, Text, Thumbs
from litdistill.report.collect import Group, Row, Seed
from litdistill.report.converted import beside_float
from litdistill.report.of_boxes import drawn, only_one
from litdistill.report.of_task import of_task
from litdistill.tasks.detection.boxes import padded
from litdistill.tasks.detection.metrics import Split
from litdistill.tasks.detection.task import Detection
from litdistill.types import Outputs
from tests.pages import summary, write_page

TRUTH = torch.tensor([[0.0, 0, 10, 10, 0, 0], [20, 20, 30, 30, 1, 0]])
BOTH = torch.tensor([[0.0, 0, 10, 10, 0.9, 0], [20, 20, 30, 30, 0.8, 1]])
ONE = torch.tensor([[0.0, 0, 10, 10, 0.9, 0], [0, 0, 0, 0, 0, -1]])


def _seed(found: Tensor, sha: str, teacher: str | None = None) -> Seed:
    summary = {"seed": 0, "method": "kd", "teacher": None if teacher is None else {"sha256": teacher}}
    outputs, targets = Outputs({"detections": found}), padded([TRUTH] * len(found))
    return Seed(summary, Path(), Detection(), test=outputs, test_targets=targets, sha256=sha)


def _group(inputs: Tensor) -> Group:
    about = {"name": "net", "params": 1, "macs": 1}
    teacher = Row("teacher", about, [_seed(torch.stack([BOTH] * 3), "t")], teacher=True)
    student = Row("distilled", about, [_seed(torch.stack([BOTH, ONE, ONE]), "s", "t")])
    facts = {"metric": {"name": "map", "direction": "max"}}
    return Group("scenes", facts, [teacher, student], inputs, ("red", "green", "blue"))


def test_each_class_and_what_only_the_teacher_finds() -> None:
    classes, misses = of_task(_group(torch.zeros(3, 3, 40, 40, dtype=torch.uint8)), "")
    table = classes.blocks[0]
    assert isinstance(table, Table)
    assert list(table.head) == ["model", "worst class", "red", "green", "blue"]
    assert list(table.rows[0])[2:] == ["100.0", "100.0", ""]
    assert list(table.rows[1])[1:] == ["green", "100.0", "33.7", ""]  # COCO takes 34 of 101 recalls up to a third
    text, thumbs = misses.blocks
    assert isinstance(text, Text)
    assert isinstance(thumbs, Thumbs)
    assert thumbs.title.endswith("of 6 objects, 2 only the teacher finds and 0 only the student")
    assert [t.caption for t in thumbs.thumbs] == ["misses green", "misses green"]


def test_an_int8_file_stands_beside_its_float_network() -> None:
    group = _group(torch.zeros(3, 3, 40, 40, dtype=torch.uint8))
    assert beside_float(group, "") == []
    check = {"agreement": 0.97, "exported": 0.5, "student": 0.51, "compared": ["scores", "boxes are the same"]}
    small = Row("distilled, then int8", {}, [_seed(torch.stack([BOTH]), "s")], precision="int8", converted=True)
    small.seeds[0].summary["check"] = check
    times = [{"bytes": 2000.0, "cpu": {1: {"p50_ms": 0.25}}}, {"bytes": 1000.0, "cpu": {1: {"p50_ms": 0.125}}}]
    group.rows[1].timing, small.timing = times
    group.rows.append(small)
    text, table = beside_float(group, "")
    assert isinstance(text, Text)
    assert "how many boxes are the same" in text.text
    assert isinstance(table, Table)
    assert list(table.rows) == [["distilled", "97.00", "50.00", "51.00", "1.0", "2.0", "0.125", "0.250"]]
    assert list(table.head)[2:4] == ["mAP %", "in float"]


def test_data_that_are_no_pictures_have_no_misses() -> None:
    assert len(of_task(_group(torch.zeros(3, 3, 40, 40)), "")) == 1


def test_objects_that_one_of_two_finds() -> None:
    first, second = Split([ONE[:1], BOTH], [TRUTH] * 2), Split([BOTH, BOTH], [TRUTH] * 2)
    assert (only_one(first, second), only_one(second, first)) == (1, 0)


def test_boxes_are_drawn_on_enlarged_and_reduced_pictures() -> None:
    for side, shown in ((64, 256), (1024, 256)):
        box = torch.tensor([[0.25, 0.25, 0.75, 0.75]]) * side
        png = drawn(torch.zeros(3, side, side, dtype=torch.uint8), [(box, "#0072B2", [])])
        picture = Image.open(io.BytesIO(png))
        assert picture.size == (shown, shown)
        assert picture.getpixel((shown // 4, shown // 2)) == (0x00, 0x72, 0xB2)
        assert picture.getpixel((shown // 2, shown // 2)) == (0, 0, 0)


def _alone(found: Tensor, sha: str, teacher: str | None = None) -> Seed:
    """A seed with all that a page reads of its summary. `teacher`: the digest of its teacher; None: boxes alone."""
    seed = _seed(found, sha, teacher)
    seed.summary |= summary(0) | {"metric": FACTS["metric"], "teacher": seed.summary["teacher"], "task": "Detection"}
    seed.summary["student"] = {"name": "fcos_slim", "test": {"map": {"best": 0.5, "last": 0.4}}}
    seed.val, seed.val_targets = seed.test, seed.test_targets
    return seed


FACTS = {"name": "scenes", "classes": 3, "test": 3, "metric": {"name": "map", "direction": "max"}}
ABOUT = {"name": "fcos_slim", "params": 1, "macs": 1}
UNSURE = torch.cat([BOTH[:, :4], BOTH[:, 4:] * torch.tensor([0.1, 1.0])], 1)  # no score of 0.5


def _page(*rows: Row) -> Group:
    return Group("scenes", FACTS, list(rows), torch.zeros(3, 3, 40, 40, dtype=torch.uint8), ("red", "green", "blue"))


def test_a_detector_alone_has_a_page_without_agreement(tmp_path: Path) -> None:
    made = _page(Row("boxes alone", ABOUT, [_alone(torch.stack([BOTH, ONE, ONE]), "s")]))
    table, *_, fold = sections.quality(made, "").blocks
    assert isinstance(table, Table)
    assert "mAP %" in table.head
    assert not [name for name in table.head if "agree" in name or "teacher" in name]
    assert "Agreement" not in str(fold)
    assert sections.over_seeds(made, "").title == "mAP, over seeds"
    assert [section.id for section in of_task(made, "")] == ["per-class"]
    write_page(tmp_path, made)
    page = (tmp_path / "index.html").read_text()
    assert "Average precision of each class" in page
    assert not re.search(r"None|nan\b|undefined|What the teacher finds", page)


def test_agreement_with_a_teacher_that_is_sure_of_nothing_is_left_empty(tmp_path: Path) -> None:
    """It is undefined: there is no box to compare with. Beside it another teacher's stays."""
    unsure = Row("unsure", ABOUT, [_alone(torch.stack([UNSURE] * 3), "t")], teacher=True)
    of_unsure = Row("of unsure", ABOUT, [_alone(torch.stack([BOTH] * 3), "a", "t")])
    made = _page(unsure, of_unsure)
    table = sections.quality(made, "").blocks[0]
    assert isinstance(table, Table)
    assert not [name for name in table.head if "agree" in name]
    assert sections.over_seeds(made, "").title == "mAP, over seeds"
    sure = Row("sure", ABOUT, [_alone(torch.stack([BOTH] * 3), "u")], teacher=True)
    made = _page(unsure, of_unsure, sure, Row("of sure", ABOUT, [_alone(torch.stack([BOTH] * 3), "b", "u")]))
    table = sections.quality(made, "").blocks[0]
    assert isinstance(table, Table)
    assert [row[list(table.head).index("agreement %")] for row in table.rows] == ["", "", "", "100.00"]
    write_page(tmp_path, made)
    assert not re.search(r"None|nan\b|undefined", (tmp_path / "index.html").read_text())
