"""Kill −9 at any moment, then the same command with `resume=auto`: it ends with the very numbers of a run that was left
alone. Killed are real commands, forked after their imports, and (slow) a process from its first line on."""

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from litdistill.cli.resume import resumed
from litdistill.config import origin
from litdistill.data import fetch
from litdistill.utils.checkpoint import AtomicCheckpointIO
from tests.forked import (
    ROOT,
    TINY,
    after_epoch,
    call,
    finished,
    killed_at_change,
    no_pictures,
    note_changes,
    same,
    start,
    weights,
)

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Where a run was left alone; beside it the changes that it made, a line each."""
    cwd = tmp_path_factory.mktemp("whole") / "cwd"
    status, printed = call("train", TINY, cwd, partial(note_changes, cwd.parent / "changes"))
    assert status == 0, printed
    assert len(list(cwd.glob("runs/teachers/*/summary.json"))) == 1
    return cwd


def assert_as_if_left_alone(whole: Path, cwd: Path) -> None:
    """The student, its teacher, what is measured of them, and no litter."""
    for name in ("one", "teachers"):
        (ours,), (theirs,) = finished(cwd, name), finished(whole, name)
        assert same(weights(ours), weights(theirs))
        assert same(load_file(ours / "student.safetensors"), load_file(theirs / "student.safetensors"))
        measured = [json.loads((p / "summary.json").read_text()) for p in (ours, theirs)]
        assert measured[0]["student"]["test"] == measured[1]["student"]["test"]
        assert measured[0]["val"] == measured[1]["val"]
        assert not [p for p in ours.rglob("*") if p.suffix == ".part"]


FORK = multiprocessing.get_context("fork")
OFTEN = ("checkpoint_minutes=0",)  # a checkpoint after every step
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("stride", "extra"),
    [(17, OFTEN), pytest.param(1, (), marks=SLOW), pytest.param(1, OFTEN, marks=SLOW)],
    ids=["some", "all", "all, saved at every step"],
)
def test_a_kill_before_or_within_any_write_loses_nothing(whole, tmp_path, stride, extra):
    count = len((whole.parent / "changes").read_text().splitlines())
    assert count > 50
    for number in range(2, count + 1, stride):
        cwd = tmp_path / str(number)
        status, printed = call("train", [*TINY, *extra], cwd, partial(killed_at_change, number))
        if status == 0 and number > 50:
            break  # how often events are flushed depends on the clock, so a run has now more writes and now fewer
        assert status == -signal.SIGKILL, (number, printed)
        status, printed = call("train", [*TINY, *extra, "resume=auto"], cwd, no_pictures)
        assert status == 0, (number, printed)
        assert_as_if_left_alone(whole, cwd)


@pytest.mark.parametrize(
    ("wanted", "extra"), [(6, OFTEN), pytest.param(20, (), marks=SLOW), pytest.param(20, OFTEN, marks=SLOW)]
)
def test_kills_at_random_moments_lose_nothing(whole, tmp_path, wanted, extra):
    draw, kills = random.Random(0), 0
    began = time.monotonic()
    call("train", [*TINY, *extra], tmp_path / "timed", no_pictures)
    life = time.monotonic() - began
    for attempt in itertools.count():
        if kills >= wanted:
            break
        cwd = tmp_path / str(attempt)
        # All over a life from its start, and then on what goes on from there.
        moment = life * (kills + draw.random()) / wanted
        while not finished(cwd):  # a run that is killed when it has just finished is no more resumed
            process = start("train", [*TINY, *extra, "resume=auto"], cwd, no_pictures)
            process.join(moment)
            if process.exitcode is None:
                process.kill()
                process.join()
                kills += 1
                moment = life * draw.uniform(0.2, 2)
            else:
                assert process.exitcode == 0, (cwd / "output").read_text()
                life *= 0.9  # the machine is less busy than when it was measured
        assert_as_if_left_alone(whole, cwd)


def die(_: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_multirun_goes_on_with_the_job_that_it_was_at(tmp_path):
    arguments = ["-m", *TINY, "seed=0,1"]
    assert call("train", arguments, tmp_path / "whole", no_pictures)[0] == 0
    for epoch in (4, 7):  # in the first job, in the second
        cwd = tmp_path / str(epoch)
        assert call("train", arguments, cwd, partial(after_epoch, epoch, die))[0] == -signal.SIGKILL
        status, printed = call("train", [*arguments, "resume=auto"], cwd, no_pictures)
        assert status == 0, printed
        assert ("is finished already" in printed) is (epoch == 7)
        assert len(list(cwd.glob("runs/one/*"))) == 1
        for ours, theirs in zip(finished(cwd), finished(tmp_path / "whole"), strict=True):
            assert same(weights(ours), weights(theirs))


SWEEP = ["sweep=random", "sweep.trials=2", "sweep.prune=null", *TINY]


@pytest.mark.parametrize("storage", ["sqlite", pytest.param("journal", marks=SLOW)])
def test_a_killed_sweep_goes_on_with_the_trial_that_it_was_at(tmp_path, storage):
    pytest.importorskip("optuna")
    arguments = [f"sweep.storage={storage}", *SWEEP]
    assert call("sweep", arguments, tmp_path / "whole", no_pictures)[0] == 0
    cwd = tmp_path / "parts"
    for epoch in (4, 5):  # in the first trial, in the second
        assert call("sweep", [*arguments, "resume=auto"], cwd, partial(after_epoch, epoch, die))[0] == -signal.SIGKILL
    status, printed = call("sweep", [*arguments, "resume=auto"], cwd, no_pictures)
    assert status == 0, printed
    assert "Going on with trial 1" in printed
    (ours,), (theirs,) = cwd.glob("runs/one/*"), (tmp_path / "whole").glob("runs/one/*")
    assert (ours / "sweep.md").read_text().splitlines()[2:6] == (theirs / "sweep.md").read_text().splitlines()[2:6]
    for trial in ("0", "1"):
        assert same(weights(ours / trial), weights(theirs / trial))


def save_over(cwd: Path, number: int) -> None:
    """Writes a checkpoint over another one, and is killed at a change of a file."""
    os.chdir(cwd)
    tempfile.tempdir = "/dev/shm"  # another disk than the run's
    killed_at_change(number)
    AtomicCheckpointIO().save_checkpoint({"step": 2, "weights": torch.ones(10_000)}, cwd / "last.ckpt")


def test_a_checkpoint_is_the_old_one_or_the_new_one_at_any_moment(tmp_path):
    steps = []
    for number in range(1, 10):
        AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
        process = FORK.Process(target=save_over, args=(tmp_path, number))
        process.start()
        process.join()
        steps.append(torch.load(tmp_path / "last.ckpt", weights_only=True)["step"])
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert len(steps) > 3
    assert steps == [1] * (len(steps) - 1) + [2]


def fetch_slowly(root: Path, step: int | None, notes: Path) -> None:
    """Fetches a published set of two files from a folder; killed at that change of a file, or noting all."""
    os.chdir(root)
    files = {name: name.encode() * 1000 for name in ("a", "b")}
    known = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    fetch.DATASETS["mnist"] = fetch.DATASETS["mnist"]._replace(digests=known, downloaders={"here": lambda _: files})
    if step is None:
        note_changes(notes)
    else:
        killed_at_change(step)
    assert fetch.obtain("mnist", root).content == files


@pytest.mark.parametrize("damaged", [False, True])
def test_a_kill_while_data_is_fetched_leaves_no_file_that_is_not_whole(tmp_path, damaged):
    def fetched(name: str, step: int | None) -> int | None:
        root = tmp_path / name
        (root / "mnist").mkdir(parents=True, exist_ok=True)
        if damaged and not (root / "mnist" / "a").exists():
            (root / "mnist" / "a").write_bytes(b"half of i")
        process = FORK.Process(target=fetch_slowly, args=(root, step, tmp_path / "notes"))
        process.start()
        process.join()
        return process.exitcode

    assert fetched("whole", None) == 0
    count = len((tmp_path / "notes").read_text().splitlines())
    assert count > 5
    for step in range(1, count + 1):
        assert fetched(str(step), step) == -signal.SIGKILL
        assert fetched(str(step), None) == 0
        left = {p.name for p in (tmp_path / str(step) / "mnist").iterdir() if not p.name.startswith(".fetch-")}
        assert left == {"a", "b"} | ({"a.damaged"} if damaged else set())


def test_no_part_of_the_note_of_a_command_is_taken_for_another_command(tmp_path):
    assert call("train", [*TINY, "trainer.max_epochs=1", "seed=3"], tmp_path, partial(after_epoch, 1, die))[0] < 0
    (note,) = tmp_path.glob("runs/one/*/.hydra/hydra.yaml")
    text, part = note.read_text(), tmp_path / "part.yaml"
    whole = ("train", [*TINY, "trainer.max_epochs=1", "seed=3"])
    for length in range(0, len(text) + 1, 7):
        part.write_text(text[:length])
        found = origin.read_record(part)
        assert found is None or found[:2] == whole or found.config_name not in ("train", "sweep")
    assert origin.read_record(note)[:2] == whole


@pytest.mark.parametrize("again", [[], ["-m"]])
def test_a_kill_while_a_resumed_start_is_noted_leaves_the_run_to_be_found(tmp_path, monkeypatch, capsys, again):
    arguments = [*again, *TINY, "seed=3"]
    call("train", arguments, tmp_path, partial(after_epoch, 3, die))
    (note,) = tmp_path.glob("runs/one/*/multirun.yaml" if again else "runs/one/*/.hydra/hydra.yaml")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        found = resumed([*arguments, "resume=auto"])
        assert found[-1].endswith(f".dir={next(tmp_path.glob('runs/one/*')).relative_to(tmp_path)}")
        note.write_text("hydra: {overrides: {task: [seed=3")  # what Hydra writes, cut off
    assert "no unfinished run" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_process_that_is_killed_from_its_first_line_on_loses_nothing(whole, tmp_path):
    """From the start of Python on, and without a stand-in for anything."""
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *TINY, "resume=auto"]
    env = {k: v for k, v in os.environ.items() if k != "RUN_STAMP"} | {"OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, check=True)
    life, draw = time.monotonic() - began, random.Random(0)
    for i in range(5):
        cwd = tmp_path / str(i)
        cwd.mkdir()
        process = subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(life * (i + draw.random()) / 5)
        process.kill()
        process.wait()
        subprocess.run(command, cwd=cwd, env=env, capture_output=True, check=True)
        assert_as_if_left_alone(whole, cwd)
