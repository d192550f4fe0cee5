"""Packs of a sweep's trials: which are trained side by side, what is said, and that each ends as it would alone."""

import signal

import pytest
import torch
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from litdistill.sweep import packed
from litdistill.sweep import trial as sweep_trial
from litdistill.utils.errors import Stopped, UserError
from litdistill.utils.paths import CONF

pytest.importorskip("optuna")

from tests.composed import composed
from tests.sweeps import accuracy, leave, points, start

RANDOM = ("sweep=random", "sweep.trials=3", "sweep.pack=2")
PACKED = [("0", True), ("1", True), ("2", False)]  # the last has nobody beside it
TEMPERATURE = {"method.temperature": {"low": 2.0, "high": 9.0}}


@pytest.fixture
def called(monkeypatch, caplog):
    """Replaces training by a closed form, and packs on a CPU too; gives the trials in order, and whether each was packed."""
    caplog.set_level("INFO", "litdistill")
    calls: list[tuple[str, bool]] = []

    def train(cfg, callbacks=(), member=None):
        name = cfg.folder.rpartition("/")[2]
        calls.append((name, member is not None))
        leave(cfg, accuracy(cfg))

    monkeypatch.setattr(sweep_trial, "train", train)
    for module in (sweep_trial, packed):
        monkeypatch.setattr(module, "compose", composed)
    monkeypatch.setattr(packed, "reason_for_single", lambda *_: None)
    return calls


def test_a_packed_sweep_has_the_trials_of_one_that_is_not(called, tmp_path):
    study = start(tmp_path / "a", *RANDOM, space=TEMPERATURE)
    assert called == PACKED
    alone = start(tmp_path / "b", *RANDOM, "sweep.pack=1", space=TEMPERATURE)
    assert called[3:] == [(str(n), False) for n in range(3)]
    assert points(study) == points(alone)
    assert [t.value for t in study.trials] == [t.value for t in alone.trials]


def test_the_grid_is_packed_in_its_order(called, tmp_path):
    study = start(tmp_path / "a", "sweep=grid", "sweep.pack=4", space={"method.temperature": [2.0, 4.0, 8.0]})
    assert [t.params["method.temperature"] for t in study.trials] == ["2.0", "4.0", "8.0"]
    assert called == [("0", True), ("1", True), ("2", True)]


@pytest.mark.parametrize(
    ("space", "given", "alone", "words"),
    [
        (
            {"seed": [0, 1]},
            (),
            True,
            "differ in data.seed, data.subset_seed; to share order and views: data.seed=0 data.subset_seed=0.",
        ),
        ({"seed": [0, 1]}, ("data.seed=0", "data.subset_seed=0"), False, "Side by side"),
        ({"data.batch_size": [32, 64]}, (), True, "differ in data.batch_size"),
        ({"optimizer.lr": [0.1, 0.2], "ema": [0.9, 0.8]}, (), False, "pass of images and teacher: trials 0, 1"),
    ],
)
def test_what_is_alike_is_packed_and_said(called, tmp_path, caplog, space, given, alone, words):
    start(tmp_path / "a", "sweep=grid", "sweep.pack=2", *given, space=space)
    assert all(packed is not alone for _, packed in called)
    assert words in caplog.text


def test_what_fails_in_a_pack_fails_alone(called, monkeypatch, tmp_path):
    def train(cfg, callbacks=(), member=None):
        name = cfg.folder.rpartition("/")[2]
        called.append((name, member is not None))
        if name == "0":
            raise UserError("no such thing")
        if name == "1" and member is not None:
            raise torch.OutOfMemoryError("out of memory")
        leave(cfg, accuracy(cfg))

    monkeypatch.setattr(sweep_trial, "train", train)
    study = start(tmp_path / "a", *RANDOM, "sweep.pack=3", space=TEMPERATURE)
    assert [t.state.name for t in study.trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert called == [("0", True), ("1", True), ("2", True), ("1", False)]


def test_a_pack_that_is_stopped_goes_on_as_a_pack(called, monkeypatch, tmp_path):
    def stop(cfg, callbacks=(), member=None):
        raise Stopped(signal.SIGTERM, "step 1")

    with monkeypatch.context() as patch:
        patch.setattr(sweep_trial, "train", stop)
        with pytest.raises(Stopped):
            start(tmp_path / "a", *RANDOM, space=TEMPERATURE)
    study = start(tmp_path / "a", *RANDOM, space=TEMPERATURE)
    assert called == PACKED
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 3


def changed(**options):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = composed("train", [])
    for key, value in options.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    return cfg


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, None),
        ({"trainer__accelerator": "cpu"}, "On a CPU"),
        ({"trainer__devices": 2}, "one device"),
        ({"trainer__strategy": "ddp"}, "one device"),
        ({"capture": "off"}, "capture=auto"),
        ({"compile__student": "reduce-overhead"}, "without compile=reduce-overhead"),
        ({"logger": {"wandb": {"_target_": "litdistill.training.loggers.wandb_logger"}}}, "Weights & Biases"),
    ],
)
def test_where_packs_gain_nothing_or_cannot_be_a_line_says_why(monkeypatch, options, words):
    sweep = OmegaConf.create({"objectives": ["val"], "pack": 4})
    assert "On a CPU" in packed.reason_for_single(sweep, changed())
    assert packed.pack_size(sweep, changed()) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = packed.reason_for_single(sweep, changed(**options))
    assert found is words is None or words in found
    sweep.objectives = ["val", "fit_s"]
    assert words is not None or "time" in packed.reason_for_single(sweep, changed())
