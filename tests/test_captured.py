"""Recorded steps train as steps that are launched operation by operation; recorded here by a stand-in for CUDA graphs."""

import functools

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.utils._python_dispatch import TorchDispatchMode

from litdistill.config.distiller import build_method
from litdistill.data.augment import Crop
from litdistill.distillation import step
from litdistill.distillation.balance import Balance
from litdistill.distillation.captured import CapturedStep
from litdistill.distillation.distiller import Clip, Distiller, SchedulerOptions
from litdistill.distillation.group_tensors import GroupTensors
from litdistill.distillation.running_means import Seen
from litdistill.distillation.teacher_cache import CacheOptions
from litdistill.distillation.uncertainty import Uncertainty
from litdistill.methods.ab import AB
from litdistill.methods.fitnet import FitNet
from litdistill.methods.kd import KD
from litdistill.tasks import Classification
from litdistill.tasks.base import Task
from litdistill.training.train import train
from litdistill.types import Batch, Group, Outputs
from tests.conftest import compose_config
from tests.fits import digits, example, fit, grouped, net, same
from tests.recorder import Replays
from tests.test_zoo import NAMES, TWO_PHASES

EACH_STEP = SchedulerOptions("step")


def warm(optimizer):
    return LambdaLR(optimizer, lambda step: 1 / (1 + step % 7))


SGD_01 = functools.partial(SGD, lr=0.1, momentum=0.9, fused=True)


def run(
    folder,
    recorder,
    optimizer=SGD_01,
    student=None,
    method=None,
    task="classification",
    kind=Distiller,
    ckpt=None,
    **options,
):
    """Three epochs of 12 minibatches, the last one smaller, with dropout, views and a learning rate of each step."""
    data = digits(**{"per_class": 23, "batch_size": 20, "augment": [Crop(1)], **options.pop("data", {})})
    torch.manual_seed(0)
    trainer = {"max_epochs": 3, **options.pop("trainer", {})}
    settings = {
        "scheduler": warm, "scheduling": EACH_STEP, "schedule": {"soft": [(0, 0), (4, 1)]}, "cache": CacheOptions("off"),
        "balance": None,  # whose minibatches are launched
    }  # fmt: skip
    distiller = kind(
        student or nn.Sequential(net(), nn.Dropout(0.1)), method or KD(), net(16), example(data), task, optimizer,
         allow_chance=True, seed=0, group=4, train_targets=data.train_targets, recorder=recorder,
        **settings | options,
    )  # fmt: skip
    return distiller, fit(distiller, grouped(data, 4, 5), folder, ckpt, **trainer)


def close(one, many):
    """Weights as close as a learning rate in float32 is to one in float64, where it enters a quotient as in Adam."""
    a, b = one.state_dict(), many.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)
    return True


@pytest.mark.parametrize(
    ("options", "equal"),
    [
        (lambda: {}, same),
        (lambda: {"ema": 0.9, "clip": Clip(0.02)}, same),
        (lambda: {"optimizer": functools.partial(AdamW, lr=0.01, fused=True)}, close),
        (lambda: {"optimizer": functools.partial(Adam, lr=0.01, amsgrad=True, fused=True)}, close),
        (lambda: {"cache": CacheOptions("memory")}, same),
        (lambda: {"method": FitNet(), "schedule": {}}, same),
        (lambda: {"method": FitNet(), "schedule": {}, "balance": Balance(steps=3)}, same),
        (lambda: {"method": FitNet(), "schedule": {}, "balance": Uncertainty()}, same),
        (lambda: {"trainer": {"precision": "bf16-mixed"}}, same),
        (lambda: {"labels": "some"}, same),
        (lambda: {"method": KD(learnt=3), "schedule": {}}, close),
        (lambda: {"trainer": {"max_steps": 17, "max_epochs": -1}}, same),
    ],
)
def test_weights_and_means_are_those_of_launched_steps(tmp_path, options, equal):
    one, trainer = run(tmp_path / "one", None, **options())
    recorder = Replays()
    many, captured = run(tmp_path / "many", recorder, **options())
    assert recorder.recorded > 0
    assert equal(one, many)
    assert trainer.global_step == captured.global_step
    a, b = trainer.callback_metrics, captured.callback_metrics
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[k], b[k], rtol=1e-4) for k in a if not k.startswith("speed"))


