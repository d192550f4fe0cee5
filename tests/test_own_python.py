"""`distill` with the networks, loaders and arguments of others: each is trained, or refused in a line that names a remedy."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, LearningRateFinder, ModelCheckpoint, Timer
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from litdistill import KD, Distiller, Supervised, distill
from litdistill.utils.errors import UserError
from litdistill.utils.shapes import described

IMAGES, LABELS = torch.rand(16, 3, 4, 4), torch.arange(16) % 3


def net(classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, classes))


def loader(make=None, count: int = 16, **options) -> DataLoader:
    """Returns a loader of `count` samples, each what `make` returns for its place."""
    make = make or (lambda i: (IMAGES[i], int(LABELS[i])))
    return DataLoader([make(i) for i in range(count)], **{"batch_size": 8, **options})


def run(tmp_path, student=None, teacher=None, train=None, val="as train", trainer=None, **options) -> Distiller:
    train = loader() if train is None else train
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    given = {"max_epochs": 1, "allow_chance": True, **options}
    teacher = net() if teacher is None else teacher
    found = train if isinstance(val, str) else val
    return distill(student or net(), teacher, train, found, out=tmp_path, trainer={**quiet, **(trainer or {})}, **given)


class Wrapped(nn.Module):
    """A network whose logits are given in another form."""

    def __init__(self, give, classes: int = 3):
        super().__init__()
        self.net, self.give = net(classes), give

    def forward(self, pixels: Tensor, scale: float = 1.0, labels: Tensor | None = None) -> object:
        return self.give(self.net(pixels) * scale)


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor | None = None


def weight_norm() -> nn.Module:
    found = net()
    nn.utils.parametrizations.weight_norm(found[4])
    return found


def with_counters() -> nn.Module:
    found = net()
    found.register_buffer("calls", torch.zeros((), dtype=torch.int32))
    found.spare = nn.Identity()
    found.register_parameter("unused", nn.Parameter(torch.ones(2)))
    return found


NETWORKS = {
    "tuple": lambda: Wrapped(lambda z: (z, z.mean())),
    "dict": lambda: Wrapped(lambda z: {"logits": z, "loss": z.mean()}),
    "dataclass": lambda: Wrapped(Answer),
    "weight norm": weight_norm,
    "scripted": lambda: torch.jit.script(net()),
    "data parallel": lambda: nn.DataParallel(net()),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
@pytest.mark.parametrize("name", NETWORKS)
def test_trains_with_a_network_of_any_kind_on_either_side(tmp_path, name):
    found = run(tmp_path, NETWORKS[name](), NETWORKS[name]())
    assert found.trainer.global_step == 2
    assert not any(p.requires_grad for p in found.teacher.parameters())


def test_trains_a_lazy_student_and_one_with_counters_and_an_unused_parameter(tmp_path):
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    assert run(tmp_path, lazy).deployed_student[1].in_features == 48
    assert run(tmp_path, with_counters()).deployed_student.calls.dtype == torch.int32


def exported() -> nn.Module:
    return torch.export.export(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), (IMAGES[:8],)).module()


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return net()


@pytest.mark.parametrize(
    ("networks", "said"),
    [
        ({"teacher": nn.Sequential(nn.Flatten(), nn.LazyLinear(3))}, "never run: its lazy module has no 1.weight yet"),
        ({"teacher": exported}, "a program of torch.export"),
        ({"teacher": lambda: lambda x: x}, "has to be a torch.nn.Module, and is of the type function: wrap it"),
        ({"teacher": lambda: net().state_dict()}, "load these weights by load_state_dict"),
        ({"teacher": lambda: Wrapped}, r"is the class Wrapped: give a network of it, Wrapped\(…\)"),
        ({"student": on_meta}, "0.weight is on the device meta"),
        ({"student": lambda: net().requires_grad_(False)}, r"nothing can be trained: student.requires_grad_\(True\)"),
        ({"teacher": lambda: net().half()}, r"Its weights are float16: give teacher.float\(\)"),
        ({"teacher": lambda: net(5)}, r"logits \(8, 3\) and the teacher \(8, 5\): both need the same classes"),
        ({"student": lambda: Wrapped(lambda z: (z.new_zeros(8, 7), z))}, r"\(8, 7\) and the teacher \(8, 3\)"),
        ({"student": lambda: Wrapped(lambda z: {"a": z, "b": z})}, "or names its logits otherwise"),
    ],
)  # fmt: skip
def test_refuses_a_network_that_cannot_be_trained_or_teach(tmp_path, networks, said):
    made = {k: v() if not isinstance(v, nn.Module) else v for k, v in networks.items()}
    with pytest.raises(UserError, match=said):
        run(tmp_path, **made)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(IMAGES[i], int(LABELS[i])) for i in range(16)])


class Batches:
    def __iter__(self):
        return iter([(IMAGES[:8], LABELS[:8]), (IMAGES[8:], LABELS[8:])])


LOADERS = {
    "image and label": lambda: loader(lambda i: {"image": IMAGES[i], "label": int(LABELS[i])}),
    "pixel_values and labels": lambda: loader(lambda i: {"pixel_values": IMAGES[i], "labels": int(LABELS[i])}),
    "np.int64": lambda: loader(lambda i: (IMAGES[i], np.int64(i % 3))),
    "np.uint8": lambda: loader(lambda i: (IMAGES[i], np.uint8(i % 3))),
    "probabilities": lambda: loader(lambda i: (IMAGES[i], np.eye(3)[i % 3])),
    "stream": lambda: DataLoader(Stream(), batch_size=8),
    "any iterable": Batches,
}


@pytest.mark.parametrize("name", LOADERS)
def test_trains_on_batches_of_many_forms(tmp_path, name):
    assert run(tmp_path, train=LOADERS[name]()).trainer.global_step == 2


def picture(i: int) -> Image.Image:
    return Image.new("RGB", (4, 4))


BAD = {
    r"train is a data set.*DataLoader\(train": lambda: TensorDataset(IMAGES, LABELS),
    "The samples make no batch: default_collate.*pil_to_tensor": lambda: loader(lambda i: (picture(i), 0)),
    "The samples make no batch: stack expects.*Resize": lambda: loader(lambda i: (torch.rand(3, 4 + i % 2, 4), 0)),
    r"float32 \(8, 3, 4, 4\), tuple of 8 str.*map names to numbers": lambda: loader(lambda i: (IMAGES[i], "abc"[i % 3])),
    r"looks like one sample": lambda: iter([(IMAGES[0], 1)]),
    r"list of 8 int.*torch.as_tensor\(labels\)": lambda: iter([(IMAGES[:8], [0] * 8)]),
    "uint8 .*floats from 0 to 1.*Preprocessed": lambda: loader(lambda i: ((IMAGES[i] * 255).byte(), 0)),
    r"float64 .*inputs.float\(\)": lambda: loader(lambda i: (IMAGES[i].double(), 0)),
    r"\(8, 4, 4, 3\).*images are \(N, channels, height, width\)": lambda: loader(lambda i: (IMAGES[i].movedim(0, 2), 0)),
    r"takes \(input\), and is called with 2 arguments": lambda: loader(lambda i: (IMAGES[i], i % 3, i)),
    "yields no batch.*has 0 samples": lambda: DataLoader(TensorDataset(IMAGES[:0], LABELS[:0])),
    "has 4 samples. With drop_last": lambda: loader(count=4, drop_last=True),
    "from 0 to 9, .*Those here are 0, 5, 9: map them": lambda: loader(lambda i: (IMAGES[i], (0, 5, 9)[i % 3])),
    "from 0 to 7": lambda: loader(lambda i: (IMAGES[i], 7 if i > 9 else i % 3)),
    "a label below 0 is none.*labels='some'": lambda: loader(lambda i: (IMAGES[i], -1 if i % 2 else i % 3)),
    r"int64 \(8, 1\)": lambda: loader(lambda i: (IMAGES[i], torch.tensor([i % 3]))),
    r"float64 \(8,\).*task=regression": lambda: loader(lambda i: (IMAGES[i], i / 2)),
    "not finite: the inputs hold NaN": lambda: loader(lambda i: (IMAGES[i] * (float("nan") if i == 11 else 1), i % 3)),
}  # fmt: skip


@pytest.mark.parametrize("said", BAD)
def test_refuses_batches_that_cannot_be_trained_on(tmp_path, said):
    with pytest.raises(UserError, match=said):
        run(tmp_path, train=BAD[said]())


def test_trains_on_some_labels_and_says_what_is_missing_of_a_validation_set(tmp_path):
    some = loader(lambda i: (IMAGES[i], -1 if i % 2 else i % 3))
    assert run(tmp_path, train=some, val=loader(), labels="some").trainer.global_step == 2
    with pytest.raises(UserError, match="There is no sample to measure"):
        run(tmp_path, val=DataLoader(TensorDataset(IMAGES[:0], LABELS[:0])))


def test_passes_an_error_of_the_users_own_data_set(tmp_path):
    class Broken(TensorDataset):
        def __getitem__(self, index):
            return 1 // 0

    with pytest.raises(ZeroDivisionError):
        run(tmp_path, train=DataLoader(Broken(IMAGES), batch_size=8))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "dkd"}, r"method='dkd' is no method: give an object, method=litdistill.DKD\(\)"),
        ({"method": KD}, r"method=litdistill.KD\(\)"),
        ({"optimizer": "adam"}, "functools.partial"),
        ({"optimizer": torch.optim.SGD(net().parameters(), 0.1)}, "functools.partial"),
        ({"max_epochs": "3"}, "max_epochs='3'"),
        ({"callbacks": Timer("00:00:00:10")}, "callbacks=Timer: give a list"),
        ({"lr": 0.1}, "distill has no argument lr: give it to the optimizer"),
        ({"max_steps": 3}, r"one of Lightning's Trainer: trainer=\{'max_steps'"),
        ({"epochs": 3}, "did you mean max_epochs"),
        ({"trainer": {"gpus": 1}}, "gpus"),
        ({"trainer": {"limit_train_batches": 0.1}}, "limit_train_batches"),
        ({"trainer": {"val_check_interval": 100}}, "val_check_interval"),
    ],
)
def test_refuses_arguments_in_a_line(tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        run(tmp_path, **options)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_the_teacher_has_the_precision_of_the_students_weights(tmp_path, precision):
    found = run(tmp_path, trainer={"precision": precision})
    kinds = {p.dtype for p in [*found.student.parameters(), *found.teacher.parameters()]}
    assert kinds == {torch.float64 if precision == "64-true" else torch.bfloat16}


def test_weights_of_half_precision_that_diverge_are_named(tmp_path):
    half = loader(lambda i: (IMAGES[i].half(), int(LABELS[i])))
    with pytest.raises(UserError, match=r"not finite any more.*weights are float16.*student.float\(\)"):
        run(tmp_path, net().half(), net().half(), half, max_epochs=4)


@pytest.mark.parametrize("options", [{"barebones": True}, {"enable_checkpointing": False}, {"fast_dev_run": True}])
def test_trains_without_checkpoints_where_the_trainer_writes_none(tmp_path, options):
    if "barebones" in options:
        options = {**options, "logger": None, "enable_progress_bar": None}
    student = net()
    before = student[4].weight.clone()
    assert not torch.equal(run(tmp_path, student, trainer=options).deployed_student[4].weight, before)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_takes_the_users_own_checkpoints_of_the_same_metric(tmp_path):
    own = ModelCheckpoint(tmp_path / "mine", monitor="val/accuracy", mode="max")
    run(tmp_path, callbacks=[own])
    assert own.best_model_path.startswith(str(tmp_path / "mine"))


def test_the_learning_rate_finder_sets_the_rate_of_the_optimizer(tmp_path):
    finder = LearningRateFinder(1e-5, 1e-2, num_training_steps=20, early_stop_threshold=None)
    optimizer = functools.partial(torch.optim.SGD, lr=7.0)
    found = run(tmp_path, train=loader(batch_size=2), callbacks=[finder], optimizer=optimizer, max_epochs=3)
    assert found.lr == finder.optimal_lr.suggestion()
    assert found.trainer.optimizers[0].param_groups[0]["lr"] == found.lr


def test_a_distiller_without_a_teacher_checks_its_network_too():
    with pytest.raises(UserError, match="cannot run on a batch"):
        Distiller(net(), Supervised(), example=(torch.rand(2, 5), torch.zeros(2).long()))


def test_described_says_types_and_shapes_alone():
    assert (
        described({"a": torch.zeros(2, 3), "b": np.zeros(2)}) == "{a: float32 (2, 3), b: array of NumPy float64 (2,)}"
    )
    assert described((torch.zeros(1).long(), "text")) == "(int64 (1,), str)"


class Fails(Callback):
    def on_train_start(self, trainer, module) -> None:
        raise AttributeError("mine")


def test_a_callback_of_lightnings_that_does_not_fit_is_named_and_an_error_of_the_users_own_passes(tmp_path):
    with pytest.raises(UserError, match=r"^BackboneFinetuning: 'Distiller' object has no attribute 'backbone'"):
        run(tmp_path, callbacks=[BackboneFinetuning()])
    with pytest.raises(AttributeError, match="mine"):
        run(tmp_path, callbacks=[Fails()])
