"""Guarantees of training detectors: frozen teachers, exact caches of dense heads, averages of weights, processes."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy

from litdistill.data.augment import Flip
from litdistill.distillation.distiller import Distiller
from litdistill.distillation.teacher import FrozenTeacher
from litdistill.distillation.teacher_cache import CacheOptions
from litdistill.evaluation.evaluate import differences, evaluate, load_run, rebuild
from litdistill.models.preprocess import Preprocess, Preprocessed
from litdistill.tasks import Detection
from litdistill.tasks.detection.backbones import fcos_on
from litdistill.tasks.detection.dense_kd import DenseKD
from litdistill.tasks.detection.fcos import fcos_slim
from litdistill.tasks.detection.scenes import digit_scenes
from litdistill.tasks.detection.torchvision import torchvision_detector
from litdistill.types import Batch
from litdistill.utils.hashing import weights_sha256
from tests.fits import fit, grouped
from tests.test_cli import call
from tests.test_zoo import equal

SHAPE = (3, 64, 64)
TINY = [
    *("data=digit_scenes", "task=detection", "method=dense_kd", "data.count=48", "data.val_size=17"),
    *("data.batch_size=8", "data.augment=[Flip]", "trainer.max_epochs=2", "++teacher.recipe.trainer.max_epochs=1"),
    *("net@student=fcos_slim", "student.width=4", "student.fpn=32", "student.convs=1", "trainer=cpu"),
    *("net@teacher=fcos_slim", "teacher.width=4", "teacher.fpn=32", "teacher.convs=1", "teacher.allow_chance=true"),
]


@pytest.mark.parametrize(
    "make",
    [
        lambda: fcos_slim(3, SHAPE, 8, 2, fpn=32),
        lambda: fcos_on(3, SHAPE, "torchvision:resnet18", fpn=32),
        lambda: torchvision_detector(3, SHAPE, "ssdlite320_mobilenet_v3_large"),
    ],
    ids=["slim", "resnet18", "ssdlite"],
)
@pytest.mark.parametrize("mode", [None, "prepacked"])
def test_a_frozen_detector_gives_the_heads_that_it_gave(make, mode):
    net = make().train()
    x = torch.rand(2, *SHAPE)
    with torch.no_grad():
        net(x)  # statistics that are none of the initial ones
        net = Preprocessed(net.eval(), Preprocess([0.5] * 3, [0.25] * 3))
        expected = net(x)
    teacher = FrozenTeacher(net, Detection(), example=Batch(x, torch.zeros(2, 1, 6)), compile=mode).train()
    heads = teacher(Batch(x, torch.zeros(2, 1, 6))).heads
    assert expected.keys() <= heads.keys()
    assert not any(h.requires_grad for h in heads.values())
    for name, value in expected.items():
        torch.testing.assert_close(heads[name], value, rtol=1e-4, atol=1e-3 if name == "boxes" else 1e-4)


def fitted(folder, mode, ema=None, lr=0.1, **options):
    """A student of dense_kd after two epochs of flipped scenes, and how many rows its cache has computed."""
    data = digit_scenes(count=40, val_size=8, batch_size=8, augment=[Flip()])
    data.setup()
    torch.manual_seed(0)
    student, teacher = (
        Preprocessed(fcos_slim(10, SHAPE, width, fpn=32, convs=1), Preprocess(data.mean, data.std)) for width in (4, 8)
    )
    distiller = Distiller(
        student, DenseKD(least=0), teacher, data.get_batch("train", data.train_ids[:2]), Detection(),
        functools.partial(torch.optim.SGD, lr=lr), ema=ema, seed=0, allow_chance=True, data=data, cache=CacheOptions(mode),
    )  # fmt: skip
    fit(distiller, grouped(data, 0), folder, limit_val_batches=0, enable_checkpointing=False, **options)
    return distiller


def test_a_cache_of_dense_heads_changes_nothing(tmp_path):
    live, cached = fitted(tmp_path, "off"), fitted(tmp_path, "memory")
    assert live.cache is None
    assert cached.cache.requested == 64
    assert cached.cache.computed < 64  # each scene has two views
    batch = cached.data.get_batch("train", cached.data.train_ids[:8], torch.tensor([0, 1] * 4))
    kept, found = cached.cache.outputs(batch), live.teacher(batch)
    assert kept.heads.keys() == found.heads.keys()
    for name, value in found.heads.items():
        assert torch.equal(kept.heads[name], value)
    assert equal(live.student.state_dict(), cached.student.state_dict())


def test_the_average_of_a_detectors_weights_is_what_is_deployed(tmp_path):
    # Whatever the average holds, it follows the student: with a decay of 0 it is the student.
    follows = fitted(tmp_path, "off", ema=0.0)
    assert equal(dict(follows.deployed_student.named_parameters()), dict(follows.student.named_parameters()))
    averaged = fitted(tmp_path, "off", ema=0.9)
    assert equal(dict(averaged.student.named_parameters()), dict(follows.student.named_parameters()))
    x = torch.rand(2, *SHAPE)
    heads, last = (net.eval()(x) for net in (averaged.deployed_student, averaged.student))
    assert heads["boxes"].shape == last["boxes"].shape
    assert not torch.allclose(heads["logits"], last["logits"])


class Kept(Callback):
    """Writes the weights with which each process ends."""

    def on_train_end(self, trainer, pl_module):
        weights = dict(pl_module.student.named_parameters())
        torch.save(weights, Path(trainer.default_root_dir) / f"{trainer.global_rank}.pt")


def test_both_processes_end_with_the_same_weights(tmp_path):
    fitted(tmp_path, "off", devices=2, strategy=DDPStrategy(start_method="fork"), callbacks=[Kept()])
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert equal(ours, theirs)
    alone = fitted(tmp_path / "alone", "off")
    assert not equal(ours, dict(alone.student.named_parameters()))  # other minibatches: both have learned from both


@pytest.mark.process
def test_two_processes_train_a_detector_and_measure_it_as_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "litdistill.tasks.detection.scenes.TESTED", 500
    )  # as in processes that these tests do not patch
    # 17 validation pictures and 7 in a batch: no multiple of the batches of two ranks.
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.eval_batch_size=7", "name=two"]
    overrides = [a for a in TINY if a != "trainer=cpu"]
    done = call("train", *overrides, *ddp, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs" / "two").iterdir()
    found = json.loads((folder / "summary.json").read_text())
    assert found["device"]["world_size"] == 2
    assert found["steps"] == 4  # 31 pictures, 8 on each of two ranks, 2 epochs
    # What the ranks gathered is what one process finds: mAP, agreement, the objects of each class.
    assert differences(evaluate(folder, device="cpu"), load_run(folder)[1]) == []
    assert weights_sha256(rebuild(folder)[1].teacher.net.state_dict()) == found["teacher"]["sha256"]
