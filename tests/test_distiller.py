"""The guarantees of `Distiller`, each broken by the fault it is there for."""

import copy
import dataclasses
import functools
import math
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
from litdistill.distillation.examine import check_teacher
from litdistill.distillation.inference import ConvAsLinear, fuse_batchnorm, prepack
from litdistill.distillation.schedules import interpolate
from litdistill.distillation.teacher import FrozenTeacher
from litdistill.methods.base import Method
from litdistill.methods.crd import CRD
from litdistill.methods.fitnet import FitNet
from litdistill.methods.kd import KD
from litdistill.methods.supervised import Supervised
from litdistill.models.preprocess import bare
from litdistill.models.resnet import resnet
from litdistill.models.small import conv4
from litdistill.tasks.classification import Classification
from litdistill.types import Batch
from litdistill.utils.errors import UserError
from litdistill.utils.hashing import weights_sha256
from tests.fits import digits, example, fit, net, quiet_trainer, same


def test_the_teacher_is_bit_identical_after_a_fit(tmp_path):
    data, teacher = digits(), net(16, seed=1)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    distiller = Distiller(net(), KD(), teacher, example(data), allow_chance=True)
    distiller.train()
    frozen = distiller.teacher
    assert not any(m.training for m in frozen.modules())
    frozen.train()  # what any other code might call
    assert not any(m.training for m in frozen.modules())
    student = {k: v.clone() for k, v in distiller.student.state_dict().items()}
    fit(distiller, data, tmp_path)
    assert same(before, teacher)  # BatchNorm's averages too
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not same(student, distiller.student)


def test_no_checkpoint_and_no_optimizer_holds_the_teacher(tmp_path):
    distiller = Distiller(net(), KD(), net(16, seed=1), allow_chance=True)
    trainer = fit(distiller, digits(), tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)  # tensors and plain values only
    assert {k.split(".")[0] for k in saved["state_dict"]} == {"student"}
    optimised = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimised == {id(p) for p in distiller.student.parameters()}
    assert not [n for n, _ in distiller.named_modules() if "teacher" in n]


def test_kd_without_its_soft_term_is_supervised_to_the_bit(tmp_path):
    students = []
    for method, teacher in ((KD(hard=1, soft=0), net(16, seed=1)), (Supervised(), None)):
        distiller = Distiller(net(), method, teacher, allow_chance=True)
        fit(distiller, digits(), tmp_path)
        students.append(weights_sha256(distiller.student.state_dict()))
    assert students[0] == students[1]


def test_the_student_learns_in_train_mode_and_is_validated_in_eval_mode(tmp_path):
    modes = {"training_step": set(), "validation_step": set()}

    class Spy(Distiller):
        def training_step(self, *a):
            modes["training_step"].add(self.student.training)
            return super().training_step(*a)

        def validation_step(self, *a):
            modes["validation_step"].add(self.student.training)
            return super().validation_step(*a)

    fit(Spy(net(), KD(), net(16, seed=1), allow_chance=True), digits(), tmp_path, max_epochs=3)
    assert modes == {"training_step": {True}, "validation_step": {False}}


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("method", [KD, FitNet, CRD, functools.partial(FitNet, stage=0)])
def test_everything_is_there_once_it_is_constructed(tmp_path, method, ema):
    data = digits()
    distiller = Distiller(
        net(),
        method(),
        net(16, 1),
        example(data),
        allow_chance=True,
        ema=ema,
        train_targets=data.train_targets,
        data=data,
    )
    before, modes = list(distiller.state_dict()), [m.training for m in distiller.modules()]
    assert all(modes[:1])
    fit(distiller, data, tmp_path, max_epochs=1)
    assert list(distiller.state_dict()) == before
    assert [m.training for m in distiller.modules()] == modes


def test_constructing_leaves_networks_as_they_were():
    data, student, teacher = digits(), net(), net(16, 1)
    state, student.training = torch.get_rng_state(), True
    students, teachers = (copy.deepcopy(n.state_dict()) for n in (student, teacher))
    Distiller(student, KD(), teacher, example(data))
    assert same(students, student)
    assert same(teachers, teacher)
    assert torch.equal(state, torch.get_rng_state())
    assert student.training


