"""Trainings side by side: each is equal to the bit to one alone, whatever happens to the others, and work is shared."""

import functools
import json
import signal
import sys

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import SGD, AdamW

from litdistill.data.augment import Crop
from litdistill.data.datamodule import ImageData
from litdistill.distillation.distiller import Distiller
from litdistill.distillation.teacher import FrozenTeacher
from litdistill.distillation.teacher_cache import CacheOptions
from litdistill.methods.fitnet import FitNet
from litdistill.methods.kd import KD
from litdistill.training.grouping import GroupedData, Layout
from litdistill.training.pack import together
from litdistill.training.train import train
from litdistill.utils.errors import Stopped, UserError
from litdistill.utils.logging import logged_to
from tests.conftest import SMALL, compose_config
from tests.fits import digits, example, fit, logged, net, same
from tests.recorder import Replays
from tests.test_sweep_runs import tensorboard

# What may differ: temperature, learning rate, weights, optimizer, size of the student, method.
TRIALS = [
    {"temperature": 2.0, "lr": 0.1, "steps": None},  # its dropout draws from where it left torch's generator
    {"temperature": 8.0, "lr": 0.05, "seed": 1},
    {
        "temperature": 4.0,
        "lr": 0.01,
        "optimizer": AdamW,
        "width": 12,
        "order": 1,
    },  # which shares nothing but validation
    {"temperature": 4.0, "lr": 0.1, "hints": True},
]
MINIBATCHES = 6  # of an epoch


def run(folder, trial, member=None, recorder=None, cache="off", ckpt=None, callbacks=(), epochs=2):
    data = digits(batch_size=20, augment=[Crop(1)], seed=trial.get("order", 0))
    width, seed = trial.get("width", 8), trial.get("seed", 0)
    student = nn.Sequential(net(width, seed), nn.Dropout(0.1))
    method = FitNet() if trial.get("hints") else KD(trial["temperature"])
    torch.manual_seed(seed)
    distiller = Distiller(
        student, method, net(16), example(data), data=data, allow_chance=True, seed=trial.get("steps", seed), group=4,
        optimizer=functools.partial(trial.get("optimizer", SGD), lr=trial["lr"], fused=True), cache=CacheOptions(cache),
        recorder=recorder,
    )  # fmt: skip
    module = GroupedData(data, Layout(4, 5), member)
    logger = CSVLogger(folder, name="", version="")
    trainer = fit(distiller, module, folder, ckpt, max_epochs=epochs, logger=logger, callbacks=list(callbacks))
    return distiller, trainer


def side_by_side(folder, options, trials=TRIALS):
    """Runs trials side by side, each with its own of the options."""
    jobs = [
        functools.partial(run, folder / f"{i}", t, **o) for i, (t, o) in enumerate(zip(trials, options, strict=True))
    ]
    return together([lambda member, job=job: job(member=member) for job in jobs])


@pytest.mark.parametrize(("recorder", "cache"), [(None, "off"), (Replays, "memory")])
def test_each_is_equal_to_the_bit_to_one_alone(tmp_path, recorder, cache):
    options = lambda: [{"recorder": recorder and recorder(), "cache": cache} for _ in TRIALS]  # noqa: E731
    own, theirs = options(), options()
    alone = [run(tmp_path / f"alone{i}", t, **o) for i, (t, o) in enumerate(zip(TRIALS, theirs, strict=True))]
    packed = side_by_side(tmp_path, own)
    for (one, a), (other, b) in zip(alone, packed, strict=True):
        assert same(one, other)
        assert logged(a) == logged(b)
    if recorder is not None:
        recorded, expected = ([o["recorder"].recorded for o in options] for options in (own, theirs))
        assert recorded == expected
        assert recorded[0] > 0


@pytest.fixture
def count(monkeypatch):
    """How many batches were made for training, and how often the teacher was called in training."""
    counts = {"groups": 0, "teacher": 0}

    def counted(name, function, when):
        def call(self, given, *args, **options):
            counts[name] += when(self, given)
            return function(self, given, *args, **options)

        return call

    monkeypatch.setattr(ImageData, "make_batch", counted("groups", ImageData.make_batch, lambda _, r: bool(r.sizes)))
    run_teacher = counted("teacher", FrozenTeacher.forward, lambda _, b: b.views is not None)
    monkeypatch.setattr(FrozenTeacher, "forward", run_teacher)
    return counts


