"""A run that is resumed with other options: each is applied from that step on, or refused by its name. And a run that was
moved is resumed as if it had stayed."""

import json
import math
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf

from litdistill.cli.resume import resumed
from litdistill.config.changes import as_started, check_changes, is_applied, new_run
from litdistill.evaluation.evaluate import rebuild
from litdistill.training.resume import moved
from litdistill.training.train import train
from litdistill.utils.errors import Stopped, UserError
from tests.conftest import compose_config

ALONE = ("method=supervised", "teacher=null", "logger=none", "trainer.max_epochs=4")  # four steps an epoch
PER_EPOCH, STOP = 4, 6


class Stop(Callback):
    """Ends a run in the middle of an epoch, with its state saved as a signal has it."""

    def __init__(self, step=STOP):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt")
            raise KeyboardInterrupt


class Rates(Callback):
    """Notes the learning rate of every step, and the optimizer's options at the end."""

    def __init__(self):
        self.rates, self.group = [], {}

    def on_train_batch_start(self, trainer, *_):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_end(self, trainer, *_):
        self.group = {k: v for k, v in trainer.optimizers[0].param_groups[0].items() if k != "params"}


@pytest.fixture
def stopped(small):
    """`stopped(*overrides)`: a run that was stopped at a step of its 16; returns a function that resumes it with others."""

    def begin(*overrides, step=STOP):
        with pytest.raises(Stopped):
            train(small(*ALONE, *overrides), [Stop(step)])

        def resume(*more):
            seen = Rates()
            cfg = small(*ALONE, *overrides, *more)
            train(cfg, [seen])
            return seen, json.loads((Path(cfg.folder) / "summary.json").read_text())

        return resume

    return begin


def test_a_changed_learning_rate_and_weight_decay_are_those_of_the_optimizer(stopped):
    seen, summary = stopped()("optimizer.lr=0.0001", "optimizer.weight_decay=0.05", "+optimizer.betas=[0.8,0.99]")
    assert seen.rates == [0.0001] * (16 - STOP)
    assert seen.group["lr"] == 0.0001
    assert seen.group["weight_decay"] == 0.05
    assert list(seen.group["betas"]) == [0.8, 0.99]
    (change,) = summary["changes"]
    assert change["step"] == STOP
    assert change["options"]["optimizer.lr"] == [0.001, 0.0001]


def test_without_a_change_nothing_is_touched(stopped):
    seen, summary = stopped("scheduler=cosine")()
    assert "changes" not in summary
    assert seen.group["lr"] == pytest.approx(0)


