"""What could lose a training at its end, or choose the wrong epoch, is known before a step is taken, or is a warning."""

import importlib.metadata
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from litdistill.config.build import build_data
from litdistill.config.recipes import is_complete, teacher_config
from litdistill.data.datamodule import ImageData
from litdistill.evaluation.evaluate import draw
from litdistill.tasks import Classification, Regression
from litdistill.training import finish
from litdistill.training import train as train_module
from litdistill.training.monitors import monitored
from litdistill.training.preflight import with_min_steps
from litdistill.training.train import train
from litdistill.training.trainer import named_callbacks
from litdistill.utils.errors import Stopped, UserError
from litdistill.utils.files import write_text
from tests.conftest import compose_config

ALONE = ("method=supervised", "teacher=null", "logger=none")


@pytest.fixture
def untrained(small, monkeypatch, tmp_path):
    """`untrained(*overrides)`: what a run says that may not reach its first step, nor train a teacher."""

    def refused(*overrides: str) -> str:
        monkeypatch.setattr(train_module, "fit", lambda *_: pytest.fail("it is trained"))
        cfg = small(*overrides)
        cfg.runs = str(tmp_path / "new")
        with pytest.raises(UserError) as error:
            train(cfg)
        assert not (tmp_path / "new" / "teachers").exists() or not list(
            (tmp_path / "new").glob("teachers/*/summary.json")
        )
        return str(error.value)

    return refused


# -- what chooses the epoch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("monitor", "mode", "expected"),
    [
        (None, None, ("val/accuracy", "max")),
        ("val/nll", None, ("val/nll", "min")),
        ("val/kl", None, ("val/kl", "min")),
        ("train/loss", None, ("train/loss", "min")),
        ("val/agreement", None, ("val/agreement", "max")),
        ("val/mine", "min", ("val/mine", "min")),
        *((f"val/{name}", None, (f"val/{name}", "min")) for name in ("brier", "ece", "rmse", "mae", "deviation")),
        *((f"val/{name}", None, (f"val/{name}", "max")) for name in ("map", "f1", "r2", "teacher_accuracy")),
        ("train/accuracy", None, ("train/accuracy", "max")),
        ("train/soft", None, ("train/soft", "min")),
    ],
)
def test_the_direction_is_the_metrics_own(monitor, mode, expected):
    assert monitored(OmegaConf.create({"monitor": monitor, "mode": mode}), Classification()) == expected


def test_without_a_word_the_task_chooses():
    node = OmegaConf.create({"monitor": None, "mode": None})
    assert monitored(node, Regression([0.0], [1.0])) == ("val/rmse", "min")


@pytest.mark.parametrize(
    ("monitor", "mode"), [("val/nll", "max"), ("val/ece", "max"), ("val/accuracy", "min"), ("val/agreement", "min")]
)
def test_a_mode_that_would_keep_the_worst_epoch_is_refused(untrained, monitor, mode):
    text = untrained(f"callbacks.best.monitor={monitor}", f"callbacks.best.mode={mode}")
    assert text.startswith(f"callbacks.best.monitor={monitor} with mode={mode} would keep the worst epoch")


def test_a_metric_that_is_not_measured_is_known_before_a_teacher_is_trained(untrained):
    text = untrained("callbacks.best.monitor=val/acc", "callbacks.best.mode=max")
    assert text.startswith("callbacks.best.monitor=val/acc is not measured here. There is val/accuracy, val/agreement")
    assert "val/teacher_accuracy" in text
    text = untrained(*ALONE, "callbacks.best.monitor=val/agreement")  # with nobody to agree
    assert text.endswith("There is val/accuracy, val/brier, val/ece, val/nll.")


STOP = "+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: %s}"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["callbacks.best.monitor=train/lss"],
            "callbacks.best.monitor=train/lss is not measured here. There is train/accuracy",
        ),
        ([*ALONE, "callbacks.best.monitor=train/soft"], "callbacks.best.monitor=train/soft is not measured here"),
        (
            ["callbacks.best.monitor=train/loss", "callbacks.best.mode=max"],
            "callbacks.best.monitor=train/loss with mode=max",
        ),
        ([STOP % "val/acc"], "callbacks.stop.monitor=val/acc is not measured here. There is val/accuracy"),
        ([STOP % "val/accuracy", "+callbacks.stop.mode=min"], "callbacks.stop.monitor=val/accuracy with mode=min"),
    ],
)
def test_a_monitor_in_training_and_of_any_callback_is_checked_too(small, monkeypatch, options, words):
    monkeypatch.setattr(
        train_module, "fit", lambda cfg, *_: pytest.fail("it is trained") if cfg.name == "train" else 0.0
    )
    cfg = small(*options)
    if "train/lss" in words or "val/acc " in words:
        monkeypatch.undo()  # the teacher, which may be trained first, is trained
    with pytest.raises(UserError) as error:
        train(cfg)
    assert str(error.value).startswith(words)