@pytest.mark.parametrize("name", sorted({*NAMES} - {"ard", "rslad"}))  # whose attack is launched
def test_every_method_is_recorded(tmp_path, name, caplog):
    two = name in TWO_PHASES
    cfg = compose_config(tmp_path, f"method={name}", *(["method.init_epochs=1"] if two else []))

    def trained(recorder):
        # A power of two is the same in float32, in which a recorded step reads the learning rate.
        options = {"optimizer": functools.partial(AdamW, lr=2**-7, fused=True), "scheduler": None} if two else {}
        more = {"schedule": {}, "trainer": {"max_epochs": 2}, "data": {"batch_size": 40}}
        return run(tmp_path, recorder, method=build_method(cfg), student=net(), **options, **more)[0]

    one, recorder = trained(None), Replays()
    many = trained(recorder)
    assert recorder.recorded > 0, caplog.text
    assert same(one, many)


class HalfLabelled(Classification):
    """Chooses the samples with labels, whose number a graph cannot hold."""

    recordable = True
    labelled_loss = Task.labelled_loss


class OwnHook(Distiller):
    def on_before_optimizer_step(self, optimizer):
        pass


class Ramp(KD):
    """Weighs its term by how often it was called, which a graph would keep as it was."""

    calls = 0

    def forward(self, student, teacher, batch):
        self.calls += 1
        return {name: self.calls * value for name, value in super().forward(student, teacher, batch).items()}


class Own(KD):
    recordable = True


def test_a_method_of_ones_own_is_recorded_where_it_says_so(tmp_path):
    recorder = Replays()
    run(tmp_path, recorder, method=Own())
    assert recorder.recorded > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (lambda: {"kind": OwnHook}, "OwnHook has its own on_before_optimizer_step"),
        (lambda: {"method": Ramp()}, "Ramp may change with each step in Python"),
        (lambda: {"optimizer": functools.partial(RMSprop, lr=0.01)}, "RMSprop may keep a state in Python"),
        (lambda: {"labels": "some", "task": HalfLabelled()}, "aten.nonzero"),
        (
            lambda: {"scheduler": functools.partial(OneCycleLR, max_lr=0.1, total_steps=36)},
            "an option of the optimizer, changes too often",
        ),
        (lambda: {"method": AB(init_epochs=1), "schedule": {}}, "parameters that are trained later"),
    ],
)
def test_what_cannot_be_recorded_is_launched_and_said(tmp_path, options, words, caplog):
    caplog.set_level("INFO", "litdistill")
    optimizer = {"optimizer": functools.partial(SGD, lr=0.1, momentum=0.9)}
    one, _ = run(tmp_path / "one", None, **optimizer | options())
    recorder = Replays()
    many, _ = run(tmp_path / "many", recorder, **optimizer | options())
    assert [words in line for line in caplog.messages].count(True) == 1
    assert all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(one.parameters(), many.parameters(), strict=True)
    )


def test_a_run_goes_on_by_recorded_steps_to_the_bit(tmp_path):
    whole, _ = run(tmp_path / "whole", Replays())
    _, trainer = run(tmp_path / "part", Replays(), trainer={"max_epochs": 2})
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    recorder = Replays()
    rest, _ = run(tmp_path / "rest", recorder, ckpt=tmp_path / "part.ckpt")
    assert recorder.recorded > 0
    assert same(whole, rest)


