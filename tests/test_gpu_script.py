"""`make gpu`: no stage can hang, none is measured twice, every figure is kept at once; its dry form runs on a CPU."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import benchmark_parts as parts
import gpu
import gpu_cells
import gpu_forms
import gpu_graph
import gpu_stages

from litdistill.benchmarks import published_tables
from litdistill.utils.errors import UserError

CPU = torch.device("cpu")
TINY = parts.PAIRS["small"]._replace(steps=2, light_steps=2, batch=4)
HANGS = (
    "import subprocess, sys, time; print('begun', flush=True); p = subprocess.Popen(['sleep', '600']); {say}; p.wait()"
)


def stages(monkeypatch, **commands):
    """Stages of these commands, each with three seconds."""
    monkeypatch.setattr(gpu, "STAGES", tuple(gpu.Stage(name, 3) for name in commands))
    monkeypatch.setattr(gpu, "command", lambda stage, given: [sys.executable, "-c", commands[stage]])


def ended(out: Path) -> dict[str, object]:
    return {f["stage"]: f["status"] for f in gpu.Figures(out / "figures.jsonl").read() if f["what"] == "ended"}


def is_gone(pid: int) -> bool:
    """Whether a process has ended within some seconds, or is only to be waited for."""
    stat = Path(f"/proc/{pid}/stat")
    for _ in range(50):
        if not stat.exists() or "Z" in stat.read_text().split():
            return True
        time.sleep(0.1)
    return False


def test_a_stage_that_hangs_is_killed_with_its_children_and_the_next_one_runs(tmp_path, monkeypatch):
    child = tmp_path / "child"
    stages(monkeypatch, a=HANGS.format(say=f"open({str(child)!r}, 'w').write(str(p.pid))"), b="print('b')")
    start = time.monotonic()
    assert gpu.main([f"out={tmp_path}"]) == 1
    assert time.monotonic() - start < 60
    assert ended(tmp_path) == {"a": "killed at its limit", "b": 0}
    assert is_gone(int(child.read_text()))
    assert (tmp_path / "log.txt").read_text() == "begun\nb\n"


def test_a_termination_ends_the_stage_that_runs(tmp_path, monkeypatch):
    child = tmp_path / "child"
    say = f"open({str(child)!r}, 'w').write(str(p.pid)); import os, signal; os.kill(os.getppid(), signal.SIGTERM)"
    stages(monkeypatch, a=HANGS.format(say=say))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        gpu.main([f"out={tmp_path}"])
    assert is_gone(int(child.read_text()))
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_finished_stage_is_skipped_and_a_failed_one_begun_anew(tmp_path, monkeypatch, capsys):
    stages(monkeypatch, a="print('once')", b="raise SystemExit(3)")
    assert gpu.main([f"out={tmp_path}"]) == 1
    assert gpu.main([f"out={tmp_path}"]) == 1
    assert (tmp_path / "log.txt").read_text() == "once\n"
    assert "a: finished before" in capsys.readouterr().out
    assert ended(tmp_path) == {"a": 0, "b": 3}


def test_the_dry_form_gives_no_stage_more_than_ten_minutes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "STAGES", (gpu.Stage("a", 4 * 3600), gpu.Stage("b", 60)))
    monkeypatch.setattr(gpu, "command", lambda stage, given: [sys.executable, "-c", "pass"])
    assert gpu.main([f"out={tmp_path}", "device=cpu"]) == 0
    said = capsys.readouterr().out
    assert "-- a, at most 600 s" in said
    assert "-- b, at most 300 s" in said


def test_no_stage_begins_when_the_time_is_over(tmp_path, monkeypatch, capsys):
    stages(monkeypatch, a="pass")
    assert gpu.main([f"out={tmp_path}", "seconds=2"]) == 0
    assert "a: not begun" in capsys.readouterr().out


def test_a_figure_is_kept_at_once_and_measured_once_and_an_error_again(tmp_path):
    path = tmp_path / "figures.jsonl"
    path.write_text('{"stage": "s", "what": "known", "ms": 1.0}\n{"stage": "s", "wh')  # cut by a kill
    figures, calls = gpu.Figures(path), []

    def work():
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return {"ms": 2.0}

    figures.measure("s", "known", work)
    assert not calls
    figures.measure("s", "new", work)
    assert "out of memory" in figures.read()[-1]["error"]
    figures.measure("s", "new", work)
    figures.measure("s", "new", work)
    assert len(calls) == 2
    assert [f.get("ms") for f in figures.read()] == [1.0, None, 2.0]


def test_unknown_options_and_stages_end_the_command():
    for argument in ("stage=a", "stages=stepz", "cuda"):
        with pytest.raises(SystemExit, match=r"option|stage"):
            gpu.options([argument])


def test_the_table_has_a_column_a_pair_and_ratios():
    lines = [
        {"stage": "peers", "what": "small peers", "pair": "small", "ms": 6.0},
        {"stage": "steps", "what": "small live captured", "pair": "small", "ms": 0.5, "kernels": 144.0},
        {"stage": "steps", "what": "small live bare", "pair": "small", "ms": 0.4},
    ]
    text = gpu.table(lines)
    assert "| peers ÷ live | 12.00 |" in text
    assert "| live ÷ bare graph | 1.25 |" in text
    assert "| peers ÷ cached | – |" in text
    assert "| steps | small live captured | kernels 144 |" in text


def test_losses_and_weights_of_captured_and_eager_steps_are_compared():
    found = gpu_stages.same_training(parts.Bench(TINY, CPU), "live", 3)
    assert (found["steps"], found["equal"], found["loss"], found["weights"]) == (3, True, 0.0, 0.0)
    assert gpu_stages.apart([1.0, 2.0], [1.0, 2.5]) == pytest.approx(0.2)


def test_accuracies_are_the_same_within_their_spread_over_seeds():
    assert gpu_stages.within_seeds([0.90, 0.92], [0.91, 0.93])
    assert not gpu_stages.within_seeds([0.90, 0.91], [0.92, 0.93])


def given(out: Path) -> dict[str, str]:
    return {"out": str(out), "runs": str(out / "runs"), "data": str(out / "none"), "device": "cpu"}


def test_a_teacher_is_trained_first_and_kept_and_summaries_are_copied_once(tmp_path, monkeypatch):
    monkeypatch.setattr(
        gpu_cells, "HINTON", tuple(gpu_cells.HINTON[i] for i in (0, 2))
    )  # the teacher, and one of its students
    figures = gpu.Figures(tmp_path / "figures.jsonl")
    gpu_cells.hinton_on_mnist(figures, CPU, given(tmp_path))
    teacher, student = figures.read()
    assert student["its_teacher"] == teacher["best"]
    places = {Path(f["summary"]) for f in (teacher, student)}
    assert {p.parts[:3] for p in places} == {("results", "hinton2015", n) for n in ("teacher_long", "distilled")}
    assert "teacher=teacher_long" in student["summary"]
    assert all((tmp_path / p).is_file() for p in places)
    monkeypatch.setattr(gpu_cells, "run", lambda *_, **__: pytest.fail("trained again"))
    gpu_cells.hinton_on_mnist(figures, CPU, given(tmp_path))
    assert figures.read() == [teacher, student]


def test_means_are_over_the_seeds_of_each_experiment(tmp_path, capsys):
    figures = gpu.Figures(tmp_path / "figures.jsonl")
    for what, last in (("a/kd seed 0", 90.0), ("a/kd seed 1", 92.0), ("a teacher", 95.0), ("b/kd seed 0", 80.0)):
        figures.add("cells", what, last=last)
    capsys.readouterr()
    gpu_cells.means(figures, "cells")
    said = capsys.readouterr().out.splitlines()
    assert said == ["cells: a/kd: 91.00 ± 1.41, 2 seeds", "cells: b/kd: 80.00, 1 seeds"]


def test_cells_are_those_of_published_tables_and_need_their_data(tmp_path):
    found = published_tables.experiments()
    assert all(f"{pair}/{method}" in found for pair, methods in gpu_cells.PAIRS.items() for method in methods)
    with pytest.raises(UserError, match="cifar10"):
        gpu_cells.cells_of_tables(gpu.Figures(tmp_path / "f.jsonl"), torch.device("cuda"), given(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cached", [False, True])
def test_the_bare_step_trains_the_student(monkeypatch, cached):
    bench, kept = parts.Bench(TINY, CPU), []
    networks = bench.networks
    monkeypatch.setattr(bench, "networks", lambda: kept.append(networks()) or kept[-1])
    step = gpu_graph.bare_step(bench, cached)
    (student, teacher), before = kept[0], [p.clone() for p in kept[0][0].parameters()]
    frozen = [p.clone() for p in teacher.parameters()]
    step()
    assert all(not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(frozen, teacher.parameters(), strict=True))
    assert gpu_graph.seconds_of(bench, gpu_graph.captured(step, CPU), 2) > 0


def test_stacked_students_train_as_each_of_them_alone():
    bench = parts.Bench(TINY, CPU)
    given, refresh = gpu_forms.batches(bench)
    one, many = gpu_forms.students_of(bench, 3), gpu_forms.students_of(bench, 3)
    steps = gpu_forms.side_by_side([gpu_forms.alone(bench, student, given) for student in one], CPU)
    together, weights = gpu_forms.stacked(bench, many, given)
    before = {name: w.detach().clone() for name, w in weights.items()}
    for _ in range(3):
        refresh()
        steps()
        together()
    for i, student in enumerate(one):
        for name, w in student.named_parameters():
            torch.testing.assert_close(weights[name][i], w, rtol=1e-4, atol=1e-6)
            assert not torch.equal(before[name][i], w)


def test_streams_that_take_half_as_long_again_make_the_stacked_form_worth_building(tmp_path, monkeypatch):
    figures, taken = gpu.Figures(tmp_path / "figures.jsonl"), iter([1e-3, 4.5e-3, 3e-3])
    monkeypatch.setattr(gpu_forms, "seconds_of", lambda *_: next(taken))
    gpu_forms.many_students(figures, CPU, given(tmp_path))
    (found,) = (f for f in figures.read() if f["what"] == "ratios")
    assert (found["streams ÷ one"], found["streams ÷ stacked"]) == pytest.approx((4.5, 1.5))
    assert found["worth"] is True


@pytest.mark.slow
def test_the_dry_form_runs_to_its_end(tmp_path):
    assert gpu.main(["device=cpu", f"out={tmp_path}"]) == 0
    assert set(ended(tmp_path).values()) == {0}
    assert {json.loads(line)["stage"] for line in (tmp_path / "figures.jsonl").read_text().splitlines()} == {
        stage.name for stage in gpu.STAGES
    }
    assert "| live, captured |" in (tmp_path / "table.md").read_text()