def cosine(step, lr, epochs):
    return lr * (1 + math.cos(math.pi * (step // PER_EPOCH) / epochs)) / 2


def warmup_cosine(step, lr, total, warmup=0.25):
    rising = int(warmup * total)
    if step < rising:
        return lr * (step + 1) / (rising + 1)
    return lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / (total - rising)))


@pytest.mark.parametrize(("lr", "epochs"), [(0.001, 6), (0.0005, 4), (0.0005, 7)])
def test_a_cosine_is_that_of_the_new_horizon_at_its_step(stopped, lr, epochs):
    seen, _ = stopped("scheduler=cosine")(f"trainer.max_epochs={epochs}", f"optimizer.lr={lr}")
    assert seen.rates == pytest.approx([cosine(s, lr, epochs) for s in range(STOP, PER_EPOCH * epochs)])


def test_a_warm_up_and_cosine_in_steps_too(stopped):
    seen, _ = stopped("scheduler=warmup_cosine", "scheduler.warmup=0.25")("trainer.max_epochs=8")
    assert seen.rates == pytest.approx([warmup_cosine(s, 0.001, 32) for s in range(STOP, 32)])


def test_one_cycle_has_its_momentum_too(stopped, small):
    options = ("scheduler=onecycle", "optimizer=sgd")
    whole = Rates()
    train(small(*ALONE, *options, "trainer.max_epochs=6", name="whole"), [whole])
    seen, _ = stopped(*options)("trainer.max_epochs=6")
    assert seen.rates == whole.rates[STOP:]
    assert seen.group == whole.group


def test_a_plateau_keeps_its_reductions(stopped):
    plateau = ("scheduler=plateau", "scheduler.patience=0", "scheduler.factor=0.5", "+scheduler.eps=0")
    resume = stopped(*plateau, "optimizer.lr=1e-12", step=10)
    seen, _ = resume("optimizer.lr=2e-12", "scheduler.factor=0.25")
    # The accuracy of such a student does not change: it is the best in the first epoch, and each of the others reduces.
    assert seen.rates[0] == pytest.approx(2e-12 * 0.5, abs=0)
    assert seen.rates[-1] == pytest.approx(2e-12 * 0.5 * 0.25, abs=0)


@pytest.mark.parametrize(
    "change",
    [
        "data.batch_size=16",
        "data.per_class=10",
        "seed=1",
        "ema=0.9",
        "method.hard=0.5",
        "+schedule.hard=[[0,0],[2,1]]",
        "student.widths=[8,9]",
        "optimizer=sgd",
        "+optimizer.amsgrad=true",
        "scheduler=cosine",
        "trainer.precision=bf16-mixed",
        "+trainer.accumulate_grad_batches=2",
        "callbacks.best.monitor=val/nll",
    ],
)
def test_what_belongs_to_the_whole_training_is_refused_by_name(stopped, small, change):
    resume = stopped()
    with pytest.raises(UserError) as refused:
        resume(change)
    text = str(refused.value)
    key = change.lstrip("+").split("=")[0]
    assert {"optimizer": "optimizer._target_", "scheduler": "scheduler._target_"}.get(key, key) in text
    assert "cannot go on with other options than it began with" in text
    assert "student.checkpoint=" in text


def test_the_remedy_of_a_refusal_starts_a_run_from_those_weights(stopped, small):
    resume = stopped()
    with pytest.raises(UserError) as refused:
        resume("seed=1")
    (remedy,) = [word.rstrip(",") for word in str(refused.value).split() if word.startswith("student.checkpoint=")]
    source = torch.load(remedy.partition("=")[2], weights_only=True)["state_dict"]
    cfg = small(*ALONE, "seed=1", remedy, "trainer.max_epochs=0", name="new")
    train(cfg)
    new = torch.load(Path(cfg.folder) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(new[k], v) for k, v in source.items() if k.startswith("student."))


def test_a_remedy_can_be_typed_where_a_folder_has_a_space(tmp_path):
    assert new_run(tmp_path / "run") == f"student.checkpoint={tmp_path}/run/checkpoints/last.ckpt"
    folder = tmp_path / "a run, s=1"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "best.ckpt").touch()
    assert shlex.split(new_run(folder)) == [f"student.checkpoint='{folder}/checkpoints/best.ckpt'"]
    (folder / "student.safetensors").touch()
    (typed,) = shlex.split(new_run(folder))
    assert compose_config(tmp_path / "new", typed).student.checkpoint == str(folder)


def test_places_and_speed_may_change(stopped):
    _, summary = stopped()("checkpoint_minutes=5", "watch_test=true", "technique=other", "++trainer.benchmark=false")
    assert "changes" not in summary


def test_more_patience_is_had(stopped):
    stop = "+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/accuracy, patience: 1}"
    resume = stopped(stop, "optimizer.lr=1e-12")  # nothing is learned, so that the second epoch would be the last
    seen, _ = resume("callbacks.stop.patience=9")
    assert len(seen.rates) == 16 - STOP


def test_a_finished_run_does_not_pass_over_other_options(small):
    train(small(*ALONE))
    train(small(*ALONE, "threads=1"))
    with pytest.raises(UserError, match=r"is finished, .* trainer.max_epochs was 4, and is 6. Start a new run"):
        train(small(*ALONE, "trainer.max_epochs=6"))


