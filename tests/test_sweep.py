"""A sweep: how many trials, what survives a kill, what the objective is, and what is left of it. Its runs are stand-ins."""

import itertools
import json
import os
import signal
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from litdistill.sweep import trial as sweep_trial
from litdistill.utils.errors import Stopped, UserError
from tests.sweeps import (
    FORK,
    TEMPERATURE,
    accuracy,
    leave,
    points,
    quick_fixture,  # noqa: F401
    rerun_config,
    same_but_for_the_folder,
    start,
)

pytest.importorskip("optuna")

from litdistill.sweep.trial import objective


@pytest.mark.parametrize("options", [("sweep=optuna",), ("sweep=random",), ("sweep=grid", "sweep.trials=5")])
def test_a_sweep_has_the_planned_trials_and_is_the_same_twice(quick, tmp_path, options):
    options = ("sweep.trials=11", *options)
    first = start(tmp_path / "a", *options)
    n = 5 if "sweep=grid" in options else 11
    assert [t.state.name for t in first.trials] == ["COMPLETE"] * n
    assert len(quick) == n == len(set(quick))
    assert points(first) == points(start(tmp_path / "b", *options))
    assert len({str(p) for p in points(first)}) == n
    if "sweep=grid" not in options:
        other = start(tmp_path / "c", "sweep.seed=1", "sweep.trials=1", *options[1:])
        assert points(other)[0] != points(first)[0]


def test_tpe_learns_where_random_does_not(quick, tmp_path):
    space = {"method.temperature": {"low": 1.0, "high": 30.0}}
    tpe = start(tmp_path / "a", "sweep.trials=20", space=space)
    chance = start(tmp_path / "b", "sweep=random", "sweep.trials=20", space=space)
    late = lambda s: sum(t.value for t in s.trials[10:])  # noqa: E731
    assert late(tpe) > 1.25 * late(chance)


def test_a_grid_is_every_combination(quick, tmp_path):
    space = {
        "method": {"temperature": [2.0, 4], "hard": {"low": 0.0, "high": 0.5, "step": 0.25}},
        "student.widths": [[8, 16, 32], [16, 32, 64]],
    }
    study = start(tmp_path / "a", "sweep=grid", space=space)
    found = [tuple(t.params.values()) for t in study.trials]
    assert list(study.trials[0].params) == ["method.temperature", "method.hard", "student.widths"]
    assert found == list(itertools.product(["2.0", "4"], [0.0, 0.25, 0.5], ["[8,16,32]", "[16,32,64]"]))


def killed_at(trial: int):
    """A run in whose middle the process is killed."""

    def train(cfg, callbacks=(), member=None):
        if Path(cfg.folder).name == str(trial):
            os.kill(os.getpid(), signal.SIGKILL)
        leave(cfg, accuracy(cfg))

    return train


def in_a_process(monkeypatch, train, folder, *options):
    monkeypatch.setattr(sweep_trial, "train", train)
    process = FORK.Process(target=start, args=(folder, *options))
    process.start()
    return process


@pytest.mark.process
@pytest.mark.parametrize(("kind", "storage"), [("optuna", "sqlite"), ("random", "journal"), ("grid", "sqlite")])
def test_a_killed_sweep_ends_as_if_it_had_not_been_killed(quick, monkeypatch, tmp_path, kind, storage):
    options = (f"sweep={kind}", "sweep.trials=8", f"sweep.storage={storage}")
    whole = start(tmp_path / "whole", *options)
    quick.clear()
    with monkeypatch.context() as patch:
        process = in_a_process(patch, killed_at(5), tmp_path / "parts", *options)
        process.join()
    assert process.exitcode == -signal.SIGKILL
    parts = start(tmp_path / "parts", *options)
    assert [t.state.name for t in parts.trials] == ["COMPLETE"] * 8
    assert [p.name for p in quick] == ["5", "6", "7"]
    assert points(parts) == points(whole)
    assert [t.value for t in parts.trials] == [t.value for t in whole.trials]
    start(tmp_path / "parts", *options)
    assert len(quick) == 3
    assert len(start(tmp_path / "parts", *options, "sweep.trials=10").trials) == 10


