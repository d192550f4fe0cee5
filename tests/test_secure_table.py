"""scripts/secure_table.py: cells that are what they say, tables by hand, and one short run of each part."""

import importlib.util
import json
from types import ModuleType

import pytest
from omegaconf import OmegaConf

from litdistill.evaluation.attacks import fgsm
from litdistill.utils.errors import UserError
from litdistill.utils.paths import CONF

ROOT = CONF.parent


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("secure_table", ROOT / "scripts" / "secure_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_part_stands_between_its_marks_and_the_rest_is_kept(script):
    before = "# A\n\n<!-- robust -->\nold\n<!-- end robust -->\n\nB\n"
    assert script.insert(before, "robust", "new") == "# A\n\n<!-- robust -->\n\nnew\n\n<!-- end robust -->\n\nB\n"
    with pytest.raises(UserError, match="needs <!-- robust -->"):
        script.insert("# A", "robust", "new")
    document = (ROOT / "docs" / "security.md").read_text()
    for name in script.PARTS:
        script.insert(document, name, "")


def test_students_differ_in_what_their_names_say_and_share_one_robust_teacher(script):
    cells = {name: script.cell(overrides, 1, "runs") for name, overrides in script.STUDENTS.items()}
    attacked = {name for name, cfg in cells.items() if cfg.adversarial}
    assert attacked == {"labels, adversarial", "`kd`, adversarial", "`ard`", "`rslad`"}
    for cfg in cells.values():
        assert cfg.teacher.recipe.adversarial == {"eps": script.EPS, "step": None, "steps": 10}
        assert cfg.trainer.check_val_every_n_epoch == cfg.trainer.max_epochs  # no epoch is chosen
        assert not cfg.adversarial or cfg.adversarial.eps == script.EPS
    assert len({cfg.folder for cfg in cells.values()}) == len(cells)


@pytest.mark.parametrize("part", ["robust", "defensive"])
def test_a_short_run_of_a_part_fills_its_table_and_is_not_repeated(script, part, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "ATTACKS", {"FGSM": fgsm})
    monkeypatch.setattr(script, "defense", lambda temperature: {"FGSM": fgsm})
    monkeypatch.setattr(script, "TEMPERATURES", {"labels alone": 1.0, "distilled": 2.0})
    monkeypatch.setattr(script, "EPOCHS", {"digits": 1})
    short = ["trainer.max_epochs=1", "trainer.check_val_every_n_epoch=1", "data.epoch_size=128", "adversarial.steps=1",
             "++teacher.recipe.data.epoch_size=256", "teacher.allow_chance=true"]  # fmt: skip
    monkeypatch.setattr(script, "STUDENTS", {"`rslad`": short, "`ard`": ["method=ard", *short]})
    choices = OmegaConf.create({**script.DEFAULTS, "seeds": 1, "jobs": 1, "runs": str(tmp_path)})
    text = script.PARTS[part](choices)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == (4 if part == "robust" else 3)
    for file in tmp_path.rglob("*robust.json"):
        assert all(0 <= value <= 1 for value in json.loads(file.read_text()).values())
    monkeypatch.setattr(script, "train", None)  # would fail
    monkeypatch.setattr(script, "distill", None)
    assert script.PARTS[part](choices) == text
