"""Who starts the processes of a run, one folder for all of them, and the launchers themselves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from omegaconf import OmegaConf
from torch.distributed import TCPStore

from litdistill.methods.ft import FT
from litdistill.methods.kd import KD
from litdistill.tasks.classification import Classification
from litdistill.training.trainer import build_trainer
from litdistill.utils.distributed import Launch, fit_to_launch, launched, run_stamp
from litdistill.utils.errors import UserError
from tests import forked
from tests.conftest import compose_config
from tests.fits import digits
from tests.test_cli import ROOT, call
from tests.test_scale import PLAIN, free_port

JOB = {"SLURM_JOB_ID": "71", "SLURM_JOB_NAME": "litdistill"}
TASKS = {"SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_STEP_ID": "0"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3"}


@pytest.fixture
def started(monkeypatch):
    """Sets the variables that a launcher sets, in place of all that are there."""

    def set_all(variables: dict[str, str]) -> None:
        for name in [n for n in os.environ if n.startswith(("SLURM_", "TORCHELASTIC_"))]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, None),
        (TORCHRUN, Launch("torchrun", 2, 3)),
        (JOB | TASKS, Launch("srun", 2, 2)),
        (JOB | TASKS | TORCHRUN, Launch("torchrun", 2, 3)),
        (JOB | TASKS | {"SLURM_JOB_NAME": "interactive"}, None),
        (JOB | {"SLURM_NTASKS": "1", "SLURM_NNODES": "1"}, Launch("srun", 1, 1)),
    ],
)
def test_who_started_the_processes_is_read_from_the_environment(variables, found, started):
    started(variables)
    assert launched() == found


@pytest.mark.parametrize("missing", ["SLURM_STEP_ID", "SLURM_NTASKS_PER_NODE"])
def test_tasks_without_srun_are_refused(missing, started):
    started({k: v for k, v in (JOB | TASKS).items() if k != missing})
    with pytest.raises(UserError, match="start the command with srun"):
        launched()


def test_devices_are_those_that_were_started(started, tmp_path):
    started(JOB | TASKS)
    options = compose_config(tmp_path / "run", "trainer=ddp").trainer
    fit_to_launch(options)
    assert (options.devices, options.num_nodes) == (2, 2)
    with pytest.raises(UserError, match=r"trainer.devices=8, but srun started 2 process\(es\) on each of 2 node"):
        fit_to_launch(compose_config(tmp_path / "run", "trainer=ddp", "trainer.devices=8").trainer)
    with pytest.raises(UserError, match=r"srun started 4 processes.*Choose trainer=ddp"):
        fit_to_launch(compose_config(tmp_path / "run", "trainer=cpu").trainer)
    started({})
    options = compose_config(tmp_path / "run", "trainer=ddp").trainer
    fit_to_launch(options)
    assert (options.devices, options.num_nodes) == ("auto", 1)


def test_a_requeued_job_finds_its_folder_and_another_command_of_it_another(started, monkeypatch):
    started(JOB)
    monkeypatch.setattr("sys.argv", ["train.py", "seed=1"])
    stamp = run_stamp()
    assert stamp.startswith("slurm-71-")
    assert run_stamp() == stamp
    monkeypatch.setattr("sys.argv", ["train.py", "seed=2"])
    assert run_stamp() != stamp
    started(JOB | {"SLURM_JOB_NAME": "bash"})  # typed in a shell of SLURM's: each a run of its own
    assert run_stamp() != run_stamp()


def test_all_ranks_of_a_torchrun_have_one_stamp_also_after_a_restart(started, monkeypatch):
    store = TCPStore("127.0.0.1", 0, is_master=True)
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    stamps = []
    for rank in ("0", "1", "0", "1"):
        started(TORCHRUN | agent | {"RANK": rank})
        stamps.append(run_stamp())
    assert len(set(stamps)) == 1
    started(TORCHRUN | agent | {"RANK": "1", "TORCHELASTIC_USE_AGENT_STORE": "False"})
    with pytest.raises(UserError, match="RUN_STAMP"):
        run_stamp()


# -- the launchers themselves: minutes, as each process imports everything ---------------------------------------------


@pytest.mark.slow
def test_two_nodes_of_torchrun_make_one_run(tmp_path):
    rendezvous = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    script = [
        str(ROOT / "scripts" / "train.py"),
        *PLAIN,
        "trainer=ddp",
        "trainer.accelerator=cpu",
        "data.batch_size=16",
    ]
    env = {k: v for k, v in os.environ.items() if k != "RUN_STAMP"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *rendezvous]
    nodes = [subprocess.Popen([*command, f"--node_rank={r}", *script], cwd=tmp_path, env=env) for r in (0, 1)]
    assert [node.wait(600) for node in nodes] == [0, 0]
    (folder,) = (tmp_path / "runs" / "one").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["device"]["world_size"] == 2
    assert summary["options"]["train/global_batch"] == 32
    assert "Global batch 32 = 16 x 2 processes" in (folder / "train.log").read_text()


@pytest.mark.slow
def test_joblib_runs_a_multirun_in_processes_that_share_a_teacher(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    arguments = [a for a in PLAIN if not a.startswith("teacher.checkpoint")] + ["trainer=cpu", "data.per_class=8"]
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0,1"]
    done = call("train", "-m", *launcher, *arguments, "+teacher.recipe.trainer.max_epochs=1", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (sweep,) = (tmp_path / "runs" / "one").iterdir()
    found = [json.loads((sweep / job / "summary.json").read_text()) for job in ("s0", "s1")]
    assert [s["seed"] for s in found] == [0, 1]
    assert found[0]["teacher"]["sha256"] == found[1]["teacher"]["sha256"]
    assert len(list((tmp_path / "runs" / "teachers").glob("*/summary.json"))) == 1


@pytest.mark.slow
def test_the_workers_of_a_sweep_do_each_trial_once(tmp_path):
    pytest.importorskip("optuna")
    arguments = [a for a in PLAIN if not a.startswith("student.widths")] + ["trainer=cpu", "data.per_class=8"]
    space = ["sweep=random", "sweep.trials=6", "sweep.space.student.widths=[[8],[16]]", "sweep.workers=2"]
    status = forked.finish(forked.start("sweep", [*arguments, *space], tmp_path), 600)
    assert status == 0, (tmp_path / "output").read_text()
    (folder,) = (tmp_path / "runs" / "one").iterdir()
    log = (folder / "sweep.log").read_text()
    assert log.count("Sweep of 6 trials") == 2  # each says so
    assert sorted(map(int, re.findall(r"Trial (\d+)  .*val/accuracy", log))) == list(range(6))
    assert "6 complete" in (folder / "sweep.md").read_text()
    # The second has left the config of the first as it was: resume=auto finds the sweep by it.
    assert list(OmegaConf.load(folder / ".hydra" / "overrides.yaml")) == [*arguments, *space]


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "method=ft"],
        ["trainer=auto", "+trainer.strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu"],
    ],
)
def test_a_trainer_takes_what_its_file_has_no_key_for(tmp_path, overrides):
    cfg = compose_config(tmp_path, *overrides)
    method = FT(init_epochs=2) if "method=ft" in overrides else KD()
    assert build_trainer(cfg, tmp_path, method, Classification(), digits()).trainer.world_size == 2


@pytest.mark.slow
def test_the_ranks_of_a_sweeps_trials_train_on_the_trials_own_values(tmp_path):
    """Lightning starts them by the command of the trial and not of the sweep. DDP refuses ranks whose networks differ."""
    pytest.importorskip("optuna")
    arguments = [a for a in PLAIN if not a.startswith(("student.widths", "name="))] + ["data.per_class=8", "name=s"]
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "sweep=grid"]
    space = ["sweep.space.method=null", "sweep.space.student.widths=[[8],[12]]"]
    done = call("sweep", *arguments, *ranks, *space, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs" / "s").iterdir()
    assert sorted(p.name for p in (tmp_path / "runs" / "s").iterdir()) == [
        folder.name
    ]  # no rank made a sweep of its own
    found = [json.loads((folder / trial / "summary.json").read_text()) for trial in "01"]
    assert [s["device"]["world_size"] for s in found] == [2, 2]
    assert found[0]["student"]["params"] != found[1]["student"]["params"]
