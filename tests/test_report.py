"""Tables over runs: which are of one kind, what tells kinds apart, and names and figures that need care."""

import copy
import io
import json
import math

import pytest
from PIL import Image
from rich.console import Console

from litdistill.evaluation.summary import settings
from litdistill.report import tables as report
from litdistill.report.picture import draw, picture
from litdistill.report.writers import fitting, markdown, table
from litdistill.tasks.figures import STUDENT_COLOR
from litdistill.utils.files import write_text
from litdistill.utils.units import spread

# -- kinds -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("seed=3", True),
        ("threads=2", True),
        ("watch_test=true", True),
        ("checkpoint_minutes=3", True),
        ("group=1", True),
        ("logger=none", True),
        ("teacher.cache.mode=off", True),
        ("data.root=elsewhere", True),
        ("trainer.devices=2", True),
        ("+callbacks.more={_target_: a.B, folder: '${folder}'}", False),
        ("optimizer.weight_decay=0.1", False),
        ("scheduler=cosine", False),
        ("ema=0.9", False),
        ("compress=prune", False),
        ("+schedule.soft=[[0, 0], [20, 1]]", False),
        ("data.mix={_target_: litdistill.data.mixing.Mixup, alpha: 0.2}", False),
        ("data.augment=[{_target_: litdistill.data.augment.Flip}]", False),
        ("method.temperature=9", False),
        ("teacher.recipe.seed=1", False),
        ("teacher.recipe.trainer.max_epochs=4", False),
    ],
)
def test_settings_are_what_decides_the_weights_but_for_the_seed(small, override, same):
    assert (settings(small()) == settings(small(override, name="other"))) is same
    json.dumps(settings(small(override)))


def test_settings_reach_into_lists_and_sums(small):
    assert settings(small("method=mlkd")) != settings(small("method=mlkd", "method.temperatures=[2.0]"))
    assert settings(small("method=kd_at")) != settings(small("method=kd_at", "method.methods.at.hint=3"))


def test_what_follows_the_seed_is_no_other_kind(small):
    drawn = ("teacher.recipe.seed=${seed}", "+callbacks.more={_target_: a.B, folder: '${folder}'}")
    assert settings(small("seed=1", *drawn)) == settings(small("seed=2", *drawn, name="other"))


def test_a_teacher_that_is_given_counts_by_its_runs_settings_or_by_its_weights(small, tmp_path):
    for name, noted in (
        ("a", {"settings": {"x": 1}}),
        ("b", {"settings": {"x": 1}}),
        ("c", {"settings": {"x": 2}}),
        ("old", {}),
    ):
        data = {"data": {"train": 5}, "method": "kd"}
        write_text(tmp_path / name / "summary.json", json.dumps(noted | data))
    of = lambda run, sha="1": settings(small(f"teacher.checkpoint={tmp_path / run}"), sha)  # noqa: E731
    assert of("a", "1") == of("b", "2")
    assert of("a") != of("c")
    assert of("old", "1") != of("old", "2")
    assert str(tmp_path) not in json.dumps(of("old"))
    begun = lambda run: settings(small(f"student.checkpoint={tmp_path / run}"))  # noqa: E731
    assert begun("a") == begun("b") != begun("c")
    assert begun("old")["student.checkpoint"] == "network/kd/5"


def run(seed: int = 0, **settings: object) -> dict:
    """A summary, as far as tables read it; the weights are its seed's and settings' own."""
    quality = {"accuracy": 0.9, "nll": 0.1, "ece": 0.1}
    student = {
        "name": "net",
        "sha256": f"{seed} {settings}",
        "params": 10,
        "test": quality | {"accuracy": {"best": 0.9 + seed / 100, "last": 0.9}},
        "agreement": 0.5,
    }
    return {
        "experiment": "e",
        "method": "kd",
        "seed": seed,
        "options": {"method": "kd", "train/lr": 0.1},
        "settings": {"optimizer.lr": 0.1, "optimizer._target_": "torch.optim.SGD", "teacher.recipe.seed": 0} | settings,
        "metric": {"name": "accuracy", "direction": "max"},
        "data": {"train": 1000, "input_shape": [1, 8, 8]},
        "teacher": {"name": "big", "sha256": "t", "params": 20, "test": quality},
        "student": student,
        "time": {"total_s": 1.0},
    }


def methods(found: list[dict]) -> list[tuple[str, str]]:
    """Method and seeds of each row that is not the teacher's."""
    return [(row["method"], row["seeds"]) for row in report.rows(found)[1:]]


