"""A sweep: how many trials, what survives a kill, what the objective is, and what is left of it. Its runs are stand-ins."""

import functools
import importlib
import io
import itertools
import json
import logging
import multiprocessing
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console

from litdistill.cli.suggestions import suggestions
from litdistill.config.recipes import teacher_folder
from litdistill.sweep import trial as sweep_trial
from litdistill.utils.errors import Stopped, UserError
from litdistill.utils.paths import CONF

pytest.importorskip("optuna")

from litdistill.sweep import study as sweep_study
from litdistill.sweep.space import first, fitting, pinned, read_space, unbalanced
from litdistill.sweep.study import sweep, typed_keys
from litdistill.sweep.trial import objective
from tests.composed import composed

FORK = multiprocessing.get_context("fork")


def start(folder: Path, *overrides: str, space: dict | None = None):
    """What `scripts/sweep.py` does with these overrides, and with a file in conf/sweep that has this space."""
    cfg = composed("sweep", ["sweep.storage=journal", *overrides])  # the quicker one
    if space is not None:
        cfg.sweep.space = space
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.MonkeyPatch.context() as patch:
        for module in (sweep_study, sweep_trial):
            patch.setattr(module, "compose", composed)
        return sweep(cfg, overrides, folder)


def accuracy(cfg) -> float:
    """A stand-in's validation accuracy: best at temperature 4, and a little better for wider students."""
    return 1 / (1 + abs(cfg.method.temperature - 4)) + 0.01 * sum(cfg.student.widths) / 100


def leave(cfg, val: float) -> None:
    """What a finished run leaves, as far as a sweep reads it; on the test set the worse is better."""
    folder, cost = Path(cfg.folder), sum(cfg.student.widths)
    student = {"params": cost, "macs": 10 * cost, "bytes": 4 * cost, "test": {"accuracy": {"best": 1 - val}}}
    summary = {"val": {"best": val}, "student": student, "time": {"fit_s": 1.0}}
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def quick(monkeypatch):
    """Replaces training by a closed form; gives the folders in which it was called, in order."""
    calls: list[Path] = []

    def train(cfg, callbacks=(), member=None):
        calls.append(Path(cfg.folder))
        leave(cfg, accuracy(cfg))

    monkeypatch.setattr(sweep_trial, "train", train)
    return calls


def points(study) -> list[dict]:
    return [t.params for t in study.trials]


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


