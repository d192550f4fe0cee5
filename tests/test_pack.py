"""Runs in a pack end where they would have ended alone, whatever becomes of the others."""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from litdistill import shared as shared_module
from litdistill.build import build_data
from litdistill.checkpoint import write_text
from litdistill.data.datamodule import ImageData
from litdistill.errors import Stopped, UserError
from litdistill.pack import Pack
from litdistill.recipes import teacher_folder
from litdistill.runtime import CONF
from litdistill.shared import common
from litdistill.sweep import sweep
from litdistill.teacher import FrozenTeacher
from litdistill.train import logged_to, train, train_teacher
from tests.conftest import SMALL, compose_config

DROPOUT = ["net@student=mlp", "student.widths=[32]", "student.dropout=0.3"]
# A student each; what they share is in all.
MIX = [
    ["method.temperature=2", "optimizer.lr=0.01", "trainer.gradient_clip_val=0.5"],
    ["method.temperature=8", "method.hard=0.5", "scheduler=cosine", "ema=0.9"],
    ["student.widths=[8,16]", "optimizer=sgd", "optimizer.lr=0.05", "+schedule.soft=[[0, 0], [2, 1]]"],
]
FEATURES = [["method=fitnet"], ["method=fitnet", "method.hint=10"], ["method=kd"]]
DRAWS = [[*DROPOUT, f"seed={seed}", "data.seed=0", "data.subset_seed=0"] for seed in (0, 1, 2)]


@pytest.fixture(scope="module")
def taught(teachers) -> Path:
    """A finished teacher. One that is trained as its student is would be another for another learning rate."""
    cfg = compose_config(teachers / "unused", *SMALL)
    cfg.runs = str(teachers)
    folder = teacher_folder(cfg)
    train_teacher(cfg, folder)
    return folder


def configs(taught: Path, folder: Path, overrides: list[list[str]], *more: str) -> list:
    found = []
    for i, own in enumerate(overrides):
        widths = any(o.startswith("student.widths") for o in own)
        small = [o for o in SMALL if not (widths and o.startswith("student"))]
        cfg = compose_config(folder / str(i), *small, f"teacher.checkpoint={taught}", *own, *more)
        cfg.runs = str(taught.parent.parent)
        found.append(cfg)
    return found


