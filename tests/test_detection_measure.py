"""What is measured of a student of boxes: agreement with its teacher, each class, and what is wrong with it."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from litdistill.data.protocol import split_ids
from litdistill.distillation.distiller import Distiller
from litdistill.distillation.running_means import RunningMeans, Seen
from litdistill.evaluation.predictions import agreement, measure, predict_split
from litdistill.methods.supervised import Supervised
from litdistill.models.preprocess import Preprocess, Preprocessed
from litdistill.tasks.classification import Classification
from litdistill.tasks.detection.boxes import padded
from litdistill.tasks.detection.fcos import fcos_slim
from litdistill.tasks.detection.metrics import Split, as_targets, mean_ap
from litdistill.tasks.detection.scenes import digit_scenes
from litdistill.tasks.detection.task import Detection
from litdistill.tasks.findings import judge
from litdistill.types import Outputs
from tests.fits import fit


def _rows(*rows: tuple[float, ...], most: int = 4) -> Tensor:
    """One picture's detections (1, most, 6)."""
    empty = (0.0, 0, 0, 0, 0, -1)
    return torch.tensor([[*rows, *[empty] * (most - len(rows))]], dtype=torch.float32)


def _kept(found: Tensor) -> Outputs:
    return Outputs({"detections": found})


def test_agreement_is_the_map_against_what_the_teacher_is_sure_of() -> None:
    teacher = _rows((0, 0, 10, 10, 0.9, 1), (20, 20, 30, 30, 0.5, 0), (40, 40, 60, 60, 0.49, 0))
    student = _rows((0, 0, 10, 10, 0.3, 1), (20, 20, 30, 30, 0.2, 0), (40, 40, 60, 60, 0.1, 0))
    found = agreement(Detection(), _kept(student), _kept(teacher), torch.zeros(1, 1, 6))
    assert found == {"agreement": pytest.approx(1.0)}  # what the teacher is not sure of comes last, and costs nothing
    worse = student.clone()
    worse[0, 0, 5] = 0  # the class
    assert agreement(Detection(), _kept(worse), _kept(teacher), torch.zeros(1, 1, 6))["agreement"] < 0.6
    unsure = _rows((0, 0, 10, 10, 0.4, 1))
    assert agreement(Detection(), _kept(student), _kept(unsure), torch.zeros(1, 1, 6)) == {}


def test_each_class_by_its_name() -> None:
    targets = padded([torch.tensor([[0.0, 0, 10, 10, 2, 0], [20, 20, 30, 30, 0, 0], [40, 40, 50, 50, 0, 1]])])
    found = _rows((0, 0, 10, 10, 0.9, 2), (0, 0, 9, 9, 0.9, 1))
    assert Detection().by_class(_kept(found), targets, ["red", "green", "blue"]) == {
        "red": {"map": 0.0, "map_50": 0.0, "count": 1},
        "blue": {"map": pytest.approx(1.0), "map_50": pytest.approx(1.0), "count": 1},
    }
    assert list(Detection().by_class(_kept(found), targets, [])) == ["0", "2"]


def test_a_student_that_finds_nothing_is_told() -> None:
    targets = padded([torch.tensor([[0.0, 0, 10, 10, 1, 0]])] * 30)
    nothing = _kept(_rows().expand(30, -1, -1))
    found = judge(Detection(), nothing, targets, 0.0)
    assert "finds nothing: none of its scores is above 0.05 in any of 30 pictures of the test set" in found["nothing"]
    assert "at chance level: its mAP on the test set is 0.00 %" in found["chance"]
    good = _kept(_rows((0, 0, 10, 10, 0.9, 1)).expand(30, -1, -1))
    assert "nothing" not in judge(Detection(), good, targets, 1.0)


def _detector(seed: int) -> Preprocessed:
    torch.manual_seed(seed)
    net = fcos_slim(10, (3, 64, 64), width=8, depth=1, fpn=32, convs=1)
    return Preprocessed(net, Preprocess([0.5] * 3, [0.5] * 3))


def test_training_and_evaluation_measure_the_same(tmp_path: Path) -> None:
    data = digit_scenes(24, val_size=12, eval_batch_size=5)
    data.setup()
    student, teacher = _detector(0), _detector(1)
    for net in (student, teacher):  # untrained heads are sure of nothing
        net.get_submodule("head.classification_head.cls_logits").bias.data.fill_(3.0)
    task = Detection()
    distiller = Distiller(
        student, Supervised(), teacher, data.get_batch("train", data.train_ids[:2]), task, data=data, allow_chance=True,
        optimizer=lambda p: torch.optim.SGD(p, lr=1e-4),
    )  # fmt: skip
    trainer = fit(distiller, data, tmp_path, max_epochs=1)
    found = measure(distiller.deployed_student, teacher, data, task, "val")
    logged = {k: v.item() for k, v in trainer.callback_metrics.items()}
    assert logged["val/agreement"] == pytest.approx(found["agreement"]["agreement"], abs=1e-6)
    assert logged["val/map"] == pytest.approx(found["student"]["map"], abs=1e-6)
    assert logged["val/teacher_map"] == pytest.approx(found["teacher"]["map"], abs=1e-6)
    student_out, targets = predict_split(distiller.deployed_student, data, "val", "cpu", task)
    teacher_out, _ = predict_split(teacher, data, "val", "cpu", task)
    sure = as_targets(teacher_out.heads["detections"], 0.5)
    assert (sure[..., 4] >= 0).any()
    expected = mean_ap(Split.of(student_out.heads["detections"], sure))["map"]
    assert found["agreement"]["agreement"] == pytest.approx(expected, abs=1e-9)
    assert len(targets) == len(split_ids(data, "val")) == 12
    assert found["by_class"].keys() == {"student", "teacher"}


def test_dense_heads_are_not_held_while_training():
    means = RunningMeans(Detection())
    heads = {"logits": torch.zeros(2, 5, 3), "boxes": torch.zeros(2, 5, 4)}
    held = [weakref.ref(head) for head in heads.values()]
    for value in (1.0, 3.0):
        means.add(Seen({"cls": torch.tensor(value)}, Outputs(heads), Outputs(heads), torch.zeros(2, 1, 6), 2))
    del heads
    assert [ref() for ref in held] == [None, None]
    assert {name: float(value) for name, value in means.means().items()} == {"loss": 2.0, "cls": 2.0}
    assert float(means.epoch_loss()) == 2.0


def test_features_of_the_teacher_are_not_held_while_training():
    means = RunningMeans(Classification())
    logits, features = torch.eye(3), {"layer1": torch.zeros(3, 8, 4, 4)}
    held = weakref.ref(features["layer1"])
    means.add(
        Seen({"hint": torch.ones(())}, Outputs.of(logits), Outputs({"logits": logits}, features), torch.arange(3), 3)
    )
    del features
    assert held() is None
    assert float(means.means()["agreement"]) == 1.0
