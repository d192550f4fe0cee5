"""Loggers: TensorBoard, CSV, Weights & Biases offline, several at once and none; what all of them are told; what may fail."""

from __future__ import annotations

import csv
import json
import logging
import sys
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from litdistill.cli.suggestions import suggestions
from litdistill.training import loggers
from litdistill.training.loggers import build_loggers, has_wandb_key, wandb_finished, wandb_logger
from litdistill.training.train import train
from litdistill.utils.command_line import without_null
from litdistill.utils.errors import UserError
from litdistill.utils.tags import tag
from tests.composed import composed

ALONE = ["method=supervised", "teacher=null"]


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def column(found: list[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in found if row.get(name)]


@pytest.fixture(scope="module")
def both(teachers, tmp_path_factory):
    """A run with TensorBoard and CSV at once."""
    from tests.conftest import SMALL, compose_config

    folder = tmp_path_factory.mktemp("both") / "run"
    cfg = compose_config(folder, *SMALL, "logger=[tensorboard,csv]")
    cfg.runs = str(teachers)
    train(cfg)
    return folder


def test_two_loggers_have_the_same_curves(both):
    events = EventAccumulator(str(both), size_guidance={"scalars": 0}).Reload()
    found = rows(both / "csv" / "version_0")
    for name in ("train/loss", "val/accuracy", "val/agreement"):
        assert column(found, name) == pytest.approx([e.value for e in events.Scalars(tag(name))], rel=1e-6)
    assert len(column(found, "train/loss")) >= 4


def test_csv_has_the_hyperparameters_and_the_results_of_the_summary(both):
    summary = json.loads((both / "summary.json").read_text())
    (last,) = [row for row in rows(both / "csv" / "version_0") if row["test/accuracy"]]
    assert float(last["test/accuracy"]) == summary["student"]["test"]["accuracy"]["best"]
    assert float(last["test/accuracy_last"]) == summary["student"]["test"]["accuracy"]["last"]
    assert float(last["best/val_accuracy"]) == pytest.approx(summary["val"]["best"])
    assert float(last["student/params"]) == summary["student"]["params"]
    hyperparameters = (both / "csv" / "version_0" / "hparams.yaml").read_text()
    assert "method: kd" in hyperparameters
    assert "method/temperature: 4.0" in hyperparameters


def test_a_resumed_run_keeps_its_first_file_of_csv(small, both):
    cfg = small(*ALONE, "logger=csv")
    folder = Path(cfg.folder) / "csv" / "version_0"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("of the first start\n")
    train(cfg)
    assert (folder / "metrics.csv").read_text() == "of the first start\n"
    assert rows(folder.parent / "version_1")


@pytest.mark.parametrize(
    ("typed", "kinds"),
    [
        ("logger=tensorboard", ["TensorBoard"]),
        ("logger=csv", ["CSVLogger"]),
        ("logger=[tensorboard,csv]", ["TensorBoard", "CSVLogger"]),
        ("logger=none", []),
        ("logger=null", []),
        ("logger.tensorboard=null", []),
        (
            "+logger.mine={_target_: lightning.pytorch.loggers.CSVLogger, save_dir: x}",
            ["TensorBoard", "CSVLogger"],
        ),
    ],
)
def test_what_is_typed_is_what_logs(tmp_path, typed, kinds):
    cfg = composed("train", without_null([typed, f"folder={tmp_path}"]))
    assert [type(one).__name__ for one in build_loggers(cfg.logger)] == kinds


def test_a_typo_in_a_list_of_loggers_has_its_nearest_named():
    assert "logger=tensorbord: did you mean tensorboard" in suggestions(["logger=[csv,tensorbord]"], "train")


def test_a_package_that_is_missing_is_named(monkeypatch):
    node = {"mine": {"_target_": "lightning.pytorch.loggers.MLFlowLogger", "tracking_uri": "file:./x"}}
    for name in ("mlflow", "mlflow.tracking"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"logger\.mine needs a package that is not installed.*mlflow"):
        build_loggers(node)


def test_without_wandb_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'litdistill\[wandb\]'"):
        wandb_logger(str(tmp_path))


@pytest.mark.parametrize(
    ("environment", "netrc", "key"),
    [
        ({}, "", False),
        ({"WANDB_API_KEY": "x"}, "", True),
        ({"WANDB_API_KEY": "x", "WANDB_MODE": "offline"}, "", False),
        ({}, "machine api.wandb.ai\n  login user\n  password x\n", True),
        ({"WANDB_BASE_URL": "https://wandb.example.org"}, "machine api.wandb.ai\n  login user\n  password x\n", False),
    ],
)
def test_nothing_is_sent_without_a_key(monkeypatch, tmp_path, environment, netrc, key):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**environment, "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    if netrc:
        (tmp_path / ".netrc").write_text(netrc)
        (tmp_path / ".netrc").chmod(0o600)
    assert has_wandb_key() is key


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No key, and no folder of the user's own."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return wandb


@pytest.mark.process
@pytest.mark.usefixtures("drawn")
def test_a_student_and_its_teacher_are_two_runs_of_wandb(small, offline, tmp_path, monkeypatch, caplog):
    """Each in its own folder, with its curves, its results and its pictures; no run is left open for the next."""
    caplog.set_level(logging.INFO)
    seen: list[tuple[str, dict]] = []
    inner = offline.Run.log

    def log(self, data, *args, **kwargs):
        seen.append((self.name, dict(data)))
        return inner(self, data, *args, **kwargs)

    monkeypatch.setattr(offline.Run, "log", log)
    cfg = small("logger=wandb")
    cfg.runs = str(tmp_path / "own")
    train(cfg)
    assert offline.run is None
    teacher, student = dict.fromkeys(name for name, _ in seen)
    assert "teachers" in teacher
    for name, folder in ((teacher, next((tmp_path / "own" / "teachers").glob("conv4*"))), (student, Path(cfg.folder))):
        assert list(folder.glob("wandb/offline-run-*/*.wandb"))
        logged = {key for who, data in seen if who == name for key in data}
        assert {"train/loss", "val/accuracy", "test/accuracy", "best/val_accuracy"} <= logged
        assert any(key.startswith("validation/") for key in logged)
    assert "wandb sync" in caplog.text
    assert "left out" not in caplog.text


def test_a_run_of_ones_own_stays_open(offline, tmp_path):
    mine = offline.init(dir=tmp_path, mode="offline", settings=offline.Settings(silent=True))
    with wandb_finished():
        pass
    assert offline.run is mine
    mine.finish()
    with wandb_finished():
        offline.init(dir=tmp_path, mode="offline", settings=offline.Settings(silent=True))
    assert offline.run is None


@pytest.mark.parametrize("method", ["log_hyperparams", "finalize", "save"])
def test_no_logger_fails_a_run_after_its_fit(small, monkeypatch, caplog, method):
    ended = []
    original = getattr(CSVLogger, method)

    def fails(self, *args, **kwargs):
        if not ended:
            return original(self, *args, **kwargs)
        raise ConnectionError("no network")

    note = loggers.note_results
    monkeypatch.setattr("litdistill.training.finish.note_results", lambda *a: ended.append(True) or note(*a))
    monkeypatch.setattr(CSVLogger, method, fails)
    cfg = small(*ALONE, "logger=csv")
    train(cfg)
    assert (Path(cfg.folder) / "summary.json").is_file()
    assert "The results in CSVLogger are left out: ConnectionError: no network" in caplog.text


def test_pictures_go_where_they_can(tmp_path):
    assert loggers.picture_writer(CSVLogger(tmp_path)) is None
    assert hasattr(loggers.picture_writer(TensorBoardLogger(tmp_path)), "add_figure")