@pytest.mark.process
def test_two_processes_share_a_sweep(quick, monkeypatch, tmp_path):
    def train(cfg, callbacks=(), member=None):
        with open(tmp_path / "calls", "a") as file:
            file.write(f"{Path(cfg.folder).name} {os.getpid()}\n")
        time.sleep(0.15)
        leave(cfg, accuracy(cfg))

    options = ("sweep=random", "sweep.trials=8", "sweep.storage=sqlite")
    workers = [in_a_process(monkeypatch, train, tmp_path / "a", *options) for _ in range(2)]
    for worker in workers:
        worker.join()
    assert [w.exitcode for w in workers] == [0, 0]
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert sorted(int(n) for n, _ in calls) == list(range(8))
    assert len({pid for _, pid in calls}) == 2
    assert len(start(tmp_path / "a", *options).trials) == 8
    assert "8 complete" in (tmp_path / "a" / "sweep.md").read_text()


def test_a_failed_trial_is_recorded_with_its_reason_and_the_rest_go_on(quick, monkeypatch, tmp_path):
    def train(cfg, callbacks=(), member=None):
        if Path(cfg.folder).name == "1":
            raise UserError("no such thing")
        if Path(cfg.folder).name == "2":
            raise RuntimeError("out of\nmemory")
        leave(cfg, float("nan") if Path(cfg.folder).name == "3" else accuracy(cfg))

    monkeypatch.setattr(sweep_trial, "train", train)
    study = start(tmp_path / "a", "sweep.trials=5")
    assert [t.state.name for t in study.trials] == ["COMPLETE", "FAIL", "FAIL", "FAIL", "COMPLETE"]
    text = (tmp_path / "a" / "sweep.md").read_text()
    assert "UserError: no such thing" in text
    assert "RuntimeError: out of memory" in text
    assert "is not finite" in text
    assert len(start(tmp_path / "a", "sweep.trials=5").trials) == 5


def test_a_sweep_of_failures_is_a_failure(quick, monkeypatch, tmp_path):
    monkeypatch.setattr(sweep_trial, "train", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match=r"None of 2 trials succeeded.*ZeroDivisionError"):
        start(tmp_path / "a", "sweep.trials=2")


