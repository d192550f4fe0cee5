"""What a sweep says: a line for each trial, a table at its end, and the command that reruns the best."""

import functools
import io
import logging
import shlex

import pytest
from rich.console import Console

from litdistill.sweep import trial as sweep_trial
from tests.sweeps import (
    accuracy,
    leave,
    quick_fixture,  # noqa: F401
    start,
)

pytest.importorskip("optuna")

from tests.composed import composed


def test_a_trial_is_a_line_on_the_screen_and_its_lines_are_in_its_file_alone(quick, monkeypatch, tmp_path, caplog):
    from litdistill.sweep import study as module

    screen = io.StringIO()
    handler = logging.StreamHandler(screen)
    monkeypatch.setattr(logging.getLogger(), "level", logging.INFO)

    def train(cfg, callbacks=(), member=None):
        logging.getLogger("litdistill.training.train").info("a line of the run")
        logging.getLogger("litdistill.training.prerequisites").info("No such teacher yet")
        leave(cfg, accuracy(cfg))

    monkeypatch.setattr(sweep_trial, "train", train)
    logging.getLogger().addHandler(handler)
    try:
        study = start(tmp_path / "a", "sweep.trials=3")
        module.log.info("after it")
    finally:
        logging.getLogger().removeHandler(handler)
    lines = screen.getvalue().splitlines()
    told = [line for line in lines if line.startswith("Trial ")]
    assert [line.split()[1] for line in told] == ["0", "1", "2"]
    so_far = 0.0
    for line, trial in zip(told, study.trials, strict=True):
        so_far = max(so_far, trial.value)
        assert f"method.temperature={trial.params['method.temperature']:.4g}" in line
        assert f"best {so_far:.6g} (trial " in line
    assert ["left" in line for line in told] == [True, True, False]
    assert "a line of the run" not in lines
    assert "No such teacher yet" in lines  # it takes long
    assert "after it" in lines
    for number in "012":
        assert (tmp_path / "a" / number / "train.log").read_text().count("a line of the run") == 1


def test_a_sweep_ends_with_its_table_the_best_value_and_the_command_that_reruns_it(quick, tmp_path, caplog, capsys):
    caplog.set_level("INFO")
    study = start(tmp_path / "a", "sweep.trials=3", "data.batch_size=16")
    best = study.best_trial
    table = capsys.readouterr().out
    first_row = next(line for line in table.splitlines() if line.startswith("│"))
    assert first_row.split("│")[1].strip() == str(best.number)
    assert f"The best is trial {best.number}: val/accuracy {best.value:.6g}" in caplog.text
    (command,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("To rerun the best: ")]
    words = shlex.split(command.removeprefix("To rerun the best: "))
    overrides = [w for w in words if "=" in w]
    cfg = composed("train", ["folder=x", *overrides])
    assert accuracy(cfg) == pytest.approx(best.value)
    assert cfg.data.batch_size == 16
    assert "train" in words[:4] or words[1].endswith("train.py")


@pytest.mark.parametrize("width", [60, 80])
def test_the_table_fits_a_narrow_terminal(quick, tmp_path, monkeypatch, width, capsys, caplog):
    caplog.set_level("INFO", "litdistill.sweep.report")
    monkeypatch.setenv("COLUMNS", str(width))
    console = functools.partial(Console, force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr("litdistill.sweep.report.Console", lambda **_: console())
    start(tmp_path / "a", "sweep.trials=2")
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines() if line[:1] in "│┏┃└┡") <= width
    assert "…" not in shown
    assert caplog.text.count("All trials and parameters are in") == 1
