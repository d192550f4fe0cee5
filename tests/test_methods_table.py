"""The pure parts of scripts/methods_table.py: what it reads from files, and how it writes numbers."""

import importlib.util
from types import ModuleType

import pytest
import torch

from litdistill.methods import KD, RKD, SRD, BinaryKD, Mutual, Shuffled, Sum, Supervised
from litdistill.utils.errors import UserError
from litdistill.utils.paths import CONF

NAMES = sorted(p.stem for p in (CONF / "method").glob("*.yaml"))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("methods_table", CONF.parent / "scripts" / "methods_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hints. Romero et al. (arXiv 1412.6550), section 2.2.", "Hints. Romero et al. (arXiv 1412.6550), section 2.2"),
        ("A\nname (arXiv 1), table 1: T = 4.\n\nMore.", "A name (arXiv 1), table 1"),
        ("Of nobody. By none.\n\nMore (arXiv 2).", "Of nobody. By none"),
        ("First. Second (arXiv 3). Third.", "First. Second (arXiv 3)"),
    ],
)  # fmt: skip
def test_a_reference_ends_with_the_sentence_that_names_the_paper(script, text, expected):
    assert script.reference(text) == expected


def test_every_method_names_a_source_or_is_none_of_its_own(script):
    for name in NAMES:
        text = script.paper(
            CONF / "method" / f"{name}.yaml", script.options(CONF / "method" / f"{name}.yaml")["_target_"]
        )
        assert "\n" not in text
        assert name in ("supervised", "pairs", "fsp", "mlkd", "srrl") or "https://arxiv.org/abs/" in text, text
        assert name in ("supervised", "pairs") or any(f" {year}" in text for year in range(2014, 2027)), text


def test_defaults_leave_out_targets_and_taps(script):
    node = {
        "_target_": "a.B",
        "hard": 1.0,
        "hint": 1e-3,
        "on": True,
        "stage": None,
        "ts": [2.0, 3],
        "student_taps": "last",
    }
    assert script.defaults(node) == "hard 1, hint 0.001, on true, ts 2 3"
    assert script.defaults({"methods": {"kd": {"hard": 0.1}, "at": {"hint": 1000.0}}}) == "kd.hard 0.1, at.hint 1000"


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (KD, "logits"),
        (RKD, "pooled"),
        (SRD, "logits, pooled"),
        (lambda: Sum({"kd": KD(hard=0), "rkd": RKD()}), "logits, pooled"),
        (BinaryKD, "logits"),
        (lambda: Shuffled(RKD()), "pooled"),
        (Mutual, "no teacher; the student's own peers.0"),
        (Supervised, "no teacher"),
    ],
)
def test_what_is_read_of_a_teacher_is_found_by_trying(script, monkeypatch, make, expected):
    monkeypatch.setattr(script, "BATCH", 4)
    monkeypatch.setattr(script, "SAMPLES", 40)
    monkeypatch.setattr(script, "SHAPE", (3, 8, 8))
    torch.set_num_threads(1)
    step = script.Step(make())
    assert script.reads(step.method, step.uses_logits()) == expected


def test_first_phases_keep_their_share_of_a_run(script):
    assert [script.first_epochs(30, n) for n in (240, 16, 1)] == [30, 2, 1]


def test_a_method_for_several_labels_has_no_accuracy(script):
    assert script.outcome([90.0, 80.0], [89.0, 79.0]) == ("85.00 ± 7.07", "+1.00 ± 0.00")
    assert script.outcome([89.0, 80.0], [90.0, 83.0])[1] == "−2.00 ± 1.41"
    assert script.outcome(None, [89.0, 79.0]) == ("–", "–")


def test_unknown_options_are_refused(script, monkeypatch):
    monkeypatch.setattr("sys.argv", ["methods_table.py", "seed=5"])
    with pytest.raises(UserError, match="seeds"):
        script.main()


def test_other_rows_and_sections_of_the_file_are_kept(script):
    table = "| method | gain |\n|---|---:|\n| `kd` | +0.10 |\n| `at` | -49.20 ± 7.11 |\n"
    text = f"# Methods\n\n{table}\n## Detectors\n\n| `kd` | 1 |\n"
    rows, below = script.kept(text)
    assert rows == {"kd": "| `kd` | +0.10 |", "at": "| `at` | −49.20 ± 7.11 |"}
    assert below == "\n## Detectors\n\n| `kd` | 1 |\n"
    assert script.kept("# Methods\n") == ({}, "")


def test_methods_that_were_no_better_are_named_with_their_accuracy(script, tmp_path):
    (tmp_path / "methods.json").write_text('{"X (arXiv 1)": [80.0, 82.0]}')
    said = script.left_out(tmp_path / "methods.json", [90.0, 92.0])
    assert said.endswith("`kd` (91.00 ± 1.41): X (arXiv 1) 81.00 ± 1.41.\n")
    assert script.left_out(tmp_path / "none.json", [90.0]) == ""


def test_the_written_table_has_a_row_of_every_method_but_those_of_boxes(script):
    rows, below = script.kept((CONF.parent / "docs" / "methods.md").read_text())
    of_boxes = {n for n in NAMES if "litdistill.tasks." in (CONF / "method" / f"{n}.yaml").read_text()}
    assert rows.keys() == set(NAMES) - of_boxes - {"pairs"}
    assert below.startswith("\n## Detectors\n")