@pytest.mark.process
def test_a_trial_that_kills_its_process_is_given_up(quick, monkeypatch, tmp_path):
    for _ in range(2):
        with monkeypatch.context() as patch:
            in_a_process(patch, killed_at(1), tmp_path / "a", "sweep.trials=3", "sweep.attempts=2").join()
    study = start(tmp_path / "a", "sweep.trials=3", "sweep.attempts=2")
    assert [t.state.name for t in study.trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert study.trials[1].user_attrs["reason"] == "its process died 2 times"


def test_a_stop_is_no_failure_of_the_trial(quick, monkeypatch, tmp_path):
    def stop(cfg, callbacks=(), member=None):
        raise Stopped(signal.SIGTERM, "step 1")

    for _ in range(4):  # more often than a trial may die
        with monkeypatch.context() as patch:
            patch.setattr(sweep_trial, "train", stop)
            with pytest.raises(Stopped):
                start(tmp_path / "a", "sweep.trials=2")
    assert [t.state.name for t in start(tmp_path / "a", "sweep.trials=2").trials] == ["COMPLETE"] * 2


def test_the_objective_is_the_best_on_validation(quick, tmp_path):
    study = start(tmp_path / "a", "sweep=grid")
    assert study.best_value == max(accuracy(OmegaConf.load(f / ".hydra" / "config.yaml")) for f in quick)
    assert study.best_params["method.temperature"] == "4.0"


@pytest.mark.parametrize("name", ["test", "test/accuracy", "agreement"])
def test_the_test_set_is_no_objective(quick, tmp_path, name):
    with pytest.raises(UserError, match="The test set is no objective"):
        start(tmp_path / "a", f"sweep.objectives=[{name}]")


def test_a_metric_that_is_better_when_smaller_is_minimised(quick, tmp_path):
    study = start(
        tmp_path / "a", "sweep=grid", "callbacks.best.monitor=val/nll", "callbacks.best.mode=min", "sweep.trials=6"
    )
    assert study.best_value == min(t.value for t in study.trials)
    assert "val/nll (minimize)" in (tmp_path / "a" / "sweep.md").read_text()


def test_seeds_are_averaged_within_a_trial(quick, monkeypatch, tmp_path):
    def train(cfg, callbacks=(), member=None):
        assert cfg.data.seed == cfg.seed
        leave(cfg, {3: 0.2, 4: 0.4, 9: 0.9}[cfg.seed] + cfg.method.hard)

    monkeypatch.setattr(sweep_trial, "train", train)
    study = start(tmp_path / "a", "sweep=random", "sweep.trials=3", "sweep.seeds=[3,4,9]")
    for trial in study.trials:
        assert trial.value == pytest.approx(0.5 + trial.params["method.hard"], abs=1e-12)
        assert {p.name for p in (tmp_path / "a" / str(trial.number)).iterdir()} == {"seed3", "seed4", "seed9"}
    assert "litdistill train -m experiment=best seed=3,4,9" in (tmp_path / "a" / "best.yaml").read_text()


def test_the_pareto_front_is_that_of_a_brute_force(quick, tmp_path):
    study = start(tmp_path / "a", "sweep=random", "sweep.trials=20", "sweep.objectives=[val,macs]")
    values = {t.number: t.values for t in study.trials}
    better = lambda a, b: a[0] >= b[0] and a[1] <= b[1] and a != b  # noqa: E731
    front = {n for n, v in values.items() if not any(better(w, v) for w in values.values())}
    assert {t.number for t in study.best_trials} == front
    assert 1 < len(front) < 20
    text = (tmp_path / "a" / "sweep.md").read_text()
    shown = text.split("## Pareto front")[1].split("##")[0].splitlines()
    assert {int(line.split("|")[1]) for line in shown if line[2:3].isdigit()} == front
    most = max(front, key=lambda n: values[n][0])
    assert f"trial {most}:" in (tmp_path / "a" / "best.yaml").read_text()


def test_importance_finds_the_parameter_that_matters(quick, tmp_path):
    start(tmp_path / "a", "sweep=random", "sweep.trials=25")
    lines = (tmp_path / "a" / "sweep.md").read_text().split("## Importance")[1].splitlines()
    shares = {
        c[1].strip(): float(c[2]) for c in (x.split("|") for x in lines) if len(c) == 4 and c[2].strip()[0].isdigit()
    }
    assert shares.keys() == {"method.temperature", "method.hard", "method.soft", "optimizer.lr", "student.widths"}
    assert max(shares, key=shares.__getitem__) == "method.temperature"
    assert sum(shares.values()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("overrides", "space"),
    [
        ((), None),
        (("experiment=digits/distilled", "optimizer=sgd", "seed=3", "+schedule.soft=[[0, 0], [20, 1]]"), None),
        (("experiment=digits/few_labels", "method=dkd"), {"optimizer.lr": [1e-5, 1]}),
        (("net@teacher=mlp", "+trainer.accumulate_grad_batches=2", "name='a b'", "++ema=0.9"), TEMPERATURE),
        (("teacher=null",), {"method": ["supervised"], "optimizer": {"lr": {"low": 1e-5, "high": 2e-5}}}),
        (("experiment=digits/distilled",), {"net@student": ["conv4_wide", "lenet"], "method": ["dkd", "kd"]}),
        (("callbacks.learning_rate._target_=lightning.pytorch.callbacks.Timer", "sweep.seeds=[4,5]"), TEMPERATURE),
    ],
)
def test_best_yaml_composes_to_the_config_of_the_best_trial(monkeypatch, tmp_path, overrides, space):
    def train(cfg, callbacks=(), member=None):
        folder = Path(cfg.folder)
        summary = {"val": {"best": 0.1 * (1 + int(next(p for p in folder.parts[::-1] if p.isdigit())))}}
        (folder / "summary.json").write_text(json.dumps(summary))

    monkeypatch.setattr(sweep_trial, "train", train)
    start(tmp_path / "a", "sweep.trials=2", *overrides, space=space)
    folder, extra = tmp_path / "a" / "1", []
    if "sweep.seeds=[4,5]" in overrides:
        folder, extra = folder / "seed4", ["seed=4"]
    then = OmegaConf.load(folder / ".hydra" / "config.yaml")
    assert same_but_for_the_folder(rerun_config(tmp_path / "a", tmp_path / "home", *extra), then)


def test_a_trial_whose_int8_file_was_refused_has_no_size_to_be_judged_by(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"student": {"bytes": None, "params": 7}}))
    assert objective("params", tmp_path) == 7
    with pytest.raises(UserError, match="has no bytes: its int8 file was refused"):
        objective("bytes", tmp_path)
