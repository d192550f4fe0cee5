"""Which objects are found and missed, and the figures that show it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from litdistill.tasks.base import Samples
from litdistill.tasks.detection.boxes import padded
from litdistill.tasks.detection.figures import detection_figures
from litdistill.tasks.detection.matching import counted, matched, missed
from litdistill.tasks.detection.metrics import Split
from litdistill.tasks.detection.task import Detection
from litdistill.types import Outputs


def _found(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor([*rows], dtype=torch.float32).view(-1, 6)


TRUTH = torch.tensor([[0.0, 0, 10, 10, 0, 0], [20, 20, 30, 30, 1, 0], [40, 40, 60, 60, 1, 1]])


def test_each_object_is_found_once_by_the_best_box_of_its_class() -> None:
    found = _found(
        (0, 0, 10, 9, 0.9, 0),  # right
        (0, 0, 10, 10, 0.8, 0),  # a second one of the same object
        (20, 20, 30, 30, 0.7, 0),  # of another class
        (41, 41, 50, 50, 0.65, 1),  # in the crowd: neither right nor wrong
        (20, 20, 30, 30, 0.49, 1),  # not sure
    )
    one = matched(found, TRUTH)
    assert one.hit.tolist() == [True, False]
    assert one.right.tolist() == [True, False, False]
    assert one.found[:, 4].tolist() == torch.tensor([0.9, 0.8, 0.7]).tolist()
    assert matched(found, TRUTH, score=0.4).hit.tolist() == [True, True]
    assert matched(found, TRUTH, overlap=0.95).hit.tolist() == [True, False]  # by the second box
    assert matched(found, TRUTH, overlap=0.95).right.tolist()[:2] == [False, True]
    assert counted(Split([found], [TRUTH])) == (2, 1, 2)


def test_nothing_found_and_nothing_there() -> None:
    assert matched(_found(), TRUTH).hit.tolist() == [False, False]
    alone = matched(_found((0, 0, 1, 1, 0.9, 0)), TRUTH[:0])
    assert alone.right.tolist() == [False]
    assert counted(Split([_found()], [TRUTH[:0]])) == (0, 0, 0)


def test_the_worst_misses_are_those_that_the_teacher_finds() -> None:
    good = _found((0, 0, 10, 10, 0.9, 0), (20, 20, 30, 30, 0.9, 1))
    student = Split([good, _found(), good[:1], _found()], [TRUTH] * 3 + [TRUTH[:0]])
    teacher = Split([good, _found(), good, _found()], student.truth)
    assert missed(student, teacher) == [(2, 1, 1), (1, 2, 0)]
    assert missed(student, None) == [(1, 2, 2), (2, 1, 1)]


def test_figures_are_drawn_with_and_without_a_teacher(tmp_path: Path) -> None:
    targets = padded([TRUTH] * 9)
    targets[4] = torch.nan  # without labels
    found = padded([_found((0, 0, 10, 10, 0.9, 0))] * 9, 3)
    found[:, 1:, 4], found[:, 1:, 5] = 0, -1
    student = Outputs({"detections": found})
    sure = Outputs({"detections": torch.cat([found[:, :1], found[:, :1] + torch.tensor([20, 20, 20, 20, 0, 1])], 1)})
    for teacher in (None, sure):
        samples = Samples(lambda i: torch.zeros(3, 64, 64, dtype=torch.uint8), targets, ("0", "$1"), student, teacher)
        figures = detection_figures(samples)
        assert list(figures) == ["worst misses", "precision and recall"]
        texts = [t.get_text() for f in figures["worst misses"].subfigs for a in f.axes for t in a.texts]
        titles = [f.get_suptitle() for f in figures["worst misses"].subfigs]
        assert len(titles) == 6
        assert titles[0] == ("1 of 2 missed" + (", 1 of them found by the teacher" if teacher else ""))
        assert {"0", "$1", "0 0.90"} <= set(texts)
        for name, figure in figures.items():
            figure.savefig(tmp_path / f"{name}.png")
    assert Detection().figures(samples).keys() == figures.keys()


def test_a_student_without_a_miss_is_said() -> None:
    found = torch.tensor([[[0.0, 0, 10, 10, 0.9, 0]]])
    truth = torch.tensor([[[0.0, 0, 10, 10, 0, 0]]])
    samples = Samples(lambda i: None, truth, ("a",), Outputs({"detections": found}), None)
    assert "no object" in detection_figures(samples)["worst misses"].texts[0].get_text()