def test_a_constant_that_changes_is_recorded_anew(tmp_path):
    """Each epoch has its own factor of the soft term, and each shape of a minibatch its own record."""
    recorder = Replays()
    run(tmp_path, recorder)
    assert (
        recorder.recorded == 3
    )  # 12 minibatches an epoch: the first of a key is watched, and the smaller one is alone


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("group", [0, 4])
def test_gradients_of_a_fused_optimizer_are_clipped_in_any_precision_without_scaling(tmp_path, precision, group):
    data = digits(per_class=23, batch_size=20)
    distiller = Distiller(
        net(), KD(), net(16), example(data), allow_chance=True, seed=0, group=group, clip=Clip(1e-4),
        optimizer=functools.partial(SGD, lr=1.0, fused=True),
    )  # fmt: skip
    before = [p.detach().clone() for p in distiller.parameters()]
    clipping = {} if group else {"gradient_clip_val": 1e-4}
    fit(distiller, grouped(data, group), tmp_path, max_steps=3, max_epochs=-1, precision=precision, **clipping)
    moved = (
        torch.stack([(a - b).square().sum() for a, b in zip(before, distiller.parameters(), strict=True)]).sum().sqrt()
    )
    assert 0 < moved <= 3.01e-4


def test_places_of_pictures_are_measured_as_the_task_sees_them(tmp_path, monkeypatch, caplog):
    """Labelled pixels are places, whose number depends on values: such steps are launched, and their means are right."""
    options = [
        "experiment=segmentation/digit_scenes", "data.epoch_size=192", "trainer.max_epochs=1", "teacher.allow_chance=true",
        "teacher.checkpoint=null", "logger=none", "trainer=cpu",
    ]  # fmt: skip
    monkeypatch.setattr("litdistill.config.distiller.CudaGraphs", Replays)
    cfg = compose_config(tmp_path / "run", *options)
    caplog.set_level("INFO", "litdistill")
    assert 0 <= train(cfg) <= 1
    assert "not as CUDA graphs" in caplog.text


def test_a_step_that_waits_once_is_watched_again(tmp_path):
    """As the first step of a compiled network does, which reads values while it is compiled."""

    class Compiling(Replays):
        watched = 0

        def watch(self, step):
            taken, reason = super().watch(step)
            self.watched += 1
            return taken, "compiled" if self.watched == 1 else reason

    one, _ = run(tmp_path / "one", None)
    recorder = Compiling()
    many, _ = run(tmp_path / "many", recorder)
    assert recorder.recorded > 0
    assert same(one, many)


def test_the_teacher_of_a_whole_group_is_a_graph_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "BY_MINIBATCH", ())  # on a CPU, too, its outputs for a group are computed ahead
    calls, shared, begin = [], [], CapturedStep.begin

    def kept(self, group):
        """Of launched steps, which the means hold until later groups have overwritten what recorded steps read."""
        found = begin(self, group)
        shared.append(found[0].logits.untyped_storage().data_ptr() == self._tensors.heads["logits"].data_ptr())
        return found

    monkeypatch.setattr(CapturedStep, "begin", kept)

    def trained(recorder):
        hook = nn.modules.module.register_module_forward_hook(
            lambda module, inputs, out: calls.append(len(out)) if isinstance(module, nn.Linear) else None
        )
        try:
            return run(tmp_path, recorder, student=net())
        finally:
            hook.remove()

    one, trainer = trained(None)
    whole = [n for n in calls if n == 80]  # samples of a group: no minibatch of a student has so many
    calls.clear()
    many, captured = trained(recorder := Replays())
    assert same(one, many)
    a, b = trainer.callback_metrics, captured.callback_metrics
    assert all(torch.allclose(a[k], b[k], rtol=1e-4) for k in a if not k.startswith("speed"))
    assert len(whole) == 2 * 3  # groups of four minibatches in three epochs
    assert calls.count(80) == 2  # watched and recorded
    assert shared
    assert not any(shared)
    assert recorder.recorded == 3 + 3  # of the steps, and by the samples of a group: 80, 20 and 27


