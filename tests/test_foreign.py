"""Anybody's networks and loaders by `distill()`, and anybody's data modules by `distill()` and by `train()`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from lightning import LightningDataModule
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from litdistill import CRD, KD, BinaryKD, FitNet, LogitMSE, distill, load_student
from litdistill.data import tables
from litdistill.data.datamodule import ImageData
from litdistill.data.foreign import ForeignData, offers, output_names, sample, training_inputs
from litdistill.evaluation.evaluate import differences, evaluate, load_run
from litdistill.export.export import export
from litdistill.export.predict import load
from litdistill.models.preprocess import Preprocess, Preprocessed
from litdistill.tasks import Regression
from litdistill.tasks.base import to_batch
from litdistill.training.train import train
from litdistill.types import Batch
from litdistill.utils.checkpoint import write_text
from litdistill.utils.errors import UserError
from tests.conftest import compose_config

QUIET = {"logger": False, "accelerator": "cpu"}


def mlp(width: int, inputs: int = 4, outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs))


def conv(width: int) -> nn.Module:
    """Images (N, 1, 8, 8) -> logits (N, 3)."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3),
    )  # fmt: skip


def points(count: int = 96) -> tuple[Tensor, Tensor]:
    """Points (N, 4) of three classes: the largest of the first three numbers."""
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    return x, x[:, :3].argmax(1)


def teacher_of_points() -> nn.Module:
    """One that is always right, and confident."""
    net = nn.Linear(4, 3)
    with torch.no_grad():
        net.weight.copy_(4 * torch.eye(3, 4))
        net.bias.zero_()
    return net


def loader(collate=None, count: int = 96, batch: int = 32) -> DataLoader:
    return DataLoader(TensorDataset(*points(count)), batch_size=batch, collate_fn=collate)


def once(*batch: Tensor) -> DataLoader:
    """Yields one batch."""
    return DataLoader([batch], batch_size=None)


def stacked(samples: list) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])


class Named(nn.Module):
    """Takes `x` by name, and gives a dict."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net(x)}


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


# -- data modules ------------------------------------------------------------------------------------------------------


class Foreign(LightningDataModule):
    """Yields tuples, and shifts its inputs on their way to the device, as some do with a GPU's help."""

    def __init__(self, batch_size: int = 32, shift: float = 0.0):
        super().__init__()
        self.batch_size, self.shift = batch_size, shift

    def setup(self, stage=None):
        x, y = points(192)
        self.parts = TensorDataset(x[:96], y[:96]), TensorDataset(x[96:144], y[96:144]), TensorDataset(x[144:], y[144:])

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + self.shift, batch[1]]

    def train_dataloader(self):
        return DataLoader(self.parts[0], self.batch_size)

    def val_dataloader(self):
        return DataLoader(self.parts[1], self.batch_size)

    def test_dataloader(self):
        return DataLoader(self.parts[2], self.batch_size)


class OnlyTrain(LightningDataModule):
    def train_dataloader(self):
        return loader()


class Endless(IterableDataset):
    def __iter__(self):
        x, y = points()
        while True:
            yield from zip(x, y, strict=True)


class EndlessData(Foreign):
    def train_dataloader(self):
        return DataLoader(Endless(), 8)


def test_distill_takes_a_foreign_data_module_with_and_without_a_validation_set(tmp_path):
    found = distill(mlp(6), teacher_of_points(), Foreign(), max_epochs=2, out=tmp_path, trainer=QUIET)
    assert (tmp_path / "best.ckpt").is_file()
    assert found.cache is None
    distill(mlp(6), None, OnlyTrain(), max_epochs=1, out=tmp_path / "b", trainer=QUIET)
    assert not (tmp_path / "b" / "best.ckpt").exists()
    with pytest.raises(UserError, match="leave val out"):
        distill(mlp(6), None, Foreign(), loader())


