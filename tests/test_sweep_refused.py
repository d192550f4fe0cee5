"""What a sweep refuses before its first trial, and with which options one goes on."""

import importlib
import json
import sys

import pytest

from litdistill.cli.suggestions import suggestions
from litdistill.utils.errors import UserError
from tests.sweeps import (
    quick_fixture,  # noqa: F401
    start,
)

pytest.importorskip("optuna")


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


def test_a_misspelt_key_of_the_sweep_has_its_nearest_named():
    assert "sweep.trials" in suggestions(["sweep.trails=3"], "sweep")


def test_without_optuna_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "litdistill.sweep.study")
    with pytest.raises(UserError, match=r"pip install 'litdistill\[sweep\]'"):
        importlib.import_module("litdistill.sweep.study")
