"""The public names: what `from litdistill import …` offers, and that it waits for nothing that is not used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import litdistill
import litdistill.methods

SOURCE = Path(litdistill.__file__)


def test_type_checkers_see_the_names_that_programs_see():
    (block,) = [node for node in ast.parse(SOURCE.read_text()).body if isinstance(node, ast.If)]
    seen = {a.name for node in block.body if isinstance(node, ast.ImportFrom) for a in node.names} | {"__version__"}
    assert seen == set(litdistill.__all__)
    assert (SOURCE.parent / "py.typed").is_file()


@pytest.mark.parametrize("name", litdistill.__all__)
def test_a_public_name_is_there(name):
    assert getattr(litdistill, name) is not None
    assert name in dir(litdistill)


def test_every_method_is_public():
    methods = {n for n in litdistill.methods.__all__ if n not in ("Method", "MapMethod")}
    assert methods <= set(litdistill.__all__)


def test_a_name_that_is_none_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'KDD'"):
        litdistill.KDD  # noqa: B018


@pytest.mark.process
def test_the_package_alone_imports_no_torch():
    code = "import litdistill, sys; litdistill.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