def rerun_config(folder: Path, home: Path, *overrides: str):
    """What `best.yaml` composes to once it is in conf/experiment."""
    (home / "experiment").mkdir(parents=True)
    (home / "experiment" / "best.yaml").write_text((folder / "best.yaml").read_text())
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", ["experiment=best", f"hydra.searchpath=[file://{home}]", *overrides])


def same_but_for_the_folder(a, b) -> bool:
    """Nor does a run by itself know that others with its teacher follow, as a trial of a sweep does."""
    a, b = (OmegaConf.to_container(c, resolve=False) | {"folder": 0} for c in (a, b))
    for config in (a, b):
        if config["teacher"] is not None:
            del config["teacher"]["cache"]["shared"]
    return a == b


TEMPERATURE = {"method.temperature": {"low": 2.0, "high": 9.0}}


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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+sweep.space.method.temprature=[1,2]", r"sweep\.space: .*temprature.*sweep\.space\.KEY=null"),
        ("sweep.space.method.temperature=3", "neither a list nor a range. To fix a value: method.temperature=3"),
        ("sweep.space.method.temperature={low: 3, high: 1}", "is no range"),
        ("+sweep.space.data.batch_size={low: 3}", "is no range"),
        ("sweep.space=null", "sweep.space is empty"),
        ("sweep.sampler=grid", "is a range; a grid needs a list"),
        ("sweep.sampler=tpo", "choose tpe, random or grid"),
        ("sweep.trials=null", "say how many"),
        ("sweep.storage=nothing://a", "URL of a database"),
        ("sweep.trials=two", r"sweep\.trials=two must be a whole number, and at least 1"),
        ("sweep.trials=0", r"sweep\.trials=0 must be"),
        ("sweep.workers=0", r"sweep\.workers=0 must be"),
        ("sweep.attempts=0", r"sweep\.attempts=0 must be"),
        ("sweep.attempts=null", r"sweep\.attempts=None must be"),
        ("sweep.seed=-1", r"sweep\.seed=-1 must be"),
        ("sweep.prune.startup=-1", r"sweep\.prune\.startup=-1 must be"),
        ("sweep.prune.warmup=0.5", r"sweep\.prune\.warmup=0\.5 must be"),
        ("sweep.seeds=3", r"sweep\.seeds=\[0,1,2\]"),
        ("sweep.seeds=[]", r"sweep\.seeds=\[0,1,2\]"),
        ("sweep.objectives=[]", r"sweep\.objectives=\[val\]"),
        ("sweep.objectives=val", r"sweep\.objectives=\[val\]"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_its_first_trial(quick, tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        start(tmp_path / "a", override)
    assert quick == []


def test_a_sweep_is_not_continued_as_another(quick, tmp_path):
    start(tmp_path / "a", "sweep.trials=2")
    with pytest.raises(UserError, match="another space"):
        start(tmp_path / "a", "sweep.trials=3", "sweep.space.method.temperature.high=9")


def test_a_sweep_goes_on_with_the_options_that_its_trials_have_in_common(quick, tmp_path):
    begun = ("sweep.trials=2", "data.batch_size=16", "seed=1")
    start(tmp_path / "a", *begun)
    for other in ("data.batch_size=8", "seed=2", "optimizer.weight_decay=0.5", "scheduler=cosine"):
        with pytest.raises(UserError, match="another training options common to all trials"):
            start(tmp_path / "a", *begun, other)
    with pytest.raises(UserError, match="another monitored metric"):
        start(tmp_path / "a", *begun, "callbacks.best.monitor=val/brier")
    same = ("data.root=elsewhere", "threads=2", "trainer.log_every_n_steps=7", "watch_test=true", "runs=others")
    study = start(tmp_path / "a", *begun, *same, "sweep.trials=3")
    assert len(study.trials) == 3
    question = json.loads(study.user_attrs["question"])
    study.set_user_attr("question", json.dumps({k: question[k] for k in ("space", "objectives", "seeds")}))  # as once
    assert len(start(tmp_path / "a", "sweep.trials=4").trials) == 4


@pytest.mark.parametrize(
    ("space", "given"),
    [
        ({"optimizer": ["adam", "sgd"]}, ()),
        ({"optimizer": ["sgd", "adamw"], "optimizer.lr": [0.1, 0.2]}, ("+teacher.recipe.optimizer.weight_decay=0.5",)),
        ({"scheduler": ["steps", "cosine", "none"], "trainer.max_epochs": [3, 4]}, ("scheduler=cosine",)),
        ({"trainer": ["cpu", "gpu"]}, ()),
        ({"data.epoch_size": [100, 200]}, ("data.epoch_size=50",)),
    ],
)
def test_whatever_is_searched_there_is_one_teacher(space, given):
    own = ["folder=x", *given]
    base = composed("train", own)
    held, distributions = pinned(base, read_space(space)), read_space(space)
    points = [f"{key}={choice}" for key, d in distributions.items() for choice in d.choices]
    found = {teacher_folder(composed("train", [*own, *held, point])) for point in points}
    assert found == {teacher_folder(base)}


def test_a_misspelt_key_of_the_sweep_has_its_nearest_named():
    assert "sweep.trials" in suggestions(["sweep.trails=3"], "sweep")


def test_without_optuna_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "litdistill.sweep.study")
    with pytest.raises(UserError, match=r"pip install 'litdistill\[sweep\]'"):
        importlib.import_module("litdistill.sweep.study")


def test_a_trial_whose_int8_file_was_refused_has_no_size_to_be_judged_by(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"student": {"bytes": None, "params": 7}}))
    assert objective("params", tmp_path) == 7
    with pytest.raises(UserError, match="has no bytes: its int8 file was refused"):
        objective("bytes", tmp_path)


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        ([], {"method.temperature", "method.hard", "method.soft", "optimizer.lr", "student.widths"}),
        (
            ["net@student=shufflenet_v2"],
            {"method.temperature", "method.hard", "method.soft", "optimizer.lr", "student.width"},
        ),
        (["net@student=lenet"], {"method.temperature", "method.hard", "method.soft", "optimizer.lr"}),
        (["net@student=torchvision"], {"method.temperature", "method.hard", "method.soft", "optimizer.lr"}),
        (["method=supervised", "teacher=null"], {"method.hard", "optimizer.lr", "student.widths"}),
        (["net@student=resnet8", "method=at"], None),
    ],
)
@pytest.mark.parametrize("kind", ["optuna", "grid"])
def test_a_space_of_this_project_fits_any_student(overrides, keys, kind):
    node, base = composed("sweep", [f"sweep={kind}"]).sweep.space, composed("train", ["folder=x", *overrides])
    kept, left = fitting(OmegaConf.to_container(node), base)
    space = read_space(kept)
    composed("train", ["folder=x", *overrides, *(f"{key}={first(d)}" for key, d in space.items())])
    if keys is not None and kind == "optuna":
        assert space.keys() == keys
        assert (
            set(left)
            == {*("method.temperature", "method.hard", "method.soft", "student.width", "student.widths")} - keys
        )


