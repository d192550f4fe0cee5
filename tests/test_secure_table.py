"""scripts/secure_table.py: cells that are what they say, tables by hand, and one short run of each part."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import nn

from litdistill.benchmarks.compare import config_of
from litdistill.benchmarks.tables import between_marks
from litdistill.config.recipes import teacher_folder
from litdistill.evaluation.attacks import cross_entropy, fgsm
from litdistill.evaluation.evaluate import rebuild
from litdistill.report.security import SECTIONS, TEACHER, trained_attacks
from litdistill.types import Batch, Outputs
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


def chosen(script: ModuleType, **own) -> DictConfig:
    return OmegaConf.create({**script.DEFAULTS, **own})


def test_parts_have_sections_and_marks_in_the_document(script):
    assert list(script.PARTS) == list(SECTIONS)
    document = (ROOT / "docs" / "security.md").read_text()
    for name in script.PARTS:
        assert "new" in between_marks(document, name, "new")


def test_students_differ_in_what_their_names_say_and_share_one_robust_teacher(script):
    cells = {name: config_of(script.job(name, 1, chosen(script))) for name in script.STUDENTS}
    attacked = {name for name, cfg in cells.items() if cfg.adversarial}
    assert attacked == {"labels, adversarial", "kd, adversarial", "ard", "rslad"}
    for cfg in cells.values():
        assert cfg.teacher.recipe.adversarial == {"eps": script.EPS, "step": None, "steps": 10}
        assert cfg.trainer.check_val_every_n_epoch == cfg.trainer.max_epochs  # no epoch is chosen
        assert not cfg.adversarial or cfg.adversarial.eps == script.EPS
    assert len({cfg.folder for cfg in cells.values()}) == len(cells)
    assert (
        len({teacher_folder(cfg) for cfg in cells.values() if cfg.method._target_ != "litdistill.methods.Supervised"})
        == 1
    )


SHORT = ("trainer.max_epochs=1", "trainer.check_val_every_n_epoch=1", "data.epoch_size=128", "adversarial.steps=1",
         "++teacher.recipe.data.epoch_size=256", "teacher.allow_chance=true")  # fmt: skip


def shorten(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "ATTACKS", {"FGSM": fgsm})
    monkeypatch.setattr(script, "defense", lambda temperature: {"FGSM": fgsm})
    monkeypatch.setattr(script, "TEMPERATURES", {"labels alone": 1.0, "distilled": 2.0})
    monkeypatch.setattr(script, "EPOCHS", {"digits": 1})
    monkeypatch.setattr(script, "STUDENTS", {"labels alone": ("method=rslad", *SHORT)})


def test_short_runs_of_both_tables_fill_the_document_and_are_not_repeated(script, tmp_path, monkeypatch):
    shorten(script, monkeypatch)
    out, keep, picture = (tmp_path / f"security.{end}" for end in ("md", "json", "png"))
    out.write_text(
        "# A\n\n<!-- robust -->\n<!-- end robust -->\n\n<!-- defensive -->\nold\n<!-- end defensive -->\n\nB\n"
    )
    own = [f"out={out}", f"keep={keep}", f"picture={picture}", f"runs={tmp_path / 'runs'}", "seeds=1", "jobs=1"]
    monkeypatch.setattr("sys.argv", ["x", *own, "parts=[robust,defensive]"])
    seen, measure = [], script.evaluated
    monkeypatch.setattr(script, "evaluated", lambda net, *about: seen.append(net) or measure(net, *about))
    script.main()
    text, found = out.read_text(), json.loads(keep.read_text())
    names = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    assert names == [
        "| network",
        f"| {TEACHER}",
        "| labels alone",
        "| network",
        "| labels alone",
        "| distilled",
    ]
    assert "old" not in text
    assert text.endswith("<!-- end defensive -->\n\nB\n")
    assert "`python scripts/secure_table.py parts=[robust] seeds=1`" in text
    for part in ("robust", "defensive"):
        one = found[part]["digits"]
        assert one["seconds"] > 0
        assert all(0 <= value <= 1 for row in one["rows"].values() for values in row.values() for value in values)
    folder = Path(config_of(script.job("labels alone", 0, chosen(script, runs=str(tmp_path / "runs")))).folder)
    _, distiller = rebuild(folder)
    for net, other in zip(seen, (distiller.deployed_student, distiller.teacher.net), strict=False):
        assert all(
            torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True)
        )
    assert (
        json.loads((folder / "summary.json").read_text())["time"]["core_s"] < found["robust"]["digits"]["seconds"] + 1
    )
    assert Image.open(picture).size[0] > 600
    shown = trained_attacks([tmp_path / "runs"])
    assert [section.id for section in shown] == ["a0-digits-robust", "a0-digits-defensive"]
    for name in ("run", "distill", "evaluated"):
        monkeypatch.setattr(script, name, None)  # would fail
    script.main()
    assert out.read_text() == text
    monkeypatch.setattr("sys.argv", ["x", *own, "parts=[]"])
    monkeypatch.setattr(script, "measured", None)
    script.main()
    assert out.read_text() == text


def test_attacks_on_logits_over_t_and_training_at_t_are_what_they_say(script):
    logits, targets = torch.randn(5, 3, dtype=torch.double), torch.tensor([0, 1, 2, 1, 0])
    task, batch = script.AtTemperature(20.0), Batch(None, targets)
    expected = F.nll_loss((logits / 20).log_softmax(1), targets)
    torch.testing.assert_close(task.loss(nn.Identity(), Outputs.of(logits), batch)["hard"].double(), expected)
    images = torch.rand(4, 1, 2, 2)
    weight = torch.randn(4, 3)
    saturated = lambda x: 1e4 * x.flatten(1) @ weight  # noqa: E731
    labels = saturated(images).argmax(1)
    attacks = script.defense(1e4)
    assert torch.equal(attacks["FGSM"](saturated, images, labels, 0.1), images)  # no gradient is left
    found = attacks["FGSM, logits / T"](saturated, images, labels, 0.1)
    cooled = lambda x: x.flatten(1) @ weight  # noqa: E731
    assert torch.equal(found, fgsm(cooled, images, labels, 0.1, loss=cross_entropy))
    assert not torch.equal(found, images)


@pytest.mark.parametrize("wrong", ["seeds=0", "parts=[robust,none]", "dataset=iris", "seed=1"])
def test_options_that_are_none_are_refused(script, monkeypatch, wrong):
    monkeypatch.setattr("sys.argv", ["x", wrong])
    with pytest.raises(UserError, match="robust, defensive, membership, extraction"):
        script.main()
