"""Two gloo processes that go on in the middle of an epoch, by a method whose memories belong to their process."""

import functools

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch.multiprocessing import ProcessRaisedException
from torch.optim import SGD

from litdistill.distillation.distiller import Distiller
from litdistill.distillation.teacher_cache import CacheOptions
from litdistill.methods.crd import CRD
from litdistill.methods.kd import KD
from tests.fits import digits, example, fit, grouped, net, same

FORKED = functools.partial(DDPStrategy, start_method="fork")  # started by this process, which has imported everything


class SaveAt(Callback):
    def __init__(self, folder, step):
        self.folder, self.step = folder, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.folder / f"{self.step}.ckpt", weights_only=False)


class Memories(Callback):
    """Writes what each process's method remembers at the end."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        self.folder.mkdir(exist_ok=True)
        torch.save(dict(pl_module.method.named_buffers()), self.folder / f"{trainer.global_rank}.pt")


def run(folder, group, callbacks=(), ckpt=None, method=None, broadcast=False):
    data = digits(per_class=8, batch_size=10)  # 4 steps an epoch
    torch.manual_seed(0)
    distiller = Distiller(
        net(), method or CRD(width=8, negatives=16), net(12), example(data), optimizer=functools.partial(SGD, lr=0.05),
        allow_chance=True, cache=CacheOptions("off"), seed=0, group=group, train_targets=data.train_targets, data=data,
    )  # fmt: skip
    callbacks = [Memories(folder / "memories"), *callbacks]
    folder.mkdir(exist_ok=True)
    fit(
        distiller, grouped(data, group), folder, ckpt, devices=2, strategy=FORKED(broadcast_buffers=broadcast),
        callbacks=callbacks, enable_checkpointing=False,
    )  # fmt: skip
    memories = [torch.load(folder / "memories" / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    return distiller.student.state_dict(), memories


@pytest.mark.parametrize("group", [0, 2])
def test_each_process_goes_on_with_what_its_own_method_remembers(tmp_path, group):
    step = 6 if group else 3
    whole, memories = run(tmp_path / "a", group, [SaveAt(tmp_path, step)])
    resumed, again = run(tmp_path / "b", group, ckpt=tmp_path / f"{step}.ckpt")
    assert same(whole, resumed)
    for rank in (0, 1):
        assert same(memories[rank], again[rank])
    ours, theirs = (m["memory_student"] for m in memories)  # each has moved the rows of its own samples
    assert not torch.equal(ours, theirs)


def test_groups_are_single_steps_under_two_processes_too(tmp_path):
    one, _ = run(tmp_path / "a", 0, method=KD())
    many, _ = run(tmp_path / "b", 3, method=KD())
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, rtol=1e-5, atol=1e-6)


def test_memories_that_would_be_overwritten_are_refused(tmp_path):
    with pytest.raises(ProcessRaisedException, match=r"UserError.*broadcast_buffers=False"):
        run(tmp_path / "a", 0, broadcast=True)
