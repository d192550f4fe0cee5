"""The first second of a command: a line is on the screen before anything heavy is imported, and only where it is of use."""

from __future__ import annotations

import importlib
import io
import subprocess
import sys
import time

import pytest

from litdistill import cli
from litdistill.cli import commands, hydra_main, starting
from litdistill.cli.hydra_main import run_task
from litdistill.utils.errors import UserError
from tests.test_terminal import on_a_terminal


class Screen(io.StringIO):
    """What stands for stderr from `open` on; pytest sets its own between a fixture and the test."""

    def isatty(self) -> bool:
        return self.terminal

    def open(self) -> None:
        self.patch.setattr(sys, "stderr", self)


@pytest.fixture(params=[True, False], ids=["terminal", "pipe"])
def screen(request, monkeypatch) -> Screen:
    found = Screen()
    found.terminal, found.patch = request.param, monkeypatch
    monkeypatch.setattr(starting, "_open", None)
    for name in starting.RANKS:
        monkeypatch.delenv(name, raising=False)
    return found


LINE = "litdistill train: loading torch and Lightning …"


def test_the_line_is_completed_with_its_time(screen, monkeypatch):
    screen.open()
    clock = iter([10.0, 18.6])
    monkeypatch.setattr(starting.time, "perf_counter", lambda: next(clock))
    starting.show("train", cli.TORCH, ["seed=1"])
    assert screen.getvalue() == (LINE if screen.terminal else LINE + "\n")
    starting.end(loaded=True)
    starting.end(loaded=True)  # once
    completed = f"{LINE}\r\x1b[2Klitdistill train: loaded torch and Lightning in 9 s\n"
    assert screen.getvalue() == (completed if screen.terminal else LINE + "\n")


def test_an_error_takes_the_line_away_on_a_terminal(screen):
    screen.open()
    starting.show("train", cli.TORCH, [])
    starting.end()
    assert screen.getvalue() == (LINE + "\r\x1b[2K" if screen.terminal else LINE + "\n")


@pytest.mark.parametrize("argument", ["--help", "--cfg=job", "-h", "--cfg", "--info", "--shell-completion"])
def test_what_only_prints_has_no_line_in_a_pipe_and_names_no_torch(screen, argument):
    screen.open()
    starting.show("train", cli.TORCH, [argument])
    assert screen.getvalue() == ("litdistill train: loading …" if screen.terminal else "")


def test_a_quick_verb_has_a_line_on_a_terminal_alone(screen):
    screen.open()
    starting.show("report", "", ["runs=a"])
    assert screen.getvalue() == ("litdistill report: loading …" if screen.terminal else "")


def test_hydras_lines_of_a_multirun_stand_below(screen):
    screen.open()
    starting.show("train", cli.TORCH, ["-m", "seed=0,1"])
    starting.end(loaded=True)
    assert screen.getvalue() == LINE + "\n"


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [("LOCAL_RANK", "1", False), ("LOCAL_RANK", "0", True), ("RANK", "3", False), ("SLURM_PROCID", "2", False)],
)
def test_one_rank_speaks(screen, monkeypatch, variable, value, said):
    screen.open()
    monkeypatch.setenv(variable, value)
    starting.show("train", cli.TORCH, [])
    assert bool(screen.getvalue()) is said


def test_a_worker_of_a_sweep_says_nothing(screen):
    screen.open()
    starting.show("sweep", cli.TORCH, ["sweep.workers=1", "hydra.output_subdir=null"])
    assert not screen.getvalue()


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_line_is_there_before_a_verb_is_imported(screen, monkeypatch, verb):
    screen.open()

    def note(name):
        assert verb in screen.getvalue() or not (screen.terminal or cli.VERBS[verb].loads)
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", note)
    monkeypatch.setattr(sys, "argv", ["litdistill", verb])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 130
    assert screen.getvalue().endswith("Interrupted.\n")


def test_nothing_heavy_is_imported_before_it():
    code = (
        "import sys; import litdistill.cli; print([m for m in ('torch', 'hydra', 'rich', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_a_table_of_runs_needs_no_torch():
    modules = (
        "litdistill.report.tables",
        "litdistill.report.writers",
        "litdistill.report.pivot",
        "litdistill.report.picture",
    )
    code = f"import sys; import {', '.join(modules)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_a_users_error_within_a_task_is_told_without_hydras_line(tmp_path, monkeypatch, capfd):
    def task(cfg):
        raise UserError("no such thing")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x.py", "seed=3"])
    with pytest.raises(SystemExit) as end:
        run_task(task, "train")
    assert end.value.code == 2
    assert capfd.readouterr().err == "\nno such thing\n"


def test_a_defect_within_a_task_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(ZeroDivisionError):
        run_task(lambda cfg: 1 / 0, "train")


def test_the_error_of_an_option_ends_the_line_first(screen, tmp_path, monkeypatch):
    screen.open()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["litdistill", "train", "trainer.max_epoch=3"])
    with pytest.raises(SystemExit):
        cli.main()
    before, _, after = screen.getvalue().partition("Could not override")
    assert before == (LINE + "\r\x1b[2K\n" if screen.terminal else LINE + "\n\n")
    assert "trainer.max_epochs" in after


@pytest.mark.process
def test_a_typo_on_a_terminal_is_told_and_the_first_line_is_quick(tmp_path):
    begun = time.monotonic()
    status, shown = on_a_terminal([sys.executable, "-m", "litdistill", "train", "trainer.max_epoch=3"], tmp_path)
    assert status == 2
    assert shown.startswith(LINE)
    assert "did you mean trainer.max_epochs" in shown
    assert time.monotonic() - begun < 60


def test_the_modules_that_wait_are_those_that_say_so():
    """The verbs that are said to load torch do; the others of `commands` import it nowhere at their start."""
    assert not {"torch", "lightning"} & vars(commands).keys()
    assert not {"torch", "lightning"} & vars(hydra_main).keys()
    assert {name for name, verb in cli.VERBS.items() if verb.loads == cli.TORCH} == {
        *("train", "sweep", "evaluate", "outputs", "export", "compare", "doctor"),
    }
