"""The section on security: of made-up models, and of what attacks that train models have kept."""

import json
import statistics

import pytest

from litdistill.benchmarks.extraction import FORMS, LABELS
from litdistill.benchmarks.shadows import KINDS, PLAIN, TEACHER
from litdistill.report.blocks import Table, html_page
from litdistill.report.build import not_attacked
from litdistill.report.sections import looks
from litdistill.report.security import FILE, security, trained_attacks
from litdistill.report.security import TEACHER as TEACHER_BY_PGD
from tests.pages import SETTINGS, group

UNDER_ATTACK = {
    **{"dataset": "digits", "eps": 0.1, "images": 500, "epochs": 30, "params": [10, 20]},
    "rows": {
        TEACHER_BY_PGD: {"clean": [0.99], "FGSM": [0.9], "worst": [0.8]},
        "labels alone": {"clean": [0.9, 0.8], "FGSM": [0.5, 0.4], "worst": [0.1, 0.2]},
        "`ard`": {"clean": [0.89, 0.81], "FGSM": [0.7, 0.6], "worst": [0.5, 0.6]},
    },
}
MEMBERSHIP = {
    **{"dataset": "digits", "shadows": 2, "members": 585, "others": 583},
    "kinds": {
        kind: {
            "accuracy": [0.9 + i / 100, 0.92, 0.94],
            "threshold": [[0.5, 0.01], [0.6, 0.02], [0.7, 0.03]],
            "shadows": [[0.6, 0.1], [0.7, None if kind == TEACHER else 0.2], [0.8, 0.3]],
        }
        for i, kind in enumerate(KINDS)
    },
}
EXTRACTION = {
    "dataset": "digits",
    "copies": {
        form: {"117": {"accuracy": [0.9, 0.8], "agreement": [0.91, 0.81], "kl": [0.1, 0.2]}}
        for form in (*FORMS, LABELS)
    },
    "honest": {form: {"accuracy": [0.9, 0.92], "brier": [0.1, 0.2], "ece": [0.01, 0.03]} for form in FORMS},
}
KEPT = {"membership": {"digits": MEMBERSHIP}, "extraction": {"digits": EXTRACTION}}


def table(section):
    (found,) = [block for block in section.blocks if isinstance(block, Table)]
    return found


def test_the_page_says_of_each_model_what_attackers_get():
    found = group(rows=2, seeds=2, name="distilled")
    shown = table(security(found, "", SETTINGS))
    place = shown.head.index("area under the curve")
    assert [row[0] for row in shown.rows] == [style.name for style in looks(found)]
    for row, cells in zip(found.rows, shown.rows, strict=True):
        assert len(cells) == len(shown.head)
        areas = [seed.membership.auc for seed in row.seeds]
        assert float(cells[place].split(" ")[0]) == pytest.approx(statistics.mean(areas), abs=5e-4)
        for i in range(len(SETTINGS.epsilons)):
            assert cells[3 + i] == ("45.0", "5.0")[i]  # under all attacks at once
    assert shown.rows[0][place + 1 :] == ["1.20 %", "500", "60"]
    for seed in found.rows[1].seeds:
        seed.membership = None
    assert table(security(found, "", SETTINGS)).rows[1][place] == "not measured"


def test_a_protections_cost_is_shown_of_students_on_labels_alone_too():
    found = group(rows=3, seeds=2, name="plain")
    settings = [{}, {"adversarial.eps": 0.1}, {"adversarial.eps": 0.1}]
    for row, method, own in zip(found.rows[1:], ("supervised", "supervised", "rslad"), settings, strict=True):
        for i, seed in enumerate(row.seeds):
            seed.summary |= {"method": method, "settings": own, "seed": i}
            seed.summary["start"] = found.rows[1].seeds[0].summary.get("start")
    costs = [row[2] for row in table(security(found, "", SETTINGS)).rows]
    of = lambda row: statistics.mean(seed.score for seed in row.seeds)  # noqa: E731
    expected = [of(row) - of(found.rows[1]) for row in found.rows[2:]]
    assert costs[:2] == ["", ""]
    assert [float(cost.split(" ")[0].replace("−", "-")) for cost in costs[2:]] == pytest.approx(expected, abs=0.01)


def test_what_was_not_measured_is_said():
    found = group(rows=2, seeds=2, name="distilled")
    for row in found.rows:
        for seed in row.seeds:
            seed.robustness = {}
    assert not any("attack" in name for name in table(security(found, "", SETTINGS)).head)
    for row in found.rows:
        for seed in row.seeds:
            seed.membership = None
    (text,) = security(found, "", SETTINGS).blocks
    assert text.text.startswith("Not measured")


def test_trained_attacks_are_shown_where_their_file_lies_below_the_folders(tmp_path, caplog):
    assert trained_attacks([tmp_path]) == []
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / FILE).write_text(json.dumps(KEPT))
    shadows, copies = map(table, trained_attacks([tmp_path, tmp_path / "deep"]))
    rows = {row[0]: row for row in shadows.rows}
    assert rows[PLAIN][1:] == ["92.33 ± 1.53", "", "0.600 ± 0.100", "2.00 ± 1.00 %", "0.700 ± 0.100", "20.00 ± 10.00 %"]
    assert rows[TEACHER][-1] == "too few samples"
    assert rows["distilled student"][2] == "+0.33 ± 0.58"
    assert [row[0] for row in copies.rows] == [*FORMS, LABELS]
    assert copies.rows[0][1:] == ["86.00 ± 7.07", "85.00 ± 7.07", "91.00 ± 1.41", "0.150 ± 0.071", "0.020 ± 0.014"]
    assert copies.rows[-1][3:] == ["", "", ""]
    assert "0.600 ± 0.100" in html_page("x", [], trained_attacks([tmp_path]))
    (tmp_path / FILE).write_text('{"extraction": {"digits": {"copies": 3}}}')
    assert len(trained_attacks([tmp_path])) == 2
    assert "is damaged, and not shown" in caplog.text


def test_accuracy_under_attack_stands_beside_what_each_protection_cost(tmp_path):
    (tmp_path / FILE).write_text(json.dumps({"robust": {"digits": UNDER_ATTACK}, "defensive": {"mnist": UNDER_ATTACK}}))
    sections = trained_attacks([tmp_path])
    assert len(sections) == 2
    for section in sections:
        shown = table(section)
        assert list(shown.head) == ["network", "clean", "cost", "FGSM", "worst"]
        assert shown.rows == [
            [TEACHER_BY_PGD, "99.00", "", "90.00", "80.00"],
            ["labels alone", "85.00 ± 7.07", "", "45.00 ± 7.07", "15.00 ± 7.07"],
            ["`ard`", "85.00 ± 5.66", "+0.00 ± 1.41", "65.00 ± 7.07", "55.00 ± 7.07"],
        ]


def test_runs_that_no_attack_is_for_are_said_where_attacks_are_asked_for():
    strong, other = SETTINGS._replace(attacks="strong"), group(name="boxes")
    assert not_attacked(other, strong) == []
    for row in other.rows:
        for seed in row.seeds:
            seed.robustness = {}
    [line] = not_attacked(other, strong)
    assert line.startswith("attacks=strong: nothing on ")
    assert "attacks are on classifiers of images" in line
    assert "robustness=0" in not_attacked(other, strong._replace(robustness=0))[0]
    assert not_attacked(other, SETTINGS._replace(attacks="quick")) == []
