"""The page of a report: its numbers against independent references, and against the runs that it is made of."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from litdistill.report import costs as costs_section
from litdistill.report import history, sections
from litdistill.report.blocks import Fold, Section, Table, Text
from litdistill.report.build import build
from litdistill.report.collect import Row, Settings, _cached, _tell_apart
from litdistill.report.points import pareto
from litdistill.report.robust import robust
from litdistill.training.train import train
from litdistill.utils.errors import UserError
from litdistill.utils.files import write_text
from tests import pages
from tests.conftest import SMALL, compose_config
from tests.pages import SETTINGS, group

torch.set_num_threads(1)


# -- numbers -----------------------------------------------------------------------------------------------------------

points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)


@settings(deadline=None)
@given(points)
def test_the_pareto_front_is_that_of_comparing_all_pairs(pairs):
    costs, values = [c for c, _ in pairs], [v for _, v in pairs]
    beaten = [
        any(c <= costs[i] and v >= values[i] and (c < costs[i] or v > values[i]) for c, v in pairs)
        for i in range(len(pairs))
    ]
    front = pareto(costs, values)
    assert sorted(front) == [i for i in range(len(pairs)) if not beaten[i]]
    assert [costs[i] for i in front] == sorted(costs[i] for i in front)


def test_ece_before_and_after_is_that_of_bins_by_hand():
    made = group(rows=1, seeds=1)
    shown = table(sections.calibration(made, ""), "ece")
    seed = made.rows[1].seeds[0]
    for column, t in (("ECE as trained", 1.0), ("ECE scaled", 1.5)):
        p = np.exp(seed.test.logits.double().numpy() / t)
        p /= p.sum(1, keepdims=True)
        confidence, right = p.max(1), p.argmax(1) == seed.test_targets.numpy()
        ece = 0.0
        for i in range(15):
            inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
            if inside.any():
                ece += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
        assert cell(shown, 1, column) == f"{ece:.3f}"


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_accuracy_of_a_class_is_that_of_counting(classes):
    torch.manual_seed(classes)
    logits, targets = torch.randn(200, classes), torch.randint(classes, (200,))
    found = sections.class_accuracy(logits, targets, classes)
    for c in range(classes):
        mine = [int(row.argmax()) == c for row, y in zip(logits, targets, strict=True) if y == c]
        assert float(found[c]) == pytest.approx(sum(mine) / len(mine))


@pytest.mark.parametrize(("empty", "others"), [(1, "02"), (0, "12")])
def test_a_class_without_test_images_is_not_the_worst(empty, others):
    made = group(rows=1, seeds=1, classes=3)
    for row in made.rows:
        for seed in row.seeds:
            seed.test_targets = torch.where(seed.test_targets == empty, 2, seed.test_targets)
    shown = table(sections.per_class(made, ""), "each-class")
    for i in range(2):
        assert cell(shown, i, str(empty)) == ""
        worst = min(others, key=lambda c: float(cell(shown, i, c)))
        assert cell(shown, i, "worst class") == worst


def test_what_a_row_starts_from_and_how_its_epoch_was_chosen_is_told():
    made = group(rows=3, seeds=2)
    for seed in made.rows[1].seeds:
        seed.summary["start"] = {"from": "teacher", "images": 1168, "method": "supervised"}
    for seed in made.rows[3].seeds:
        seed.summary["epochs"] = 0
    section = sections.quality(made, "")
    shown = table(section, "quality")
    starts = [cell(shown, i, "starts from") for i in range(4)]
    assert starts == ["", "the teacher (1,168 images)", "nothing", "a network of 50,000 images (label_smoothing)"]
    assert [cell(shown, i, "last epoch %") for i in range(4)] == ["", "80.00 ± 0.00", "80.00 ± 0.00", ""]
    assert "validation set has 60 images, of which one is 1.7 points" in prose(section)


def test_each_run_is_compared_with_its_own_teacher():
    made = group(rows=1, seeds=2)
    row = made.rows[1]
    own = pages.seed(98, 0.5, 10, "other", {})
    made.rows.insert(1, Row("teacher", made.rows[0].about, [own], teacher=True, timing=made.rows[0].timing))
    row.seeds[1].summary["teacher"] = {"sha256": "other"}
    same = lambda a, b: 100 * (a.test.logits.argmax(1) == b.test.logits.argmax(1)).double().mean().item()  # noqa: E731
    each = [same(row.seeds[0], made.rows[0].seeds[0]), same(row.seeds[1], own)]
    shown = f"{statistics.mean(each):.2f} ± {statistics.stdev(each):.2f}"
    assert cell(table(sections.quality(made, ""), "quality"), 2, "agreement %") == shown
    assert sections.over_seeds(made, "").blocks[1].pictures[1].alt.endswith(f"{shown}.")


def test_how_a_row_came_about_is_told_as_it_was():
    made = group(rows=2, seeds=1)
    made.rows[2].seeds[0].summary["experiment"] = "teachers"
    for checkpoint, words in (
        ("auto", "first run that needs it"),
        ("runs/a", "given, as runs/a"),
        (None, "built with"),
    ):
        made.rows[0].checkpoint = checkpoint
        told = [b.text for b in history.rerun(made, "").blocks]
        assert words in told[0]
        assert told[2] == "python scripts/train.py method=kd seed=0"
        assert "is trained by the first run that needs it, here by" in told[3]
        assert len(told) == 5


def test_failures_are_what_only_the_teacher_has_right_the_surest_first():
    targets = torch.zeros(5, dtype=torch.int64)
    right, wrong = [2.0, 0.0, 0.0], [0.0, 2.0, 0.0]
    student = torch.tensor([right, wrong, [0.0, 0.0, 9.0], wrong, right])
    teacher = torch.tensor([right, right, right, wrong, wrong])
    assert sections.failed(student, teacher, targets) == ([2, 1], [4])


def test_the_tables_hold_what_was_measured():
    made = group(rows=3, seeds=2)
    worth = table(sections.quality(made, ""), "quality")
    assert len(worth.rows) == 4
    for i, row in enumerate(made.rows):
        hits = [100 * (s.test.logits.argmax(1) == s.test_targets).double().mean().item() for s in row.seeds]
        shown = f"{statistics.mean(hits):.2f}" + (f" ± {statistics.stdev(hits):.2f}" if len(hits) > 1 else "")
        assert cell(worth, i, "accuracy %") == shown
        if not row.teacher:
            same = [
                100 * (s.test.logits.argmax(1) == made.rows[0].seeds[0].test.logits.argmax(1)).double().mean().item()
                for s in row.seeds
            ]
            assert cell(worth, i, "agreement %") == f"{statistics.mean(same):.2f} ± {statistics.stdev(same):.2f}"
    costs = table(costs_section.cost(made, "", SETTINGS), "cost")
    assert cell(costs, 1, "file, kB") == "20.0"
    assert cell(costs, 1, "of teacher's") == f"{20_000 / 1_500_000:.3f}"
    assert cell(costs, 3, "precision") == "int8"
    assert "not reported here" in costs.rows[1]
    spoilt = table(robust(made, "", SETTINGS), "corruptions")
    seeds = made.rows[1].seeds
    noise = [100 * x for s in seeds for x in s.robustness["corruptions"]["Gaussian noise"]]
    assert cell(spoilt, 1, "Gaussian noise") == f"{statistics.mean(noise):.1f}"
    attacks = table(robust(made, "", SETTINGS), "attacks")
    assert attacks.rows[1][1:] == ["50.0", "10.0", "50.0", "10.0", "45.0", "5.0"]
    words = prose(robust(made, "", SETTINGS))
    assert "straight through each rounding" in words  # said only where there is such a row
    assert "straight" not in prose(robust(float_only(made), "", SETTINGS))


def test_compute_is_the_sum_of_all_runs_and_shared_starts_count_once():
    made = group(rows=2, seeds=2)
    for row in made.rows[1:]:
        for seed in row.seeds:
            seed.starts = {"common": 30.0}
    made.rows[0].seeds[0].summary = made.rows[1].seeds[0].summary | {"time": {**TIME, "total_s": 7.0}}
    section = history.compute(made, "")
    words = prose(section)
    runs = 2 * (10.0 + 11.0)
    assert f"{runs + 7 + 30:,.0f} s in all runs" in words
    assert f"teacher took {100 * (7 + 8) / (runs + 7 + 30):.0f} %" in words
    shown = table(section, "time")
    assert cell(shown, 1, "a run, s") == "10.5"
    assert cell(shown, 1, "before it, s") == "30.0"
    assert cell(shown, 1, "teacher's share %") == f"{100 * 2 / 10.5:.1f}"


TIME = {"total_s": 1.0, "teacher_s": 0.0, "fit_s": 1.0, "samples_per_s": 10.0}


def table(section: Section, id: str) -> Table:
    return next(b for b in section.blocks if isinstance(b, Table) and b.id == id)


def cell(shown: Table, row: int, column: str) -> str:
    return shown.rows[row][list(shown.head).index(column)]


def prose(section: Section) -> str:
    """All texts of a section, also those that are folded away."""
    folded = [text for b in section.blocks if isinstance(b, Fold) for text in b.texts]
    return " ".join([*(b.text for b in section.blocks if isinstance(b, Text)), *folded])


def float_only(made):
    made.rows[-1].precision = "fp32"
    return made


# -- rows -------------------------------------------------------------------------------------------------------------


def test_labels_that_stand_twice_are_told_apart():
    made = group(rows=3, seeds=1)
    for row in made.rows:
        row.label, row.about = "same", {"name": "a"}
    made.rows[0].about = {"name": "b"}
    _tell_apart(made.rows)
    assert len({r.label for r in made.rows}) == 4
    assert made.rows[0].label == "same, b"


def test_what_was_measured_is_kept_and_measured_anew_when_something_else_is_asked(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"n": len(calls)}

    path = tmp_path / "cache" / "x.json"
    assert _cached(path, ["a", (1, 2)], compute) == {"n": 1}
    assert _cached(path, ["a", (1, 2)], compute) == {"n": 1}
    assert _cached(path, ["a", (1, 3)], compute) == {"n": 2}
    path.write_text("{ damaged")
    assert _cached(path, ["a", (1, 3)], compute) == {"n": 3}


# -- from run folders --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(teachers, tmp_path_factory) -> Path:
    """Two seeds of one kind and one run without a teacher, on fewer digits."""
    folder = tmp_path_factory.mktemp("report")
    for name, *overrides in (("a", "seed=0"), ("b", "seed=1"), ("c", "method=supervised", "teacher=null")):
        alone = "teacher=null" in overrides
        small = [o for o in SMALL if not (alone and "teacher." in o)]
        cfg = compose_config(folder / name, *small, *overrides)
        cfg.runs = str(teachers)
        write_text(folder / name / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
        write_text(folder / name / ".hydra" / "overrides.yaml", json.dumps([f"seed={cfg.seed}", "name=it's"]))
        train(cfg)
    return folder


def test_a_page_of_real_runs(runs, tmp_path):
    (runs / "broken").mkdir(exist_ok=True)
    summary = json.loads((runs / "a" / "summary.json").read_text())
    (runs / "broken" / "summary.json").write_text(json.dumps(summary | {"experiment": "gone"}))
    settings = Settings(rounds=2, robustness=20, epsilons=(8,), device="cpu")
    (made,) = build([runs], tmp_path / "page", "Students", settings)
    assert [(r.label.split(",")[0], len(r.seeds)) for r in made.rows] == [("teacher", 1), ("kd", 2), ("supervised", 1)]
    few = torch.from_numpy(np.linspace(0, summary["data"]["test"] - 1, 20).astype(int))
    for row in made.rows[1:]:
        for seed in row.seeds:  # measured anew, and the same as when the run ended
            assert seed.quality["accuracy"] == seed.summary["student"]["test"]["accuracy"]["best"]
            assert seed.quality["nll"] == seed.summary["student"]["test"]["nll"]
            assert seed.robustness["attacks"]["FGSM"][0] == pytest.approx(
                (seed.test.logits[few].argmax(1) == seed.test_targets[few]).double().mean().item()
            )
        assert row.timing["bytes"] == row.file.stat().st_size
        assert row.file.parent.name == "export"
    assert "settings" in summary  # by which the runs of one kind are known
    assert made.rows[0].checkpoint == "auto"
    assert made.rows[0].seeds[0].quality["accuracy"] == summary["teacher"]["test"]["accuracy"]
    (problem,) = made.problems
    assert "no finished run" in problem
    text = (tmp_path / "page" / "index.html").read_text()
    assert text.count('class="drawing"') + text.count("<figure><svg") > 10
    assert "python scripts/train.py seed=1" in text
    assert "name=it" in text
    assert "validation accuracy" in text

    steps, values = history.curve(runs / "a", "accuracy")
    assert len(steps) == len(values) == 2
    assert max(values) == pytest.approx(100 * summary["val"]["best"], abs=1e-3)
    assert history.curve(tmp_path, "accuracy") is None
    assert history.curve(runs / "a", "nothing") is None

    kept = sorted((tmp_path / "page" / "cache").glob("robustness-*.json"))
    assert len(kept) == 4
    for path in kept:
        path.write_text(path.read_text().replace('"FGSM": [', '"FGSM": [0.125, '))
    (again,) = build([runs], tmp_path / "page", "Students", settings)
    assert again.rows[1].seeds[0].robustness["attacks"]["FGSM"][0] == 0.125  # read, not measured again


def test_a_place_without_a_run_and_runs_that_are_gone_are_told(runs, tmp_path):
    with pytest.raises(UserError, match="no folder"):
        build([tmp_path / "nowhere"], tmp_path / "page", "x", Settings())
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "summary.json").write_text((runs / "a" / "summary.json").read_text())
    with pytest.raises(UserError, match="could be measured"):
        build([tmp_path], tmp_path / "page", "x", Settings(robustness=0))
    assert not (tmp_path / "page" / "index.html").exists()
