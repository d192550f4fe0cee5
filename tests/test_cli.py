"""The commands as a user types them: in processes of their own, and their errors in this one."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from litdistill import cli
from litdistill.cli.hydra_main import check_deleted, run_task
from litdistill.cli.resume import resumed
from litdistill.cli.suggestions import suggestions
from litdistill.report.tables import rows, summaries
from litdistill.report.writers import markdown
from litdistill.utils.errors import UserError
from litdistill.utils.paths import CONF
from litdistill.utils.text import markdown_table
from litdistill.utils.units import gain, spread

ROOT = Path(__file__).parents[1]
FAST = [
    "data.per_class=12", "data.batch_size=32", "student.widths=[8,8]", "teacher.widths=[16,16]", "trainer=cpu",
    "trainer.max_epochs=2", "+teacher.recipe.trainer.max_epochs=3", "threads=1",
]  # fmt: skip


def call(script: str, *arguments: str, cwd: Path, **options) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "RUN_STAMP"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=env, timeout=300, **options)


@pytest.mark.process
def test_a_sweep_its_report_and_an_evaluation(tmp_path):
    done = call("train", "-m", *FAST, "name=try", "seed=0,1", "method=supervised,kd", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "runs" / "try").iterdir()
    assert "4 finished runs in runs/try/" in done.stdout.splitlines()[-1]
    assert "`Trainer.fit` stopped" not in done.stdout  # in the log alone
    assert sorted(p.name for p in sweep.iterdir() if p.is_dir()) == ["kd-s0", "kd-s1", "supervised-s0", "supervised-s1"]
    assert len(list((tmp_path / "runs" / "teachers").glob("conv4*/summary.json"))) == 1
    log = (sweep / "supervised-s0" / "train.log").read_text()
    assert "`Trainer.fit` stopped" in log  # Lightning's own line ...
    assert log.count("`Trainer.fit` stopped: `max_epochs=2` reached") == 1  # ... and once
    assert "epoch 2/2" in log
    command = json.loads((sweep / "kd-s1" / "summary.json").read_text())["command"]  # of this job alone
    assert command == shlex.join(["python", "scripts/train.py", *FAST, "name=try", "seed=1", "method=kd"])

    shown = call("report", f"runs={sweep}", "out=table.md", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "±" in (tmp_path / "table.md").read_text()
    again = call("evaluate", f"run={sweep}/kd-s1", "device=cpu", cwd=tmp_path)
    assert "reproduced to the digit" in again.stdout, again.stdout + again.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs", "table.md"]  # no command litters


@pytest.mark.process
def test_ctrl_c_ends_cleanly_and_resume_auto_goes_on(tmp_path):
    arguments = [*FAST, "trainer.max_epochs=300", "name=long"]
    env = {k: v for k, v in os.environ.items() if k != "RUN_STAMP"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *arguments]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("runs/long/*/checkpoints/last.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    assert "Stopped by SIGINT" in err
    assert "Traceback" not in err
    (folder,) = (tmp_path / "runs" / "long").iterdir()
    assert not (folder / "summary.json").exists()
    done = call("train", *arguments, "resume=auto", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Going on from" in (folder / "train.log").read_text()
    assert (folder / "summary.json").is_file()
    assert [p.name for p in (tmp_path / "runs" / "long").iterdir()] == [folder.name]


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("data.per_clas=3", "did you mean data.per_class?"),
        ("method.temprature=3", "did you mean method.temperature?"),
        ("data.batchsize=3", "did you mean data.batch_size?"),
        ("net@student=conv44", "did you mean conv4"),
        ("method=kdd", "did you mean kd"),
        ("exprimnt=mnist", "did you mean experiment"),
        ("trainer.max_epoch=3", "did you mean trainer.max_epochs"),
        ("trainer.max_steps=3", "is set with a plus sign: +trainer.max_steps=3"),
        ("optimizer.eps=1e-6", "is set with a plus sign: +optimizer.eps=1e-6"),
        ("temperature=3", "method.temperature"),
        ("optimizer.lr", "key=value"),
        ("zzz=1", "unknown"),
        (
            "data.root=/my images=v1",
            """Quote the value, which contains characters of Hydra's grammar: 'data.root="/my images=v1"'""",
        ),
        ("teacher.recipe.trainer.max_epochs=3", "++teacher.recipe.trainer.max_epochs=3"),
    ],
)
def test_a_typo_is_answered_with_the_nearest_names(argument, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", argument])
    with pytest.raises(SystemExit) as ended:
        run_task(lambda cfg: pytest.fail("the config was accepted"), "train")
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert "Traceback" not in shown
    assert "To append to your config" not in shown  # a key that nothing reads


def test_flags_that_exclude_each_other_are_refused_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "seed=0,1", "--cfg", "job"])
    with pytest.raises(SystemExit) as ended:
        run_task(lambda cfg: pytest.fail("the config was accepted"), "train")
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip().startswith("Only one of --run, --multirun, --cfg")


