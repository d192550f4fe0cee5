"""The pure parts of scripts/detection_table.py: which cells it has, what it writes, and that it keeps the rest of the page."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from hydra.utils import instantiate

from litdistill.methods.base import BOXES
from litdistill.utils.errors import UserError
from litdistill.utils.paths import CONF


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("detection_table", CONF.parent / "scripts" / "detection_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def there(script: ModuleType) -> list[str]:
    return [name for name in script.METHODS if (CONF / "method" / f"{name}.yaml").is_file()]


def test_every_row_is_a_method_of_detectors_and_every_file_of_them_has_one(script, tmp_path):
    for name in there(script):
        cfg = script.config(name, 1, str(tmp_path))
        assert BOXES in instantiate(cfg.method, _convert_="all").kinds
        assert cfg.seed == 1
        if script.METHODS[name][0] and name != script.CONTROL:
            assert cfg.method.student_taps == cfg.method.teacher_taps == "pyramid"
    of_boxes = {p.stem for p in (CONF / "method").glob("*.yaml") if "litdistill.tasks.detection" in p.read_text()}
    assert of_boxes <= set(script.METHODS)


def test_the_control_has_the_labelled_scenes_alone_and_all_have_one_teacher(script, tmp_path):
    control, other = (script.config(name, 0, str(tmp_path)) for name in ("supervised", "pkd"))
    assert (control.data.labels, control.data.only_labelled, control.data.epoch_size) == (250, True, 1000)
    assert (other.data.labels, other.data.only_labelled, other.data.epoch_size) == (250, False, 1000)
    from litdistill.config.recipes import teacher_folder

    assert teacher_folder(control) == teacher_folder(other)


def test_another_seed_or_option_is_another_folder(script, tmp_path, monkeypatch):
    first = script.config("mgd", 0, str(tmp_path)).folder
    assert first == script.config("mgd", 0, str(tmp_path)).folder
    assert first != script.config("mgd", 1, str(tmp_path)).folder
    monkeypatch.setitem(script.METHODS, "mgd", (["method.hint=3"], "pyramid"))
    assert first != script.config("mgd", 0, str(tmp_path)).folder


def test_a_gain_is_of_the_seeds_that_both_have(script):
    assert script.gain({0: 50.0, 1: 60.0, 2: 0.0}, {0: 40.0, 1: 50.0}) == "+10.00 ± 0.00"
    rows = script.rows({"supervised": {0: 40.0, 1: 50.0}, "pkd": {0: 41.0}, "cwd": {}})
    assert [row[0] for row in rows] == ["`supervised`", "`pkd`"]
    assert next(row[-1] for row in rows) == "control"
    assert rows[1][3:5] == ["1", "41.00"]


def write(folder: str, value: float) -> None:
    found = {
        "student": {"params": 5, "test": {"map": {"last": value, "best": 0.9}}},
        "teacher": {"params": 1234, "test": {"map": 0.8}},
        "data": {"train": 1000, "test": 500},
        "steps": 378,
    }
    Path(folder).mkdir(parents=True)
    (Path(folder) / "summary.json").write_text(json.dumps(found))


def test_a_table_of_what_is_there_replaces_its_section_alone(script, tmp_path, monkeypatch, capsys):
    page = tmp_path / "methods.md"
    page.write_text("# Methods\n\n| a | table |\n\n## Detectors\n\nold\n")
    for seed, value in enumerate((0.3, 0.4)):
        write(script.config("supervised", seed, str(tmp_path)).folder, value)
        write(script.config("pkd", seed, str(tmp_path)).folder, value + 0.1)
    monkeypatch.setattr("sys.argv", ["x", f"out={page}", f"runs={tmp_path}", "seeds=3", "only=true"])
    script.main()
    text = page.read_text()
    assert text.startswith("# Methods\n\n| a | table |\n\n## Detectors\n\nWritten by")
    assert text.count("## Detectors") == 1
    assert "old" not in text
    assert "80.00 % mAP on the 500 scenes" in text
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(lines) == 2
    assert lines[0].endswith("| 2 | 35.00 ± 7.07 | control |")
    assert lines[1].endswith("| 2 | 45.00 ± 7.07 | +10.00 ± 0.00 |")
    script.main()
    assert page.read_text() == text


def test_nothing_there_and_unknown_options_are_refused(script, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", f"runs={tmp_path}", "seeds=1", "only=true"])
    with pytest.raises(UserError, match="no finished run"):
        script.main()
    monkeypatch.setattr("sys.argv", ["x", "seed=1"])
    with pytest.raises(UserError, match="seeds=5"):
        script.main()
