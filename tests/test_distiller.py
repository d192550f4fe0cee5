"""The guarantees of `Distiller`, each broken by the fault it is there for."""

import copy
import math

import pytest
import torch
from lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from litdistill.data.datamodule import ImageData
from litdistill.distillation.distiller import Distiller, check_teacher, interpolate
from litdistill.distillation.inference import ConvAsLinear, fuse_batchnorm, prepack
from litdistill.distillation.teacher import FrozenTeacher
from litdistill.methods.base import Method
from litdistill.methods.kd import KD
from litdistill.methods.supervised import Supervised
from litdistill.models.resnet import resnet
from litdistill.models.small import conv4
from litdistill.utils.errors import UserError
from litdistill.utils.hashing import weights_sha256


def net(width: int = 8, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return conv4(10, (1, 8, 8), widths=[width, width])


def digits(**options) -> ImageData:
    return ImageData("digits", per_class=12, batch_size=40, **options)


def fit(distiller: Distiller, data, tmp_path, epochs: int = 2, **options) -> Trainer:
    settings = {
        "accelerator": "cpu", "max_epochs": epochs, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": tmp_path, "num_sanity_val_steps": 0, "log_every_n_steps": 1,
    }  # fmt: skip
    trainer = Trainer(**(settings | options))
    if isinstance(data, ImageData):
        trainer.fit(distiller, datamodule=data)
    else:
        trainer.fit(distiller, *data)
    return trainer


def test_the_teacher_is_bit_identical_after_a_fit(tmp_path):
    teacher = FrozenTeacher(net(16, seed=1))
    before = {k: v.clone() for k, v in teacher.net.state_dict().items()}
    distiller = Distiller(net(), KD(), teacher, allow_chance=True)
    distiller.train()
    assert not any(m.training for m in teacher.modules())
    teacher.train()  # what any other code might call
    assert not any(m.training for m in teacher.modules())
    student = {k: v.clone() for k, v in distiller.student.state_dict().items()}
    fit(distiller, digits(), tmp_path)
    after = teacher.net.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)  # BatchNorm's averages too
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not all(torch.equal(v, distiller.student.state_dict()[k]) for k, v in student.items())


def test_no_checkpoint_and_no_optimizer_holds_the_teacher(tmp_path):
    distiller = Distiller(net(), KD(), FrozenTeacher(net(16, seed=1)), allow_chance=True)
    trainer = fit(distiller, digits(), tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)  # tensors and plain values only
    assert {k.split(".")[0] for k in saved["state_dict"]} == {"student"}
    assert "hyper_parameters" not in saved
    optimised = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimised == {id(p) for p in distiller.student.parameters()}
    assert not [n for n, _ in distiller.named_modules() if "teacher" in n]


def test_kd_without_its_soft_term_is_supervised_to_the_bit(tmp_path):
    students = []
    for method, teacher in ((KD(hard=1, soft=0), FrozenTeacher(net(16, seed=1))), (Supervised(), None)):
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

    fit(Spy(net(), KD(), FrozenTeacher(net(16, seed=1)), allow_chance=True), digits(), tmp_path, epochs=3)
    assert modes == {"training_step": {True}, "validation_step": {False}}


def test_any_trainer_and_any_loader_will_do(tmp_path):
    set_ = TensorDataset(torch.randn(32, 1, 8, 8), torch.randint(0, 10, (32,)))
    loaders = DataLoader(set_, batch_size=8, shuffle=True), DataLoader(set_, batch_size=8)
    distiller = Distiller(net(), KD(), FrozenTeacher(net(16, seed=1)), allow_chance=True)
    trainer = fit(distiller, loaders, tmp_path)
    assert trainer.global_step == 8
    assert {"train/loss", "train/hard", "train/soft", "train/agreement", "val/accuracy", "val/ece", "val/kl"} <= set(
        trainer.callback_metrics
    )


def test_terms_are_scaled_between_the_points_of_their_schedule(tmp_path):
    assert [interpolate([(0, 0), (20, 1)], x) for x in (0, 1, 10, 20, 300)] == [0, 0.05, 0.5, 1, 1]
    assert interpolate([(1, 1), (2, 3), (4, 0)], 3) == 1.5

    class Constant(Method):
        needs_teacher = False

        def forward(self, student, teacher, target):
            return {"hard": student.logits.sum() * 0 + 1, "soft": student.logits.sum() * 0 + 10}

    logged = []

    class Spy(Distiller):
        def on_train_epoch_end(self):
            logged.append(
                (float(self.trainer.callback_metrics["train/soft"]), float(self.trainer.callback_metrics["train/loss"]))
            )

    fit(Spy(net(), Constant(), schedule={"soft": [(0, 0), (4, 1)]}), digits(), tmp_path, epochs=3)
    assert logged == [(2.5, 3.5), (5.0, 6.0), (7.5, 8.5)]


