"""The documentation site builds strictly: no link, anchor or name of a page is missing. The project's own texts are valid."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.process
def test_the_site_builds_strictly(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "api" / "index.html").read_text()
    for name in ("litdistill.training.distill.distill", "litdistill.methods.base.Method", "litdistill.types.Outputs"):
        assert f'id="{name}"' in page
    hosts = set(re.findall(r'(?:src|href)="https?://([^/"]+)', page))
    assert hosts <= {"squidfunk.github.io"}, "pages ask no other host for fonts or scripts"


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert pages == set(re.findall(r"(\w+\.md)$", text, re.MULTILINE))


def test_the_citation_names_the_version_of_the_project():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert {"cff-version", "title", "message", "authors"} <= cited.keys()


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda p: p.stem)
def test_a_workflow_calls_targets_that_exist(path):
    jobs = yaml.safe_load(path.read_text())["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert all(run.split()[1] in targets for run in runs if run.startswith("make"))
    assert all("uses" in step or "run" in step for job in jobs.values() for step in job["steps"])


def test_the_two_runs_of_detect_that_run_at_once_have_folders_of_their_own():
    recipe = (ROOT / "Makefile").read_text().partition("\ndetect:")[2].partition("\ntest:")[0]
    folders = re.findall(r"'hydra.sweep.subdir=([^']*)'", recipe)
    assert len(folders) == len(set(folders)) == recipe.count("train.py --multirun") == 2
    assert all("$${seed}" in folder for folder in folders)