def test_runs_of_other_settings_are_other_rows_and_say_what_differs():
    decayed = {"optimizer.weight_decay": 0.5}
    found = [run(0), run(1), run(0, **decayed), run(1, **decayed), run(0, **{"teacher.recipe.seed": 1})]
    expected = (
        "kd (teacher.recipe.seed 0)",
        "kd (teacher.recipe.seed 0, weight_decay 0.5)",
        "kd (teacher.recipe.seed 1)",
    )
    assert [m for m, _ in methods(found)] == list(expected)
    other = {"optimizer._target_": "torch.optim.Adam"}
    assert [m for m, _ in methods([run(), run(**other)])] == ["kd (optimizer SGD)", "kd (optimizer Adam)"]


def test_seeds_are_counted_and_not_runs():
    twice = copy.deepcopy(run(0))
    twice["student"]["sha256"] = "other bits"
    assert methods([run(0), twice, run(1)]) == [("kd", "2")]


def test_summaries_without_settings_are_grouped_by_their_options():
    old = [run(0), run(1), run(0)]
    for one in old:
        del one["settings"]
    old[2]["options"] = {"method": "kd", "train/lr": 0.2}
    assert methods(old) == [("kd (lr 0.1)", "2"), ("kd (lr 0.2)", "1")]
    assert methods([*old[:2], run(2)]) == [("kd (settings not noted)", "2"), ("kd", "1")]


def test_a_picture_shows_a_row_for_each_kind_in_the_words_of_the_table(tmp_path):
    found = [
        run(0),
        run(1),
        run(0, **{"optimizer.lr": 0.2}),
        run(0) | {"experiment": "f", "student": run(7)["student"]},
    ]
    drawn = [text.get_text() for text in draw([found]).axes[0].texts]
    assert drawn[0::2] == ["teacher big", "kd, 1,000 images (lr 0.1)", "kd, 1,000 images (lr 0.2)", "kd, 1,000 images"]
    assert drawn[1::2] == [row["test accuracy %"] for row in report.rows(found)]
    picture(found, tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as image:
        (shown,) = json.loads(image.text["Description"]).values()
    assert list(shown.items()) == list(zip(drawn[0::2], drawn[1::2], strict=True))


def test_the_words_of_a_picture_lie_on_nothing_and_what_was_distilled_stands_out():
    long = run(3, **{"optimizer.lr": 0.2}) | {"method": "supervised", "technique": "a_technique_of_many_words " * 3}
    figure = draw([[run(0), run(1), run(2), long, run(5) | {"method": "supervised", "experiment": "f"}]])
    figure.draw_without_rendering()
    axes = figure.axes[0]
    boxes = [text.get_window_extent() for text in axes.texts]
    for i, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[i + 1 :])
    marks = [m for m in axes.lines if len(m.get_xdata()) and m.get_linestyle() == "None"]
    for points in (axes.transData.transform(m.get_xydata()) for m in marks):
        assert not any(box.contains(x, y) for box in boxes for x, y in points)
    styles = {text.get_text(): (text.get_color(), text.get_weight()) for text in axes.texts}
    assert styles["kd, 1,000 images"] == (STUDENT_COLOR, "bold")
    assert styles["supervised, 1,000 images"][1] == "normal"
    assert len({m.get_color() for m in marks}) == 3  # the teacher's, what was distilled, and what was not


# -- names and figures -------------------------------------------------------------------------------------------------


def test_a_name_is_no_markup_and_splits_no_column():
    found = [run() | {"experiment": name} for name in ("x[b]", "a[/b]", "one|two")]
    for i, one in enumerate(found):
        one["student"] = one["student"] | {"sha256": str(i)}
    rows = report.rows(found)
    shown = io.StringIO()
    Console(file=shown, width=250).print(table(rows))
    assert all(name in shown.getvalue() for name in ("x[b]", "a[/b]", "one|two"))
    assert "| one\\|two |" in markdown(rows)


@pytest.mark.parametrize(("width", "hidden"), [(250, False), (90, True)])
def test_a_narrow_terminal_breaks_no_cell_and_shows_the_test_metric(width, hidden):
    rows, shown = report.rows([run()]), io.StringIO()
    console = Console(file=shown, width=width)
    kept = fitting(rows, console)
    console.print(table(kept))
    assert ("time" not in kept[0]) == hidden
    assert {"experiment", "model", "method", "test accuracy %"} <= set(kept[0])
    assert "…" not in shown.getvalue()
    assert all(cell in shown.getvalue() for row in kept for cell in row.values())


def test_what_is_not_a_number_is_shown_as_such():
    assert spread([1.0, math.nan]) == "nan ± nan"
