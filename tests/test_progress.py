"""What is told of a fit: who is trained, each epoch's own loss, one count of epochs, and enough logs for a curve."""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from litdistill.distillation.distiller import Distiller
from litdistill.methods.supervised import Supervised
from litdistill.training import callbacks, progress
from litdistill.training.grouping import log_interval
from litdistill.training.train import train
from tests.fits import digits, example, fit, grouped, net

ALONE = ["method=supervised", "teacher=null", "logger=none"]
LINE = re.compile(r"(\w[\w' ]*): epoch +(\d+)/(\d+)(.*)")


@pytest.fixture
def every_line(monkeypatch, caplog):
    """The lines of all epochs, also of those that are shorter than a second."""
    caplog.set_level(logging.INFO)
    clock = iter(range(0, 10**9, 2))
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: float(next(clock)))
    return lambda: [m.groups() for r in caplog.records if (m := LINE.fullmatch(r.getMessage()))]


@pytest.fixture
def losses(monkeypatch) -> dict[int, list[float]]:
    """The loss of each minibatch by epoch, noted where it is computed."""
    found: dict[int, list[float]] = {}
    inner = Distiller.loss

    def loss(self, *a):
        value = inner(self, *a)
        found.setdefault(self.current_epoch, []).append(value.item())
        return value

    monkeypatch.setattr(Distiller, "loss", loss)
    return found


@pytest.mark.parametrize("options", [["group=auto"], ["group=1"], ["trainer.log_every_n_steps=50", "group=1"]])
def test_the_loss_of_an_epochs_line_is_the_mean_over_its_own_minibatches(small, every_line, losses, options):
    """Whatever the logs: 120 images in minibatches of 32 are four steps, of which the last is smaller."""
    train(small(*ALONE, "trainer.max_epochs=3", "optimizer.lr=0.02", *options))
    told = [float(re.search(r"train/loss ([\d.]+)", rest)[1]) for *_, rest in every_line()]
    means = [sum(losses[e]) / 4 for e in range(3)]
    assert [len(losses[e]) for e in range(3)] == [4, 4, 4]
    assert told == pytest.approx(means, abs=6e-5)
    assert len(set(told)) == 3


def test_metrics_are_told_for_epochs_that_were_validated(small, every_line):
    train(small(*ALONE, "trainer.max_epochs=4", "trainer.check_val_every_n_epoch=2"))
    assert ["val/accuracy" in rest for *_, rest in every_line()] == [False, True, False, True]


def test_lines_say_who_is_trained_and_count_from_one(small, every_line, tmp_path):
    cfg = small("trainer.max_epochs=2", "logger=none")
    cfg.runs = str(tmp_path / "own")
    train(cfg)
    assert [line[:3] for line in every_line()] == [
        *(("Teacher", str(e), "3") for e in (1, 2, 3)),
        *(("Student", str(e), "2") for e in (1, 2)),
    ]
    lefts = [re.search(r"(\S+) s left", rest) for *_, rest in every_line()]
    assert [bool(left) for left in lefts] == [True, True, False, True, False]


def test_the_teacher_of_a_teacher_is_called_so(small, every_line, tmp_path):
    cfg = small("trainer.max_epochs=1", "logger=none", "teacher.generations=2", "teacher.allow_chance=true")
    cfg.runs = str(tmp_path / "own")
    train(cfg)
    assert list(dict.fromkeys(line[0] for line in every_line())) == ["Teacher's teacher", "Teacher", "Student"]


@pytest.mark.parametrize(
    ("epochs", "per_epoch", "every"),
    [(10, 10, 5), (1, 10, 1), (2, 10, 1), (10, 1, 1), (10, 38, 19), (100, 390, 50), (1, 1000, 50), (5, 100, 25)],
)
def test_the_interval_of_logs_fits_the_epoch(epochs, per_epoch, every):
    assert log_interval(epochs, epochs * per_epoch) == every
    assert every == 1 or epochs * per_epoch // every >= 20


@pytest.mark.parametrize("group", ["auto", "1"])
def test_a_run_of_ten_steps_an_epoch_has_a_curve(small, group):
    """Ten steps an epoch and fifty between two logs, as Lightning's default is, would give none."""
    options = ["data.batch_size=12", "trainer.max_epochs=3", "trainer.log_every_n_steps=null", f"group={group}"]
    cfg = small("method=supervised", "teacher=null", *options)
    train(cfg)
    file = next(Path(cfg.folder).rglob("events.out.tfevents*"))
    events = EventAccumulator(str(file.parent), size_guidance={"scalars": 0}).Reload()
    steps = [e.step for e in events.Scalars("loss/total")]
    assert len(steps) >= 20
    assert max(steps) >= 29


def test_a_short_fit_in_python_has_a_curve(tmp_path):
    from litdistill.training.distill import distill

    out = tmp_path / "out"
    distill(net(), None, digits(), max_epochs=2, out=out, trainer={"accelerator": "cpu"})  # three steps an epoch
    file = next(out.rglob("events.out.tfevents*"))
    assert len(EventAccumulator(str(file.parent)).Reload().Scalars("train/loss")) == 6


@pytest.mark.parametrize(("width", "group"), [(120, 4), (120, 0), (60, 4)])
def test_the_bar_counts_minibatches_and_fits_its_line(monkeypatch, tmp_path, width, group):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None, legacy_windows=False)
    monkeypatch.setattr(progress, "get_console", lambda: console)
    monkeypatch.setattr(progress, "REFRESH", 0.0)
    data = digits(batch_size=12)
    distiller = Distiller(net(), Supervised(), None, example(data), group=group)
    fit(
        distiller, grouped(data, group, 5), tmp_path, callbacks=[progress.EpochBar("Teacher")], enable_progress_bar=True
    )
    lines = [line for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", screen.getvalue()).splitlines() if line.strip()]
    assert {len(line) for line in lines} == {width}
    assert {re.match(r"Teacher: epoch (\d)/2 ", line)[1] for line in lines} <= {"1", "2"}
    assert any(re.search(r"epoch 2/2 ━* *10/10 steps", line.replace("╸", "━")) for line in lines), lines[-3:]
    assert screen.getvalue().endswith("\x1b[2K")  # the line is gone afterwards
