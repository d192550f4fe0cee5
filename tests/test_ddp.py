"""Two gloo processes on CPU: one folder, exact metrics, the teacher left alone, statistics the same on both."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch

from litdistill.distillation.batch_statistics import recompute, training_batches
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


@pytest.mark.process
def test_two_processes_recompute_lagging_statistics_alike(tmp_path):
    """MobileNetV3's statistics move by 1 % a step: eight steps leave 92 % of their start, which predicts one class for all."""
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=15"]
    student = ["net@student=torchvision", "student.name=mobilenet_v3_small", "method=supervised", "teacher=null"]
    done = call("train", *[a for a in FAST if a != "trainer=cpu"], *ddp, *student, "name=slow", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Statistics of batch normalization lag behind") + done.stdout.count("lag behind") == 1
    (folder,) = (tmp_path / "runs" / "slow").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["device"]["world_size"], summary["steps"]) == (2, 8)
    data, distiller = rebuild(folder)
    found, net = distiller.deployed_student, copy.deepcopy(distiller.deployed_student)
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all(norm.momentum == 0.01 for norm in norms)
    data.batch_size = 15
    recompute(norms, SimpleNamespace(evaluated=net, task=distiller.task), training_batches(data, torch.device("cpu")))
    for (name, value), other in zip(found.state_dict().items(), net.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, atol=1e-5, rtol=1e-4, msg=name)
    logits, targets = collect(found, data, "val")
    assert summary["val"]["best"] == torch.tensor((logits.argmax(1) == targets).double().mean().item()).float().item()
