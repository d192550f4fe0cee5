"""Each example is short, runs from top to bottom, and its student learns what its data can teach."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
# What each student comes to at least; chance is 10 % for digits, 40 % for wines, 50 % for the others, and an R² of 0.
LEAST = {
    "digits": 0.9,
    "own_networks": 0.9,
    "features": 0.9,
    "dict_outputs": 0.85,
    "regression": 0.35,
    "tabular": 0.85,
    "text": 0.8,
    "detector": 0.4,  # mAP
}


def test_every_example_is_here():
    assert {p.stem for p in FOLDER.glob("*.py")} == set(LEAST)


@pytest.mark.parametrize("name", LEAST)
def test_an_example_is_short_and_uses_public_names_alone(name):
    text = (FOLDER / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 60
    modules = {n.module for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom) and n.module}
    assert {m for m in modules if m.split(".")[0] in ("litdistill", "hydra", "lightning")} == {"litdistill"}


@pytest.mark.parametrize("name", LEAST)
def test_an_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, example)  # where a dataclass looks its types up
    spec.loader.exec_module(example)
    assert example.main(out=tmp_path / "run") >= LEAST[name]
    assert list((tmp_path / "run").rglob("best.ckpt"))
