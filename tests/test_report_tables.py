"""Tables of methods over pairs, the difference from the control, and tables as CSV and LaTeX."""

import csv
import io
import re
import statistics

import pytest

from litdistill.evaluation.controls import control_of, difference, unprotected
from litdistill.report.pivot import pivot
from litdistill.report.tables import data_title, differing, kinds, records
from litdistill.report.writers import FORMATS, csv_text, ending, escape_latex, latex
from litdistill.utils.errors import UserError
from tests.test_report import run as made_run


def run(seed: int, score: float, method: str = "kd", student: str = "net", teacher: str | None = "big", **data) -> dict:
    """A summary of a student that has this test accuracy."""
    one = made_run(seed, name=f"{method} {student} {teacher} {score}")
    del one["settings"]["name"]
    one["method"] = one["options"]["method"] = method
    one["settings"] |= {"method._target_": method, "student._target_": student}
    one["data"] |= {"name": "digits", "classes": 10, "test": 500} | data
    one["student"]["name"] = student
    one["student"]["test"]["accuracy"]["best"] = score
    one["val"] = {"best": score}
    one["teacher"] = None if teacher is None else one["teacher"] | {"name": teacher, "sha256": teacher}
    return one


PAIR = "big → net, "
FOUND = [
    *(run(0, 0.90, "supervised"), run(1, 0.80, "supervised")),
    *(run(0, 0.94), run(1, 0.86), run(2, 0.99)),
    run(0, 0.97, train=5000),
    *(run(0, 0.5, "at", student="tiny"), run(0, 0.4, "supervised", student="tiny", teacher=None)),
]


def test_a_pivot_has_a_row_a_method_and_columns_a_pair():
    rows = pivot(FOUND)
    assert [(r["method"], str(r["trained on"])) for r in rows] == [
        *(("teacher", ""), ("supervised", "1,000"), ("kd", "1,000"), ("at", "1,000"), ("kd", "5,000")),
    ]
    assert str(rows[0][f"{PAIR}test accuracy %"]) == "90.00"
    by_hand = [90.0, 80.0]
    shown = f"{statistics.mean(by_hand):.2f} ± {statistics.stdev(by_hand):.2f}"
    assert str(rows[1][f"{PAIR}test accuracy %"]) == shown
    assert str(rows[1]["big → tiny, test accuracy %"]) == "40.00"  # it has no teacher: it is the control of all
    assert str(rows[3]["big → tiny, over labels alone"]) == "+10.00"
    assert rows[3][f"{PAIR}test accuracy %"] == ""


def test_what_a_teacher_adds_is_the_mean_over_pairs_of_one_seed():
    (row,) = [r for r in pivot(FOUND) if r["method"] == "kd" and str(r["trained on"]) == "1,000"]
    pairs = [94.0 - 90.0, 86.0 - 80.0]  # the control has no third seed
    assert str(row[f"{PAIR}over labels alone"]) == f"+{statistics.mean(pairs):.2f} ± {statistics.stdev(pairs):.2f}"
    assert next(r for r in pivot(FOUND) if str(r["trained on"]) == "5,000")[f"{PAIR}over labels alone"] == ""
    assert difference({0: 1.0, 1: 3.0}, {5: 1.0}) == (1.0, None, 0)
    # Seeds make the pairs, in whatever order runs were found: 1 - 0 and 3 - 1, and not 1 - 1 and 3 - 0.
    assert difference({0: 1.0, 1: 3.0}, {1: 1.0, 0: 0.0}) == (1.5, pytest.approx(0.5**0.5), 2)


@pytest.mark.parametrize(
    ("change", "is_control"),
    [
        ({}, True),
        ({"settings": {"optimizer.lr": 7}}, True),
        ({"settings": {"teacher.recipe.seed": 7}}, True),
        ({"settings": {"data.augment": []}}, False),
        ({"settings": {"task.label_smoothing": 0.1}}, False),
        ({"options": {"train/epochs": 100}}, False),
        ({"data": {"train": 10}}, False),
        ({"student": {"name": "other"}}, False),
        ({"start": {"from": "network"}}, False),
        ({"method": "shuffled"}, False),
    ],
)
def test_a_control_has_the_same_student_data_and_budget(change, is_control):
    other = run(0, 0.5, "supervised")
    for key, value in change.items():
        other[key] = other.get(key, {}) | value if isinstance(value, dict) else value
    found = kinds([run(0, 0.9), other])
    assert (control_of(found[0][0], found) is not None) == is_control
    assert control_of(found[1][0], found) is None or change