def run(cfg, train=train, callbacks=()) -> bool:
    folder = Path(cfg.folder)
    write_text(folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
    with logged_to(folder / "train.log"):
        train(cfg, callbacks)
    return True


def together(cfgs, callbacks=None) -> list[BaseException]:
    """Runs them as one pack; gives what went wrong in it."""
    pack, left, errors = Pack(len(cfgs)), list(enumerate(cfgs)), []

    def job() -> bool:
        i, cfg = left.pop(0)
        try:
            return run(cfg, pack.train, callbacks[i] if callbacks else ())
        except Exception as error:
            errors.append(error)
            return True

    assert pack.run(job)
    return errors


def state(folder: Path) -> dict:
    """All tensors that a run leaves in its checkpoints, its optimiser's too."""
    found = {}
    for name in ("best", "last"):
        saved = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
        found |= {f"{name} {k}": v for k, v in saved["state_dict"].items()}
        for n, moments in saved["optimizer_states"][0]["state"].items():
            found |= {f"{name} {n} {k}": v for k, v in moments.items() if isinstance(v, torch.Tensor)}
    return found


def assert_equal_runs(a: Path, b: Path) -> None:
    one, other = state(a), state(b)
    assert one.keys() == other.keys()
    assert [k for k in one if not torch.equal(one[k], other[k])] == []
    assert summary(a) == summary(b)
    assert curves(a) == curves(b)
    assert {p.relative_to(a) for p in a.rglob("*.*") if "tfevents" not in p.name} == {
        p.relative_to(b) for p in b.rglob("*.*") if "tfevents" not in p.name
    }


def summary(folder: Path) -> dict:
    found = json.loads((folder / "summary.json").read_text())
    return {k: v for k, v in found.items() if k not in ("time", "command", "git")}


def curves(folder: Path) -> dict:
    """What TensorBoard shows, but for the speed."""
    events = EventAccumulator(str(next(folder.rglob("events*")).parent), size_guidance={"scalars": 0}).Reload()
    tags = [t for t in events.Tags()["scalars"] if not t.startswith("speed/")]
    return {t: [(e.step, e.value) for e in events.Scalars(t)] for t in tags}


@pytest.mark.parametrize(
    ("overrides", "more"),
    [
        (MIX, []),
        (MIX, ["teacher.cache.mode=off", "data.augment=[{_target_: litdistill.data.augment.Crop, pad: 1}]"]),
        pytest.param(MIX, ["window=1", "teacher.cache.mode=memory"], marks=pytest.mark.slow),
        (FEATURES, ["teacher.cache.mode=off"]),
        (DRAWS, []),
    ],
)
def test_runs_in_a_pack_end_where_they_end_alone(taught, tmp_path, overrides, more):
    for cfg in configs(taught, tmp_path / "alone", overrides, *more):
        run(cfg)
    assert together(configs(taught, tmp_path / "pack", overrides, *more)) == []
    for i in range(len(overrides)):
        assert_equal_runs(tmp_path / "alone" / str(i), tmp_path / "pack" / str(i))


@pytest.fixture(scope="module")
def alone(taught, tmp_path_factory):
    """The folders of the runs of `MIX`, each by itself."""
    folder = tmp_path_factory.mktemp("alone")
    for cfg in configs(taught, folder, MIX):
        run(cfg)
    return [folder / str(i) for i in range(len(MIX))]


def test_windows_are_gathered_and_the_teacher_is_asked_once(taught, tmp_path, monkeypatch):
    calls = {"seen": 0, "teacher": 0}
    seen, forward = ImageData.seen, FrozenTeacher.forward

    def count_seen(self, split, ids, views):
        calls["seen"] += views is not None and len(ids) > 2
        return seen(self, split, ids, views)

    def count_forward(self, images):
        calls["teacher"] += len(images) in (32, 24)  # minibatches: neither two examples nor the validation set
        return forward(self, images)

    monkeypatch.setattr(ImageData, "seen", count_seen)
    monkeypatch.setattr(FrozenTeacher, "forward", count_forward)
    more = ["teacher.cache.mode=off", "data.augment=[{_target_: litdistill.data.augment.Crop, pad: 1}]"]
    assert together(configs(taught, tmp_path, MIX, *more)) == []
    # 120 images in 4 minibatches and, as every second step is logged, 2 windows an epoch, for 2 epochs
    assert calls == {"seen": 4, "teacher": 8}


class Scribble(Callback):
    """Spoils the images that its run has trained on."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        batch.images.fill_(7.0)


def test_what_one_run_does_to_the_images_no_other_sees(taught, tmp_path, alone):
    assert together(configs(taught, tmp_path, MIX), [[Scribble()], [], []]) == []
    for i in (1, 2):
        assert_equal_runs(alone[i], tmp_path / str(i))


class RaiseAt(Callback):
    def __init__(self, step: int, error: BaseException):
        self.step, self.error = step, error

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise self.error


def test_a_run_that_fails_leaves_the_others_as_they_are(taught, tmp_path, alone):
    cfgs = configs(taught, tmp_path, MIX)
    cfgs[0].optimizer.lr = 1e30
    cfgs[0].trainer.gradient_clip_val = None
    errors = together(cfgs, [[], [RaiseAt(5, UserError("of its own"))], []])
    assert sorted(str(e)[:20] for e in errors) == ["The loss is not fini", "of its own"]
    assert_equal_runs(alone[2], tmp_path / "2")


class SignalAt(Callback):
    def __init__(self, step: int, signum: int):
        self.step, self.signum = step, signum

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.signum)


def test_a_stopped_pack_goes_on_to_the_same_end(taught, tmp_path, alone):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped):
        together(configs(taught, tmp_path, MIX), [[], [SignalAt(6, signal.SIGTERM)], []])
    assert signal.getsignal(signal.SIGTERM) is before
    assert sorted(p.parent.parent.name for p in tmp_path.glob("*/checkpoints/last.ckpt")) == ["0", "1", "2"]
    assert list(tmp_path.glob("*/summary.json")) == []
    assert together(configs(taught, tmp_path, MIX)) == []
    for i in range(3):
        assert state(alone[i]).keys() == state(tmp_path / str(i)).keys()
        assert all(torch.equal(a, state(tmp_path / str(i))[k]) for k, a in state(alone[i]).items())


def status_of(work: Callable) -> int:
    """How a forked process ends that does this."""
    if (pid := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


def test_a_killed_pack_goes_on_to_the_same_end(taught, tmp_path, alone):
    at = [[], [SignalAt(6, signal.SIGKILL)], []]
    assert status_of(lambda: together(configs(taught, tmp_path, MIX), at)) == signal.SIGKILL
    assert list(tmp_path.glob("*/summary.json")) == []
    assert len(list(tmp_path.glob("*/checkpoints/last.ckpt"))) == 3
    assert together(configs(taught, tmp_path, MIX)) == []
    for i in range(3):
        assert summary(alone[i]) == summary(tmp_path / str(i))


def test_runs_that_are_behind_catch_up(taught, tmp_path):
    places = []

    class Note(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            places.append((trainer.current_epoch, batch_idx // 2))

    cfgs = configs(taught, tmp_path, MIX[:2])
    with pytest.raises(UserError):
        run(cfgs[1], callbacks=[RaiseAt(5, UserError("later"))])
    assert together(configs(taught, tmp_path, MIX[:2]), [[Note()], [Note()]]) == []
    assert places == sorted(places)
    assert len(places) == 8 + 4


def test_runs_of_other_data_wait_for_their_turn(taught, tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(shared_module, "build_data", lambda cfg: built.append(cfg.data.seed) or build_data(cfg))
    seeds = [["seed=0"], ["seed=1"], ["seed=0", "method.temperature=2"], ["seed=1", "method.temperature=2"]]
    assert together(configs(taught, tmp_path, seeds, "trainer.max_epochs=1")) == []
    assert built == [0, 1]
    assert len(list(tmp_path.glob("*/summary.json"))) == 4


@pytest.mark.parametrize(
    ("override", "share"),
    [
        ("method.temperature=9", True),
        ("method=at", True),
        ("student.widths=[4,4]", True),
        ("seed=1", False),
        ("seed=1 data.seed=0", False),  # another subset
        ("seed=1 data.seed=0 data.subset_seed=0", True),
        ("data.batch_size=16", False),
        ("teacher.widths=[4,4]", False),
        ("teacher=null method=supervised", False),
        ("optimizer.lr=0.5", False),  # the automatic teacher's too
        ("optimizer.lr=0.5 +teacher.recipe.optimizer.lr=0.001", True),
        ("trainer.gradient_clip_val=1 +teacher.recipe.trainer.gradient_clip_val=null", True),
        ("trainer.max_epochs=5", False),
        ("trainer.precision=bf16-mixed", False),
    ],
)
def test_what_runs_must_have_in_common(small, override, share):
    pinned = [o for o in override.split() if o.startswith("+teacher")]
    assert (common(small(*pinned)) == common(small(*override.split()))) is share


def test_the_seed_of_a_subset_matters_where_there_is_one(small):
    whole = [common(small("data.per_class=null", f"seed={seed}", "data.seed=0")) for seed in (0, 1)]
    assert whole[0] == whole[1]


def test_each_run_has_its_own_log_and_command(taught, tmp_path, caplog):
    caplog.set_level("INFO", "litdistill")

    class Speak(Callback):
        def __init__(self, name):
            self.name = name

        def on_train_start(self, *_):
            sys.argv = ["train.py", self.name]

        def on_train_epoch_end(self, *_):
            logging.getLogger("litdistill").info("this is %s", self.name)

    argv = sys.argv
    assert together(configs(taught, tmp_path, MIX), [[Speak(f"run{i}")] for i in range(3)]) == []
    assert sys.argv is argv
    for i in range(3):
        text = (tmp_path / str(i) / "train.log").read_text()
        assert text.count(f"this is run{i}") == 2 == text.count("this is")
        assert summary_command(tmp_path / str(i)).endswith(f"train.py run{i}")
    assert "] this is run1" in caplog.text


def summary_command(folder: Path) -> str:
    return json.loads((folder / "summary.json").read_text())["command"]


class Sleep(Callback):
    def on_train_batch_end(self, *_):
        time.sleep(0.5)


def test_time_is_a_runs_own(taught, tmp_path):
    assert together(configs(taught, tmp_path, MIX), [[Sleep()], [], []]) == []
    times = [json.loads((tmp_path / str(i) / "summary.json").read_text())["time"] for i in range(3)]
    slow, *others = [t["fit_s"] for t in times]
    assert slow > 8 * 0.5  # steps
    assert max(others) < slow / 2


# -- sweeps ----------------------------------------------------------------------------------------------------------


def start(teachers: Path, folder: Path, *overrides: str, space: dict):
    options = ["sweep.storage=journal", *SMALL, f"runs={teachers}", *overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("sweep", options)
        cfg.sweep.space = space
        return sweep(cfg, options, folder)


GRID = {"method.temperature": [2.0, 8.0], "optimizer.lr": [0.01, 1e30]}
RANGES = {"method.temperature": {"low": 1.0, "high": 9.0}, "optimizer.lr": {"low": 0.001, "high": 0.01}}


@pytest.mark.parametrize(
    ("options", "space"),
    [(["sweep=grid"], GRID), (["sweep=random", "sweep.trials=3", "sweep.seeds=[0,1]"], RANGES)],
)
def test_a_packed_sweep_is_the_same_sweep(teachers, tmp_path, options, space):
    one = start(teachers, tmp_path / "one", *options, space=space)
    many = start(teachers, tmp_path / "many", *options, "sweep.pack=3", space=space)
    assert [t.params for t in many.trials] == [t.params for t in one.trials]
    assert [t.values for t in many.trials] == [t.values for t in one.trials]
    assert [t.intermediate_values for t in many.trials] == [t.intermediate_values for t in one.trials]
    assert [t.state for t in many.trials] == [t.state for t in one.trials]
    assert [t.user_attrs.get("reason") for t in many.trials] == [t.user_attrs.get("reason") for t in one.trials]
    runs = sorted(p.parent.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("summary.json"))
    assert len(runs) == (2 if "sweep=grid" in options else 6)
    for name in runs:
        assert_equal_runs(tmp_path / "one" / name, tmp_path / "many" / name)


def test_one_trial_of_a_pack_is_pruned_and_the_others_go_on(teachers, tmp_path):
    # The first pack has nothing yet to be compared with; the second repeats it.
    space = {"checkpoint_minutes": [10, 11], "optimizer.lr": [0.02, 0.0]}
    options = ["sweep=grid", "trainer.max_epochs=3", "sweep.prune.startup=1", "sweep.prune.warmup=0", "sweep.pack=2"]
    study = start(teachers, tmp_path / "a", *options, space=space)
    assert [t.state.name for t in study.trials] == ["COMPLETE", "COMPLETE", "COMPLETE", "PRUNED"]
    assert len(study.trials[3].intermediate_values) < 3
    assert not (tmp_path / "a" / "3" / "summary.json").exists()
    cfg = OmegaConf.load(tmp_path / "a" / "2" / ".hydra" / "config.yaml")
    cfg.folder = str(tmp_path / "again")
    run(cfg)
    assert summary(tmp_path / "again") == summary(tmp_path / "a" / "2")  # and so the weights' SHA-256
    assert curves(tmp_path / "again") == curves(tmp_path / "a" / "2")


def test_a_killed_packed_sweep_repeats_no_finished_trial(teachers, tmp_path, monkeypatch):
    options, space = ["sweep=grid", "sweep.pack=2"], {"method.temperature": [2.0, 4.0, 8.0, 16.0]}
    whole = start(teachers, tmp_path / "whole", *options, space=space)
    original = Pack.train

    def killed(self, cfg, callbacks=()):
        at = [SignalAt(5, signal.SIGKILL)] if Path(cfg.folder).name == "3" else []
        return original(self, cfg, [*callbacks, *at])

    with monkeypatch.context() as patch:
        patch.setattr(Pack, "train", killed)
        assert status_of(lambda: start(teachers, tmp_path / "a", *options, space=space)) == signal.SIGKILL
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("summary.json")}
    assert {p.parent.name for p in done} == {"0", "1"}
    study = start(teachers, tmp_path / "a", *options, space=space)
    assert {p: p.stat().st_mtime_ns for p in done} == done
    assert [t.values for t in study.trials] == [t.values for t in whole.trials]
    assert [t.user_attrs["starts"] for t in study.trials] == [1, 1, 2, 2]


def test_a_trial_at_its_last_attempt_runs_alone(teachers, tmp_path, monkeypatch):
    def die(self, cfg, callbacks=()):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Pack, "train", die)
    options, space = ["sweep=grid", "sweep.pack=2", "sweep.attempts=2"], {"method.temperature": [2.0]}
    assert status_of(lambda: start(teachers, tmp_path / "a", *options, space=space)) == signal.SIGKILL
    study = start(teachers, tmp_path / "a", *options, space=space)
    assert study.trials[0].state.name == "COMPLETE"


@pytest.mark.parametrize("override", ["sweep.objectives=[fit_s]", "sweep.pack=0"])
def test_a_pack_that_cannot_be_is_refused(teachers, tmp_path, override):
    with pytest.raises(UserError, match=r"sweep\.pack="):
        start(teachers, tmp_path, "sweep=grid", "sweep.pack=2", override, space=GRID)


def test_runs_whose_seed_draws_their_teacher_share_none(small):
    fixed = ["data.seed=0", "data.subset_seed=0", "teacher.allow_chance=true"]
    for drawn in ("teacher.checkpoint=null", "+teacher.head=new", "teacher.ensemble=[{checkpoint: null}]"):
        assert common(small(*fixed, drawn)) != common(small(*fixed, drawn, "seed=1"))
