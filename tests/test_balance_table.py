"""The statistics of scripts/balance_table.py, against scipy's own intervals and a table by hand."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from omegaconf import OmegaConf
from scipy import stats

from litdistill.benchmarks import compare
from litdistill.benchmarks.compare import Job
from litdistill.utils.checkpoint import STUDENT
from litdistill.utils.errors import UserError
from litdistill.utils.files import write_text
from litdistill.utils.paths import CONF
from tests.conftest import compose_config


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("balance_table", CONF.parent / "scripts" / "balance_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("tests", "confidence"), [(1, 0.95), (20, 1 - 0.05 / 20)])
def test_intervals_are_those_of_scipy(script: ModuleType, tests: int, confidence: float) -> None:
    values = [1.0, -2.0, 0.5, 3.0]
    expected = stats.t.interval(confidence, 3, loc=0.625, scale=stats.sem(values))
    assert script.interval(values, tests) == pytest.approx(expected)


def test_the_mean_over_methods_is_taken_seed_by_seed(script: ModuleType) -> None:
    text = script.table({"at": [1.0, 3.0], "sp": [-1.0, 1.0]})
    assert "| `at` | +2.00 ± 1.41 |" in text
    assert text.endswith("| **mean of 2** | **+1.00** | -11.71 to +13.71 |")  # of 0 and 2: t = 12.706, s / sqrt(2) = 1


def test_every_method_of_the_table_exists(script: ModuleType) -> None:
    assert {*script.METHODS, script.CONTROL} <= {p.stem for p in (CONF / "method").glob("*.yaml")}


def test_rules_stand_beside_each_other_with_their_mean_and_the_worst(script: ModuleType) -> None:
    a, b = "auto", "uncertainty:0.3"
    found = {("at", a): [1.0, 3.0], ("at", b): [0.0, -1.0], ("sp", a): [-1.0, 0.0], ("sp", b): [4.0, 4.0]}
    assert script.by_rule(found).splitlines() == [
        "| method | `auto` | `uncertainty:0.3` |",
        "|---|---:|---:|",
        "| `at` | +2.00 | -0.50 |",
        "| `sp` | -0.50 | +4.00 |",
        "| **mean of 2** | **+0.75** | **+1.75** |",
        "| interval | -8.78 to +10.28 | -1.43 to +4.93 |",  # of 0 and 1.5, and of 2 and 1.5: t = 12.706
        "| **worst** | -0.50 | -0.50 |",
    ]


def test_runs_differ_from_the_control_in_method_and_balance_alone(script: ModuleType) -> None:
    choices = OmegaConf.create(
        script.DEFAULTS | {"seeds": 2, "methods": ["fitnet", "ft"], "rules": ["auto", "uncertainty:3"]}
    )
    todo = script.jobs(choices)
    assert list(todo)[:3] == [(("fitnet", "auto"), 0), (("supervised", ""), 0), (("fitnet", "uncertainty:3"), 0)]
    assert list(todo)[5] == (("fitnet", "auto"), 1)
    assert len(todo) == 2 * (1 + 2 * 2)
    columns = (("supervised", ""), ("fitnet", "auto"), ("fitnet", "uncertainty:3"))
    control, auto, other = (set(todo[(column, 1)].overrides) for column in columns)
    assert auto - control == {"method=fitnet", "balance=auto"}
    assert other - control == {"method=fitnet", "balance=uncertainty", "balance.ratio=3"}
    assert "method.init_epochs=2" in todo[("ft", "auto"), 0].overrides  # 30 of 240 epochs, of 16


def test_a_search_looks_at_the_last_epoch_of_the_validation_alone(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"supervised": (0.5, 0.9), "sp": (0.75, 0.1)}

    def trained(job: Job) -> Path:
        folder = tmp_path / f"{job.technique}-{job.seed}"
        val, test = known[job.technique]
        summary = {"val": {"best": val}, "student": {"test": {"accuracy": {"last": test, "best": test}}}}
        write_text(folder / "summary.json", json.dumps({"metric": {"name": "accuracy"}, **summary}))
        write_text(folder / STUDENT, "")
        assert compose_config(tmp_path, *job.overrides).trainer.check_val_every_n_epoch == (
            16 if choices.split == "val" else 1
        )
        return folder

    monkeypatch.setattr(compare, "run", trained)
    choices = OmegaConf.create(script.DEFAULTS | {"seeds": 2, "methods": ["sp"], "split": "val"})
    assert script.differences(choices, script.summaries(choices)) == {("sp", "auto"): [25.0, 25.0]}
    assert "75.00 %" in (said := capsys.readouterr().out)
    assert "10.00 %" not in said
    choices.split = "test"
    assert script.differences(choices, script.summaries(choices)) == {("sp", "auto"): pytest.approx([-80.0, -80.0])}


def test_without_finished_runs_there_is_no_table(script: ModuleType, tmp_path: Path) -> None:
    choices = OmegaConf.create(script.DEFAULTS | {"seeds": 2, "methods": ["sp"], "only": True, "runs": str(tmp_path)})
    with pytest.raises(UserError, match="Too few finished runs"):
        script.differences(choices, script.summaries(choices))


def summary(accuracy: float) -> dict[str, Any]:
    """Of a finished run, as far as the document reads it."""
    net = {"name": "conv4", "params": 1234, "test": {"accuracy": 0.5}}
    return {
        "student": net | {"test": {"accuracy": {"last": accuracy, "best": 1.0}}}, "teacher": net, "steps": 7,
        "data": {"name": "cifar10", "train": 500, "test": 10_000, "input_shape": [3, 32, 32]},
        "time": {"core_s": 2.25}, "device": {"type": "cpu"},
    }  # fmt: skip


def test_what_was_found_is_kept_and_written_between_marks(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"supervised": [0.5, 0.6], "sp": [0.55, 0.66], "at": [0.4, 0.5]}
    monkeypatch.setattr(
        script, "summaries", lambda choices: {key: summary(known[key[0][0]][key[1]]) for key in script.jobs(choices)}
    )
    out, keep = tmp_path / "page.md", tmp_path / "kept.json"
    options = ["dataset=cifar10", "root=/data", "seeds=2", "methods=[sp,at]", f"keep={keep}", f"out={out}"]
    monkeypatch.setattr("sys.argv", ["balance_table.py", *options])
    out.write_text("no marks")
    with pytest.raises(UserError, match="<!-- cifar10 -->"):
        script.main()
    assert not keep.exists()
    out.write_text("Before.\n<!-- cifar10 -->\n<!-- end cifar10 -->\nAfter.\n")
    script.main()
    kept, text = json.loads(keep.read_text())["cifar10"], out.read_text()
    assert kept["methods"] == {"sp": [5.0, 6.0], "at": [-10.0, -10.0]}
    assert kept["command"] == "python scripts/balance_table.py dataset=cifar10 seeds=2 methods=[sp,at]"
    assert kept["seconds"] == 14  # six runs
    assert "| `at` | −10.00 ± 0.00 | −10.00 to −10.00 |" in text
    assert "interval lies below 0: `at`; above 0: none. That of the mean lies on both sides of 0." in text
    assert "have 55.00 ± 7.07 %. Made by" in text
    assert text.startswith("Before.\n")
    assert text.endswith("\nAfter.\n")


@pytest.mark.parametrize(
    "wrong", ["split=val keep=a.json", "rules=[auto,uncertainty] keep=a.json", "out=a.md", "dataset=svhn"]
)
def test_options_that_do_not_go_together_are_refused(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.setattr("sys.argv", ["balance_table.py", *wrong.split()])
    with pytest.raises(UserError):
        script.main()


def test_runs_of_other_data_have_its_setting_and_its_files(script: ModuleType) -> None:
    assert len(script.SETTINGS["cifar10"].methods) == 10
    choices = OmegaConf.create(script.DEFAULTS | {"dataset": "cifar10", "root": "/data", "seeds": 2, "methods": ["sp"]})
    todo = script.jobs(choices)
    assert len(todo) == 2 * (1 + 1)
    assert all({"data=cifar10", "data.root=/data", "data.per_class=50"} <= set(job.overrides) for job in todo.values())
