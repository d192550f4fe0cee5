"""The card of the page and what stands around it: its figures by hand, what is left out, and findings that nobody overlooks."""

import math
import re
import statistics
import warnings

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from litdistill.report import headline, plots, points, sections
from litdistill.report.blocks import Card, Fold, Table, Warn, html_page
from litdistill.report.build import chapter
from tests.pages import SETTINGS, group


def with_control(rows: int = 3):
    """A group whose last row is the control of the others."""
    made = group(rows=rows, seeds=2, name="first")
    made.rows[-1].precision = "fp32"
    for seed in made.rows[-1].seeds:
        seed.summary["method"] = "supervised"
        seed.summary.pop("start")
    return made


def test_the_card_holds_the_differences_of_the_runs():
    made = with_control()
    card = headline.card(made)
    row = headline.chosen(made)
    teacher, control = made.rows[0].seeds[0].score, made.rows[-1]
    lost = [seed.score - teacher for seed in row.seeds]
    won = [mine.score - its.score for mine, its in zip(row.seeds, control.seeds, strict=True)]
    figures = {words: figure for figure, words in card.figures}
    number = lambda v: f"{statistics.mean(v):+.2f} ± {statistics.stdev(v):.2f} points".replace("-", "−")  # noqa: E731
    assert figures["accuracy against its teacher"] == number(lost)
    assert figures["by distillation, over labels alone"] == number(won)
    assert figures["the file"] == f"{1_500_000 / row.timing['bytes']:.0f}x smaller"
    ratio = 1 / row.timing["cpu"][1]["ratio"][1]  # not of milliseconds, which another process may have stretched
    assert figures["one image on the CPU"] == f"{ratio:.1f}x faster"
    (table,) = (b for b in sections.quality(made, "").blocks if isinstance(b, Table))
    shown = table.rows[made.rows.index(row)][1]
    assert figures["test accuracy"] == f"{shown.split(' ')[0]} %"  # the table's own digits


def test_the_card_is_of_the_best_on_validation_and_never_of_the_best_on_test():
    made = with_control()
    first, second = made.rows[1:3]
    for seed in first.seeds:
        seed.val, seed.test = made.rows[0].seeds[0].test, second.seeds[0].test
    assert headline.chosen(made) is first
    assert first.seeds[0].score < made.rows[0].seeds[0].score


def test_what_is_not_there_is_left_out():
    made = group(rows=2, seeds=1)
    words = [w for _, w in headline.card(made).figures]
    assert "by distillation, over labels alone" not in words  # no control
    assert "±" not in str(headline.card(made))  # one seed
    made.rows = made.rows[1:]
    for row in made.rows:
        row.timing = {}
        for seed in row.seeds:
            seed.summary["teacher"] = None
    assert [w for _, w in headline.card(made).figures] == ["test accuracy"]
    made.rows = []
    assert headline.card(made) is None


def test_a_student_that_is_larger_and_slower_is_said_to_be():
    made = group(rows=1, seeds=1)
    made.rows[1].timing["bytes"], made.rows[1].timing["cpu"][1]["ratio"] = 3_000_000, [9, 10, 11]
    figures = [figure for figure, _ in headline.card(made).figures]
    assert figures[:2] == ["2.0x larger", "10x slower"]


@pytest.mark.parametrize(("share", "words"), [(1.0, "as"), (1.04, "as"), (0.96, "as"), (1.06, "1.1x"), (0.9, "1.1x")])
def test_a_student_that_costs_the_same_is_as_large_and_as_fast(share, words):
    made = group(rows=1, seeds=1)
    teacher, row = (r.timing for r in made.rows)
    row["bytes"] = share * teacher["bytes"]
    row["cpu"][1]["ratio"] = [share * ratio for ratio in teacher["cpu"][1]["ratio"]]
    for figure, word in zip([f for f, _ in headline.card(made).figures], ("large", "fast"), strict=False):
        assert figure == f"as {word}" if words == "as" else figure.startswith(f"{words} ")


def test_where_less_is_better_the_card_says_so_and_takes_the_least():
    made = group(rows=2, seeds=1)
    made.facts["metric"] = {"name": "nll", "direction": "min"}
    for row in made.rows:
        for seed in row.seeds:
            seed.task.monitor = ("nll", "min")
    card = headline.card(made)
    assert "test NLL, less is better" in [w for _, w in card.figures]
    assert not any("%" in f or "points" in f for f, _ in card.figures)
    scores = {row.label: row.seeds[0].score for row in made.rows[1:]}
    assert card.title == min(scores, key=scores.get)


def test_accuracy_stands_first_and_the_prose_is_folded():
    made = with_control()
    table, fold = sections.quality(made, "").blocks
    assert list(table.head)[:4] == ["model", "accuracy %", "against its teacher", "over labels alone"]
    assert isinstance(fold, Fold)
    page = html_page("t", [], chapter(made, "", SETTINGS))
    assert page.count("<details>") == page.count("<summary>How this was measured</summary>") >= 5
    assert "trained on 1,000 images, tested on 60, 10 classes, 8x8 pixels in gray</h2>" in page


