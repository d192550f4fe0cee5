"""Two gloo processes on CPU: one folder, exact metrics, the teacher left alone."""

import json

import pytest
import torch

from litdistill.evaluation.evaluate import differences, evaluate, load_run, rebuild
from litdistill.evaluation.predictions import collect
from litdistill.utils.hashing import weights_sha256
from tests.test_cli import FAST, call


@pytest.mark.process
def test_two_processes_make_one_run_with_exact_metrics(tmp_path):
    # 129 validation and 500 test images: neither is a multiple of the batches of two ranks.
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.eval_batch_size=50"]
    overrides = [a for a in FAST if a != "trainer=cpu"]
    done = call("train", *overrides, *ddp, "name=two", "method=kd_crd", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs" / "two").iterdir()
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["cache", "teachers", "two"]
    assert not (folder / "train_ddp_process_1.log").exists()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["device"]["world_size"] == 2
    assert summary["steps"] == 4  # 120 images, 32 on each of two ranks, 2 epochs
    assert differences(evaluate(folder, device="cpu"), load_run(folder)[1]) == []
    data, distiller = rebuild(folder)
    logits, targets = collect(distiller.deployed_student, data, "val")
    # What the ranks gathered and logged is what one process finds, to the last sample.
    assert summary["val"]["best"] == torch.tensor((logits.argmax(1) == targets).double().mean().item()).float().item()
    assert weights_sha256(distiller.teacher.net.state_dict()) == summary["teacher"]["sha256"]
