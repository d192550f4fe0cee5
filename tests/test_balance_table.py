"""The statistics of scripts/balance_table.py, against scipy's own intervals and a table by hand."""

import importlib.util
from types import ModuleType

import pytest
from scipy import stats

from litdistill.utils.paths import CONF


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