# -- any loader, any teacher, any Trainer ----------------------------------------------------------------------------


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
        ({}, {}, [SWA], 13),  # Lightning counts one of its last pass, which trains nothing
        ({"scheduler": functools.partial(ReduceLROnPlateau, mode="max")}, {}, [], 12),
        ({"scheduler": CYCLE, "scheduling": SchedulerOptions("step")}, {}, [], 12),
        ({"ema": 0.9}, {"max_steps": 7}, [], 7),
    ],
    ids=["checkpoint", "stopping", "accumulate", "clip", "swa", "plateau", "onecycle", "ema and max_steps"],
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
    with pytest.raises(UserError, match=r"a mapping with a, in which no logits.*wrap it"):
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


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [KD, FitNet])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_distiller_is_loaded_from_its_checkpoint_without_an_example(tmp_path, method, ema):
    data = digits()
    distiller = Distiller(net(), method(), net(16, 1), example(data), allow_chance=True, ema=ema, seed=3)
    fit(distiller, data, tmp_path, max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    facts = torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]
    assert all(type(v) in (str, int, float) for v in facts.values())
    again = Distiller.load_from_checkpoint(
        tmp_path / "a.ckpt", student=net(seed=5), method=method(), teacher=net(16, 1)
    )
    assert same(distiller, again)
    assert again.seed == 3
    assert (method is FitNet) == any(k.startswith("method.regressor") for k in again.state_dict())
    batch = next(data.batches("val"))
    again.eval(), distiller.eval()
    assert torch.equal(again(batch.inputs).logits, distiller(batch.inputs).logits)