def test_images_are_made_once_and_the_teacher_runs_once_for_all(tmp_path, count):
    alike = [{"temperature": t, "lr": 0.1} for t in (1.0, 2.0, 4.0, 8.0)]
    run(tmp_path / "alone", alike[0])
    one = dict(count)
    side_by_side(tmp_path, [{}] * 4, alike)
    assert one["teacher"] == 2 * MINIBATCHES
    assert count == {name: 2 * n for name, n in one.items()}


class Ends(Callback):
    """Raises an error at the end of the first epoch."""

    def __init__(self, error):
        self.error = error

    def on_train_epoch_end(self, trainer, pl_module):
        raise self.error


@pytest.mark.parametrize("which", [0, 1])
def test_one_that_fails_leaves_the_others_as_they_are(tmp_path, which):
    trials = TRIALS[:3]
    alone = [run(tmp_path / f"alone{i}", t)[0] for i, t in enumerate(trials)]

    def job(i, member):
        try:
            return run(tmp_path / str(i), trials[i], member, callbacks=[Ends(UserError("no"))] if i == which else [])[0]
        except UserError:
            return None

    found = together([functools.partial(job, i) for i in range(3)])
    assert [f is None for f in found] == [i == which for i in range(3)]
    assert all(same(a, f) for a, f in zip(alone, found, strict=True) if f is not None)


def test_an_error_that_no_job_expects_is_raised_after_all_have_ended(tmp_path):
    argv = sys.argv
    options = [{}, {"callbacks": [Ends(ValueError("a defect"))]}]
    with pytest.raises(ValueError, match="a defect"):
        side_by_side(tmp_path, options, TRIALS[:2])
    assert sys.argv is argv


@pytest.mark.parametrize("which", [0, 1])
def test_a_stop_of_one_stops_all(tmp_path, which):
    options = [{"epochs": 3}, {"epochs": 3}]
    options[which]["callbacks"] = [Ends(Stopped(signal.SIGTERM, "step 6"))]
    with pytest.raises(Stopped, match="SIGTERM"):
        side_by_side(tmp_path, options, TRIALS[:2])


def test_one_that_is_resumed_behind_the_others_catches_up_and_shares_again(tmp_path, count):
    alike = [{"temperature": t, "lr": 0.1} for t in (1.0, 2.0)]
    whole = [run(tmp_path / f"whole{i}", t, epochs=4)[0] for i, t in enumerate(alike)]
    for i, epochs in enumerate((2, 1)):
        run(tmp_path / f"part{i}", alike[i], epochs=epochs)[1].save_checkpoint(tmp_path / f"{i}.ckpt")
    count["teacher"] = 0
    options = [{"ckpt": tmp_path / f"{i}.ckpt", "epochs": 4} for i in range(2)]
    rest = side_by_side(tmp_path, options, alike)
    assert all(same(a, b) for a, (b, _) in zip(whole, rest, strict=True))
    assert count["teacher"] == 3 * MINIBATCHES  # one epoch of the second alone, two of both


def test_runs_are_whole_and_ordinary(teachers, tmp_path, caplog):
    """Each has its summary, command, curves and log of its own, equal to those of a run alone."""
    caplog.set_level("INFO", "litdistill")

    def one(folder, temperature, member=None):
        cfg = compose_config(folder, *SMALL, f"runs={teachers}", f"method.temperature={temperature}", "trainer=cpu")
        with logged_to(folder / "train.log", alone=True):
            sys.argv = ["train.py", f"method.temperature={temperature}"]
            return train(cfg, member=member)

    alone, packed = tmp_path / "alone", tmp_path / "packed"
    value = one(alone, 8)
    assert together([functools.partial(one, packed, 8), functools.partial(one, tmp_path / "other", 2)])[0] == value
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (alone, packed)]
    assert all(summary.pop("time") for summary in summaries)
    assert summaries[0] == summaries[1]
    assert "method.temperature=8" in summaries[1]["command"]
    curves = [[e.value for e in tensorboard(folder).Scalars("accuracy/validation")] for folder in (alone, packed)]
    assert curves[0] == curves[1]
    for name in ("other", "packed"):  # each log has the lines of its own run
        text = (tmp_path / name / "train.log").read_text()
        assert [n for n in ("other", "packed") if f"{n}\n" in text] == [name]
