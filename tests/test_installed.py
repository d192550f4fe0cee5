"""The wheel: installed without its sources, its command trains in an empty folder, as one process and as two."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_cli import FAST, ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with what the wheel brings, without its dependencies, which are this environment's."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("src", "conf"):  # a copy: what an earlier build has left beside the sources would get into this one
        shutil.copytree(
            ROOT / name, folder / "sources" / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__")
        )
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "sources")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "sources")]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(folder / "site"), wheel], check=True, capture_output=True
    )
    return folder / "site"


def litdistill(installed: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "RUN_STAMP"} | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(installed),
    }
    command = [sys.executable, str(installed / "bin" / "litdistill"), *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600, check=False)


def test_the_wheel_holds_all_of_conf(installed):
    ours = {p.relative_to(ROOT / "conf") for p in (ROOT / "conf").rglob("*.yaml")}
    conf = installed / "litdistill" / "conf"
    assert {p.relative_to(conf) for p in conf.rglob("*.yaml")} == ours
    assert (installed / "litdistill" / "py.typed").is_file()
    assert (installed / "litdistill" / "report" / "page.html").is_file()


def test_the_installed_command_trains_reports_and_exports_in_an_empty_folder(installed, tmp_path):
    done = litdistill(installed, "train", *FAST, "name=one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs" / "one").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["command"].startswith("litdistill train data.per_class=12")
    assert summary["git"] is None
    assert "litdistill.utils" not in (run / "train.log").read_text()
    shown = litdistill(installed, "report", "runs=runs/one", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    exported = litdistill(installed, "export", f"run={run}", cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    assert (run / "export" / "student.onnx").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"]


def test_ranks_of_the_installed_command_are_started_by_it(installed, tmp_path):
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    overrides = [a for a in FAST if a != "trainer=cpu"]
    done = litdistill(installed, "train", *overrides, *ddp, "name=two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs" / "two").iterdir()
    assert json.loads((run / "summary.json").read_text())["device"]["world_size"] == 2


def test_jobs_of_a_multirun_have_ranks_of_their_own(installed, tmp_path):
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "method=supervised", "teacher=null"]
    overrides = [a for a in FAST if a != "trainer=cpu" and "teacher" not in a]
    done = litdistill(installed, "train", "-m", *overrides, *ddp, "name=jobs", "seed=0,1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "runs" / "jobs").iterdir()
    found = [json.loads((sweep / job / "summary.json").read_text()) for job in ("s0", "s1")]
    assert [s["seed"] for s in found] == [0, 1]
    assert [s["device"]["world_size"] for s in found] == [2, 2]