def test_a_method_that_reads_logits_needs_no_example_to_be_loaded_either(tmp_path):
    distiller = Distiller(net(), KD(), net(16, 1), allow_chance=True, ema=0.5)
    fit(distiller, digits(), tmp_path, max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    again = Distiller.load_from_checkpoint(tmp_path / "a.ckpt", student=net(), method=KD(), teacher=net(16, 1))
    assert same(distiller, again)


def test_predict_gives_what_the_task_makes_of_the_deployed_student(tmp_path):
    distiller, set_ = Distiller(net(), Supervised(), ema=0.9), tensors()
    for loader in (DataLoader(set_, 8), DataLoader(TensorDataset(set_.tensors[0]), 8), DataLoader(set_.tensors[0], 8)):
        found = quiet_trainer(tmp_path).predict(distiller, loader)
        distiller.eval()
        expected = Classification().decode(distiller(set_.tensors[0]))
        for name, value in expected.items():
            torch.testing.assert_close(torch.cat([batch[name] for batch in found]), value)


# -- what is refused, and when a training stops ----------------------------------------------------------------------


def test_images_that_a_network_does_not_take_are_refused_with_both_remedies():
    images = torch.randn(4, 1, 8, 8)  # normalized already
    batch = (images, torch.arange(4))
    for student, teacher in ((net(), bare(net(16, 1))), (bare(net()), net(16, 1))):
        with pytest.raises(UserError, match=r"values from -.*without normalization.*preprocess\.bare\(net\)"):
            Distiller(student, KD(), teacher, batch)
    # The first remedy: images from 0 to 1. The second: networks without their preprocessing.
    Distiller(net(), KD(), net(16, 1), (images.sigmoid(), torch.arange(4)))
    Distiller(bare(net()), KD(), bare(net(16, 1)), batch)
    with pytest.raises(UserError, match="values from 0 to 255"):
        Distiller(net(), Supervised(), None, (torch.linspace(0, 255, 64).view(1, 1, 8, 8), torch.zeros(1)))


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


def test_a_method_that_needs_an_example_says_so():
    with pytest.raises(UserError, match=r"FitNet reads features.*example=…"):
        Distiller(net(), FitNet(), net(16, 1))


def test_terms_are_scaled_between_the_points_of_their_schedule(tmp_path):
    assert [interpolate([(0, 0), (20, 1)], x) for x in (0, 1, 10, 20, 300)] == [0, 0.05, 0.5, 1, 1]
    assert interpolate([(1, 1), (2, 3), (4, 0)], 3) == 1.5

    class Constant(Method):
        needs_teacher = False

        def hard_factor(self, epoch):
            return 0.0

        def forward(self, student, teacher, batch):
            return {"hard": student.logits.sum() * 0 + 1, "soft": student.logits.sum() * 0 + 10}

    logged = []

    class Spy(Distiller):
        def on_train_epoch_end(self):
            super().on_train_epoch_end()
            logged.append(
                (float(self.trainer.callback_metrics["train/soft"]), float(self.trainer.callback_metrics["train/loss"]))
            )

    fit(Spy(net(), Constant(), schedule={"soft": [(0, 0), (4, 1)]}), digits(), tmp_path, max_epochs=3)
    assert logged == [(2.5, 3.5), (5.0, 6.0), (7.5, 8.5)]


def test_a_schedule_of_a_term_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UserError, match="schedule names sof, but the terms of this method are hard"):
        fit(Distiller(net(), Supervised(), schedule={"sof": [(0, 0), (4, 1)]}), digits(), tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_term(tmp_path):
    class Explodes(Method):
        needs_teacher = False

        def forward(self, student, teacher, batch):
            return {"soft": student.logits.mean() * (math.inf if self.epoch == 1 else 1)}

    with pytest.raises(UserError, match=r"not finite.*soft = (nan|inf|-inf)"):
        fit(Distiller(net(), Explodes()), digits(), tmp_path, max_epochs=3, log_every_n_steps=1000)
    kept = list(tmp_path.rglob("*.ckpt"))
    assert len(kept) == 1  # of epoch 0, written before the loss exploded
    state = torch.load(kept[0], weights_only=True)["state_dict"]
    assert all(torch.isfinite(v).all() for v in state.values())


def test_a_student_that_overflows_in_its_last_step_stops_the_run_and_no_checkpoint_is_written(tmp_path):
    class Spoils(Distiller):
        def on_train_batch_end(self, *a):
            super().on_train_batch_end(*a)
            if self.trainer.is_last_batch:
                next(self.student.parameters()).data.fill_(math.inf)

    with pytest.raises(UserError, match=r"not finite.*weights.*smaller learning rate"):
        fit(Spoils(net(), Supervised()), digits(), tmp_path, max_epochs=1)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_teacher_at_chance_level_is_refused_before_the_first_step(tmp_path):
    distiller = Distiller(net(), KD(), net(16, seed=1))
    before = weights_sha256(distiller.student.state_dict())
    with pytest.raises(UserError, match=r"chance level.*allow_chance"):
        fit(distiller, digits(), tmp_path)
    assert weights_sha256(distiller.student.state_dict()) == before


def test_chance_is_the_most_frequent_label():
    task = Classification()
    targets = torch.tensor([0] * 90 + [1] * 10)
    with pytest.raises(UserError, match="chance"):
        check_teacher(task, {"accuracy": 0.9}, targets)
    check_teacher(task, {"accuracy": 0.9}, targets, allow_chance=True)
    check_teacher(task, {"accuracy": 0.9 + 3.1 * math.sqrt(0.9 * 0.1 / 100)}, targets)
    check_teacher(task, {"accuracy": 1.0}, targets)
    for few in (torch.tensor([0, 1] * 4), torch.tensor([0] * 95 + [1] * 5)):  # no number could exceed it by three sigma
        check_teacher(task, {"accuracy": 1.0}, few)
    with pytest.raises(UserError, match="not a number"):
        check_teacher(task, {"accuracy": math.nan}, targets)


def test_a_method_that_needs_a_teacher_says_so():
    with pytest.raises(UserError, match="learns from a teacher"):
        Distiller(net(), KD())


def test_a_teacher_is_known_by_the_hash_of_its_weights():
    a, b = net(seed=1), net(seed=1)
    assert weights_sha256(a.state_dict()) == weights_sha256(b.state_dict())
    assert weights_sha256(dict(reversed(a.state_dict().items()))) == weights_sha256(a.state_dict())
    next(iter(b.state_dict().values())).view(-1)[0] += 1e-3
    assert weights_sha256(a.state_dict()) != weights_sha256(b.state_dict())


def test_folding_is_exact_in_float64_and_leaves_the_teacher_itself_alone():
    teacher = bare(net(16, seed=1)).double().eval()
    for m in teacher.modules():
        if isinstance(m, nn.BatchNorm2d):  # as trained, not as made
            m.running_mean.uniform_(-1, 1), m.running_var.uniform_(0.5, 2), m.weight.data.uniform_(0.5, 2)
    before = weights_sha256(teacher.state_dict())
    images = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    fast = fuse_batchnorm(teacher, images)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())
    torch.testing.assert_close(fast(images), teacher(images), rtol=1e-12, atol=1e-12)
    frozen = FrozenTeacher(teacher, example=Batch(images, None))
    assert frozen.run is not teacher
    torch.testing.assert_close(frozen(Batch(images, None)).logits, teacher(images), rtol=1e-12, atol=1e-12)
    assert weights_sha256(teacher.state_dict()) == before
    assert FrozenTeacher(teacher, taps=["layer1"], example=Batch(images, None))(Batch(images, None)).features[
        "layer1"
    ].shape == (5, 16, 8, 8)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 8, 8)])
