"""A bare `Distiller` in anybody's Trainer: any loader, any network, any callback and schedule, as their users know them."""

import copy
import dataclasses
import functools
from typing import Any, NamedTuple

import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

from litdistill.distillation.distiller import Distiller, SchedulerOptions
from litdistill.methods.dist import DIST
from litdistill.methods.kd import KD
from litdistill.methods.supervised import Supervised
from litdistill.models.small import conv4
from litdistill.tasks.classification import Classification
from litdistill.types import Batch
from litdistill.utils.errors import UserError
from tests.fits import digits, example, fit, net, quiet_trainer, same


class Dicts(torch.utils.data.Dataset):
    def __init__(self, set_):
        self.set = set_

    def __len__(self):
        return len(self.set)

    def __getitem__(self, i):
        return {"images": self.set[i][0], "labels": self.set[i][1]}


def as_batch(samples):
    return Batch(torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples]))


def tensors(count: int = 32) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 1, 8, 8, generator=generator)
    return TensorDataset(images, torch.arange(count) % 10)


LOADERS = {
    "tuples": lambda shuffle: DataLoader(tensors(), 8, shuffle=shuffle),
    "dicts": lambda shuffle: DataLoader(Dicts(tensors()), 8, shuffle=shuffle),
    "batches": lambda shuffle: DataLoader(tensors(), 8, shuffle=shuffle, collate_fn=as_batch),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_any_loader_will_do_and_gives_the_same(tmp_path, kind):
    students = []
    for loader in (LOADERS[kind], LOADERS["tuples"]):
        torch.manual_seed(0)
        distiller = Distiller(net(), KD(), net(16, seed=1), allow_chance=True)
        trainer = fit(distiller, (loader(False), loader(False)), tmp_path)
        assert trainer.global_step == 8
        wanted = {"train/loss", "train/hard", "train/soft", "train/agreement", "val/accuracy", "val/ece", "val/kl"}
        assert wanted <= set(trainer.callback_metrics)
        students.append(distiller.student)
    assert same(*students)


CYCLE = functools.partial(OneCycleLR, max_lr=0.3, total_steps=12)
SWA = functools.partial(StochasticWeightAveraging, 0.05, swa_epoch_start=1)


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize(
    ("options", "trainer", "callbacks", "steps"),
    [
        ({}, {}, [lambda: ModelCheckpoint(monitor="val/accuracy", mode="max")], 12),
        ({}, {}, [lambda: EarlyStopping("val/accuracy", mode="max", min_delta=2, patience=0)], 8),
        ({}, {"accumulate_grad_batches": 2}, [], 6),
        ({}, {"gradient_clip_val": 0.1}, [], 12),
        ({}, {"fast_dev_run": True}, [], 1),
        ({}, {}, [SWA], 13),  # Lightning counts one of its last pass, which trains nothing
        ({"scheduler": functools.partial(ReduceLROnPlateau, mode="max")}, {}, [], 12),
        ({"scheduler": CYCLE, "scheduling": SchedulerOptions("step")}, {}, [], 12),
        ({"ema": 0.9}, {"max_steps": 7}, [], 7),
    ],
    ids=[
        "checkpoint",
        "stopping",
        "accumulate",
        "clip",
        "fast_dev_run",
        "swa",
        "plateau",
        "onecycle",
        "ema and max_steps",
    ],
)
def test_a_bare_distiller_is_any_lightning_module_to_its_trainer(tmp_path, kind, options, trainer, callbacks, steps):
    optimizer = functools.partial(SGD, lr=0.1)
    distiller = Distiller(net(), KD(), net(16, 1), optimizer=optimizer, allow_chance=True, **options)
    before = copy.deepcopy(distiller.state_dict())
    loaders = LOADERS[kind](False), LOADERS[kind](False)
    fitted = fit(distiller, loaders, tmp_path, max_epochs=3, callbacks=[c() for c in callbacks], **trainer)
    assert fitted.global_step == steps
    assert distiller.state_dict().keys() == before.keys()
    assert not same(before, distiller)
    assert "val/accuracy" in fitted.callback_metrics


def test_clipping_accumulation_and_weights_of_a_bare_distiller_are_those_of_a_plain_module(tmp_path):
    """The same training in twenty lines of plain Lightning."""

    class Plain(LightningModule):
        def __init__(self, student):
            super().__init__()
            self.student = student

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.student(batch[0]), batch[1])

        def configure_optimizers(self):
            return SGD(self.parameters(), lr=0.1)

    found = []
    for module in (Plain(net()), Distiller(net(), Supervised(), optimizer=functools.partial(SGD, lr=0.1))):
        options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "callbacks": [SWA()], "max_epochs": 3}
        found.append((module.student, fit(module, (LOADERS["tuples"](False),), tmp_path, **options).global_step))
    assert same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_one_cycle_reaches_its_peak_and_a_plateau_cuts_the_rate(tmp_path):
    rates: list[float] = []

    class Spy(Distiller):
        def training_step(self, *a):
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            return super().training_step(*a)

    optimizer = functools.partial(SGD, lr=0.1)
    loaders = LOADERS["tuples"](False), LOADERS["tuples"](False)
    fit(
        Spy(net(), optimizer=optimizer, scheduler=CYCLE, scheduling=SchedulerOptions("step")),
        loaders,
        tmp_path,
        max_epochs=3,
    )
    assert len(rates) == 12
    assert max(rates) == pytest.approx(0.3, rel=0.05)
    assert rates[-1] < 0.01
    rates.clear()
    waits = functools.partial(ReduceLROnPlateau, mode="max", patience=0, threshold=2, threshold_mode="abs")
    fit(Spy(net(), optimizer=optimizer, scheduler=waits), loaders, tmp_path, max_epochs=4)
    assert rates[::4] == pytest.approx([0.1, 0.1, 0.01, 0.001])
    rates.clear()
    fit(Spy(net(), optimizer=optimizer, scheduler=waits), loaders, tmp_path, max_epochs=4, check_val_every_n_epoch=2)
    assert rates[::4] == pytest.approx([0.1] * 4)  # of two validations the first is the best


