"""A step of several minibatches is what as many steps of one are: to the bit, and for whoever watches."""

import copy
import functools

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR

from litdistill.data.augment import Crop
from litdistill.distillation.distiller import Clip, Distiller, SchedulerOptions
from litdistill.distillation.running_means import RunningMeans
from litdistill.distillation.teacher_cache import CacheOptions
from litdistill.methods.crd import CRD
from litdistill.methods.kd import KD
from litdistill.methods.supervised import Supervised
from litdistill.training import grouping
from litdistill.training.distill import distill
from litdistill.training.grouping import Layout, group_size, layout_of, reason_for_single
from litdistill.training.resume import LastState
from litdistill.training.trainer import build_trainer
from litdistill.utils.errors import UserError
from tests.conftest import compose_config
from tests.fits import digits, example, fit, grouped, logged, net, same

STEPS = (functools.partial(StepLR, step_size=1, gamma=0.5), SchedulerOptions())


def run(
    tmp_path, group: int, clip=None, ckpt=None, log_every: int = 5, scheduler=STEPS, ema=None, method=None, **options
):
    """Three epochs of 12 minibatches, the last one smaller, with all that depends on a step: dropout, views, a schedule."""
    data = digits(per_class=23, batch_size=20, augment=[Crop(1)])
    torch.manual_seed(0)
    distiller = Distiller(
        nn.Sequential(net(), nn.Dropout(0.1)), method or KD(), net(16), example(data), "classification",
        functools.partial(SGD, lr=0.1, momentum=0.9), *scheduler, schedule={"soft": [(0, 0), (4, 1)]} if method is None else {},
        allow_chance=True, cache=CacheOptions("off"), seed=0, group=group, clip=Clip(clip), ema=ema,
        train_targets=data.train_targets,
    )  # fmt: skip
    settings = {
        "max_epochs": 3, "logger": CSVLogger(tmp_path / f"log{group}"), "log_every_n_steps": 1 if group else log_every,
        "gradient_clip_val": None if group else clip,
    }  # fmt: skip
    trainer = fit(distiller, grouped(data, group, log_every), tmp_path / str(group), ckpt, **(settings | options))
    return distiller, trainer


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 36),
        ({"clip": 0.5, "ema": 0.9}, 36),
        ({"max_steps": 17, "max_epochs": -1}, 17),
        ({"precision": "bf16-mixed", "max_epochs": 1}, 12),
        ({"check_val_every_n_epoch": 2}, 36),
        ({"method": "crd"}, 36),
    ],
)
def test_weights_and_counts_of_steps_are_those_of_single_steps(tmp_path, options, steps):
    options = options | ({"method": CRD(width=8, negatives=16)} if "method" in options else {})
    one, trainer = run(tmp_path, 0, **options)
    if "method" in options:
        options["method"] = CRD(width=8, negatives=16)
    many, trainer4 = run(tmp_path, 4, **options)
    assert same(one, many)
    assert trainer4.global_step == trainer.global_step == steps
    assert trainer4.current_epoch == trainer.current_epoch
    val = [{k: v for k, v in t.callback_metrics.items() if k.startswith("val/")} for t in (trainer, trainer4)]
    assert val[0] == val[1]


@pytest.mark.parametrize("name", ["onecycle", "plateau"])
def test_schedules_by_step_and_by_metric_are_those_of_single_steps(tmp_path, name):
    schedulers = {
        "onecycle": (functools.partial(OneCycleLR, max_lr=0.3, total_steps=36), SchedulerOptions("step")),
        "plateau": (
            functools.partial(ReduceLROnPlateau, mode="max", patience=0, threshold=1),
            SchedulerOptions("epoch", "val/accuracy"),
        ),
    }
    found = [run(tmp_path, group, scheduler=schedulers[name]) for group in (0, 4)]
    assert same(found[0][0], found[1][0])
    rates = [trainer.optimizers[0].param_groups[0]["lr"] for _, trainer in found]
    assert rates[0] == rates[1]
    if name == "plateau":  # of three validations the first is the best, and no other is better by 1
        assert rates[0] == pytest.approx(0.1 * 0.1**2)


def test_groups_are_logged_at_the_step_of_the_optimizer_and_once(tmp_path):
    _, trainer = run(tmp_path, 4, callbacks=[ModelCheckpoint(tmp_path, "{step}")])
    rows = logged(trainer)
    train = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in train] == [5, 10, 12, 17, 22, 24, 29, 34, 36]
    assert all(
        {"train/hard", "train/soft", "train/accuracy", "train/agreement", "lr-SGD"} <= row.keys() for row in train
    )
    assert [row["lr-SGD"] for row in train] == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.05, 0.025, 0.025, 0.025, 0.0125])
    assert [row["step"] for row in rows if "val/accuracy" in row] == [12, 24, 36]
    assert len(rows) == 12
    assert (tmp_path / "step=36.ckpt").is_file()
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(train[-1]["train/loss"])


