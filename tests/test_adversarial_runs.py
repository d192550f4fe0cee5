"""Adversarial training beyond one process in float32: two gloo processes, bfloat16, a sweep, and what is exported."""

import functools

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch.optim import SGD

from litdistill.distillation import step
from litdistill.distillation.adversarial import PGD
from litdistill.distillation.distiller import Distiller
from litdistill.evaluation.evaluate import load_run, rebuild
from litdistill.export.export import export
from litdistill.export.predict import load
from litdistill.methods import ARD, RSLAD, Supervised
from tests.conftest import SMALL
from tests.fits import digits, example, fit, grouped, net, same

EPS = 0.1


class Written(Callback):
    """Writes each process's parameters at the end, and a checkpoint in the middle."""

    def __init__(self, folder, step):
        self.folder, self.step = folder, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.folder / "middle.ckpt")

    def on_train_end(self, trainer, pl_module):
        torch.save(dict(pl_module.student.named_parameters()), self.folder / f"{trainer.global_rank}.pt")


def run(folder, method, group=0, ckpt=None, **options):
    folder.mkdir(exist_ok=True)
    data = digits(per_class=8, batch_size=10)
    teacher = net(12, seed=1) if method.needs_teacher else None
    made = Distiller(
        net(), method, teacher, example(data), data=data, adversarial=PGD(EPS, steps=2), seed=0, group=group,
        optimizer=functools.partial(SGD, lr=0.05), allow_chance=True,
    )  # fmt: skip
    fit(made, grouped(data, group), folder, ckpt, **options)
    return made


@pytest.mark.process
@pytest.mark.parametrize(("method", "group"), [(Supervised, 0), (ARD, 2), (RSLAD, 0)])
def test_two_processes_train_one_student_and_go_on_to_the_bit(tmp_path, method, group):
    def both(folder, ckpt=None):
        folder.mkdir()
        ddp = DDPStrategy(start_method="fork", process_group_backend="gloo", broadcast_buffers=False)
        written = Written(folder, 6)
        run(folder, method(), group, ckpt, devices=2, strategy=ddp, callbacks=[written], enable_checkpointing=False)
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]

    whole = both(tmp_path / "a")
    assert same(*whole)
    assert same(both(tmp_path / "b", tmp_path / "a" / "middle.ckpt")[0], whole[0])
    alone = run(tmp_path / "c", method(), group)
    assert not same(dict(alone.student.named_parameters()), whole[0])  # the other half of each minibatch counted


@pytest.mark.parametrize("method", [Supervised, RSLAD])
def test_in_bfloat16_the_attack_reaches_the_edge_of_the_ball_and_a_step_is_nearly_that_of_float32(
    tmp_path, monkeypatch, method
):
    seen, attack = [], step.attacked_batch
    monkeypatch.setattr(step, "attacked_batch", lambda *given: seen.append((given[1], attack(*given))) or seen[-1][1])
    full = run(tmp_path / "a", method(), max_steps=1)
    half = run(tmp_path / "b", method(), max_steps=1, precision="bf16-mixed")
    (batch, one), (_, other) = seen
    for attacked in (one, other):
        assert attacked.inputs.dtype == torch.float32
        change = (attacked.inputs - batch.inputs / 255).abs()
        assert change.max() <= EPS + 1e-6
        assert ((change > EPS - 1e-6) | (attacked.inputs == 0) | (attacked.inputs == 1)).double().mean() > 0.8
    assert (one.inputs - other.inputs).abs().gt(1e-6).double().mean() < 0.1  # the signs of few gradients differ
    for a, b in zip(full.student.parameters(), half.student.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=5e-3, rtol=0)


@pytest.mark.process  # optuna takes long to load
def test_a_sweep_over_methods_trains_what_is_exported(tmp_path):
    pytest.importorskip("optuna")
    from tests.sweeps import start

    options = [*SMALL, f"runs={tmp_path}", "adversarial=pgd", "adversarial.steps=1", "teacher.allow_chance=true"]
    options += ["adversarial.eps=0.3", "trainer.max_epochs=1", "sweep=grid"]
    study = start(tmp_path / "sweep", *options, space={"method": ["ard", "rslad"]})
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 2
    for i, method in enumerate((ARD, RSLAD)):
        folder = tmp_path / "sweep" / str(i)
        assert load_run(folder)[0].adversarial.eps == 0.3
        data, distiller = rebuild(folder)
        assert isinstance(distiller.method, method)
        export(folder)
        images = data.get_batch("train", data.train_ids[:8]).inputs
        answered = torch.from_numpy(load(folder / "export" / "student.onnx").run(images.numpy()))
        with torch.no_grad():
            torch.testing.assert_close(answered, distiller.deployed_student.eval()(images), atol=1e-4, rtol=1e-4)
