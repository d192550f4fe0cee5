"""The documentation site builds strictly: no link, anchor or name of a page is missing. The project's own texts are valid."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from litdistill.benchmarks import published_tables
from litdistill.cli import VERBS
from litdistill.config.schema import SCHEMAS, check
from litdistill.utils.errors import UserError
from litdistill.utils.paths import CONF

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


def commands_of(text: str) -> list[list[str]]:
    """The words of each `litdistill …` of a page, in its blocks and between backticks; what it leaves open is x."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    typed = [*blocks.splitlines(), *re.findall(r"`(litdistill [^`]+)`", text)]
    typed = [re.sub(r"<[\w' -]+>", "x", line) for line in typed if line.startswith("litdistill ") and "…" not in line]
    return [words for line in dict.fromkeys(typed) if len(words := shlex.split(line, comments=True)) > 1]


def first_of(override: str) -> str:
    """An override of a multirun as its first job has it."""
    parsed = OverridesParser.create().parse_override(override)
    if not parsed.is_sweep_override():
        return override
    return f"{parsed.get_key_element()}={next(iter(parsed.sweep_iterator()))}"


def complaints(cfg, verb: str) -> list[str]:
    try:
        check(cfg, verb)
    except UserError as error:
        return str(error).splitlines()
    return []


# Files that own.md writes are in its commands: those are tested in test_readme.py.
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md") if path.stem != "own")]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_composes_and_is_taken(page):
    for _, verb, *words in commands_of((ROOT / page).read_text()):
        assert verb in {*VERBS, "x"}, verb
        if verb not in SCHEMAS or any(word.startswith(("resume=", "--")) for word in words):
            continue
        overrides = [first_of(word) for word in words if not word.startswith("-")]
        published_tables.register(overrides)
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose(verb, [*(["folder=x"] if verb in ("train", "sweep") else []), *overrides])
        # A sentence may name a part of a command.
        assert not [line for line in complaints(cfg, verb) if "is to be given" not in line]
