"""The statistics of scripts/balance_table.py, against scipy's own intervals and a table by hand."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from omegaconf import OmegaConf
from scipy import stats

from litdistill.benchmarks import compare
from litdistill.benchmarks.compare import Job
from litdistill.utils.checkpoint import STUDENT, write_text
from litdistill.utils.errors import UserError
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


def test_ratios_stand_beside_each_other_with_their_mean_and_the_worst(script: ModuleType) -> None:
    found = {("at", 0.1): [1.0, 3.0], ("at", 1.0): [0.0, -1.0], ("sp", 0.1): [-1.0, 0.0], ("sp", 1.0): [4.0, 4.0]}
    assert script.by_ratio(found).splitlines() == [
        "| method | 0.1 | 1 |",
        "|---|---:|---:|",
        "| `at` | +2.00 | -0.50 |",
        "| `sp` | -0.50 | +4.00 |",
        "| **mean of 2** | **+0.75** | **+1.75** |",
        "| **worst** | -0.50 | -0.50 |",
    ]


def test_runs_differ_from_the_control_in_method_and_balance_alone(script: ModuleType) -> None:
    choices = OmegaConf.create(script.DEFAULTS | {"seeds": 2, "methods": ["fitnet", "ft"], "ratios": [0.1, 1]})
    todo = script.jobs(choices)
    assert list(todo)[:3] == [(("fitnet", 0.1), 0), (("supervised", 0.0), 0), (("fitnet", 1.0), 0)]
    assert list(todo)[5] == (("fitnet", 0.1), 1)
    assert len(todo) == 2 * (1 + 2 * 2)
    control, hint = (set(todo[(column, 1)].overrides) for column in (("supervised", 0.0), ("fitnet", 1.0)))
    assert hint - control == {"method=fitnet", "balance=auto", "balance.ratio=1"}
    assert "method.init_epochs=2" in todo[("ft", 0.1), 0].overrides  # 30 of 240 epochs, of 16


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
    assert script.differences(choices) == {("sp", 0.1): [25.0, 25.0]}
    assert "75.00 %" in (said := capsys.readouterr().out)
    assert "10.00 %" not in said
    choices.split = "test"
    assert script.differences(choices) == {("sp", 0.1): pytest.approx([-80.0, -80.0])}


def test_without_finished_runs_there_is_no_table(script: ModuleType, tmp_path: Path) -> None:
    choices = OmegaConf.create(script.DEFAULTS | {"seeds": 2, "methods": ["sp"], "only": True, "runs": str(tmp_path)})
    with pytest.raises(UserError, match="Too few finished runs"):
        script.differences(choices)