def test_single_steps_are_logged_as_lightning_logs_them(tmp_path):
    _, trainer = run(tmp_path, 0, callbacks=[LearningRateMonitor("step")])
    train = [row for row in logged(trainer) if "train/loss" in row]
    assert [row["step"] for row in train] == [4, 9, 14, 19, 24, 29, 34]  # Lightning counts batches from 0


@pytest.mark.parametrize("group", [0, 4])
def test_what_is_logged_is_the_mean_since_the_last_log(tmp_path, monkeypatch, group):
    losses, inner = [], Distiller.loss
    monkeypatch.setattr(Distiller, "loss", lambda self, *a: (losses.append(loss := inner(self, *a)), loss)[1])
    _, trainer = run(tmp_path, group, max_epochs=2, log_every=6)
    rows = [row["train/loss"] for row in logged(trainer) if "train/loss" in row]
    assert rows == pytest.approx([torch.stack(losses[i : i + 6]).mean().item() for i in range(0, 24, 6)], rel=1e-5)


def test_what_is_logged_of_accumulated_steps_is_the_mean_of_all_their_minibatches(tmp_path, monkeypatch):
    losses, inner = [], Distiller.loss
    monkeypatch.setattr(Distiller, "loss", lambda self, *a: (losses.append(loss := inner(self, *a)), loss)[1])
    _, trainer = run(tmp_path, 0, max_epochs=2, accumulate_grad_batches=3, log_every=2)
    assert trainer.global_step == 8
    rows = [row["train/loss"] for row in logged(trainer) if "train/loss" in row]
    assert rows == pytest.approx([torch.stack(losses[i : i + 6]).mean().item() for i in range(0, 24, 6)], rel=1e-5)


@pytest.mark.parametrize("group", [0, 4])
def test_accuracy_and_agreement_are_shares_of_the_samples_since_the_last_log(tmp_path, monkeypatch, group):
    seen, inner = [], RunningMeans.add

    def add(self, one):
        guess = one.student.logits.argmax(1)
        seen.append(torch.stack([guess == one.targets, guess == one.teacher.logits.argmax(1)]))
        inner(self, one)

    monkeypatch.setattr(RunningMeans, "add", add)
    _, trainer = run(tmp_path, group, max_epochs=1, log_every=6)  # 12 minibatches, the last one smaller
    rows = [row for row in logged(trainer) if "train/accuracy" in row]
    for row, part in zip(rows, (seen[:6], seen[6:]), strict=True):
        accuracy, agreement = torch.cat(part, 1).double().mean(1).tolist()
        assert row["train/accuracy"] == pytest.approx(accuracy)
        assert row["train/agreement"] == pytest.approx(agreement)


def test_logging_can_be_switched_off(tmp_path):
    for group in (0, 4):
        _, trainer = run(tmp_path, group, max_epochs=1, log_every=0, log_every_n_steps=0 if not group else 1)
        assert trainer.global_step == 12
        assert not any("train/loss" in row for row in logged(trainer))


