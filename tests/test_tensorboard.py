"""Runs are named by what differs, curves by what they are, and figures are whole."""

import warnings

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser

from litdistill.tasks.base import Samples
from litdistill.tasks.figures import (
    any_names,
    classification_figures,
    confusion_matrices,
    new_figure,
    save_figure,
    shorter,
)
from litdistill.types import Outputs
from litdistill.utils import run_names
from litdistill.utils.tags import tag


def jobs_of(*typed):
    """The names of all jobs of a multirun of these overrides, in order."""
    import itertools

    run_names.announce(typed)
    parsed = OverridesParser.create().parse_overrides(list(typed))
    choices = [
        [f"{o.get_key_element()}={v}" for v in o.sweep_string_iterator()] if o.is_sweep_override() else [o.input_line]
        for o in parsed
    ]
    return [run_names.job_name(i, job) for i, job in enumerate(itertools.product(*choices))]


@pytest.fixture(autouse=True)
def nothing_swept(monkeypatch):
    monkeypatch.setenv(run_names.SWEPT, "{}")


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (("method=kd", "method.temperature=1,4", "seed=0,1"), ["T1-s0", "T1-s1", "T4-s0", "T4-s1"]),
        (("seed=range(2)", "method=kd,dkd", "data=digits"), ["kd-s0", "dkd-s0", "kd-s1", "dkd-s1"]),
        (("net@student=conv4,lenet", "optimizer.lr=1e-3"), ["conv4", "lenet"]),
        (("student.widths=[8,8],[16,16]",), ["widths8-8", "widths16-16"]),
        (("+ema=0.9,0.99",), ["ema0.9", "ema0.99"]),
        (("experiment=digits/distilled,digits/same_images",), ["digits-distilled", "digits-same_images"]),
        (("name=a/b,a-b",), ["0-a-b", "1-a-b"]),  # two jobs of one name get their numbers
        (("optimizer.lr=interval(0.1,1)",), None),
    ],
)
def test_jobs_are_named_by_what_differs(typed, expected):
    if expected is None:
        run_names.announce(typed)
        assert run_names.job_name(3, ["optimizer.lr=0.5"]) == "3"
        return
    assert jobs_of(*typed) == expected


def test_long_names_are_cut_and_still_differ():
    found = jobs_of("name=" + ",".join("x" * 100 + str(i) for i in range(3)))
    assert len(set(found)) == 3
    assert all(len(n) <= run_names.LONGEST for n in found)
    assert all(not set(n) & set("/\\:*?\"<>| =,'") for n in found)


def test_a_run_alone_varies_in_nothing():
    run_names.announce(["method=kd", "seed=0"])
    assert run_names.varied(["method=kd", "seed=0"]) == {}
    run_names.announce(["method=kd,dkd", "optimizer.lr=0.1,1", "seed=0"])
    assert run_names.varied(["method=dkd", "optimizer.lr=0.1", "seed=0"]) == {"method": "dkd", "optimizer.lr": 0.1}


def test_trials_of_a_sweep_vary_in_the_keys_of_its_space():
    overrides = ["data=digits", "optimizer.lr=0.1", "method=kd", "seed=2"]
    with run_names.varying(["optimizer.lr", "seed"]):
        assert run_names.varied(overrides) == {"optimizer.lr": 0.1, "seed": 2}
    assert run_names.varied(overrides) == {}


def test_a_name_in_a_script_without_a_font_is_one_line_in_the_log_and_no_warning(caplog):
    caplog.set_level("WARNING", "litdistill")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with any_names():
            figure = confusion_matrices([("student", torch.eye(2))], ["\U0001f9ea", "plain"])
            figure.canvas.draw()
            figure.canvas.draw()
            warnings.warn("of another kind", stacklevel=1)
    said = [str(w.message) for w in caught]
    assert "of another kind" in said
    assert not any("Glyph" in text for text in said)
    assert [r.getMessage()[:43] for r in caplog.records] == ["No installed font has all characters of the"]
    with any_names():
        confusion_matrices([("student", torch.eye(2))], ["plain", "$x_{\\frac$"]).canvas.draw()
    assert len(caplog.records) == 1


def test_tags_put_metric_and_loss_first():
    known = {
        "val/accuracy": "accuracy/validation", "val/teacher_accuracy": "accuracy/teacher",
        "train/accuracy": "accuracy/training", "watched/test_accuracy": "accuracy/test", "train/loss": "loss/total",
        "train/hard": "loss/hard", "train/my_term": "loss/my_term", "val/agreement": "teacher/agreement_validation",
        "val/nll": "validation/nll", "lr-Adam": "rate/Adam", "speed/samples_per_s": "speed/samples_per_s",
        "epoch": None, "step": None, "test/accuracy": "test/accuracy",
    }  # fmt: skip
    assert {name: tag(name) for name in known} == known


@pytest.mark.parametrize(
    "names", [["a$b_{\\frac$", "x" * 201, "a line\nand another"], [f"kind {i} of 30" for i in range(30)]]
)
def test_figures_are_whole_whatever_classes_are_called(names):
    torch.manual_seed(0)
    count = len(names)
    targets = torch.arange(count).repeat(20)
    student, teacher = (torch.randn(len(targets), count) + s * torch.eye(count)[targets] for s in (2, 4))
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    figures = classification_figures(Samples(lambda i: image, targets, names, Outputs.of(student), Outputs.of(teacher)))
    confusion = figures["confusion"]
    for figure in figures.values():
        figure.canvas.draw()
        whole = figure.bbox
        for axes in figure.axes if figure is confusion else ():
            inside = axes.get_tightbbox()
            assert inside.x0 >= -1
            assert inside.y0 >= -1
            assert inside.x1 <= whole.x1 + 1
            assert inside.y1 <= whole.y1 + 1
    scales = {axes.images[0].get_clim() for axes in confusion.axes[:2]}
    assert len(scales) == 1  # teacher and student are shaded alike
    assert [t.get_text() for t in confusion.axes[0].get_yticklabels()] == [shorter(n) for n in names]


def test_names_are_shortened_in_the_middle():
    assert shorter("short") == "short"
    assert shorter("Tropical Disease (Rust)") == "Tropical Dis…Rust)"
    assert len(shorter("x" * 300)) == 18


def test_a_figure_that_is_not_drawn_to_its_end_leaves_the_file_before(tmp_path):
    class Broken:
        def savefig(self, path, **_):
            path.write_bytes(b"a part")
            raise ValueError("broken")

    kept = tmp_path / "a.png"
    kept.write_bytes(b"whole")
    with pytest.raises(ValueError, match="broken"):
        save_figure(Broken(), kept)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"whole"]
    save_figure(new_figure(1, 1), kept)
    save_figure(new_figure(1, 1), tmp_path / "new" / "a.svg")
    assert kept.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "new" / "a.svg").read_text()