def test_a_typo_is_compared_with_the_options_of_what_is_chosen():
    found = suggestions(["data=texts", "data.tokenzier=bpe", "net@student=text_cnn", "student.kernel=[3]"], "train")
    assert "data.tokenzier: did you mean data.tokenizer?" in found
    assert "student.kernel: did you mean student.kernels?" in found
    assert "did you mean texts" in suggestions(["data=tekst", "experiment=nothing"], "train")


@pytest.mark.parametrize("name", ["callbacks", "logger", "teacher"])
def test_deleting_a_group_that_is_read_is_refused(monkeypatch, capsys, tmp_path, name):
    monkeypatch.setattr(sys, "argv", ["train.py", f"runs={tmp_path}", f"~{name}"])
    with pytest.raises(SystemExit):
        run_task(lambda cfg: pytest.fail("it runs"), "train")
    assert f"~{name} deletes a key that is read here: {name}=null" in capsys.readouterr().err
    check_deleted(OmegaConf.create({name: {"_target_": "my.Own"}}), [f"~{name}", f"+{name}=…"], "train")  # it is back


def test_a_user_error_is_shown_alone_and_a_defect_with_its_traceback(monkeypatch, capsys, tmp_path):
    # An option of a group that is not the default one: no typo, whatever else is wrong.
    monkeypatch.setattr(
        sys, "argv", ["train.py", f"runs={tmp_path}", "net@student=torchvision", "student.name=resnet18"]
    )

    def wrong(cfg):
        raise UserError("the remedy")

    with pytest.raises(SystemExit) as ended:
        run_task(wrong, "train")
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip().endswith("the remedy")

    assert list(tmp_path.rglob("*")) == []  # nothing was done in the run's folder: it is removed
    assert tmp_path.is_dir()  # which was there before

    def late(cfg):
        (Path(HydraConfig.get().runtime.output_dir) / "checkpoints").mkdir()
        (Path(HydraConfig.get().runtime.output_dir) / "checkpoints" / "last.ckpt").write_bytes(b"1")
        raise UserError("the remedy")

    with pytest.raises(SystemExit):
        run_task(late, "train")
    (kept,) = tmp_path.rglob("last.ckpt")
    assert (kept.parents[1] / ".hydra" / "config.yaml").is_file()

    def broken(cfg):
        raise ZeroDivisionError("a defect")

    with pytest.raises(ZeroDivisionError):
        run_task(broken, "train")


@pytest.mark.parametrize("verb", sorted(p.stem for p in CONF.glob("*.yaml")))
def test_a_refused_command_leaves_the_folder_in_which_it_was_called(verb, monkeypatch, tmp_path):
    def wrong(cfg):
        raise UserError("the remedy")

    (tmp_path / "own.log").write_text("mine")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{verb}.py"])
    with pytest.raises(SystemExit):
        run_task(wrong, verb)
    assert (tmp_path / "own.log").read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} == {"own.log", "empty"}  # and no folder of runs


def test_a_full_or_read_only_disk_is_named_with_the_remedy(monkeypatch, capsys, tmp_path):
    def full(cfg):
        raise OSError(28, "No space left on device", "runs/x/checkpoints/last.ckpt")

    (tmp_path / "file").write_text("")
    for runs, words in ((tmp_path, "No space left"), (tmp_path / "file", "Not a directory")):
        monkeypatch.setattr(sys, "argv", ["train.py", f"runs={runs}"])
        with pytest.raises(SystemExit) as ended:
            run_task(full, "train")
        assert ended.value.code == 2
        shown = capsys.readouterr().err
        assert words in shown
        assert "choose another folder with runs=" in shown