def test_a_callback_follows_its_metric(small):
    """EarlyStopping's own mode is min, with which it would stop where the accuracy rises."""
    cfg = small(*ALONE, STOP % "val/accuracy")
    _, named = named_callbacks(cfg, Classification())
    assert named["stop"].mode == "max"
    _, named = named_callbacks(small(*ALONE, STOP % "val/nll", "+callbacks.stop.mode=null"), Classification())
    assert named["stop"].mode == "min"


def test_a_teachers_epoch_is_chosen_by_its_tasks_metric(small):
    cfg = small("callbacks.best.monitor=val/agreement")  # a teacher has nobody to agree with
    train(cfg)
    assert teacher_config(cfg).callbacks.best.monitor is None
    assert (Path(cfg.folder) / "summary.json").is_file()


def test_a_metric_that_nobody_logs_is_one_line(small):
    with pytest.raises(UserError, match="mine/x"):
        train(small(*ALONE, "callbacks.best.monitor=mine/x", "callbacks.best.mode=max"))


# -- what the end of a run needs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("technique=[a,b]", "technique=[a,b]: text, a number or null."),
        ("seed=1.5", "seed=1.5: a whole number from 0 to 2³² − 1. Did you mean 2?"),
        ("~callbacks.best", "callbacks.best is missing"),
        ("callbacks.last=null", "callbacks.last is missing"),
        ("callbacks.last.dirpath=elsewhere", "callbacks.last must keep one checkpoint"),
        ("callbacks.best.filename=mybest", "callbacks.best must keep one checkpoint"),
        ("+callbacks.best.save_top_k=3", "callbacks.best must keep one checkpoint"),
        ("trainer.check_val_every_n_epoch=5", "No epoch would be validated"),
        ("+trainer.max_steps=3", "trainer.max_steps=3 would end the run before its first validation, after 4 steps"),
    ],
)
def test_what_would_fail_at_the_last_line_is_refused_before_the_first_step(untrained, override, words):
    assert untrained(override).startswith(words)


def test_a_run_from_sources_without_metadata_ends_with_its_summary(small, monkeypatch):
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    cfg = small(*ALONE, "trainer.max_epochs=1")
    train(cfg)
    found = json.loads((Path(cfg.folder) / "summary.json").read_text())["versions"]
    assert found["litdistill"] is None
    assert found["python"]


