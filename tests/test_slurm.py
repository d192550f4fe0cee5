"""Jobs of a real SLURM: two nodes on this machine, as scripts/slurm/cluster.sh starts them (root, slurm-wlm, munge)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.test_scale import PLAIN, free_port

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts" / "slurm"
PARTS = ("slurmctld", "slurmd", "munged", "sbatch")

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        not all(map(shutil.which, PARTS)) or os.geteuid() != 0, reason="needs root, slurm-wlm and munge"
    ),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[dict[str, str]]:
    """The environment in which SLURM's commands find the cluster."""
    root = tmp_path_factory.mktemp("slurm")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RUN_STAMP"))}
    env |= {"SLURM_ROOT": str(root), "SLURM_PORT": str(free_port())}
    env |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    started = subprocess.run([SCRIPTS / "cluster.sh", "start"], env=env, capture_output=True, text=True, timeout=60)
    assert started.returncode == 0, started.stdout + started.stderr
    yield env | dict(v.split("=") for v in started.stdout.removeprefix("export ").split())
    subprocess.run([SCRIPTS / "cluster.sh", "stop"], env=env, check=True, timeout=60)
    assert not root.exists()


def ask(cluster: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=cluster, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def state(cluster: dict[str, str], job: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S*)", ask(cluster, "scontrol", "show", "job", job)))


def wait_until(done, output: Path, seconds: float = 400) -> None:
    """Polls; `output`: what the job prints, which is shown where it takes longer than it may."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, output.read_text() if output.is_file() else "no output"
        time.sleep(0.5)


@pytest.mark.parametrize(
    ("script", "trainer", "ranks"),
    [("train", "trainer=cpu", 1), ("ddp", "trainer.accelerator=cpu", 2)],
)
def test_a_job_that_is_told_to_leave_is_requeued_and_goes_on_in_its_folder(script, trainer, ranks, cluster, tmp_path):
    output = tmp_path / "output"
    arguments = [*PLAIN, trainer, f"runs={tmp_path}/runs", "data.per_class=8", "trainer.max_epochs=100"]
    job = ask(
        cluster, "sbatch", "--parsable", f"--output={output}", str(SCRIPTS / f"{script}.sbatch"), *arguments
    ).strip()
    saved = lambda: list(tmp_path.glob("runs/one/*/checkpoints/last.ckpt"))  # noqa: E731
    wait_until(saved, output)
    ask(cluster, "scancel", "--signal=USR1", job)
    wait_until(lambda: state(cluster, job)["JobState"] == "PENDING", output)
    stopped = torch.load(saved()[0], weights_only=True)["global_step"]
    assert not list(tmp_path.glob("runs/one/*/summary.json"))
    wait_until(lambda: set(ask(cluster, "sinfo", "--noheader", "--format=%T").split()) == {"idle"}, output)
    time.sleep(5)
    ask(cluster, "scontrol", "update", f"JobId={job}", "StartTime=now")  # SLURM would let two minutes pass
    wait_until(
        lambda: state(cluster, job)["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), output
    )
    assert (state(cluster, job)["JobState"], state(cluster, job)["Restarts"]) == ("COMPLETED", "1"), output.read_text()
    (folder,) = (tmp_path / "runs" / "one").iterdir()
    assert re.fullmatch(rf"slurm-{job}-[0-9a-f]{{12}}", folder.name)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["device"]["world_size"] == ranks
    assert summary["epochs"] == 100
    assert 0 < stopped < summary["steps"]
    log = (folder / "train.log").read_text()
    assert log.count("Going on from") == 1
    assert f"= 32 x {ranks} process" in log
    assert "Stopped by SIGUSR1" in output.read_text()


def test_a_multirun_is_a_job_of_two_ranks_for_each_run(cluster, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.tasks_per_node=2", "hydra.launcher.timeout_min=10"]
    arguments = [*PLAIN, *launcher, f"runs={tmp_path}/runs", "trainer=ddp", "trainer.accelerator=cpu", "seed=0,1"]
    with (tmp_path / "output").open("w") as file:
        command = [sys.executable, str(ROOT / "scripts" / "train.py"), "-m", *arguments]
        done = subprocess.run(command, env=cluster, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=600)
    assert done.returncode == 0, (tmp_path / "output").read_text()
    (sweep,) = (tmp_path / "runs" / "one").iterdir()
    assert sorted(p.name for p in sweep.iterdir() if p.is_dir() and p.name[0] != ".") == ["s0", "s1"]
    found = [json.loads((sweep / job / "summary.json").read_text()) for job in ("s0", "s1")]
    assert [s["seed"] for s in found] == [0, 1]
    assert [s["device"]["world_size"] for s in found] == [2, 2]
    assert found[0]["student"]["sha256"] != found[1]["student"]["sha256"]