class SaveAt(Callback):
    """Saves the state after each group, as a signal does; not at an epoch's end, whose validation is still to come."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        if not trainer.is_last_batch:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt", weights_only=False)


PLATEAU = (
    functools.partial(ReduceLROnPlateau, mode="max", patience=0, threshold=1),
    SchedulerOptions("epoch", "val/accuracy"),
)


@pytest.mark.parametrize("group", [0, 4])
@pytest.mark.parametrize(
    "scheduler", [STEPS, (functools.partial(OneCycleLR, max_lr=0.3, total_steps=36), SchedulerOptions("step")), PLATEAU]
)
def test_a_run_goes_on_with_the_minibatch_that_came_next_to_the_bit(tmp_path, group, scheduler):
    points = tmp_path / "points"
    last = ModelCheckpoint(
        points, "end{epoch}", save_on_train_epoch_end=True, enable_version_counter=False, save_top_k=-1
    )
    best = ModelCheckpoint(points, "best{epoch}", monitor="val/accuracy", mode="max", save_top_k=-1)
    whole, _ = run(tmp_path, group, scheduler=scheduler, ema=0.9, callbacks=[SaveAt(points), last, best])
    saved = {p.stem for p in points.iterdir()}
    within = ["4", "5", "9", "16"] if group else ["1", "7", "11", "13"]
    # What is saved behind a validation knows no metric any more, so that a plateau is not seen again.
    ends = ["endepoch=0", "endepoch=1", *(["bestepoch=0"] if scheduler is not PLATEAU else [])]
    assert {*within, *ends} <= saved
    for name in [*within, *ends]:
        resumed, trainer = run(tmp_path / name, group, scheduler=scheduler, ema=0.9, ckpt=points / f"{name}.ckpt")
        assert same(whole, resumed), name
        assert trainer.global_step == 36


@pytest.mark.parametrize("group", [0, 4])
def test_the_average_of_the_weights_is_that_of_lightning(tmp_path, group):
    theirs, _ = run(tmp_path / "a", 0, callbacks=[EMAWeightAveraging(decay=0.9)])  # ends as the average
    ours, _ = run(tmp_path / "b", group, ema=0.9)
    expected, now = theirs.student.state_dict(), ours.student.state_dict()
    for name, value in ours.average.module.state_dict().items():
        if value.is_floating_point() and "running" not in name:  # statistics are those of the averaged weights here
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
            assert not torch.allclose(value, now[name], rtol=1e-3)


def test_a_callback_that_averages_weights_copies_neither_teacher_nor_data(tmp_path):
    data = digits()
    distiller = Distiller(net(), KD(), net(16, 1), example(data), data=data, allow_chance=True)
    fit(distiller, data, tmp_path, max_epochs=1)
    other = copy.deepcopy(distiller)
    assert other.teacher is distiller.teacher
    assert other.data is data
    assert other.student is not distiller.student
    assert other.extractor.net is other.student
    assert same(other, distiller)


# -- where groups are made, and where not ----------------------------------------------------------------------------


class Watches(Callback):
    def on_train_batch_end(self, *_):
        pass


class Waits(ModelCheckpoint):
    def on_before_optimizer_step(self, *_):
        pass


@pytest.mark.parametrize(
    ("options", "callbacks", "reason"),
    [
        ({}, [], None),
        ({"strategy": "ddp"}, [EarlyStopping("x"), ModelCheckpoint(), RichProgressBar(), LearningRateMonitor()], None),
        ({"strategy": "fsdp"}, [], "strategy"),
        ({"accumulate_grad_batches": 2}, [], "accumulate_grad_batches"),
        ({"precision": "16-mixed"}, [], "float16"),
        ({"limit_train_batches": 3}, [], "limit_train_batches"),
        ({"overfit_batches": 1}, [], "overfit_batches"),
        ({"fast_dev_run": True}, [], "fast_dev_run"),
        ({"val_check_interval": 5}, [], "val_check_interval"),
        ({"val_check_interval": 1}, [], "val_check_interval"),
        ({"val_check_interval": 1.0}, [], None),
        ({"val_check_interval": 0.5}, [], "val_check_interval"),
        ({}, [StochasticWeightAveraging(0.1)], "StochasticWeightAveraging"),
        ({}, [EMAWeightAveraging()], "EMAWeightAveraging, which acts on each batch"),
        ({}, [Watches()], "Watches, which acts on each batch"),
        ({}, [Waits()], "Waits, which acts on each batch"),
        ({}, [DeviceStatsMonitor()], "DeviceStatsMonitor"),
        ({}, [LambdaCallback(on_train_batch_start=print)], "LambdaCallback"),
        ({}, [LambdaCallback(on_train_epoch_start=print)], None),
        ({}, [ModelCheckpoint(every_n_train_steps=3)], "checkpoint within an epoch"),
    ],
)
def test_who_has_to_see_each_minibatch_gets_it(options, callbacks, reason):
    found = reason_for_single(options, callbacks)
    assert (found is None) if reason is None else (reason in found)


@pytest.mark.parametrize(
    ("overrides", "group", "said"),
    [
        ([], 16, ""),
        (["group=4"], 4, ""),
        (["group=1"], 0, ""),
        (["trainer.limit_train_batches=2"], 0, "trainer.limit_train_batches needs to see every one"),
        (["+callbacks.ema={_target_: lightning.pytorch.callbacks.EMAWeightAveraging}"], 0, "EMAWeightAveraging"),
    ],
)
def test_a_run_says_why_its_steps_are_single(tmp_path, caplog, overrides, group, said):
    caplog.set_level("INFO")
    built = build(tmp_path, overrides)
    assert built.layout == Layout(group, 50)
    assert built.trainer.log_every_n_steps == (1 if group else 50)
    assert any(isinstance(c, LearningRateMonitor) for c in built.trainer.callbacks) is (group == 0)
    assert said in caplog.text
    assert ("Each step of the Trainer is one minibatch" in caplog.text) is bool(said)


def build(tmp_path, overrides, layout=None):
    cfg = compose_config(tmp_path / "run", "trainer=cpu", "trainer.log_every_n_steps=50", *overrides)
    distiller = Distiller(net(), Supervised())
    return build_trainer(cfg, tmp_path / "run", Supervised(), distiller.task, digits(), (), LastState(layout=layout))


def test_a_run_that_goes_on_keeps_its_groups(tmp_path):
    assert build(tmp_path, [], Layout(3, 7)).layout == Layout(3, 7)
    assert build(tmp_path, [], Layout(0, 7)).layout.group == 0
    with pytest.raises(UserError, match="leave group at auto"):
        build(tmp_path, ["group=1"], Layout(3, 7))
    with pytest.raises(UserError, match=r"accumulate_grad_batches needs to see every one: start a new run"):
        build(tmp_path, ["+trainer.accumulate_grad_batches=2"], Layout(3, 7))
    for wrong in ("0", "many", "1.5"):
        with pytest.raises(UserError, match="at least 1, or auto"):
            build(tmp_path, [f"group={wrong}"])


def test_a_checkpoint_knows_how_its_epochs_are_cut(tmp_path):
    _, trainer = run(tmp_path, 4, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert layout_of(torch.load(tmp_path / "a.ckpt", weights_only=True)) == Layout(4, 5)
    assert layout_of({}) is None


def test_a_group_lasts_no_longer_than_ctrl_c_may_wait(tmp_path, monkeypatch):
    data = digits()
    distiller = Distiller(net(), KD(), net(16), example(data))
    before = {k: v.clone() for k, v in distiller.state_dict().items()}
    state = torch.get_rng_state()
    for seconds, group in ((0.5, 4), (3.0, 1), (1e-9, 16)):
        monkeypatch.setattr(grouping, "step_seconds", lambda *_, seconds=seconds: seconds)
        assert group_size(distiller, data) == group
    monkeypatch.undo()
    assert 1 <= group_size(distiller, data) <= 16
    assert same(before, distiller)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in distiller.parameters())
    assert all(m.training for m in distiller.student.modules())
    monkeypatch.setattr(grouping, "BYTES", 40 * 64 * 4 * 3)
    assert group_size(distiller, data) <= 3


def test_all_processes_take_the_layout_of_the_first(monkeypatch):
    class Strategy:
        def broadcast(self, value):
            return (7, 5)

    data = grouped(digits(), 4, 5)
    trainer = type("T", (), {"world_size": 2, "strategy": Strategy()})()
    data.trainer = trainer
    data.setup("fit")
    assert data.layout == Layout(7, 5)


def test_the_images_of_a_group_are_gathered_once(tmp_path, monkeypatch):
    from litdistill.data.datamodule import ImageData

    sizes, inner = [], ImageData.get_batch

    def get_batch(self, split, ids, views=None, images=None):
        if views is not None:
            sizes.append(len(ids))
        return inner(self, split, ids, views, images)

    monkeypatch.setattr(ImageData, "get_batch", get_batch)
    data = digits(per_class=8, batch_size=10, augment=[Crop(1)])
    distiller = Distiller(net(), KD(), net(4), example(data), allow_chance=True, group=5)
    fit(distiller, grouped(data, 5), tmp_path, max_epochs=1, enable_checkpointing=False)
    assert sizes == [50, 30]


def test_distill_trains_in_groups_and_a_callback_that_needs_each_minibatch_gets_it(tmp_path):
    seen = []

    class Counts(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule):
            seen.append((pl_module.automatic_optimization, trainer.num_training_batches))

    class CountsEach(Counts):
        def on_train_batch_end(self, *_):
            seen.append("batch")

    students = []
    for callbacks in ([Counts()], [CountsEach()]):
        data = digits(per_class=23, batch_size=20)
        options = {"callbacks": callbacks, "trainer": {"log_every_n_steps": 6}, "allow_chance": True}
        found = distill(net(), net(16, 1), data, max_epochs=1, out=tmp_path, **options)
        students.append(found.deployed_student)
    assert seen[0][0] is False
    assert seen[0][1] < 12
    assert seen[1] == (True, 12)
    assert seen[2:] == ["batch"] * 12
    assert same(*students)
