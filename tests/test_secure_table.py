"""scripts/secure_table.py: cells that are what they say, tables by hand, and one short run of each part."""

import importlib.util
import json
import operator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import nn

from litdistill.benchmarks.compare import config_of
from litdistill.benchmarks.tables import between_marks
from litdistill.config.recipes import teacher_folder
from litdistill.evaluation.attacks import cross_entropy, fgsm, pgd, square
from litdistill.evaluation.evaluate import rebuild
from litdistill.methods import Supervised
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
    measured = [folder / "robust.json", *(tmp_path / "runs").glob("teacher-*.json")]
    seconds = [json.loads(path.read_text())["seconds"] for path in measured]
    seconds.append(json.loads((folder / "summary.json").read_text())["time"]["core_s"])
    assert len(seconds) == 3
    assert min(seconds) > 0
    assert found["robust"]["digits"]["seconds"] == pytest.approx(sum(seconds), abs=0.06)
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


def test_what_is_attacked_are_test_images_from_0_to_1_of_a_network_in_eval_mode(script, monkeypatch):
    monkeypatch.setattr(script, "IMAGES", 3)
    images, labels = torch.randint(0, 256, (5, 1, 2, 2), dtype=torch.uint8), torch.arange(5)
    data = SimpleNamespace(batches={"test": [Batch(images[:4], labels[:4]), Batch(images[4:], labels[4:])]}.get)
    net, seen = nn.Sequential(nn.Dropout(0.9), nn.Flatten(), nn.Linear(4, 5)), []
    attack = lambda f, x, y, eps: seen.append((f, x, y, eps)) or x  # noqa: E731
    found = script.evaluated(net, data, {"nothing": attack})
    ((f, x, y, eps),) = seen
    assert torch.equal(x, images[[0, 2, 4]] / 255)
    assert (y.tolist(), eps) == ([0, 2, 4], script.EPS)
    assert torch.equal(f(x), net[2](x.flatten(1)))  # nothing is dropped
    assert found["nothing"] == found["clean"] == (net(x).argmax(1) == y).double().mean().item()


def test_a_network_trained_at_t_teaches_another_at_t(script, tmp_path, monkeypatch):
    calls, seen = [], []

    def distill(student, teacher, **options):
        calls.append((student, teacher, options))
        return SimpleNamespace(deployed_student=student)

    monkeypatch.setattr(script, "distill", distill)
    monkeypatch.setattr(script, "defense", lambda temperature: {"temperature": temperature})
    monkeypatch.setattr(
        script, "evaluated", lambda net, data, attacks: seen.append((net, attacks)) or {"clean": len(seen)}
    )
    choices = {"runs": str(tmp_path), "dataset": "digits", "root": "data"}
    assert script.defended("distilled at T = 20", 1, choices)["clean"] == 1
    (first, nobody, alone), (second, teacher, taught) = calls
    assert nobody is None
    assert isinstance(alone["method"], Supervised)
    assert teacher is first
    assert [(name, getattr(taught["method"], name)) for name in ("hard", "soft", "temperature")] == [
        ("hard", 0.0),
        ("soft", 1.0),
        ("temperature", 20.0),
    ]
    for options in (alone, taught):
        assert (options["task"].temperature, options["max_epochs"]) == (20.0, script.EPOCHS["digits"])
    assert alone["out"] != taught["out"]
    assert not torch.equal(*(torch.cat([p.flatten() for p in net.parameters()]) for net in (first, second)))
    assert seen[0] == (second, {"temperature": 20.0})
    assert first(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    assert script.defended("labels alone", 1, choices)["clean"] == 2  # each is a cell of its own
    assert script.defended("labels alone", 2, choices)["clean"] == 3
    ((plain, _, options), (other, *_)) = calls[2:]
    assert options["task"].temperature == 1.0
    assert seen[1] == (plain, {"temperature": 1.0})
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), first.parameters(), strict=True))
    assert not torch.equal(*(torch.cat([p.flatten() for p in net.parameters()]) for net in (plain, other)))
    assert script.defended("labels alone", 2, choices)["clean"] == 3  # kept


