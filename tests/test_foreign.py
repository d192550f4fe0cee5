"""Anybody's networks and loaders by `distill()`, and anybody's data modules by `distill()` and by `train()`."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from litdistill import CRD, KD, BinaryKD, FitNet, LogitMSE, distill
from litdistill.models.preprocess import Preprocess, Preprocessed
from litdistill.tasks import Regression
from litdistill.types import Batch
from litdistill.utils.errors import UserError
from tests.foreigners import QUIET, Named, conv, loader, mlp, once, points, stacked, teacher_of_points

# -- distill() ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("collate", "wrap"),
    [
        (None, lambda net: net),
        (lambda s: dict(zip(("inputs", "labels"), stacked(s), strict=True)), lambda net: net),
        (lambda s: dict(zip(("x", "targets"), stacked(s), strict=True)), Named),
        (lambda s: Batch(*stacked(s), weight=1.0), lambda net: net),
    ],
    ids=["tuples", "dicts", "named inputs", "Batches"],
)
def test_distill_takes_plain_modules_and_loaders_and_gives_the_same_whatever_they_yield(tmp_path, collate, wrap):
    torch.manual_seed(0)
    student = mlp(6)
    before = [p.clone() for p in student.parameters()]
    train, val = loader(collate), loader(collate, 48)
    found = distill(
        wrap(student), wrap(teacher_of_points()), train, val, KD(), max_epochs=2, out=tmp_path, trainer=QUIET
    )
    assert not any(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    assert not found.training
    torch.manual_seed(0)
    again = mlp(6)
    distill(again, teacher_of_points(), loader(), loader(None, 48), max_epochs=2, out=tmp_path / "b", trainer=QUIET)
    for a, b in zip(student.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


class Worse(torch.optim.SGD):
    """Learns in the first of 3-step epochs, and then un-learns."""

    def step(self, closure=None):
        self.count = getattr(self, "count", 0) + 1
        for group in self.param_groups:
            group["lr"] = 0.5 if self.count <= 3 else -2.0
        return super().step(closure)


@pytest.mark.parametrize("ema", [None, 0.2])
def test_what_is_returned_has_the_best_weights_and_not_the_last(tmp_path, ema):
    torch.manual_seed(0)
    val = loader(None, 48)
    found = distill(
        mlp(6), teacher_of_points(), loader(), val, max_epochs=3, out=tmp_path, optimizer=lambda p: Worse(p, lr=0.5),
        trainer=QUIET, ema=ema,
    )  # fmt: skip
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert saved["epoch"] == 0
    prefix = "student." if ema is None else "average.module."
    for name, value in found.deployed_student.state_dict().items():
        assert torch.equal(value, saved["state_dict"][prefix + name])
    if ema is not None:
        assert not torch.equal(saved["state_dict"]["student.0.weight"], saved["state_dict"]["average.module.0.weight"])


def test_a_metric_of_which_less_is_better_chooses_the_epoch_with_the_least(tmp_path):
    x = torch.linspace(-1, 1, 96)[:, None]
    train = DataLoader(TensorDataset(x, 3 * x), batch_size=32)
    torch.manual_seed(0)
    net = nn.Linear(1, 1)
    found = distill(
        net, None, train, train, max_epochs=3, task=Regression(), out=tmp_path,
        optimizer=lambda p: Worse(p, lr=0.1), trainer=QUIET,
    )  # fmt: skip
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert saved["epoch"] == 0
    (kept,) = [v for k, v in saved["callbacks"].items() if k.startswith("ModelCheckpoint")]
    error = (found.deployed_student(x) - 3 * x).square().mean().sqrt().item()
    assert kept["best_model_score"].item() == pytest.approx(error, rel=1e-5)
    assert kept["monitor"] == "val/rmse"


def test_a_method_that_reads_features_trains_its_projector_and_deploys_the_student_alone(tmp_path):
    images = torch.rand(32, 1, 8, 8)
    data = DataLoader(TensorDataset(images, torch.arange(32) % 3), batch_size=16)
    torch.manual_seed(0)
    student, method = conv(4), FitNet(student_taps="last", teacher_taps="last")
    found = distill(
        student, conv(8), data, None, method, max_epochs=1, out=tmp_path, trainer=QUIET, allow_chance=True
    )  # fmt: skip
    assert sum(p.numel() for p in method.parameters()) > 0
    assert found.deployed_student is student
    assert not (tmp_path / "best.ckpt").exists()


@pytest.mark.parametrize(
    ("task", "targets", "method"),
    [
        ("regression", torch.randn(96, 3), LogitMSE(hard=1.0)),
        ("multilabel", (torch.randn(96, 3) > 0).float(), BinaryKD()),
    ],
)
def test_tasks_are_named(tmp_path, task, targets, method):
    data = DataLoader(TensorDataset(points()[0], targets), batch_size=32)
    distiller = distill(
        mlp(6), mlp(8), data, data, method, task, 1, tmp_path, trainer=QUIET, allow_chance=True
    )  # fmt: skip
    metric = {"regression": "val/rmse", "multilabel": "val/map"}[task]
    assert metric in distiller.trainer.callback_metrics


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"teacher": None, "method": KD()}, "KD learns from a teacher: give one, or use Supervised"),
        ({"teacher": mlp(4), "method": BinaryKD()}, "BinaryKD is defined for logits that are bernoulli"),
        ({"teacher": mlp(4), "method": FitNet()}, "compares spatial maps"),
        ({"task": "boxes"}, "choose classification, multilabel, regression"),
        ({"train": once(torch.zeros(2, 4))}, r"should be a pair \(inputs, targets\)"),
        ({"train": DataLoader([])}, "yields no batch"),
        ({"train": [points()]}, "train is a list, which Lightning takes for several loaders"),
        ({"train": once(torch.zeros(2, 4), torch.tensor([0, 7]))}, "network gives 3 logits"),
        ({"trainer": {"max_epochs": 3}}, r"give distill\(max_epochs=…\)"),
        ({"student": Preprocessed(conv(4), Preprocess([0.5], [0.2])), "train": once(torch.randn(8, 1, 8, 8), points(8)[1])},
         r"values from -.*takes uint8, or floats from 0 to 1.*bare\(net\)"),
    ],
)  # fmt: skip
def test_errors_speak_of_arguments_in_a_line(tmp_path, arguments, says):
    asked = {"student": mlp(6), "teacher": None, "train": loader(), "out": tmp_path, "max_epochs": 1, "trainer": QUIET}
    with pytest.raises(UserError, match=says) as caught:
        distill(**(asked | arguments))
    assert "\n" not in str(caught.value)
    assert not any(word in str(caught.value) for word in ("net@", "method=", "optimizer.lr", "trainer.", "data."))


def test_a_method_that_remembers_samples_is_refused_for_loaders_without_ids(tmp_path):
    with pytest.raises(UserError, match="id"):
        distill(conv(4), conv(8), once(torch.rand(4, 1, 8, 8), torch.arange(4) % 3), None, CRD(), out=tmp_path)


def test_networks_may_come_in_training_mode_and_the_teacher_stays_as_it_is(tmp_path):
    teacher = nn.Sequential(nn.BatchNorm1d(4), mlp(8)).train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    distill(mlp(6), teacher, loader(), loader(None, 48), max_epochs=1, out=tmp_path, trainer=QUIET, allow_chance=True)
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