def test_of_several_controls_the_best_on_validation_is_taken():
    weak, strong = run(0, 0.5, "supervised"), run(0, 0.7, "supervised")
    weak["settings"]["optimizer.lr"] = 3
    found = kinds([run(0, 0.9), weak, strong])
    assert control_of(found[0][0], found) == 2
    for kind in found:
        kind[0]["metric"] = {"name": "rmse", "direction": "min"}
    assert control_of(found[0][0], found) == 1


def test_what_a_protection_costs_is_taken_from_a_student_without_one():
    plain, robust, student = run(0, 0.7, "supervised"), run(0, 0.9, "supervised"), run(0, 0.8)
    for one in (robust, student):
        one["settings"] |= {"adversarial.eps": 0.1, "adversarial.steps": 10}
    found = kinds([plain, robust, student])
    assert control_of(student, found) == 1  # which says what the teacher added
    assert [unprotected(one, found) for one in (plain, robust, student, run(0, 0.8))] == [None, 0, 0, 0]
    assert unprotected(student, found[1:]) is None
    assert "adversarial.eps 0.1" in differing(robust, [plain, robust])


def test_csv_holds_the_figures_of_the_table_for_programs():
    rows = records(FOUND)
    read = list(csv.DictReader(io.StringIO(csv_text([(data_title(FOUND), rows)]))))
    assert [r["parameters"] for r in read] == [str(int(row["parameters"].mean)) for row in rows]
    for row, line in zip(rows, read, strict=True):
        assert line["data"] == "digits"
        shown = line["test accuracy %"] + (f" ± {line['test accuracy % sd']}" if line["test accuracy % sd"] else "")
        assert shown == str(row["test accuracy %"])
    assert read[-1].keys() >= {"time, s", "seeds"}


def test_csv_joins_tables_and_no_name_is_a_formula():
    other = run(0, 0.5, "=1+1", name="mnist")
    read = list(csv.DictReader(io.StringIO(csv_text([(n, records([r])) for n, r in (("a", FOUND[0]), ("b", other))]))))
    assert [r["data"] for r in read] == ["a", "a", "b", "b"]
    assert read[3]["method"] == "'=1+1"


def test_latex_escapes_what_is_a_command_and_has_as_many_cells_as_columns():
    hostile = run(0, 0.5, r"a_b & \input{x} $1$ 50% ^~#")
    text = latex(records([hostile]), "digits_1")
    assert r"a\_b \& \textbackslash{}input\{x\} \$1\$ 50\% \textasciicircum{}\textasciitilde{}\#" in text
    assert r"\caption{digits\_1}" in text
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {len(records([hostile])[0]) - 1}
    assert [text.count(rf"\{rule}rule") for rule in ("top", "bottom")] == [1, 1]
    assert escape_latex("1 ± 2 → −3") == r"1 $\pm$ 2 $\rightarrow$ $-$3"


def test_latex_sets_pairs_above_their_columns():
    text = latex(pivot(FOUND))
    assert r" &  & \multicolumn{1}{c}{big $\rightarrow$ net}" not in text
    assert r"\multicolumn{2}{c}{big $\rightarrow$ net} & \multicolumn{2}{c}{big $\rightarrow$ tiny} \\" in text
    assert r"\cmidrule(lr){3-4} \cmidrule(lr){5-6}" in text
    assert "over labels alone" in text
    assert text.count(r"\midrule") == 3  # below the head, the teacher, and those of 1,000 images


@pytest.mark.parametrize(
    ("out", "found"),
    [
        ("a.md", ".md"),
        ("a.csv", ".csv"),
        ("a.tex", ".tex"),
        ("a.html", ".html"),
        ("report/", ""),
        ("a", ""),
        (None, ""),
    ],
)
def test_the_ending_of_a_file_says_what_is_written(out, found):
    assert ending(out) == found
    assert {".md", ".csv", ".tex"} == set(FORMATS)


def test_another_ending_is_refused_before_anything_is_read():
    with pytest.raises(UserError, match=r"table\.xlsx.*Tables end in \.md, \.csv, \.tex"):
        ending("table.xlsx")


def test_a_title_says_how_large_the_data_are():
    colored = run(0, 0.5, input_shape=[3, 224, 224], classes=3, test=1200, name="birds")
    assert data_title([colored]) == (
        "birds: trained on 1,000 images, tested on 1,200, 3 classes, 224x224 pixels in color"
    )
    numbers = run(0, 0.5, input_shape=[10], classes=1, name="diabetes") | {"task": "Regression"}
    assert data_title([numbers]) == (
        "diabetes: trained on 1,000 samples, tested on 500, 1 value to predict, inputs of 10"
    )
    unknown = run(0, 0.5, input_shape=None, classes=None, train=None, test=None, name=None)
    assert data_title([unknown]) == "data"
