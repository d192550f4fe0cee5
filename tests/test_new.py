"""`litdistill new`: the project that it writes composes, and passes its own tests; `litdistill.run`, which these use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from litdistill import run
from litdistill.cli.new import main, write_project
from litdistill.utils.errors import UserError
from tests.conftest import SMALL

SOURCES = Path(__file__).resolve().parents[1] / "src"


def test_the_folder_names_the_package(tmp_path, capsys):
    main([str(tmp_path / "My-Study")])
    folder = tmp_path / "My-Study"
    assert (folder / "my_study" / "methods.py").is_file()
    assert "_target_: my_study.methods.Margin" in (folder / "conf" / "method" / "margin.yaml").read_text()
    assert (folder / ".gitignore").is_file()
    texts = [path.read_text() for path in folder.rglob("*") if path.is_file()]
    assert len(texts) == 10
    assert not any("my_project" in text for text in texts)
    assert "litdistill train --config-dir conf experiment=first" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["2fast", "class", "litdistill", "a+b"])
def test_a_name_that_python_cannot_import_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="names a Python package"):
        write_project(tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_folder_with_a_space_is_shown_as_a_shell_takes_it(tmp_path, capsys):
    main([str(tmp_path / "my study")])
    assert f"  cd '{tmp_path / 'my study'}'\n" in capsys.readouterr().out


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="Name a new folder"):
        write_project(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_run_trains_what_the_command_would_and_trains_no_finished_run_again(tmp_path, teachers):
    options = [*SMALL, "teacher=null", "method=supervised", "logger=none", f"runs={teachers}"]
    data, distiller = run(*options, folder=tmp_path / "a")
    before = (tmp_path / "a" / "summary.json").stat().st_mtime_ns
    again = run(*options, folder=tmp_path / "a")[1]
    assert (tmp_path / "a" / "summary.json").stat().st_mtime_ns == before
    images = next(data.batches("test")).inputs
    with torch.no_grad():
        logits = distiller.deployed_student(images)
        assert torch.equal(again.deployed_student(images), logits)
    assert not distiller.deployed_student.training


@pytest.mark.process
def test_a_new_project_passes_its_own_tests(tmp_path):
    write_project(tmp_path / "kd_study")
    env = os.environ | {"PYTHONPATH": str(SOURCES), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path / "kd_study", env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout
