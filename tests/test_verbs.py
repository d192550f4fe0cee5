"""The command `litdistill`: its verbs, what a job takes for its own command, and folders of configs that a user keeps."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from litdistill import cli
from litdistill.cli import commands
from litdistill.cli.hydra_main import Job, run_task
from litdistill.cli.resume import resumed
from litdistill.utils import command_line, versions
from litdistill.utils.command_line import command_argv, command_text, config_dir_of, near, split_flags, typed
from litdistill.utils.errors import UserError
from litdistill.utils.paths import CONF, PACKAGE, ROOT, resolve_paths

assert ROOT is not None


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder that commands are started in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Recorder:
    """A task that notes what it was given and what its process took for its command meanwhile."""

    def __init__(self):
        self.configs, self.commands, self.folders, self.places = [], [], [], []

    def __call__(self, cfg) -> None:
        self.configs.append(cfg)
        self.commands.append(list(sys.argv))
        self.folders.append(cfg.folder)
        self.places.append(Path.cwd())


def start(monkeypatch, *argv: str, verb: str | None = None) -> Recorder:
    monkeypatch.setattr(sys, "argv", list(argv))
    recorder = Recorder()
    run_task(recorder, "train", verb)
    return recorder


# -- verbs -------------------------------------------------------------------------------------------------------------


def test_the_overview_names_every_verb_and_imports_nothing_heavy():
    code = "from litdistill.cli import main; main(); import sys; print(sorted({'torch', 'hydra'} & sys.modules.keys()))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for name, verb in cli.VERBS.items():
        assert re.search(rf"^  {name} +{re.escape(verb.help)}$", shown, re.MULTILINE)
    assert shown.count("\n  litdistill ") == 4  # examples
    assert shown.endswith("[]\n")


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("trian", "Did you mean litdistill train?"),
        ("zzz", "The verbs are train, sweep"),
        ("data=mnist", "litdistill train data=mnist"),
    ],
)
def test_an_unknown_verb_is_answered_with_the_nearest(typed, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["litdistill", typed])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_has_a_function_a_config_and_a_script(name):
    verb = cli.VERBS[name]
    module, function = verb.function.split(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert verb.config is None or (CONF / f"{verb.config}.yaml").is_file()
    assert f'run("{name}")' in (ROOT / "scripts" / f"{name}.py").read_text()


def test_a_user_error_of_a_verb_without_a_config_is_shown_alone(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["litdistill", "predict", "nothing.onnx", "image.png"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "nothing.onnx" in capsys.readouterr().err


def test_the_package_runs_as_a_file_whose_folder_hides_no_module_of_pythons(tmp_path):
    done = subprocess.run(
        [sys.executable, str(PACKAGE / "__main__.py")], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == cli.overview()


@pytest.mark.process
def test_a_module_that_is_no_command_says_which_one_is(tmp_path):
    module = [sys.executable, "-m", "litdistill.training.train", "trainer=debug"]
    done = subprocess.run(module, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "litdistill train" in done.stderr


# -- the command of a job ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "verb"), [(["bin/litdistill", "train"], "train"), (["scripts/train.py"], None)])
def test_a_run_repeats_its_whole_command(folder, monkeypatch, command, verb):
    typed = [*command, "seed=3", "name=x"]
    seen = start(monkeypatch, *typed, verb=verb)
    assert seen.commands == [typed]
    assert seen.configs[0].seed == 3


def test_a_job_of_a_multirun_repeats_itself_and_not_the_multirun(folder, monkeypatch):
    monkeypatch.setenv("RUN_STAMP", "now")
    seen = start(monkeypatch, "bin/litdistill", "train", "-m", "seed=0,1", "name=x", verb="train")
    assert seen.commands == [
        ["bin/litdistill", "train", f"seed={i}", "name=x", f"folder=runs/x/now/s{i}", "hydra.mode=RUN"] for i in (0, 1)
    ]
    assert seen.folders == [str(folder / f"runs/x/now/s{i}") for i in (0, 1)]
    again = start(monkeypatch, *seen.commands[1], verb="train")  # as a rank does
    assert again.folders[0] == "runs/x/now/s1"
    assert again.configs[0].seed == 1


def test_a_job_can_be_sent_to_another_process():
    job = pickle.loads(pickle.dumps(Job(commands.train, ["litdistill", "train"], ["seed=1"])))
    assert job.task is commands.train
    assert job.command == ["litdistill", "train"]


def test_ranks_are_started_by_a_file_that_is_there(tmp_path, monkeypatch):
    installed = tmp_path / "litdistill"
    installed.write_text("")
    scripts = [str(ROOT / "scripts" / "train.py")]
    for argv, expected in (
        ([str(installed), "sweep"], [str(installed), "train"]),
        ([str(ROOT / "scripts" / "sweep.py")], scripts),
        (["somebody.py"], scripts),
        ([str(PACKAGE / "__main__.py"), "sweep"], [str(PACKAGE / "__main__.py"), "train"]),
    ):
        monkeypatch.setattr(sys, "argv", argv)
        assert command_argv("train") == expected
    monkeypatch.setattr(command_line, "ROOT", None)  # installed, and called from somebody's program
    monkeypatch.setattr(sys, "argv", ["somebody.py"])
    assert command_argv("train") == [str(PACKAGE / "__main__.py"), "train"]


def test_a_command_is_shown_as_it_is_typed():
    own = ["seed=1", "data.root=my images", "folder=runs/x", "hydra.mode=RUN"]
    typed = "seed=1 'data.root=my images'"
    assert command_text([str(ROOT / "scripts" / "train.py"), *own]) == f"python scripts/train.py {typed}"
    assert command_text(["/usr/bin/litdistill", "train", *own]) == f"litdistill train {typed}"
    assert command_text([str(PACKAGE / "__main__.py"), "train", *own]) == f"python -m litdistill train {typed}"


# -- folders and paths of the user's -----------------------------------------------------------------------------------


@pytest.fixture
def mine(folder) -> Path:
    """A folder of configs with an experiment."""
    (folder / "mine" / "experiment").mkdir(parents=True)
    (folder / "mine" / "experiment" / "first.yaml").write_text("# @package _global_\nseed: 7\nname: first\n")
    return folder / "mine"


def test_a_folder_of_configs_is_searched_beside_the_projects(mine, monkeypatch, capsys):
    monkeypatch.setenv("RUN_STAMP", "now")
    seen = start(monkeypatch, "train.py", "--config-dir", "mine", "experiment=first", "method=dkd")
    assert seen.configs[0].seed == 7
    several = start(monkeypatch, "train.py", "--config-dir=mine", "-m", "experiment=first", "seed=0,1")
    assert [c[1:4] for c in several.commands] == [["--config-dir", str(mine), "experiment=first"]] * 2
    with pytest.raises(SystemExit):
        start(monkeypatch, "train.py", "--config-dir", "mine", "experiment=fisrt")
    assert "did you mean first" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        start(monkeypatch, "train.py", "--config-dir", "nowhere")
    assert ended.value.code == 2


def test_flags_keep_their_values():
    arguments = ["-m", "--config-dir", "mine", "seed=1", "-cd", "other", "--cfg", "job", "method=kd"]
    assert split_flags(arguments) == (
        ["-m", "--config-dir", "mine", "-cd", "other", "--cfg", "job"],
        ["seed=1", "method=kd"],
    )
    assert config_dir_of(arguments) == Path("other")
    assert config_dir_of(["--config-dir=a b", "x=1"]) == Path("a b")
    assert config_dir_of([]) is None


def noted(folder: Path, overrides: list[str], config_dir: Path | None = None) -> Path:
    """A run folder as Hydra notes its start."""
    sources = [{"path": str(config_dir), "schema": "file", "provider": "command-line"}] if config_dir else []
    note = {"overrides": {"task": overrides}, "job": {"config_name": "train"}, "runtime": {"config_sources": sources}}
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "hydra.yaml").write_text(json.dumps({"hydra": note}))
    return folder


@pytest.mark.parametrize(
    "override",
    [
        *("--config-dir=/tmp/x", "-m", "hydra.run.dir=/tmp/x", "++hydra.run.dir=/tmp/x", "hydra/launcher=joblib"),
        *(
            "+hydra.callbacks.x={_target_: torch.load}",
            "+hydra/callbacks@hydra.callbacks.x=y",
            "~hydra.callbacks",
            "seed",
        ),
    ],
)
def test_what_sets_up_hydra_is_not_taken_from_a_run_folder(folder, override):
    run = noted(folder / "run", ["seed=1", override])
    with pytest.raises(UserError, match="is refused"):
        resumed([f"resume={run}"])


def test_a_folder_of_configs_is_not_taken_from_a_run_folder(folder, mine):
    run = noted(folder / "run", ["experiment=first"], mine)
    with pytest.raises(UserError, match=f"add --config-dir {mine}"):
        resumed([f"resume={run}"])
    run = noted(folder / "other", ["experiment=first"], mine)
    found = resumed(["--config-dir", "mine", f"resume={run}"])
    assert found == ["--config-dir", "mine", "experiment=first", f"hydra.run.dir={run}"]


def test_paths_stay_relative_to_the_start_when_hydra_changes_the_folder(folder, monkeypatch):
    monkeypatch.setenv("RUN_STAMP", "now")
    (folder / "teacher").mkdir()
    seen = start(
        monkeypatch, "train.py", "hydra.job.chdir=true", "teacher.checkpoint=teacher", "student.checkpoint=auto"
    )
    (cfg,), (place,) = seen.configs, seen.places
    assert place == folder / "runs" / "train" / "now"
    assert (cfg.runs, cfg.data.root) == (str(folder / "runs"), str(folder / "data_files"))
    assert (cfg.teacher.checkpoint, cfg.student.checkpoint) == (str(folder / "teacher"), "auto")
    os.chdir(folder)
    assert start(monkeypatch, "train.py").configs[0].runs == "runs"


def test_what_may_be_a_word_is_a_path_only_where_it_is_there(tmp_path):
    (tmp_path / "rows.csv").touch()
    cfg = OmegaConf.create(
        {"teacher": {"outputs": "boosting"}, "data": {"test": "rows.csv", "validation": "theo"}, "pictures": "drawn"}
    )
    resolve_paths(cfg, tmp_path)
    assert (cfg.teacher.outputs, cfg.data.validation) == ("boosting", "theo")
    assert (cfg.data.test, cfg.pictures) == (str(tmp_path / "rows.csv"), str(tmp_path / "drawn"))


def test_lists_slashes_and_absolute_paths_are_kept():
    cfg = OmegaConf.create({"runs": ["a", "/b"], "out": "report/", "picture": None, "run": "/c"})
    resolve_paths(cfg, Path("/start"))
    assert cfg == {"runs": ["/start/a", "/b"], "out": "/start/report/", "picture": None, "run": "/c"}


# -- sources that are not installed ------------------------------------------------------------------------------------


def test_a_package_without_metadata_has_no_version(monkeypatch):
    known = importlib.metadata.version

    def version(name: str) -> str:
        if name == "litdistill":
            raise importlib.metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = versions.versions()
    assert found["litdistill"] is None
    assert found["torch"] == known("torch")


def test_an_installed_package_has_no_commit_though_it_lies_in_somebodys_repository(monkeypatch):
    monkeypatch.setattr(versions, "ROOT", None)
    assert versions.git_state() is None


def test_paths_are_said_as_they_are_typed_in_a_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert near("runs/a") == near(tmp_path / "runs" / "a") == "runs/a"
    assert near(tmp_path) == near(".") == str(tmp_path)  # a working folder that is the run's says nothing
    assert near("../b") == str(tmp_path.parent / "b")
    assert typed("run", "runs/a") == "run=runs/a"
    assert typed("run", "my runs/a=1") == "\"run='my runs/a=1'\""
    for odd in ("my runs/$a", "a b`c", 'a "b"', "a\\b c", "it's"):
        assert OverridesParser.create().parse_override(shlex.split(typed("run", odd))[0]).value() == odd
