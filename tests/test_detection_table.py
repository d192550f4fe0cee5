"""The pure parts of scripts/detection_table.py: which cells it has, what it writes, and that it keeps the rest of the page."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from hydra.utils import instantiate
from omegaconf import DictConfig

from litdistill.benchmarks.compare import config_of
from litdistill.config.recipes import teacher_folder
from litdistill.methods.base import BOXES
from litdistill.utils.errors import UserError
from litdistill.utils.paths import CONF
from tests.conftest import compose_config


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("detection_table", CONF.parent / "scripts" / "detection_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config(script: ModuleType, name: str, seed: int, runs: Path) -> DictConfig:
    return config_of(script.job(name, seed, str(runs)))


def test_every_row_is_a_method_of_detectors_and_every_file_of_them_has_one(script, tmp_path):
    for name, row in script.ROWS.items():
        cfg = config(script, name, 1, tmp_path)
        assert BOXES in instantiate(cfg.method, _convert_="all").kinds
        assert cfg.seed == 1
        assert (row.control is None) == (row.method == "supervised")
        assert row.control is None or script.ROWS[row.control].control is None
        if "pyramid" in row.reads and "student_taps" in cfg.method:
            assert cfg.method.student_taps == cfg.method.teacher_taps == "pyramid"
    of_boxes = {p.stem for p in (CONF / "method").glob("*.yaml") if "litdistill.tasks.detection" in p.read_text()}
    assert of_boxes <= {row.method for row in script.ROWS.values()}


def test_a_method_has_the_network_and_the_options_of_its_control(script, tmp_path):
    for name, row in script.ROWS.items():
        cfg = config(script, name, 0, tmp_path)
        assert (cfg.data.labels, cfg.data.epoch_size) == (250, 1000)
        assert cfg.data.only_labelled == (script.ALONE in row.options)
        if name.endswith((" of all", " as published")):
            assert not cfg.data.only_labelled
        if row.control is not None:
            control = config(script, row.control, 0, tmp_path)
            assert [cfg[k] for k in ("student", "optimizer", "trainer")] == [
                control[k] for k in ("student", "optimizer", "trainer")
            ]
            assert teacher_folder(cfg) == teacher_folder(control)


def test_the_rows_have_the_options_of_make_detect(script, tmp_path):
    row = config(script, "pkd_dense_kd", 0, tmp_path)
    made = compose_config(tmp_path, "experiment=detection/digit_scenes", "method=pkd_dense_kd")
    for key in ("student", "method", "optimizer", "scheduler"):
        assert row[key] == made[key]
    assert row.trainer.max_epochs == made.trainer.max_epochs
    made.trainer.precision = row.trainer.precision
    assert teacher_folder(row).name == teacher_folder(made).name


def test_another_seed_or_option_is_another_folder(script, tmp_path, monkeypatch):
    first = config(script, "mgd", 0, tmp_path).folder
    assert first == config(script, "mgd", 0, tmp_path).folder
    assert first != config(script, "mgd", 1, tmp_path).folder
    monkeypatch.setitem(script.ROWS, "mgd", script.Row("mgd", "pyramid", ("method.hint=3",)))
    assert first != config(script, "mgd", 0, tmp_path).folder


def test_what_is_missing_is_trained_and_first_beside_each_teacher(script, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(script, "run_all", lambda todo, at_once: done.extend([at_once, *todo]))
    cells = [("supervised", 0), ("pkd", 0), ("fgd", 0), ("supervised", 1), ("ld", 1)]
    todo = {(one := script.job(*cell, str(tmp_path))): config_of(one) for cell in cells}
    write(todo[script.job("supervised", 0, str(tmp_path))].folder, 0.3)
    script.train_missing(todo, 16)
    assert done[0] == 16
    assert {(c.technique, c.seed) for c in done[1:3]} == {("pkd", 0), ("ld", 1)}
    assert [(c.technique, c.seed) for c in done[3:]] == [("fgd", 0), ("supervised", 1)]
    done.clear()
    for cfg in list(todo.values())[1:]:
        write(cfg.folder, 0.3)
    script.train_missing(todo, 16)
    assert not done


def write(folder: str, value: float, train: int = 1000) -> None:
    found = {
        "student": {"params": 5, "test": {"map": {"last": value, "best": 0.9}}},
        "teacher": {"params": 1234, "test": {"map": 0.8}},
        "data": {"train": train, "test": 500},
        "steps": 378,
        "versions": {"torch": "9.9", "lightning": None},
    }
    Path(folder).mkdir(parents=True)
    (Path(folder) / "summary.json").write_text(json.dumps(found))


def test_a_table_of_what_is_there_replaces_its_section_alone(script, tmp_path, monkeypatch):
    page = tmp_path / "methods.md"
    page.write_text("# Methods\n\n| a | table |\n\n## Detectors\n\nold\n")
    for seed, value in enumerate((0.3, 0.4)):
        write(config(script, "supervised", seed, tmp_path).folder, value, 250)
        write(config(script, "pkd", seed, tmp_path).folder, value + 0.1)
        write(config(script, script.CONTROL_OF_SIDES, seed, tmp_path).folder, value + 0.2, 250)
    write(config(script, "ld", 1, tmp_path).folder, 0.5)
    monkeypatch.setattr("sys.argv", ["x", f"out={page}", f"runs={tmp_path}", "seeds=3", "only=true"])
    script.main()
    text = page.read_text()
    assert text.startswith("# Methods\n\n| a | table |\n\n## Detectors\n\nWritten by")
    assert text.count("## Detectors") == 1
    assert "\nold\n" not in text
    assert "80.00 % mAP on the 500 scenes" in text
    assert "378 steps on\n1,000 scenes" in text
    assert "Made with torch 9.9." in text
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(lines) == 4
    assert lines[0].endswith("| 2 | 35.00 ± 7.07 | control |")
    assert lines[1].endswith("| 2 | 45.00 ± 7.07 | +10.00 ± 0.00 |")
    assert lines[2].endswith("| 2 | 55.00 ± 7.07 | control |")
    assert lines[3].endswith("| 1 | 50.00 | −10.00 |")  # of the control with the same head and seed
    script.main()
    assert page.read_text() == text


def test_nothing_there_and_unknown_options_are_refused(script, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", f"runs={tmp_path}", "seeds=1", "only=true"])
    with pytest.raises(UserError, match="no finished run"):
        script.main()
    monkeypatch.setattr("sys.argv", ["x", "seed=1"])
    with pytest.raises(UserError, match="seeds=5"):
        script.main()
