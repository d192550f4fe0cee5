"""What makes another cache: all that changes what a teacher says, and nothing else."""

import functools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode as Interpolation

from litdistill.data.augment import Crop, Flip
from litdistill.data.mixing import Mixup
from litdistill.distillation import teacher_cache as cache_module
from litdistill.distillation.teacher import FrozenTeacher
from litdistill.distillation.teacher_cache import (
    cache_key,
)
from litdistill.evaluation import predictions
from litdistill.models.ensemble import Ensemble
from litdistill.utils.hashing import stable_repr
from tests.caches import CPU, TASK, Dim, digits, net


@pytest.mark.parametrize(
    "change", ["teacher", "network", "data", "augment", "mix", "dtype", "taps", "precision", "seed", "mean", "mode"]
)
def test_whatever_changes_what_the_teacher_says_is_another_cache(change):
    def key(**c):
        data = digits(c.get("seed", 0), c.get("augment", [Crop(1)]), mix=c.get("mix"))
        if c.get("data"):
            data.source.train.images[0, 0, 0, 0] += 1
        inner = net(16, seed=c.get("weights", 1), mean=c.get("mean", 0.3))
        if c.get("network"):
            inner.net.layer1[2] = torch.nn.LeakyReLU()
        teacher = FrozenTeacher(inner, taps=c.get("taps", []), compile=c.get("mode"))
        return cache_key(teacher, data, CPU, c.get("dtype", torch.float32), c.get("precision", "32-true"))

    changes = {
        "teacher": {"weights": 2}, "network": {"network": True}, "data": {"data": True}, "augment": {"augment": [Crop(2)]},
        "dtype": {"dtype": torch.float16}, "taps": {"taps": ["layer1"]}, "precision": {"precision": "bf16-mixed"},
        "mean": {"mean": 0.2}, "mix": {"mix": Mixup(0.5)}, "mode": {"mode": "prepacked"},
    }  # fmt: skip
    assert key() == key()
    mixed = [key(mix=Mixup(0.5)), key(mix=Mixup(0.2)), key(mix=Mixup(0.5), seed=1)]
    assert len({*mixed, key()}) == 4
    if change == "seed":  # the views of an image are numbered the same for every seed, unless there is no end of them
        assert key(seed=1) == key()
        assert key(seed=1, augment=[Dim()]) != key(augment=[Dim()])
    else:
        assert key(**changes[change]) != key()


class Act(torch.nn.Module):
    """A network that is not all in its layers: what it applies and scales by are plain attributes."""

    def __init__(self, act=F.relu, scale: float = 1.0):
        super().__init__()
        self.fc, self.act, self.scale = torch.nn.Linear(64, 10), act, scale

    def forward(self, images):
        return self.act(self.fc(images.flatten(1) / 255)) * self.scale


def _acts():
    torch.manual_seed(0)
    first = Act()
    others = Act(torch.tanh), Act(scale=2.0)
    for other in others:
        other.load_state_dict(first.state_dict())
    member = net(16)
    return [first, *others, Ensemble([member, net(8)]), Ensemble([member, net(8)], average="probabilities")]


def test_networks_of_the_same_weights_that_compute_otherwise_share_no_rows():
    data = digits()
    key = functools.partial(cache_key, data=data, device=CPU, dtype=torch.float32, precision="32-true")
    keys = [key(FrozenTeacher(n)) for n in _acts()]
    assert len(set(keys)) == 5
    assert keys == [key(FrozenTeacher(n)) for n in _acts()]  # and no address of an object is in a key


def test_a_network_that_holds_what_holds_it_is_described_too():
    one, other = Act(functools.partial(F.leaky_relu, negative_slope=0.1)), Act(functools.partial(F.leaky_relu))
    for module in (one, other):
        module.owners = [{"owner": module}]
    assert stable_repr(one) == stable_repr(one) != stable_repr(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Interpolation.NEAREST, Interpolation.BICUBIC),
        ({1, 2}, {1, 3}),
        (Path("a"), Path("b")),
        (torch.half, torch.float),
    ],
)
def test_values_without_attributes_are_told_apart(one, other):
    assert stable_repr(one) == stable_repr(one) != stable_repr(other)
    assert stable_repr({"b", "a"}) == ["'a'", "'b'"]  # in an order that no hash decides


def test_evaluations_that_are_not_the_networks_are_computed_anew(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cache_module, "logits_key", lambda *_: "key")  # as if it lacked what tells two networks apart
    one, other, data = Act(), Act(torch.tanh), digits()
    for teacher in (one, other, one):
        found = predictions.teacher_outputs(teacher, data, TASK, "val", "cpu", tmp_path).logits
        assert torch.equal(found, predictions.collect(teacher, data, "val")[0])
    assert caplog.text.count("does not hold the teacher's logits") == 2


def test_augmentations_that_differ_in_a_large_table_share_no_rows():
    class Table(Flip):
        def __init__(self, table):
            self.table = table

    tables = [torch.zeros(2000) for _ in range(2)]
    tables[1][1000] = 1
    keys = [cache_key(FrozenTeacher(net()), digits(augment=[Table(t)]), CPU, torch.float32, "") for t in tables]
    assert keys[0] != keys[1]