def test_a_weight_that_is_searched_is_kept_also_at_its_default():
    cfg = functools.partial(composed, "train")
    names = ["method.methods.at.hint", "method.methods.kd.soft", "optimizer.lr"]
    assert unbalanced(names, cfg(["method=kd_at"])) == ["+balance.terms.at_hint=null"]
    assert unbalanced(["method.hint"], cfg(["method=at"])) == ["+balance.terms.hint=null"]
    at = {"_target_": "litdistill.methods.AT", "hint": 1000.0}
    inside = OmegaConf.create({"balance": {"terms": {}}, "method": {"method": at}})
    assert unbalanced(["method.method.hint"], inside) == ["+balance.terms.hint=null"]  # the term's own name
    assert unbalanced(["method.soft"], cfg(["method=srrl"])) == ["+balance.terms.soft=null"]
    assert dict(cfg(["method=at", *unbalanced(["method.hint"], cfg(["method=at"]))]).balance.terms) == {"hint": None}
    for overrides in (
        ["balance=none"],
        ["method.hint=0"],
        ["+balance.terms.hint=0.3"],
    ):  # nothing to keep, or typed
        assert unbalanced(["method.hint"], cfg(["method=at", *overrides])) == []


def test_widths_are_multiples_of_the_students_own():
    base = OmegaConf.create({"student": {"widths": [8, 16], "width": 1.0, "depth": 1, "name": "x"}})
    kept, left = fitting({"student": {k: ["x0.5", "x1", "x2"] for k in ("widths", "width", "depth", "none")}}, base)
    assert kept == {"student": {"widths": [[4, 8], [8, 16], [16, 32]], "width": [0.5, 1.0, 2.0], "depth": [1, 2]}}
    assert left == ["student.none"]
    with pytest.raises(UserError, match=r"sweep\.space\.student\.name: x has no multiples"):
        fitting({"student": {"name": ["x0.5"]}}, base)


def test_what_is_left_out_is_said_and_a_typed_key_is_never(quick, tmp_path, caplog):
    caplog.set_level("INFO")
    start(tmp_path / "a", "sweep.trials=1", space={"method.temperature": [4.0], "method.nothing": [1], "ema": [0.9]})
    assert "Left out of the space, since this run has no such key: method.nothing" in caplog.text
    assert typed_keys(["+sweep.space.data.batch_size=[1]", "sweep.space.method.hard.low=0", "seed=1"]) == {
        *("data.batch_size", "data", "method.hard.low", "method.hard"),
    }


def test_a_trial_is_a_line_on_the_screen_and_its_lines_are_in_its_file_alone(quick, monkeypatch, tmp_path, caplog):
    from litdistill.sweep import study as module

    screen = io.StringIO()
    handler = logging.StreamHandler(screen)
    monkeypatch.setattr(logging.getLogger(), "level", logging.INFO)

    def train(cfg, callbacks=(), member=None):
        logging.getLogger("litdistill.training.train").info("a line of the run")
        logging.getLogger("litdistill.training.prerequisites").info("No such teacher yet")
        leave(cfg, accuracy(cfg))

    monkeypatch.setattr(sweep_trial, "train", train)
    logging.getLogger().addHandler(handler)
    try:
        study = start(tmp_path / "a", "sweep.trials=3")
        module.log.info("after it")
    finally:
        logging.getLogger().removeHandler(handler)
    lines = screen.getvalue().splitlines()
    told = [line for line in lines if line.startswith("Trial ")]
    assert [line.split()[1] for line in told] == ["0", "1", "2"]
    so_far = 0.0
    for line, trial in zip(told, study.trials, strict=True):
        so_far = max(so_far, trial.value)
        assert f"method.temperature={trial.params['method.temperature']:.4g}" in line
        assert f"best {so_far:.6g} (trial " in line
    assert ["left" in line for line in told] == [True, True, False]
    assert "a line of the run" not in lines
    assert "No such teacher yet" in lines  # it takes long
    assert "after it" in lines
    for number in "012":
        assert (tmp_path / "a" / number / "train.log").read_text().count("a line of the run") == 1


def test_a_sweep_ends_with_its_table_the_best_value_and_the_command_that_reruns_it(quick, tmp_path, caplog, capsys):
    caplog.set_level("INFO")
    study = start(tmp_path / "a", "sweep.trials=3", "data.batch_size=16")
    best = study.best_trial
    table = capsys.readouterr().out
    first_row = next(line for line in table.splitlines() if line.startswith("│"))
    assert first_row.split("│")[1].strip() == str(best.number)
    assert f"The best is trial {best.number}: val/accuracy {best.value:.6g}" in caplog.text
    (command,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("To rerun the best: ")]
    words = shlex.split(command.removeprefix("To rerun the best: "))
    overrides = [w for w in words if "=" in w]
    cfg = composed("train", ["folder=x", *overrides])
    assert accuracy(cfg) == pytest.approx(best.value)
    assert cfg.data.batch_size == 16
    assert "train" in words[:4] or words[1].endswith("train.py")


@pytest.mark.parametrize("width", [60, 80])
def test_the_table_fits_a_narrow_terminal(quick, tmp_path, monkeypatch, width, capsys, caplog):
    caplog.set_level("INFO", "litdistill.sweep.report")
    monkeypatch.setenv("COLUMNS", str(width))
    console = functools.partial(Console, force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr("litdistill.sweep.report.Console", lambda **_: console())
    start(tmp_path / "a", "sweep.trials=2")
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines() if line[:1] in "│┏┃└┡") <= width
    assert "…" not in shown
    assert caplog.text.count("All trials and parameters are in") == 1