def test_the_teacher_stays_the_one_that_it_began_with(small, teachers):
    options = ("logger=none", "trainer.max_epochs=4", "optimizer.lr=0.004")
    with pytest.raises(Stopped):
        train(small(*options), [Stop()])
    known = set(teachers.glob("teachers/*"))
    cfg = small(*options, "optimizer.lr=0.002")
    train(cfg)
    train_again = small(*options, "optimizer.lr=0.002")
    train(train_again)
    assert set(teachers.glob("teachers/*")) == known
    (Path(cfg.folder) / ".hydra").mkdir()
    OmegaConf.save(cfg, Path(cfg.folder) / ".hydra" / "config.yaml")
    rebuild(Path(cfg.folder), trust=())  # finds that teacher
    (Path(cfg.folder) / "summary.json").unlink()
    other = next(p for p in known if p.is_dir() and "conv" in p.name)
    changed = small(*options, "optimizer.lr=0.002", f"teacher.checkpoint={spoilt(other, cfg)}")
    with pytest.raises(UserError, match="cannot go on with another teacher: the SHA-256"):
        train(changed)


def spoilt(teacher: Path, cfg) -> Path:
    """A copy of a teacher with another weight; the run's own recipe says that its teacher is given."""
    from safetensors.torch import load_file, save_file

    target = Path(cfg.folder).parent / "spoilt.safetensors"
    state = load_file(teacher / "student.safetensors")
    name = next(iter(state))
    save_file({**state, name: state[name] + 1}, target)
    last = Path(cfg.folder) / "checkpoints" / "last.ckpt"
    saved = torch.load(last, weights_only=True)
    options = saved["callbacks"]["RunOptions"]["options"]
    for key in [k for k in options if k.startswith("teacher.recipe.")]:
        del options[key]
    options["teacher.checkpoint"] = "given"
    torch.save(saved, last)
    return target


def test_a_strangers_history_sets_nothing_but_options_that_may_change():
    cfg = OmegaConf.create({"optimizer": {"lr": 1.0}, "runs": "mine"})
    evil = [
        {"options": {"runs": ["theirs", "mine"], "optimizer.lr": ["${oc.env:HOME}", 1.0]}},
        "no entry",
        {"options": 3},
    ]
    assert as_started(cfg, evil) == cfg
    assert as_started(cfg, [{"options": {"optimizer.lr": [2.0, 1.0]}}]).optimizer.lr == 2.0
    assert cfg.optimizer.lr == 1.0


@pytest.mark.parametrize(
    ("key", "then", "now", "applied"),
    [
        ("optimizer.momentum", 0.9, 0.8, True),
        ("optimizer.momentum", None, 0.8, False),
        ("optimizer.nesterov", False, True, True),
        ("optimizer.fused", True, False, False),
        ("scheduler.T_max", 4, 8, True),
        ("scheduler.interval", "epoch", "step", False),
        ("trainer.max_time", None, "00:01:00:00", True),
        ("trainer.limit_train_batches", None, 2, False),
    ],
)
def test_what_is_applied_is_a_table(key, then, now, applied):
    assert is_applied(key, then, now) is applied


# -- a run's folder may be moved -----------------------------------------------------------------------------------------


def test_a_run_that_was_moved_keeps_its_best_epoch(small, tmp_path):
    """After three epochs the learning rate is too high: an earlier one is the best."""
    options = (*ALONE, "callbacks.best.monitor=val/nll", "optimizer.lr=0.01", "trainer.max_epochs=6")
    train(small(*options, name="whole"), [Spoil()])
    with pytest.raises(Stopped):
        train(small(*options, name="here"), [Spoil(), StopInEpoch(5)])
    shutil.move(tmp_path / "here", tmp_path / "there")
    train(small(*options, name="there"), [Spoil()])
    whole, there = (
        torch.load(tmp_path / n / "checkpoints" / "best.ckpt", weights_only=True) for n in ("whole", "there")
    )
    assert whole["epoch"] < 4  # so that the resumed epochs would have replaced it
    assert whole["epoch"] == there["epoch"]
    assert all(torch.equal(whole["state_dict"][k], v) for k, v in there["state_dict"].items())
    summaries = [json.loads((tmp_path / n / "summary.json").read_text()) for n in ("whole", "there")]
    assert summaries[0]["val"] == summaries[1]["val"]