def test_a_finding_is_loud_and_its_row_is_marked():
    made = with_control()
    made.rows[1].seeds[1].summary["findings"] = {"gap": "The student is a constant <b>."}
    opening = chapter(made, "", SETTINGS)[0]
    assert isinstance(opening.blocks[0], Card)
    (warned,) = (b for b in opening.blocks if isinstance(b, Warn))
    assert warned.text == "first: The student is a constant <b>. (seed 1)"
    (table,) = (b for b in sections.quality(made, "").blocks if isinstance(b, Table))
    assert table.rows[1][0].endswith("[!]")
    assert list(table.marked) == [1]
    page = html_page("t", [], [opening, sections.quality(made, "")])
    assert 'class="warn" role="alert">first: The student is a constant &lt;b&gt;.' in page
    assert page.count('<tr class="marked">') == 1


def test_a_constant_student_is_warned_of_above_the_tables_and_its_row_is_marked():
    made = with_control()
    for seed in made.rows[2].seeds:  # of class 3, whatever the image is
        seed.test.heads["logits"] = seed.test.logits * 0 + 5 * torch.eye(10)[3]
    opening = chapter(made, "", SETTINGS)[0]
    constant, chance = (b.text for b in opening.blocks if isinstance(b, Warn))
    assert constant.startswith(
        f"{made.rows[2].label}: The student is a constant: it predicts 3 for 100.0 % of the test set."
    )
    assert constant.endswith("(seed 0, 1)")
    assert "at chance level" in chance
    (table,) = (b for b in sections.quality(made, "").blocks if isinstance(b, Table))
    assert list(table.marked) == [2]
    page = html_page("t", [], chapter(made, "", SETTINGS))
    assert page.index("The student is a constant") < page.index("<nav")  # nobody scrolls past it


# -- the main figure ---------------------------------------------------------------------------------------------------


def drawn(costs, values, **more):
    """The axes of a figure, laid out, its plane, and its labels."""
    looks = plots.styles([f"row {i}" for i in range(len(costs))], [False] * len(costs))
    plane = points.Plane(looks, costs, values, **more)
    with plots.styled():
        figure = Figure(figsize=(5.4, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        points.draw_points(axes, plane, "kB", "accuracy")
        figure.draw_without_rendering()
        return axes, plane, points.place_labels(axes, plane)


@pytest.mark.parametrize(
    ("costs", "values"),
    [
        ([100.0], [[90.0]]),
        ([100.0, 101.0], [[90.0], [90.0]]),
        ([1e-3, 1e6], [[98.0], [0.0]]),
        ([10.0, 1000.0], [[40.0], [98.0]]),
        ([100.0] * 30, [[90.0 + i / 10, 91.0] for i in range(30)]),
        ([1.0, 2.0, 3.0, 4.0], [[98.0], [97.0], [96.0], [10.0]]),
        ([1.0, 2.0], [[math.nan], [5.0]]),
        ([1.0], [[math.nan]]),
    ],
)
def test_every_point_is_within_the_axes_with_a_number_and_nothing_warns(costs, values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        axes, plane, labels = drawn(costs, values)
    numbers = ", ".join(text.get_text() for text in labels)
    box = axes.get_window_extent()
    for i in plane.drawn:
        assert str(plane.looks[i].number) in numbers.replace(",", "").split()
        x, y = axes.transData.transform((plane.costs[i], points.height(axes, plane, i)))
        assert box.x0 < x < box.x1
        assert box.y0 < y < box.y1
    low, high = axes.get_xlim()
    assert not plane.drawn or 3 <= sum(low <= t <= high for t in axes.get_xticks()) <= 8
    missing = [look.name for i, look in enumerate(plane.looks) if i not in plane.drawn]
    assert all(name in axes.get_title() for name in missing if plane.drawn)


def test_a_name_in_any_script_is_drawn_without_a_warning():
    plane = points.Plane(plots.styles(["日本 $x$ <b>"], [False]), [1.0], [[90.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "日本 $x$ &lt;b&gt;" in points.over_cost(plane, "kB", "accuracy")


def test_long_names_are_wrapped_in_legends_and_titles():
    looks = plots.styles(["many words " * 9, "x" * 100], [False] * 2)
    svg = points.over_cost(points.Plane(looks, [1.0, 2.0], [[90.0], [91.0]]), "kB", "accuracy")
    svg += plots.curves([([1, 2], [1.0, 2.0])], None, looks[1].name, "accuracy")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert max(map(len, texts)) <= plots.LEGEND
    assert sum("many" in text for text in texts) >= 2


def test_labels_of_a_crowd_do_not_overprint():
    costs = [100.0, 104.0, 108.0, 100.0, 104.0, 300.0, 310.0, 100.0]
    _, _, labels = drawn(costs, [[90.0], [90.2], [89.8], [91.0], [89.0], [90.0], [90.1], [90.0]])
    boxes = [text.get_window_extent() for text in labels]
    for i, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[i + 1 :])