@pytest.mark.parametrize("name", ["digits", "multilabel"])
def test_data_that_know_their_samples_bring_groups_and_a_cache(tmp_path, name):
    torch.manual_seed(0)
    if name == "digits":
        data = ImageData(name="digits", per_class=12, batch_size=32, val_size=100)
        nets = [Preprocessed(nn.Sequential(nn.Flatten(), mlp(w, 64, 10)), Preprocess([0.3], [0.3])) for w in (8, 16)]
        method, task = KD(), "classification"
    else:
        data = tables.multilabel(fraction=0.1)
        nets, method, task = [mlp(w, 40, 10) for w in (8, 16)], BinaryKD(), "multilabel"
    found = distill(
        *nets, data, None, method, task, 3, tmp_path, trainer=QUIET | {"gradient_clip_val": 0.5}, allow_chance=True
    )  # fmt: skip
    assert not found.automatic_optimization
    assert found.clip == (0.5, "norm")
    assert found.cache is not None
    assert found.cache.computed < found.cache.requested
    assert found.trainer.global_step == 3 * -(-len(data.train_ids) // data.batch_size)
    assert found.trainer.fit_loop.epoch_progress.current.completed == 3


def test_foreign_data_are_read_as_a_trainer_would_give_them():
    module = Foreign(batch_size=20, shift=5.0)
    module.setup()
    data = ForeignData(module, to_batch)
    x, y = points(192)
    assert torch.equal(data.example.inputs, x[:20] + 5)
    assert torch.equal(torch.cat([b.inputs for b in data.batches("val")]), x[96:144] + 5)
    assert torch.equal(torch.cat([b.targets for b in data.batches("test")]), y[144:])
    assert torch.equal(sample(data, "val", 37), x[96 + 37] + 5)
    assert torch.equal(training_inputs(data, 2), data.example.inputs)
    assert data.input_shape == (4,)
    assert (data.num_classes, data.class_names, output_names(data, 3)) == (None, (), ("0", "1", "2"))
    assert [data.count(split) for split in ("train", "val", "test")] == [96, 48, 48]
    module.class_names = ["a", "b", "c"]
    assert (data.num_classes, output_names(data, 3)) == (3, ("a", "b", "c"))


def test_a_data_module_that_cannot_be_measured_is_refused_before_the_training():
    module = OnlyTrain()
    with pytest.raises(UserError, match=r"OnlyTrain has no val_dataloader.*litdistill\.distill"):
        ForeignData(module, to_batch)


def test_a_data_module_made_of_data_sets_has_the_loaders_that_it_was_given():
    rows = torch.utils.data.TensorDataset(*points(8))
    assert [offers(LightningDataModule.from_datasets(rows, rows), split) for split in ("val", "test")] == [True, False]
    assert not offers(LightningDataModule.from_datasets(rows), "val")


# -- train() -----------------------------------------------------------------------------------------------------------

MODULE = '''
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning import LightningDataModule
from litdistill.tasks import Classification

class Points(LightningDataModule):
    """Says nothing of itself: tuples, and no names."""

    def setup(self, stage=None):
        x = torch.randn(192, 4, generator=torch.Generator().manual_seed(0))
        y = x[:, :3].argmax(1)
        self.parts = [TensorDataset(x[a:b], y[a:b]) for a, b in ((0, 96), (96, 144), (144, 192))]

    def train_dataloader(self):
        return DataLoader(self.parts[0], 32)

    def val_dataloader(self):
        return DataLoader(self.parts[1], 32)

    def test_dataloader(self):
        return DataLoader(self.parts[2], 32)

def net(width=8):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))

class NamedPoints(Points):
    """Yields dicts, of which the network takes two."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {"x": batch[0][:, :2], "more": batch[0][:, 2:], "labels": batch[1]}

class Both(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.net = net(width)

    def forward(self, x, more):
        return {"logits": self.net(torch.cat([x, more], 1))}

class Focal(Classification):
    """Lin et al. 2017 (arXiv 1708.02002): the cross-entropy of each sample times (1 - p) ** gamma."""

    def __init__(self, gamma: float = 2.0, label_smoothing: float = 0.0):
        super().__init__(label_smoothing)
        self.gamma = gamma

    def loss(self, net, outputs, batch):
        log_p = outputs.logits.float().log_softmax(1).gather(1, batch.targets[:, None])
        return {"focal": (-(1 - log_p.exp()) ** self.gamma * log_p).mean()}
'''


@pytest.fixture
def outside(tmp_path: Path, monkeypatch) -> str:
    """A module of somebody else's, in a temporary folder, by its name."""
    name = f"outside_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop(name, None)


def finished(folder: Path, *overrides: str) -> Path:
    """The folder of a run that `train()` has finished."""
    cfg = compose_config(folder, "trainer=cpu", "trainer.max_epochs=2", *overrides)
    write_text(folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
    train(cfg)
    return folder


def foreign_keys(outside: str) -> list[str]:
    """Networks and data of that module, in place of the default's."""
    return [
        "~data", f"+data={{_target_: {outside}.Points}}",
        "~student.widths", "~student.global_pool", f"student._target_={outside}.net",
        "~teacher.widths", "~teacher.global_pool", f"teacher._target_={outside}.net", "+teacher.width=16",
        "optimizer.lr=0.05", "++teacher.recipe.trainer.max_epochs=6",
    ]  # fmt: skip


@pytest.mark.usefixtures("drawn")
def test_a_foreign_data_module_trains_evaluates_and_exports_without_names(outside, tmp_path, caplog):
    folder = finished(tmp_path / "run", *foreign_keys(outside))
    _, summary = load_run(folder)
    assert summary["data"]["name"] == "Points"
    assert (summary["data"]["train"], summary["data"]["val"], summary["data"]["test"]) == (96, 48, 48)
    assert summary["teacher"] is not None
    assert summary["options"]["train/global_batch"] == 32
    events = EventAccumulator(str(folder)).Reload()
    assert (
        "loss/total" in events.Tags()["scalars"]
    )  # though an epoch has fewer minibatches than trainer.log_every_n_steps
    assert differences(evaluate(folder, device="cpu"), summary) == []
    assert list(folder.rglob("events*"))
    assert "left out" not in caplog.text  # the pictures in TensorBoard
    path, check = export(folder)
    assert check["agreement"] == 1.0
    model = load(path)
    assert model.facts.classes == ["0", "1", "2"]
    x, _ = points(192)
    given = torch.from_numpy(model.run(x[144:].numpy()))
    torch.testing.assert_close(given, load_student(folder)(x[144:]).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("drawn")
def test_inputs_by_name_train_and_evaluate_too_and_an_export_says_what_does_it(outside, tmp_path, caplog):
    keys = [k.replace(".Points", ".NamedPoints").replace(".net", ".Both") for k in foreign_keys(outside)]
    folder = finished(tmp_path / "run", *keys)
    _, summary = load_run(folder)
    assert summary["data"]["input_shape"] is None
    assert summary["teacher"] is not None
    assert differences(evaluate(folder, device="cpu"), summary) == []
    assert "left out" not in caplog.text
    with pytest.raises(
        UserError, match=r"has one input, and this student takes several: load it with litdistill\.load_student"
    ):
        export(folder)
    x, y = (t[144:] for t in points(192))
    right = load_student(folder)(x=x[:, :2], more=x[:, 2:])["logits"].argmax(1) == y
    assert right.double().mean().item() == summary["student"]["test"]["accuracy"]["best"]


def test_a_task_of_ones_own_trains_and_evaluates(outside, tmp_path):
    folder = finished(
        tmp_path / "run",
        *foreign_keys(outside),
        f"task._target_={outside}.Focal",
        "+task.gamma=1.5",
        "logger=none",
    )
    _, summary = load_run(folder)
    assert summary["task"] == "Focal"
    assert differences(evaluate(folder, device="cpu"), summary) == []
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["epoch"] == 1


def test_its_loss_is_what_is_learnt(outside, tmp_path):
    """With labels alone one step of gradient descent is that of the focal loss, closed form and all."""
    folder = finished(
        tmp_path / "run", *foreign_keys(outside), f"task._target_={outside}.Focal", "method=supervised",
        "teacher=null", "logger=none", "optimizer=sgd", "optimizer.lr=0.1", "optimizer.momentum=0", "optimizer.weight_decay=0",
        "optimizer.nesterov=false", "trainer.max_epochs=1", "+trainer.limit_train_batches=1", "scheduler=none",
    )  # fmt: skip
    module = sys.modules[outside]
    torch.manual_seed(0)
    net = module.net()
    x, y = (t[:32] for t in points(192))
    log_p = net(x).log_softmax(1).gather(1, y[:, None])
    loss = (-((1 - log_p.exp()) ** 2) * log_p).mean()
    loss.backward()
    with torch.no_grad():
        for p in net.parameters():
            p -= 0.1 * p.grad
    trained = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in net.state_dict().items():
        torch.testing.assert_close(trained[f"student.{name}"], value, rtol=1e-5, atol=1e-6)


def test_an_endless_loader_needs_to_be_told_its_epoch(tmp_path):
    keys = foreign_keys(__name__)
    keys[1] = f"+data={{_target_: {__name__}.EndlessData}}"
    keys = [k.replace(f"{__name__}.net", f"{__name__}.mlp") for k in keys]
    fast = ["logger=none", "method=supervised", "teacher=null", "+student.width=4"]
    with pytest.raises(UserError, match=r"has no length.*trainer\.limit_train_batches"):
        finished(tmp_path / "a", *keys, *fast)
    assert load_run(finished(tmp_path / "b", *keys, *fast, "+trainer.limit_train_batches=5"))[1]["steps"] == 10