@pytest.mark.usefixtures("drawn")
def test_a_class_whose_name_no_picture_takes_costs_the_picture_alone(tmp_path, caplog):
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("plain", r"a$b_{\frac$"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(8):
                Image.fromarray(draw.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
    cfg = compose_config(
        tmp_path / "run",
        *(
            "data=folder",
            f"data.root={tmp_path / 'images'}",
            "data.image_size=8",
            "data.batch_size=8",
            "data.val_size=4",
        ),
        *("method=supervised", "teacher=null", "student.widths=[4]", "trainer=cpu", "trainer.max_epochs=1"),
    )
    train(cfg)
    assert (tmp_path / "run" / "summary.json").is_file()
    assert "left out" not in caplog.text  # and it is drawn as it is


@pytest.mark.parametrize("name", ["a\nb", "x" * 201, "\x1b[2J"])
def test_a_class_whose_name_no_export_may_hold_is_known_before_training(small, monkeypatch, name):
    monkeypatch.setattr(train_module, "fit", lambda *_: pytest.fail("it is trained"))
    monkeypatch.setattr(ImageData, "class_names", property(lambda self: (name, *map(str, range(9)))))
    with pytest.raises(UserError, match="cannot be exported: its name is longer than 200 characters or has one that"):
        train(small(*ALONE))


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("place", ["show", "experiment"])
def test_a_picture_that_fails_is_a_warning_with_the_command_that_draws_it(small, monkeypatch, caplog, place):
    def fail(*_):
        raise ValueError("no room for a legend")

    monkeypatch.setattr(finish.figures, {"show": "show", "experiment": "layout"}[place], fail)
    cfg = small("method=supervised", "teacher=null", "trainer.max_epochs=1")
    folder = Path(cfg.folder)
    write_text(folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
    train(cfg)
    assert "The pictures in TensorBoard are left out: ValueError: no room for a legend" in caplog.text
    assert "litdistill evaluate run=" in caplog.text
    assert (folder / "summary.json").is_file()
    monkeypatch.undo()
    before = set(folder.glob("events.*"))
    draw(folder)
    (new,) = set(folder.glob("events.*")) - before
    assert b"validation/confusion" in new.read_bytes()


def test_the_summary_is_there_before_the_first_picture(small, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(finish.figures, "show", killed)
    cfg = small("method=supervised", "teacher=null", "trainer.max_epochs=1")
    with pytest.raises(Stopped):
        train(cfg)
    assert is_complete(Path(cfg.folder))


# -- ways to start ---------------------------------------------------------------------------------------------------------


def test_the_module_that_trains_says_how_training_is_started(capsys):
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("litdistill.training.train", run_name="__main__")
    assert ended.value.code == 2
    assert "litdistill train" in capsys.readouterr().err


def test_a_run_of_so_many_steps_knows_its_epochs(small, caplog):
    caplog.set_level("INFO")
    cfg = small(*ALONE, "trainer.max_epochs=-1", "+trainer.max_steps=8")
    train(cfg)
    assert json.loads((Path(cfg.folder) / "summary.json").read_text())["steps"] == 8
    assert "epoch 2/2" in caplog.text
    assert "-1" not in " ".join(r.getMessage() for r in caplog.records if r.name.endswith("callbacks"))


def test_gradients_are_accumulated_by_lightnings_callback(small):
    """It needs automatic optimization, which the run then has of itself."""
    accumulate = (
        "+callbacks.more={_target_: lightning.pytorch.callbacks.GradientAccumulationScheduler, scheduling: {0: 2}}"
    )
    cfg = small(*ALONE, accumulate, "trainer.max_epochs=1")
    train(cfg)
    assert json.loads((Path(cfg.folder) / "summary.json").read_text())["steps"] == 2  # of four minibatches


@pytest.mark.parametrize(("lr", "learned"), [("1e-12", False), ("0.05", True)])
def test_a_student_at_chance_level_is_warned_of(small, caplog, lr, learned):
    cfg = small(*ALONE, f"optimizer.lr={lr}", "trainer.max_epochs=4")
    train(cfg)
    assert ("The student is at chance level" in caplog.text) is not learned


# -- few samples have more epochs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "epochs"),
    [
        (["min_steps=null"], 2),
        (["min_steps=8"], 2),  # 120 samples in batches of 32 are 4 steps an epoch
        (["min_steps=9"], 3),
        (["min_steps=50"], 13),
        (["min_steps=50", "+trainer.accumulate_grad_batches=2"], 25),
        (["min_steps=50", "data.epoch_size=320"], 5),
        (["min_steps=50", "+trainer.max_steps=6"], 2),
        (["min_steps=50", "trainer.limit_train_batches=1"], 2),
        (["min_steps=50", "trainer.max_epochs=0"], 0),
    ],
)
def test_min_steps_raises_the_epochs_and_never_lowers_them(small, caplog, overrides, epochs):
    caplog.set_level("INFO")
    cfg = small(*ALONE, *overrides)
    data, _ = build_data(cfg)
    before = cfg.copy()
    found = with_min_steps(cfg, data).trainer.max_epochs
    assert found == epochs
    assert cfg == before  # by which teachers and caches are found again
    assert caplog.text.count("min_steps") == (found > cfg.trainer.max_epochs)


def test_a_run_has_at_least_min_steps(small, caplog):
    caplog.set_level("INFO")
    cfg = small(*ALONE, "min_steps=10", "scheduler=warmup_cosine")
    train(cfg)
    summary = json.loads((Path(cfg.folder) / "summary.json").read_text())
    assert summary["epochs"] == 3
    assert (
        "3 epochs instead of trainer.max_epochs=2: an epoch of 120 samples has 4 steps, and min_steps=10" in caplog.text
    )
    with pytest.raises(UserError, match="min_steps=0"):
        train(small(*ALONE, "min_steps=0", name="none"))
