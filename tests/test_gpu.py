"""What only GPUs can show: kernels that train as the CPU's do, NCCL, BatchNorm over ranks, a teacher spread over cards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from litdistill.evaluation.evaluate import differences, evaluate, load_run
from tests.test_cli import call
from tests.test_scale import PLAIN, curve

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
two_cards = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

# With BatchNorm, in float32 where a kernel has it; `trainer.deterministic` is about the order of sums.
CONV = [a for a in PLAIN if not a.startswith(("net", "student.widths", "teacher.widths"))] + [
    "student.widths=[16,32]",
    "teacher.widths=[32,64]",
    "data.per_class=20",
    "deterministic=true",
]


def run(cwd: Path, *arguments: str) -> tuple[Path, dict]:
    """A run by its command, in processes of its own, and its summary."""
    cwd.mkdir()
    done = call("train", *CONV, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (cwd / "runs" / "one").iterdir()
    return folder, json.loads((folder / "summary.json").read_text())


def test_a_gpu_trains_as_a_cpu_does(tmp_path):
    a, _ = run(tmp_path / "a", "trainer=cpu")
    b, summary = run(tmp_path / "b", "trainer=auto")
    assert summary["device"]["type"] == "cuda"
    assert curve(b, "train/loss") == pytest.approx(curve(a, "train/loss"), rel=2e-2)  # TF32 has ten bits
    assert differences(evaluate(b, device="cuda"), load_run(b)[1]) == []


def test_bf16_on_one_gpu_comes_to_about_the_same(tmp_path):
    a, _ = run(tmp_path / "a", "trainer=auto")
    b, _ = run(tmp_path / "b", "trainer=gpu")
    assert curve(b, "train/loss") == pytest.approx(curve(a, "train/loss"), rel=5e-2)


def test_nccl_ranks_make_one_run(tmp_path):
    folder, summary = run(tmp_path / "a", "trainer=ddp", "data.eval_batch_size=50")
    assert (summary["device"]["type"], summary["device"]["world_size"]) == ("cuda", torch.cuda.device_count())
    assert "distributed_backend=nccl" in (folder / "train.log").read_text()
    assert differences(evaluate(folder, device="cuda"), load_run(folder)[1]) == []


@two_cards
def test_two_gpus_with_common_batchnorm_train_as_one(tmp_path):
    a, _ = run(tmp_path / "a", "trainer=auto", "data.batch_size=64")
    two = ("trainer=ddp", "trainer.devices=2", "trainer.sync_batchnorm=true", "data.batch_size=32")
    b, _ = run(tmp_path / "b", *two)
    assert curve(b, "train/loss") == pytest.approx(curve(a, "train/loss"), rel=2e-2)


@two_cards
def test_a_teacher_spread_over_two_gpus_teaches_as_a_whole_one(tmp_path):
    two = ("trainer.devices=2", "method=fitnet", "teacher.cache.mode=off")
    a, first = run(tmp_path / "a", "trainer=ddp", *two)
    b, second = run(tmp_path / "b", "trainer=fsdp", "trainer.strategy.block=500", *two)
    assert curve(b, "train/loss") == pytest.approx(curve(a, "train/loss"), rel=2e-2)
    assert second["teacher"]["sha256"] == first["teacher"]["sha256"]