@pytest.mark.process
@pytest.mark.parametrize("verb", [name for name, verb in cli.VERBS.items() if verb.config is not None])
def test_help_and_the_composed_config_are_shown(verb, tmp_path):
    shown = call(verb, "--cfg", "job", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert any(line.startswith(("run", "data", "student")) for line in shown.stdout.splitlines())
    assert "\nKeys:\n" in call(verb, "--help", cwd=tmp_path).stdout
    assert list(tmp_path.iterdir()) == []


def test_resume_finds_the_newest_unfinished_run_of_the_same_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def started(stamp: str, *overrides: str, finished: bool = False, command: str = "train") -> None:
        folder = tmp_path / "runs" / "train" / stamp
        (folder / ".hydra").mkdir(parents=True)
        known = {"hydra": {"overrides": {"task": list(overrides)}, "job": {"config_name": command}}}
        (folder / ".hydra" / "hydra.yaml").write_text(json.dumps(known))
        if finished:
            (folder / "summary.json").write_text("{}")

    started("2026-01-01", "seed=1")
    started("2026-01-02", "seed=1")
    started("2026-01-03", "seed=1", finished=True)
    started("2026-01-04", "seed=2")
    started("2026-01-05", "seed=1", command="sweep")
    assert resumed(["seed=1", "resume=auto"]) == ["seed=1", "hydra.run.dir=runs/train/2026-01-02"]
    assert resumed(["seed=9", "resume=auto"]) == ["seed=9"]
    assert "no unfinished run" in capsys.readouterr().out
    assert resumed(["seed=1"]) == ["seed=1"]
    found = resumed(["resume=runs/train/2026-01-04", "trainer.max_epochs=9"])
    assert found == ["seed=2", "trainer.max_epochs=9", "hydra.run.dir=runs/train/2026-01-04"]
    with pytest.raises(UserError, match="no run was started there"):
        resumed(["resume=runs/nothing"])
    started("2026-01-06", "seed=3", "data=digits")
    swapped = ["data=digits", "seed=3"]
    assert resumed([*swapped, "resume=auto"]) == [*swapped, "hydra.run.dir=runs/train/2026-01-06"]
    started("2026-01-07", "seed=4", "seed=5")
    assert resumed(["seed=5", "seed=4", "resume=auto"]) == ["seed=5", "seed=4"]  # the last one counts


def summary(seed: int, accuracy: float, method: str = "kd", temperature: float = 4.0) -> dict:
    test = {"accuracy": {"best": accuracy, "last": accuracy - 0.01}, "nll": 0.1, "ece": 0.01, "brier": 0.1}
    student = {"name": "s", "sha256": f"{method}{seed}", "params": 10, "test": test, "agreement": None}
    data = {"name": "digits", "train": 100}
    options = {"method": method, "method/temperature": temperature}
    return {
        "experiment": "e",
        "method": method,
        "seed": seed,
        "metric": {"name": "accuracy", "direction": "max"},
        "data": data,
        "options": options,
        "teacher": None,
        "student": student,
        "epochs": 3,
        "time": {"total_s": 2.0},
    }


def test_a_report_groups_seeds_and_gives_mean_and_spread(tmp_path):
    for i, run in enumerate(
        [
            *(summary(0, 0.90), summary(1, 0.92), summary(0, 0.5, "supervised"), summary(0, 0.7, temperature=8.0)),
            summary(1, 0.92),  # repeated
        ]
    ):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "summary.json").write_text(json.dumps(run))
    table = rows(summaries([tmp_path]))
    assert [r["method"] for r in table] == ["kd (temperature 4.0)", "supervised", "kd (temperature 8.0)"]
    assert table[0]["test accuracy %"] == "91.00 ± 1.41"
    assert table[0]["seeds"] == "2"
    assert table[1]["test accuracy %"] == "50.00"
    assert markdown(table).count("\n") == 5
    assert spread([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert gain({0: 50.0, 1: 60.0, 2: 0.0}, {0: 40.0, 1: 50.0}) == "+10.00 ± 0.00"  # of the seeds that both have
    assert gain({0: 89.0, 1: 80.0}, {0: 90.0, 1: 83.0}) == "−2.00 ± 1.41"
    assert gain({0: 1.0}, {1: 1.0}) == "–"
    assert markdown_table(["a", "b", "c"], [["x|y", 1, "z"]], 2) == "| a | b | c |\n|---|---|---:|\n| x\\|y | 1 | z |"
    with pytest.raises(UserError, match="no folder"):
        summaries([tmp_path / "nowhere"])
