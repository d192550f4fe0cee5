"""What only GPUs can show: kernels that train as the CPU's do, bf16 and fp16, NCCL, BatchNorm over ranks, a spread teacher.

    python -m pytest -m gpu tests/test_gpu.py      a minute on one GPU; what needs two is skipped by name where there is one

Runs on one card are trained in this process, which imports everything once; those on two start processes of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from litdistill.evaluation.evaluate import differences, evaluate, load_run
from litdistill.training.run import run as trained
from tests.test_cli import call
from tests.test_scale import PLAIN, curve

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
FLOAT = "trainer.precision=32-true"

# With BatchNorm, in float32 where a kernel has it; `trainer.deterministic` is about the order of sums.
CONV = [a for a in PLAIN if not a.startswith(("net", "student.widths", "teacher.widths"))] + [
    "student.widths=[16,32]",
    "teacher.widths=[32,64]",
    "data.per_class=20",
    "deterministic=true",
]
Run = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """`run("a", *overrides)`: a run in this process by the config of a command: its folder and its summary."""
    monkeypatch.chdir(tmp_path)

    def make(name: str, *overrides: str) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path / name
        trained(*CONV, *overrides, folder=folder)
        return folder, json.loads((folder / "summary.json").read_text())

    yield make
    torch.use_deterministic_algorithms(False)


def in_processes(cwd: Path, *arguments: str) -> tuple[Path, dict[str, Any]]:
    """A run by its command, in processes of its own, and its summary."""
    cwd.mkdir()
    done = call("train", *CONV, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (cwd / "runs" / "one").iterdir()
    return folder, json.loads((folder / "summary.json").read_text())


def test_a_gpu_trains_as_a_cpu_does(run: Run):
    a, _ = run("a", "trainer=cpu")
    b, summary = run("b", "trainer=auto", FLOAT)
    assert summary["device"]["type"] == "cuda"
    assert curve(b, "train/loss") == pytest.approx(curve(a, "train/loss"), rel=2e-2)  # TF32 has ten bits
    assert differences(evaluate(b, device="cuda"), load_run(b)[1]) == []


def test_bf16_is_the_default_on_one_gpu_and_comes_to_about_the_same(run: Run, caplog: pytest.LogCaptureFixture):
    a, _ = run("a", "trainer=auto", FLOAT)
    with caplog.at_level("INFO"):
        b, _ = run("b", "trainer=auto")
    assert "bf16-mixed" in caplog.text
    assert curve(b, "train/loss") != curve(a, "train/loss")
    assert curve(b, "train/loss") == pytest.approx(curve(a, "train/loss"), rel=5e-2)


def test_fp16_with_scaled_losses_comes_to_about_the_same(run: Run):
    a, _ = run("a", "trainer=auto", FLOAT)
    b, _ = run("b", "trainer=auto", "trainer.precision=16-mixed")
    assert curve(b, "train/loss") == pytest.approx(curve(a, "train/loss"), rel=5e-2)


def test_recorded_batches_are_those_that_are_launched(run: Run, caplog: pytest.LogCaptureFixture):
    views = "data.augment=[RandomResizedCrop,RandomErasing]"
    a, _ = run("a", "trainer=auto", FLOAT, views, "capture=off")
    with caplog.at_level("INFO"):
        b, _ = run("b", "trainer=auto", FLOAT, views)
    assert "not as CUDA graphs" not in caplog.text
    assert curve(b, "train/loss") == pytest.approx(curve(a, "train/loss"), rel=1e-3)


def test_a_rank_of_nccl_makes_one_run(run: Run):
    folder, summary = run("a", "trainer=ddp", "trainer.devices=1", "data.eval_batch_size=50")
    assert (summary["device"]["type"], summary["device"]["world_size"]) == ("cuda", 1)
    assert torch.distributed.get_backend() == "nccl"
    assert differences(evaluate(folder, device="cuda"), load_run(folder)[1]) == []


@needs_two
def test_nccl_ranks_on_two_gpus_make_one_run(tmp_path):
    folder, summary = in_processes(tmp_path / "a", "trainer=ddp", "trainer.devices=2", "data.eval_batch_size=50")
    assert (summary["device"]["type"], summary["device"]["world_size"]) == ("cuda", 2)
    assert "distributed_backend=nccl" in (folder / "train.log").read_text()
    assert differences(evaluate(folder, device="cuda"), load_run(folder)[1]) == []


@needs_two
def test_two_gpus_with_common_batchnorm_train_as_one(tmp_path):
    a, _ = in_processes(tmp_path / "a", "trainer=auto", "data.batch_size=64", FLOAT)
    two = ("trainer=ddp", "trainer.devices=2", "trainer.sync_batchnorm=true", "data.batch_size=32", FLOAT)
    b, _ = in_processes(tmp_path / "b", *two)
    assert curve(b, "train/loss") == pytest.approx(curve(a, "train/loss"), rel=2e-2)


@needs_two
def test_a_teacher_spread_over_two_gpus_teaches_as_a_whole_one(tmp_path):
    two = ("trainer.devices=2", "method=fitnet", "teacher.cache.mode=off", FLOAT)
    a, first = in_processes(tmp_path / "a", "trainer=ddp", *two)
    b, second = in_processes(tmp_path / "b", "trainer=fsdp", "trainer.strategy.block=500", *two)
    assert curve(b, "train/loss") == pytest.approx(curve(a, "train/loss"), rel=2e-2)
    assert second["teacher"]["sha256"] == first["teacher"]["sha256"]