class Spoil(Callback):
    """A learning rate that is too high from the fourth epoch on."""

    def on_train_epoch_start(self, trainer, *_):
        if trainer.current_epoch >= 3:
            trainer.optimizers[0].param_groups[0]["lr"] = 30.0


class StopInEpoch(Stop):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_batch_end(self, trainer, *_):
        if trainer.current_epoch == self.epoch:
            raise KeyboardInterrupt


def test_a_run_that_was_trained_to_its_end_and_moved_without_a_summary_is_finished(small, tmp_path):
    train(small(*ALONE, name="here"))
    summary = json.loads((tmp_path / "here" / "summary.json").read_text())
    (tmp_path / "here" / "summary.json").unlink()
    shutil.move(tmp_path / "here", tmp_path / "there")
    for name in ("before", "before.part"):  # of resumes that were killed
        (tmp_path / "there" / ".hydra" / name).mkdir(parents=True)
    train(small(*ALONE, name="there"))
    assert json.loads((tmp_path / "there" / "summary.json").read_text())["val"] == summary["val"]
    assert not list((tmp_path / "there" / ".hydra").glob("before*"))  # a later refusal would put that record back


def test_a_best_checkpoint_that_is_missing_is_forgotten(tmp_path, caplog):
    state = {"dirpath": "/old", "best_model_path": "/old/best.ckpt", "best_model_score": 1.0, "kth_value": 1.0}
    state |= {"kth_best_model_path": "/old/best.ckpt", "best_k_models": {"/old/best.ckpt": 1.0}, "last_model_path": ""}
    assert moved(state, tmp_path)["best_model_score"] is None
    assert "is missing: the best epoch is chosen anew" in caplog.text
    (tmp_path / "best.ckpt").write_text("")
    found = moved(state, tmp_path)
    assert found["best_model_score"] == 1.0
    assert found["best_k_models"] == {str(tmp_path / "best.ckpt"): 1.0}
    assert found["dirpath"] == str(tmp_path)


# -- what a resume replays -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        (["trainer=cpu"], ["data=digits", "trainer=ddp", "trainer.max_epochs=7"]),
        (["trainer=cpu", "trainer.devices=3"], ["data=digits", "trainer=ddp", "trainer.max_epochs=7"]),
        (
            ["threads=1"],
            ["data=digits", "trainer=ddp", "trainer.devices=2", "trainer.max_epochs=7", "+trainer.num_nodes=1"],
        ),
    ],
)
def test_another_trainer_brings_its_own_devices(tmp_path, capsys, typed, kept):
    """A run of two ranks that goes on with `trainer=cpu` has one."""
    began = ["data=digits", "trainer=ddp", "trainer.devices=2", "trainer.max_epochs=7", "+trainer.num_nodes=1"]
    note = {"hydra": {"job": {"config_name": "train"}, "overrides": {"task": began}, "runtime": {"config_sources": []}}}
    (tmp_path / ".hydra").mkdir()
    OmegaConf.save(OmegaConf.create(note), tmp_path / ".hydra" / "hydra.yaml")
    found = resumed([f"resume={tmp_path}", *typed])
    assert found == [*kept, *typed, f"hydra.run.dir={tmp_path}"]
    assert ("Not replayed, since another trainer is chosen" in capsys.readouterr().out) is (typed[0] == "trainer=cpu")


def test_a_refused_option_is_typed_back_as_a_shell_takes_it(tmp_path):
    with pytest.raises(UserError, match=r"leave them as they were \('data\.classes=\[cat,dog\]'\)"):
        check_changes({"data.classes": [["cat", "dog"], None]}, tmp_path)
