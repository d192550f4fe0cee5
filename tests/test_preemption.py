"""What ends a run before its time and is no fault: signals, alone, in multiruns, sweeps and under SLURM; and two commands
at once in one place."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tests.forked import ROOT, TINY, at_batch, at_hook, call, finish, finished, no_pictures, same, start, weights

pytestmark = pytest.mark.process

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]


def hear(signum: int, _: Path) -> None:
    signal.raise_signal(signum)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, torch.Tensor]:
    """The numbers that an undisturbed run ends with."""
    cwd = tmp_path_factory.mktemp("whole")
    assert call("train", TINY, cwd, no_pictures)[0] == 0
    return weights(finished(cwd)[0])


@pytest.mark.parametrize(
    ("signum", "places", "extra"),
    [*((signum, (3, 4), []) for signum in SIGNALS), (signal.SIGTERM, (3, 11), ["group=1"])],
)
def test_a_signal_ends_a_run_with_its_status_and_resume_goes_on_with_the_next_batch(
    whole, tmp_path, signum, places, extra
):
    for batch in places:  # in the teacher's training; in the student's, of what then is left
        status, printed = call(
            "train", [*TINY, *extra, "resume=auto"], tmp_path, partial(at_batch, batch, partial(hear, signum))
        )
        assert status == 128 + signum
        assert f"Stopped by {signum.name} at step" in printed
        assert "Traceback" not in printed
    (last,) = tmp_path.glob("runs/one/*/checkpoints/last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] % 4  # in the middle of an epoch
    status, printed = call("train", [*TINY, *extra, "resume=auto"], tmp_path, no_pictures)
    assert status == 0, printed
    assert same(whole, weights(finished(tmp_path)[0]))


def test_a_second_signal_does_not_wait(tmp_path):
    def hear_twice(_: Path) -> None:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)

    assert call("train", TINY, tmp_path, partial(at_batch, 3, hear_twice))[0] == -signal.SIGUSR1


def twice(signum: int, _: Path) -> None:
    signal.raise_signal(signum)
    signal.raise_signal(signum)


SUPERVISED = [*TINY, "method=supervised", "teacher=null"]


def test_two_terminations_in_a_validation_are_no_success(tmp_path):
    """`&&`, make and SLURM would take status 0 for a finished run."""
    stop = partial(at_hook, "on_validation_epoch_start", 2, partial(twice, signal.SIGTERM))
    assert call("train", SUPERVISED, tmp_path, stop)[0] == -signal.SIGTERM  # 143 in a shell
    assert finished(tmp_path) == []
    assert call("train", [*SUPERVISED, "resume=auto"], tmp_path, no_pictures)[0] == 0


@pytest.mark.parametrize(
    ("hook", "number", "act", "state"),
    [
        ("on_train_batch_start", 1, twice, "there was no checkpoint yet"),
        ("on_train_batch_start", 3, twice, "the last checkpoint is kept"),
        ("on_validation_epoch_start", 2, twice, "the last checkpoint is kept"),
        ("on_fit_end", 1, hear, "the last checkpoint is kept"),
    ],
)
def test_a_ctrl_c_at_any_moment_has_its_status_and_says_how_to_go_on(tmp_path, hook, number, act, state):
    stop = partial(at_hook, hook, number, partial(act, signal.SIGINT))
    status, printed = call("train", SUPERVISED, tmp_path, stop)
    assert status == 130
    assert printed.rstrip().splitlines()[-1] == (
        f"Stopped by SIGINT at once; {state}. The same command with resume=auto goes on."
    )
    assert "Traceback" not in printed
    assert call("train", [*SUPERVISED, "resume=auto"], tmp_path, no_pictures)[0] == 0
    assert len(finished(tmp_path)) == 1


@pytest.mark.parametrize("script", ["train", "sweep"])
def test_a_signal_ends_all_jobs_and_not_only_the_one_it_met(tmp_path, script):
    several = {"train": ["-m", *TINY, "seed=0,1"], "sweep": ["sweep=random", "sweep.trials=2", *TINY]}[script]
    stop = partial(at_batch, 7, partial(hear, signal.SIGTERM))
    status, printed = call(script, several, tmp_path, stop)
    assert status == 128 + signal.SIGTERM
    assert finished(tmp_path) == []
    assert "Stopped by SIGTERM" in printed
    status, printed = call(script, [*several, "resume=auto"], tmp_path, no_pictures)
    assert status == 0, printed
    assert len(finished(tmp_path)) == 2


def in_slurm(folder: Path, batch: int) -> None:
    """A SLURM job of one task, and a `scontrol` that notes what it is told."""
    job = {"JOB_ID": 7, "JOB_NAME": "train", "NTASKS": 1, "NTASKS_PER_NODE": 1, "NNODES": 1, "STEP_ID": 0, "PROCID": 0}
    os.environ.update({f"SLURM_{k}": str(v) for k, v in job.items()}, SLURM_LOCALID="0", SLURM_NODEID="0")
    told = folder / "scontrol"
    told.write_text(f"#!/bin/sh\necho $@ >> {folder}/told\n")
    told.chmod(0o755)
    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
    at_batch(batch, partial(hear, signal.SIGUSR1))


def test_a_preempted_slurm_job_saves_and_leaves_the_requeueing_to_its_script(whole, tmp_path):
    cwd = tmp_path / "cwd"
    status, printed = call("train", TINY, cwd, partial(in_slurm, tmp_path, 7))
    assert status == 128 + signal.SIGUSR1, printed
    assert not (tmp_path / "told").exists()  # Lightning would have requeued the job itself
    assert not list(cwd.rglob("hpc_ckpt*"))  # ... and have saved what a resume does not look for
    assert call("train", [*TINY, "resume=auto"], cwd, partial(in_slurm, tmp_path, 99))[0] == 0
    assert same(whole, weights(finished(cwd)[0]))


# -- several commands at once ----------------------------------------------------------------------------------------


def test_starts_in_the_same_second_have_folders_of_their_own_and_share_one_teacher(whole, tmp_path):
    commands = [start("train", TINY, tmp_path, no_pictures) for _ in range(2)]
    assert [finish(c) for c in commands] == [0, 0]
    runs = finished(tmp_path)
    assert len(runs) == 2
    assert all(same(whole, weights(run)) for run in runs)
    assert len(finished(tmp_path, "teachers")) == 1
    assert (tmp_path / "output").read_text().count("The teacher is trained.") == 1


def test_a_run_is_trained_by_one_process(tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "one" / "here"
    with FileLock(_made(folder) / ".lock"):
        begun = time.monotonic()
        status, printed = call("train", [*TINY, f"hydra.run.dir={folder}"], tmp_path, no_pictures)
    assert status == 2
    assert printed.rstrip().splitlines()[-1].startswith(f"Another process is training in {folder}. Wait until")
    assert 8 < time.monotonic() - begun < 60


def test_a_run_waits_for_one_that_is_just_ending(whole, tmp_path):
    folder = tmp_path / "runs" / "one" / "here"
    lock = FileLock(_made(folder) / ".lock")
    lock.acquire()
    command = start("train", [*TINY, f"hydra.run.dir={folder}"], tmp_path, no_pictures)
    time.sleep(3)
    lock.release()
    assert finish(command) == 0
    assert same(whole, weights(folder))


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def test_two_multiruns_in_one_folder_lose_nothing(whole, tmp_path):
    arguments = ["-m", *TINY, "seed=0,1", "hydra.sweep.dir=runs/one/both"]
    commands = [start("train", arguments, tmp_path, no_pictures) for _ in range(2)]
    statuses = [finish(c) for c in commands]
    assert 0 in statuses or call("train", arguments, tmp_path, no_pictures)[0] == 0, statuses
    assert [p.name for p in finished(tmp_path)] == ["s0", "s1"]
    assert same(whole, weights(tmp_path / "runs" / "one" / "both" / "s0"))


def fail_with_seed_1() -> None:
    no_pictures()
    import litdistill.training.train as module

    build = module.build_data

    def build_data(cfg):
        if cfg.seed == 1 and cfg.name == "one":
            raise RuntimeError("a defect")
        return build(cfg)

    module.build_data = build_data


def test_a_failed_job_of_a_multirun_is_told_at_once_and_the_others_go_on(tmp_path):
    arguments = ["-m", *TINY, "seed=0,1,2"]
    status, printed = call("train", arguments, tmp_path, fail_with_seed_1)
    assert status == 1  # a defect, with its traceback; of what a user can mend it would be 2
    assert [p.name for p in finished(tmp_path)] == ["s0", "s2"]
    assert "Job 1 failed: a defect. The other jobs go on; the same command with resume=auto" in printed
    (job,) = tmp_path.glob("runs/one/*/s1")
    assert "Job 1 failed: a defect" in (job / "train.log").read_text()
    status, printed = call("train", [*arguments, "resume=auto"], tmp_path, no_pictures)
    assert status == 0, printed
    assert printed.count("is finished already") == 2
    assert [p.name for p in finished(tmp_path)] == ["s0", "s1", "s2"]


@pytest.mark.slow
def test_ranks_that_lightning_started_stop_and_go_on_together(tmp_path):
    """Two real processes on one machine, of which the user or the scheduler knows the first alone."""
    arguments = [a for a in TINY if a != "trainer=cpu"]
    arguments += ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_epochs=500"]
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *arguments, "resume=auto"]
    env = {k: v for k, v in os.environ.items() if k != "RUN_STAMP"} | {"OMP_NUM_THREADS": "1"}
    for _ in range(2):
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 300
        begun = time.time()
        while time.monotonic() < deadline:
            found = list(tmp_path.glob("runs/one/*/checkpoints/last.ckpt"))
            if found and found[0].stat().st_mtime > begun:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGUSR1)
        printed, _ = process.communicate(timeout=100)
        assert process.returncode == 128 + signal.SIGUSR1, printed.decode()
        assert b"Stopped by SIGUSR1" in printed
    assert len(list(tmp_path.glob("runs/one/*"))) == 1