@pytest.mark.parametrize(
    ("scheduler", "scheduling", "words"),
    [
        (ReduceLROnPlateau, SchedulerOptions(), "its mode is 'max'"),
        (functools.partial(ReduceLROnPlateau, mode="max"), SchedulerOptions("step"), "its interval is epoch"),
        (ReduceLROnPlateau, SchedulerOptions("epoch", "val/los"), r"waits for val/los, which is not logged.*val/nll"),
    ],
)
def test_a_plateau_that_would_wait_for_the_wrong_thing_is_refused(tmp_path, scheduler, scheduling, words):
    distiller = Distiller(net(), scheduler=scheduler, scheduling=scheduling)
    with pytest.raises(UserError, match=words):
        fit(distiller, (LOADERS["tuples"](False), LOADERS["tuples"](False)), tmp_path)


class Answer(NamedTuple):
    logits: torch.Tensor
    aux_logits: torch.Tensor


@dataclasses.dataclass
class Named:
    logits: torch.Tensor
    loss: Any = None


GIVES = {
    "tensor": lambda z: z,
    "dict": lambda z: {"logits": z, "hidden": z.mean()},
    "tuple": lambda z: (z, None),
    "named tuple": lambda z: Answer(z, z * 2),
    "dataclass": Named,
}


class Gives(nn.Module):
    def __init__(self, inner, how):
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, images):
        return self.how(self.inner(images))


@pytest.mark.parametrize("how", GIVES)
def test_a_network_may_give_its_logits_in_any_usual_form(tmp_path, how):
    distiller = Distiller(Gives(net(), GIVES[how]), KD(), Gives(net(16, 1), GIVES[how]), allow_chance=True)
    plain = Distiller(net(), KD(), net(16, 1), allow_chance=True)
    for one in (distiller, plain):
        fit(one, digits(), tmp_path, max_epochs=1)
    assert same(distiller.student.inner, plain.student)


def test_a_teacher_in_whose_answer_no_logits_are_found_is_named(tmp_path):
    teacher = Gives(net(16, 1), lambda z: {"a": {"b": z}})
    with pytest.raises(UserError, match=r"a mapping with a, without logits.*wrap it"):
        Distiller(net(), KD(), teacher, example(digits()))


@pytest.mark.parametrize("softmax", [True, False])
def test_a_softmax_at_a_teachers_end_is_warned_of(tmp_path, caplog, softmax):
    teacher = Gives(net(16, 1), (lambda z: z.softmax(1)) if softmax else (lambda z: z))
    fit(Distiller(net(), KD(), teacher, allow_chance=True), digits(), tmp_path, max_epochs=1)
    assert ("probabilities" in caplog.text) is softmax


def test_a_teacher_that_is_the_student_is_refused():
    student = net()
    with pytest.raises(UserError, match=r"copy\.deepcopy"):
        Distiller(student, KD(), student)


def test_predict_gives_what_the_task_makes_of_the_deployed_student(tmp_path):
    distiller, set_ = Distiller(net(), Supervised(), ema=0.9), tensors()
    for loader in (DataLoader(set_, 8), DataLoader(TensorDataset(set_.tensors[0]), 8), DataLoader(set_.tensors[0], 8)):
        found = quiet_trainer(tmp_path).predict(distiller, loader)
        distiller.eval()
        expected = Classification().decode(distiller(set_.tensors[0]))
        for name, value in expected.items():
            torch.testing.assert_close(torch.cat([batch[name] for batch in found]), value)


def test_overfitting_a_loader_that_is_not_torchs_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"overfit_batches.*per_class.*epoch_size"):
        fit(Distiller(net()), digits(), tmp_path, overfit_batches=1)
    seen = []

    class Spy(Distiller):
        def training_step(self, batch, batch_idx):
            seen.append(batch[1].tolist())
            return super().training_step(batch, batch_idx)

    loader = LOADERS["tuples"](False)
    fit(Spy(net()), (loader, loader), tmp_path, overfit_batches=1, max_epochs=3)
    assert len(seen) == 3
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize(
    ("method", "classes", "said"),
    [(DIST(), 2, True), (KD(standardized=True), 2, True), (DIST(), 3, False), (KD(), 2, False)],
)
def test_a_method_that_sees_two_classes_decisions_alone_says_which_does_not(tmp_path, caplog, method, classes, said):
    images, labels = tensors().tensors
    loader = DataLoader(TensorDataset(images, labels % classes), 8)
    nets = [conv4(classes, (1, 8, 8), widths=[4]) for _ in range(2)]
    fit(Distiller(nets[0], method, nets[1], allow_chance=True), (loader, loader), tmp_path, max_epochs=1)
    assert (f"{type(method).__name__} sees only which of the two classes" in caplog.text) is said