def test_faster_forms_say_the_same_of_any_batch_and_the_default_one_to_the_bit_wherever_an_image_stands(shape):
    torch.manual_seed(0)
    for teacher in (conv4(10, shape, widths=[16, 32, 64]), resnet(10, shape, 20, [16, 16, 32, 64])):
        frozen = FrozenTeacher(teacher, example=Batch(torch.randn(2, *shape), None))
        images, order = torch.randn(64, *shape), torch.randperm(64)
        logits = frozen(Batch(images, None)).logits
        assert torch.equal(frozen(Batch(images[order], None)).logits, logits[order])
        with torch.no_grad():
            expected = copy.deepcopy(teacher).double()(images.double())
        assert torch.allclose(logits.double(), expected, atol=1e-4)

        frozen = FrozenTeacher(teacher, example=Batch(torch.randn(2, *shape), None), compile="prepacked")
        calls = [frozen(Batch(images, None)).logits for _ in range(4)]
        assert isinstance(frozen._packed[0], torch.jit.ScriptModule)
        assert torch.allclose(calls[0].double(), expected, atol=1e-4)
        assert all(torch.equal(calls[0], again) for again in calls)
        assert torch.allclose(
            torch.cat([frozen(Batch(chunk, None)).logits for chunk in images.split(23)]), calls[0], atol=1e-5
        )


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size"),
    [
        (1, 1, 0, (1, 1)),
        (1, 2, 0, (2, 2)),
        (3, 1, 1, (1, 1)),
        (3, 2, 1, (2, 2)),
        (3, 2, 1, (2, 1)),
        (3, 1, 0, (3, 3)),
        (5, 7, 2, (4, 3)),
    ],
)
def test_a_convolution_to_one_pixel_is_a_matrix_product(kernel, stride, padding, size):
    conv = nn.Conv2d(4, 6, kernel, stride, padding, bias=padding != 1).double()
    maps = torch.randn(5, 4, *size, dtype=torch.float64).to(memory_format=torch.channels_last)
    assert conv(maps).shape == (5, 6, 1, 1)
    torch.testing.assert_close(ConvAsLinear(conv, *size)(maps), conv(maps), rtol=1e-12, atol=1e-12)


def test_a_teacher_whose_course_depends_on_its_images_is_not_written_down():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = bare(net())

        def forward(self, x):
            return self.net(x) * (2 if len(x) > 1 else 1)

    odd = Odd().eval()
    images = torch.randn(4, 1, 8, 8)
    assert prepack(odd, images) is odd
    frozen = FrozenTeacher(odd, example=Batch(images[:2], None))
    assert torch.equal(frozen(Batch(images[:1], None)).logits, odd(images[:1]).detach())
    assert torch.equal(frozen(Batch(images, None)).logits, odd(images).detach())


def test_a_network_that_cannot_be_traced_or_folded_exactly_is_run_as_it_is():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = bare(net(4))

        def forward(self, images):
            return self.net(images) if images.sum() > 0 else self.net(-images)

    odd = Branches().eval()
    assert fuse_batchnorm(odd, torch.randn(2, 1, 8, 8)) is odd
    shared = nn.Sequential(conv := nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), conv, nn.Flatten()).eval()
    shared[1].running_var.fill_(9.0)
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(
        FrozenTeacher(shared, example=Batch(images, None))(Batch(images, None)).logits, shared(images)
    )