def test_a_schedule_of_a_term_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UserError, match="schedule names sof, but the terms of this method are hard"):
        fit(Distiller(net(), Supervised(), schedule={"sof": [(0, 0), (4, 1)]}), digits(), tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_term(tmp_path):
    class Explodes(Method):
        needs_teacher = False

        def forward(self, student, teacher, target):
            bad = self.epoch == 1
            return {"hard": student.logits.mean() * (math.inf if bad else 1), "soft": student.logits.mean()}

    with pytest.raises(UserError, match=r"not finite.*hard = (nan|inf|-inf)"):
        fit(Distiller(net(), Explodes()), digits(), tmp_path, epochs=3, log_every_n_steps=1000)
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

    with pytest.raises(UserError, match=r"not finite.*optimizer\.lr"):
        fit(Spoils(net(), Supervised()), digits(), tmp_path, epochs=1)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_teacher_at_chance_level_is_refused_before_the_first_step(tmp_path):
    distiller = Distiller(net(), KD(), FrozenTeacher(net(16, seed=1)))
    before = weights_sha256(distiller.student.state_dict())
    with pytest.raises(UserError, match=r"chance level.*allow_chance"):
        fit(distiller, digits(), tmp_path)
    assert weights_sha256(distiller.student.state_dict()) == before


def test_chance_is_the_most_frequent_label():
    targets = torch.tensor([0] * 90 + [1] * 10)
    majority = torch.zeros(100, 2).index_fill_(1, torch.tensor([0]), 1.0)
    with pytest.raises(UserError, match="chance"):
        check_teacher(majority, targets)
    assert check_teacher(majority, targets, allow_chance=True) == 0.9
    assert check_teacher(nn.functional.one_hot(targets).float(), targets) == 1
    for few in (
        torch.tensor([0, 1] * 4),
        torch.tensor([0] * 95 + [1] * 5),
    ):  # no number could exceed chance by three sigma
        assert check_teacher(nn.functional.one_hot(few).float(), few) == 1
    with pytest.raises(UserError, match="not finite"):
        check_teacher(majority / 0, targets)


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
    teacher = net(16, seed=1).double().eval()
    for m in teacher.modules():
        if isinstance(m, nn.BatchNorm2d):  # as trained, not as made
            m.running_mean.uniform_(-1, 1), m.running_var.uniform_(0.5, 2), m.weight.data.uniform_(0.5, 2)
    before = weights_sha256(teacher.state_dict())
    images = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    fast = fuse_batchnorm(teacher, images)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())
    torch.testing.assert_close(fast(images), teacher(images), rtol=1e-12, atol=1e-12)
    frozen = FrozenTeacher(teacher, (), images)
    torch.testing.assert_close(frozen(images).logits, teacher(images), rtol=1e-12, atol=1e-12)
    assert frozen.sha256 == weights_sha256(teacher.state_dict()) == before
    assert FrozenTeacher(teacher, ["layer1"], images)(images).features["layer1"].shape == (5, 16, 8, 8)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 8, 8)])
def test_faster_forms_say_the_same_of_any_batch_and_the_default_one_to_the_bit_wherever_an_image_stands(shape):
    torch.manual_seed(0)
    for teacher in (conv4(10, shape, widths=[16, 32, 64]), resnet(10, shape, 20, [16, 16, 32, 64])):
        frozen = FrozenTeacher(teacher, (), torch.randn(2, *shape))
        images, order = torch.randn(64, *shape), torch.randperm(64)
        logits = frozen(images).logits
        assert torch.equal(frozen(images[order]).logits, logits[order])
        with torch.no_grad():
            expected = copy.deepcopy(teacher).double()(images.double())
        assert torch.allclose(logits.double(), expected, atol=1e-4)

        frozen.compile("prepacked")
        calls = [frozen(images).logits for _ in range(4)]
        assert isinstance(frozen._packed[0], torch.jit.ScriptModule)
        assert torch.allclose(calls[0].double(), expected, atol=1e-4)
        assert all(torch.equal(calls[0], again) for again in calls)
        assert torch.allclose(torch.cat([frozen(chunk).logits for chunk in images.split(23)]), calls[0], atol=1e-5)


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
            self.net = net()

        def forward(self, x):
            return self.net(x) * (2 if len(x) > 1 else 1)

    odd = Odd().eval()
    images = torch.randn(4, 1, 8, 8)
    assert prepack(odd, images) is odd
    frozen = FrozenTeacher(odd, (), images[:2])
    assert torch.equal(frozen(images[:1]).logits, odd(images[:1]).detach())
    assert torch.equal(frozen(images).logits, odd(images).detach())


def test_a_network_that_cannot_be_traced_or_folded_exactly_is_run_as_it_is():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net(4)

        def forward(self, images):
            return self.net(images) if images.sum() > 0 else self.net(-images)

    odd = Branches().eval()
    assert fuse_batchnorm(odd, torch.randn(2, 1, 8, 8)) is odd
    shared = nn.Sequential(conv := nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), conv, nn.Flatten()).eval()
    shared[1].running_var.fill_(9.0)
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(FrozenTeacher(shared, (), images)(images).logits, shared(images))
