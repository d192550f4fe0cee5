"""Two gloo processes that go on in the middle of an epoch, by a method whose memories belong to their rank."""

import functools

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from litdistill.data.datamodule import ImageData
from litdistill.distillation.distiller import Distiller
from litdistill.distillation.teacher import FrozenTeacher
from litdistill.distillation.teacher_cache import CacheOptions
from litdistill.features import feature_extractor as taps
from litdistill.methods.crd import CRD
from litdistill.models.small import conv4
from litdistill.training.callbacks import PerStepSeed


def run(folder, callbacks=(), ckpt=None):
    torch.manual_seed(0)
    data = ImageData("digits", per_class=8, batch_size=10)  # 4 steps an epoch
    data.setup()
    data.window = 2
    student, teacher = (conv4(10, (1, 8, 8), widths=[w, w]) for w in (8, 12))
    example, method = torch.randn(2, 1, 8, 8), CRD(width=8, negatives=16)
    found = [
        taps.resolve_taps(net, example, asked) for net, asked in zip((student, teacher), method.taps(), strict=True)
    ]
    distiller = Distiller(
        student, method, FrozenTeacher(teacher, found[1]), functools.partial(torch.optim.SGD, lr=0.05),
        student_taps=found[0], allow_chance=True, cache=CacheOptions("off"), window=2,
    )  # fmt: skip
    targets = torch.full_like(data.train_targets, -1)
    targets[data.train_ids] = data.train_targets[data.train_ids]
    student.eval()
    with torch.no_grad():
        method.build(distiller.tapped(example), distiller.teacher(example), targets)
    student.train()
    distiller._ddp_params_and_buffers_to_ignore = [f"method.{name}" for name, _ in method.named_buffers()]
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", max_epochs=2, callbacks=[PerStepSeed(0), *callbacks],
        logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        use_distributed_sampler=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(distiller, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return distiller.student.state_dict()


def test_each_rank_goes_on_with_what_its_own_method_remembers(tmp_path):
    every = ModelCheckpoint(tmp_path / "points", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = run(tmp_path, [every])
    resumed = run(tmp_path / "again", ckpt=tmp_path / "points" / "step=3.ckpt")
    assert all(torch.equal(v, resumed[k]) for k, v in whole.items())
