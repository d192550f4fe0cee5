"""A sweep of real runs: pruning, one teacher, TensorBoard, a trial that goes on from its checkpoint, and best.yaml."""

import json
import signal
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from litdistill.evaluation.evaluate import differences, evaluate, load_run
from litdistill.sweep import trial as sweep_trial
from litdistill.training.train import train
from litdistill.utils.errors import Stopped
from tests.conftest import SMALL

pytest.importorskip("optuna")

from litdistill.sweep.trial import objective
from tests.sweeps import rerun_config, same_but_for_the_folder, start


@pytest.fixture(scope="module")
def real(teachers, tmp_path_factory):
    """A grid of three: a good learning rate, none at all, and one between; the hopeless one is pruned."""
    folder = tmp_path_factory.mktemp("real") / "sweep"
    before = set(teachers.glob("teachers/*/student.safetensors"))
    prune = ("sweep.prune.startup=1", "sweep.prune.warmup=0")
    options = [*SMALL, f"runs={teachers}", "trainer.max_epochs=3", "sweep=grid", "sweep.storage=sqlite", *prune]
    study = start(folder, *options, space={"optimizer.lr": [0.01, 1e-9, 0.02]})
    return study, folder, set(teachers.glob("teachers/*/student.safetensors")) - before


def test_a_hopeless_trial_is_pruned_in_its_middle(real):
    study, folder, _ = real
    assert [t.state.name for t in study.trials] == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert len(study.trials[1].intermediate_values) < 3
    assert not (folder / "1" / "summary.json").exists()
    assert "of 3 |" in (folder / "sweep.md").read_text()


def test_a_sweep_over_the_learning_rate_trains_its_teacher_once(real):
    _, folder, teachers = real
    assert len(teachers) <= 1  # none where another test of this session has trained the same one
    taught = {json.loads((folder / n / "summary.json").read_text())["teacher"]["sha256"] for n in "02"}
    assert len(taught) == 1


def tensorboard(run: Path) -> EventAccumulator:
    file = next(run.rglob("events.out.tfevents*"))
    return EventAccumulator(str(file.parent), size_guidance={"scalars": 0}).Reload()


def test_values_are_the_best_epochs_on_validation(real):
    study, folder, _ = real
    for n in (0, 2):
        best = max(e.value for e in tensorboard(folder / str(n)).Scalars("accuracy/validation"))
        assert study.trials[n].value == pytest.approx(best)
        assert max(study.trials[n].intermediate_values.values()) == pytest.approx(best)


def test_tensorboard_has_what_the_space_varies_of_every_trial_the_pruned_one_too(real):
    for n, rate in enumerate((0.01, 1e-9, 0.02)):
        events = tensorboard(real[1] / str(n))
        assert "accuracy/validation" in events.Tags()["scalars"]
        content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        found = HParamsPluginData.FromString(content).session_start_info.hparams
        assert {key: value.number_value for key, value in found.items()} == {"optimizer.lr": rate}


def test_a_trial_is_an_ordinary_run(real):
    folder = real[1] / "0"
    assert differences(evaluate(folder), load_run(folder)[1]) == []
    assert (folder / "train.log").is_file()
    assert load_run(folder)[1]["command"].startswith("python scripts/train.py ")
    assert "optimizer.lr=0.01" in OmegaConf.load(folder / ".hydra" / "overrides.yaml")


class StopAt(Callback):
    """A signal in the middle of the second epoch."""

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 6:
            signal.raise_signal(signal.SIGTERM)


def test_a_stopped_trial_goes_on_from_its_checkpoint(real, teachers, monkeypatch, tmp_path, caplog):
    _, whole, _ = real
    options = [*SMALL, f"runs={teachers}", "trainer.max_epochs=3", "sweep=grid"]
    space = {"optimizer.lr": [0.01]}
    with monkeypatch.context() as patch:
        patch.setattr(sweep_trial, "train", lambda cfg, callbacks, member: train(cfg, [*callbacks, StopAt()]))
        with pytest.raises(Stopped):
            start(tmp_path / "a", *options, space=space)
    caplog.set_level("INFO", "litdistill")
    study = start(tmp_path / "a", *options, space=space)
    assert "Going on from" in caplog.text
    assert list(study.trials[0].intermediate_values) == [0, 1, 2]
    sha = lambda f: json.loads((f / "summary.json").read_text())["student"]["sha256"]  # noqa: E731
    assert sha(tmp_path / "a" / "0") == sha(whole / "0")


def test_latency_is_measured_of_the_student(real):
    assert 0 < objective("latency_ms", real[1] / "0") < 1000


def test_best_yaml_reruns_the_best_trial_to_the_bit(real, tmp_path):
    study, folder, _ = real
    cfg = rerun_config(folder, tmp_path / "home", f"folder={tmp_path / 'rerun'}")
    best = study.best_trial.number
    assert same_but_for_the_folder(cfg, OmegaConf.load(folder / str(best) / ".hydra" / "config.yaml"))
    assert train(cfg) == study.best_value
    sha = lambda f: json.loads((f / "summary.json").read_text())["student"]["sha256"]  # noqa: E731
    assert sha(tmp_path / "rerun") == sha(folder / str(best))


def test_a_sweep_of_detectors_follows_the_mean_average_precision(tmp_path):
    """The metric and its direction are the task's own."""
    options = [
        *("data=digit_scenes", "task=detection", "net@student=fcos_slim", "method=supervised", "teacher=null"),
        *("student.width=4", "student.fpn=32", "student.convs=1", "data.count=40", "data.val_size=8", "trainer=cpu"),
        *("data.batch_size=16", "trainer.max_epochs=1", "optimizer=adamw", "sweep=grid", f"runs={tmp_path}"),
    ]
    study = start(tmp_path / "sweep", *options, space={"optimizer.lr": [1e-9, 0.02]})
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 2
    assert study.directions[0].name == "MAXIMIZE"
    for n, trial in enumerate(study.trials):
        found = json.loads((tmp_path / "sweep" / str(n) / "summary.json").read_text())
        assert found["metric"] == {"name": "map", "direction": "max"}
        best = max(e.value for e in tensorboard(tmp_path / "sweep" / str(n)).Scalars("map/validation"))
        assert trial.value == pytest.approx(best)
    assert "Objective: val/map (maximize)." in (tmp_path / "sweep" / "sweep.md").read_text()
    assert OmegaConf.load(tmp_path / "sweep" / "best.yaml").optimizer.lr in (1e-9, 0.02)