@pytest.fixture
def no_process_group():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_steps_under_ddp_are_launched_with_one_process_too(tmp_path, caplog, no_process_group):
    caplog.set_level("INFO", "litdistill")
    recorder = Replays()
    run(tmp_path, recorder, trainer={"strategy": "ddp", "devices": 1, "max_epochs": 1})
    assert recorder.recorded == 0
    assert "even if there is one" in caplog.text


class Launches(TorchDispatchMode):
    """Counts operations that are launched one by one."""

    def __init__(self):
        super().__init__()
        self.count, self.replaying = 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not self.replaying and func.namespace == "aten"  # notes of the profiler are none
        return func(*args, **kwargs or {})


def test_between_two_steps_of_a_group_nothing_is_launched_nor_seeded(tmp_path, monkeypatch):
    launches, found, seeded = Launches(), [], []

    class Counted(Replays):
        def record(self, step):
            taken, replay = super().record(step)

            def counted():
                launches.replaying = True
                replay()
                launches.replaying = False

            return taken, counted

    train_one = CapturedStep.train

    def counting(self, index):
        before, replayed = launches.count, self.replayed
        with launches:
            loss = train_one(self, index)
        if self.replayed > replayed and self.recorder.recorded == known[0]:
            found.append(launches.count - before)
        known[0] = self.recorder.recorded
        return loss

    known = [0]
    monkeypatch.setattr(CapturedStep, "train", counting)
    seed_step = Distiller.seed_step
    monkeypatch.setattr(Distiller, "seed_step", lambda self, index: seeded.append(index) or seed_step(self, index))
    options = {"scheduler": None, "schedule": {}, "student": net()}
    run(tmp_path, Counted(), **options)
    assert len(found) == 36 - 1 - 2 * 2  # but for the first, and for those that are watched or recorded, of two sizes
    assert set(found) == {0}
    assert len(seeded) == 1 + 2  # launched or watched


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_step_reads_and_writes_the_places_of_its_minibatch(layout):
    inputs = torch.randn(7, 2, 4, 4).contiguous(memory_format=layout)
    batch = Batch(inputs, torch.arange(7), torch.arange(7) + 10)
    sizes = (3, 3, 1)
    teacher = [Outputs({"logits": torch.randn(n, 5)}, {"x": torch.randn(n, 2, 2)}) for n in sizes]
    group = Group(batch, sizes, (1.0,) * 3, 0, False)
    tensors = GroupTensors(group, teacher)
    assert tensors.fits(group, teacher)
    assert not tensors.fits(group._replace(batch=batch._replace(inputs=inputs.double())), teacher)
    assert not tensors.fits(group._replace(sizes=(3, 3, 2)), teacher)
    tensors.fill(batch)
    tensors.fill_outputs(teacher)
    for i, part in enumerate(group.minibatches()):
        if i == 1:
            continue  # launched in another way
        tensors.place(3 * i, i)
        found, outputs, rows = tensors.minibatch(len(part.targets))
        assert all(torch.equal(a, b) for a, b in zip(found[:3], part[:3], strict=True))
        assert found.inputs.is_contiguous(memory_format=layout)
        assert torch.equal(outputs.logits, teacher[i].logits)
        assert torch.equal(outputs.features["x"], teacher[i].features["x"])
        seen = Seen({"a": torch.tensor(float(i))}, Outputs.of(2 * outputs.logits), None, found.targets, len(rows))
        left = tensors.leave(seen, rows, False)
        tensors.moved(3 * i + len(rows), i + 1)
    kept = tensors.seen(left, slice(6, 7), slice(2, 3))
    assert torch.equal(kept.student.logits, 2 * teacher[2].logits)
    assert torch.equal(kept.teacher.logits, teacher[2].logits)
    assert (kept.terms["a"].tolist(), kept.targets.tolist(), kept.samples) == ([2.0], [6], 1)
