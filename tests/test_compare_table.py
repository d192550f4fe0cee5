"""The table that scripts/compare_table.py makes of a page: what it takes of it, and that the document has what it wrote."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from litdistill.utils.errors import UserError
from litdistill.utils.paths import CONF

PAGE = """# Techniques compared

| model | mAP % | against its teacher | mAP50 % | network | starts from |
|---|---:|---:|---:|---|---|
| 1 teacher | 81.06 |  | 96.57 | big | nothing |
| 2 pruned | 76.79 ± 0.10 | −4.27 | 95.56 | small | the teacher (1,000 images) |
| 3 pruned, then int8 | 76.53 | −4.53 | 95.31 | small | the teacher (1,000 images) |
| 4 scratch \\[!\\] | 58.83 | −22.23 | 82.70 | small | nothing |

| in int8 | same % | mAP % |
|---|---:|---:|
| pruned | 99.00 | 76.53 |

| model | precision | parameters | file, kB | batch 1: p50, ms | of teacher's (quartiles) | p95, ms | of teacher's (quartiles) |
|---|---|---:|---:|---:|---:|---:|---:|
| 1 teacher | fp32 | 797,823 | 3,236.7 | 1.807 | 1.00 | 14.621 | 1.00 |
| 2 pruned | fp32 | 49,809 | 246.8 | 0.418 | 0.23 | 3.772 | 0.26 |
| 3 pruned, then int8 | int8 | 49,809 | 137.9 | 0.400 | 0.22 | 3.600 | 0.25 |
"""
EXPECTED = """| detector | mAP % | mAP50 % | parameters | file, kB | batch 1: p50, ms | of the teacher's | starts from |
|---|---:|---:|---:|---:|---:|---:|---:|
| teacher | 81.06 | 96.57 | 797,823 | 3,236.7 | 1.807 | 1.00 | nothing |
| pruned | 76.79 ± 0.10 | 95.56 | 49,809 | 246.8 | 0.418 | 0.23 | the teacher (1,000 images) |
| scratch | 58.83 | 82.70 |  |  |  |  | nothing |

| in int8 | same % | mAP % |
|---|---:|---:|
| pruned | 99.00 | 76.53 |"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_table", CONF.parent / "scripts" / "compare_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_row_a_technique_with_its_cost_and_one_a_file_in_int8(script):
    assert script.text_of(PAGE) == EXPECTED


@pytest.mark.parametrize("gone", ["| in int8 |", "| model | mAP % |", "| model | precision |"])
def test_a_page_of_something_else_is_refused(script, gone):
    with pytest.raises(UserError, match="no table of detectors"):
        script.text_of(PAGE.replace(gone, "| other |"))
