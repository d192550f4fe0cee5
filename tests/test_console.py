"""The console: tables at any width show every cell of `evaluate`, `export` and `nets`; lines that stand in logs alone."""

from __future__ import annotations

import io
import logging
import multiprocessing
import re
import shutil
import sys

import pytest
from rich.console import Console

from litdistill.cli import nets, overview
from litdistill.export.export import check_table
from litdistill.report.writers import evaluation_table
from litdistill.training.trainer import progress_bar
from litdistill.utils.logging import FILE, ONCE, console_handler
from litdistill.utils.paths import CONF
from litdistill.utils.terminal import show, tables

WIDTHS = (40, 60, 80, 140)
METRICS = {"accuracy": 0.9123, "nll": 0.3123, "brier": 0.1234, "ece": 0.4561}
RESULT = {
    "teacher": {k: v / 2 for k, v in METRICS.items()},
    "student": METRICS,
    "last": {"accuracy": 0.875},
    "agreement": {"agreement": 0.9377, "kl": 0.0789},
}
CHECK = {"samples": 12_345, "difference": 1.23e-6, "tolerance": {"difference": 0.0017, "agreement": 0.98}}
CHECK |= {
    "compared": ["logits", "predictions agree"],
    "agreement": 0.9876,
    "metric": "accuracy",
    "exported": 0.9543,
    "student": 0.9544,
}


def printed(capsys, width, head, rows):
    show(head, rows, Console(width=width))
    return capsys.readouterr().out


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_of_an_evaluation_is_cut(capsys, width):
    text = printed(capsys, width, *evaluation_table(RESULT))
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for cell in ("accuracy %", "agreement %", "Brier", "91.23", "0.4561", "87.50", "0.3123", "93.77", "0.0789"):
        assert cell in text
    assert text.count("on the test set") == (3 if width == 40 else 1)


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_of_an_exports_check_is_cut(capsys, width):
    text = printed(capsys, width, *check_table({"student.onnx": CHECK, "student_int8_raw.onnx": CHECK}))
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for cell in ("student_int8_raw.onnx", "12,345", "1.2e-06", "(≤ 0.0017)", "98.76", "(≥ 98)", "0.9543", "0.9544"):
        assert cell in text or width == 40
    assert "".join(re.findall(r"12,345", text)) == "12,345" * 2


@pytest.mark.parametrize("width", [60, 80])
def test_nothing_of_the_networks_is_cut(capsys, monkeypatch, tmp_path, width):
    for name in ("conv4", "efficientnet_lite0", "resnet101"):
        shutil.copy(CONF / "net" / f"{name}.yaml", tmp_path)
    monkeypatch.setattr(nets, "stdout", lambda _: Console(width=width))
    nets.main(folder=tmp_path)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    wide = tables(["net"], [], Console())  # no figures: no table
    assert wide == []
    assert "efficientnet_lite0" in text
    assert len(re.findall(r"[\d.,]+ M\b", text)) == 6  # of three networks for two inputs


def test_a_cell_wider_than_the_terminal_is_folded(capsys):
    text = printed(capsys, 30, ["file", "size"], [["a" * 50, "1"], ["b\x1b[31m", "2"]])
    assert text.count("a") == 50
    assert "b?[31m" in text
    assert max(map(len, text.splitlines())) <= 30


def test_the_overview_has_eighty_columns():
    assert max(map(len, overview().splitlines())) <= 80
    assert "experiment=photos" in overview()


def test_some_lines_stand_in_the_log_alone(monkeypatch):
    shown, kept = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    log = logging.Logger("test")
    for handler in (console_handler(), logging.StreamHandler(kept)):
        log.addHandler(handler)
    for data in ("digits", "digits", "photos"):
        log.info("%s: 10 to train on", data, extra=ONCE)
    log.info("of use to few", extra=FILE)
    log.info("`Trainer.fit` stopped: `max_epochs=2` reached.")
    log.info("Restored all states from the checkpoint at last.ckpt")
    log.info("`Trainer.fit` stopped: No validation data.")
    lines = [line.partition("  ")[2] for line in shown.getvalue().splitlines()]
    assert lines == ["digits: 10 to train on", "photos: 10 to train on", "`Trainer.fit` stopped: No validation data."]
    assert len(kept.getvalue().splitlines()) == 7


def test_a_worker_process_shows_no_bar_beside_those_of_others(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert len(progress_bar()) == 1
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    assert progress_bar() == []