def test_each_cell_is_one_student_and_one_seed(script, tmp_path, monkeypatch):
    choices = chosen(script, runs=str(tmp_path), seeds=2, jobs=1)
    first = Path(config_of(script.job("labels alone", 0, choices)).folder)
    first.mkdir(parents=True)
    about = {"data": {"test": 300}, "epochs": 30, "student": {"params": 1}, "teacher": {"params": 2}}
    (first / "summary.json").write_text(json.dumps(about))
    place = {f"robust-{'-'.join(name.replace(',', '').split())}": i for i, name in enumerate(script.STUDENTS)}

    def score(one):
        (seed,) = [int(said.removeprefix("seed=")) for said in one.overrides if said.startswith("seed=")]
        return {"clean": place[one.technique] + seed / 10, "seconds": 2.0}

    monkeypatch.setattr(script, "robust_student", lambda one: (score(one), {"clean": 0.5, "seconds": 5.0}))
    found = script.robust(choices)
    expected = {name: {"clean": [i, i + 0.1]} for i, name in enumerate(script.STUDENTS)}
    assert found["rows"] == {TEACHER: {"clean": [0.5]}, **expected}
    assert (found["seconds"], found["images"], found["params"]) == (2.0 * 12 + 5, 300, [1, 2])


def test_the_command_of_a_part_names_what_is_not_the_default(script, monkeypatch):
    monkeypatch.setattr(script, "PARTS", {"robust": lambda choices: {}})
    said = [
        script.measured("robust", chosen(script, **own))["command"] for own in ({}, {"seeds": 1, "dataset": "mnist"})
    ]
    assert said[0] == "python scripts/secure_table.py parts=[robust]"
    assert said[1] == "python scripts/secure_table.py parts=[robust] dataset=mnist seeds=1"


def test_what_is_kept_of_another_data_set_stays_and_stands_below(script, tmp_path, monkeypatch):
    def record(name):
        rows = {"labels alone": {"clean": [0.9], "worst": [0.1]}}
        about = {"dataset": name, "command": "c", "versions": {}, "seconds": 1, "eps": 0.1, "images": 5, "epochs": 1}
        return {**about, "rows": rows}

    out, keep, picture = (tmp_path / f"security.{end}" for end in ("md", "json", "png"))
    keep.write_text(json.dumps({"defensive": {"mnist": record("mnist")}}))
    out.write_text("<!-- defensive -->\n<!-- end defensive -->\n")
    monkeypatch.setattr(script, "measured", lambda part, choices: record(choices.dataset))
    own = [f"out={out}", f"keep={keep}", f"picture={picture}", f"runs={tmp_path / 'runs'}", "parts=[defensive]"]
    monkeypatch.setattr("sys.argv", ["x", *own])
    script.main()
    assert json.loads(keep.read_text()) == {"defensive": {name: record(name) for name in ("digits", "mnist")}}
    text = out.read_text()
    assert 0 < text.index("5 images of digits") < text.index("5 images of mnist")
    assert (tmp_path / "runs" / script.FILE).read_text() == keep.read_text()
    width, height = Image.open(picture).size
    assert height > width  # a panel each, one below the other


def test_attacks_that_train_models_get_the_options(script):
    options = chosen(script, dataset="mnist", root="there", seeds=2, shadows=4, jobs=1, runs="r")
    given = script.by_training(lambda choices: choices)(options)
    assert (given.dataset, given.seeds, given.shadows, given.jobs, given.runs) == ("mnist", 2, 4, 1, "r")
    assert given.overrides == ("data.root=there",)


@pytest.mark.process
@pytest.mark.parametrize("jobs", [1, 2])
def test_cells_are_computed_in_order(script, jobs):
    assert script.together(operator.neg, [(i,) for i in range(5)], jobs) == [0, -1, -2, -3, -4]


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
    started = pgd(saturated, images, labels, 0.1, loss=cross_entropy)
    assert torch.equal(attacks["PGD"](saturated, images, labels, 0.1), started)
    assert not torch.equal(started, pgd(saturated, images, labels, 0.1))  # for it stays at its random start
    found = attacks["PGD, logits / T"](saturated, images, labels, 0.1)
    assert torch.equal(found, pgd(cooled, images, labels, 0.1, loss=cross_entropy))
    black_box = script.defense(1e4)["Square"](cooled, images, labels, 0.01)
    assert torch.equal(black_box, square(cooled, images, labels, 0.01, queries=1000))
    assert not torch.equal(black_box, square(cooled, images, labels, 0.01, queries=10))


@pytest.mark.parametrize("wrong", ["seeds=0", "parts=[robust,none]", "dataset=iris", "seed=1"])
def test_options_that_are_none_are_refused(script, monkeypatch, wrong):
    monkeypatch.setattr("sys.argv", ["x", wrong])
    with pytest.raises(UserError, match="robust, defensive, membership, extraction"):
        script.main()
