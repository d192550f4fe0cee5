"""What every method keeps to: the labels' loss is the task's, and methods say how they weigh it and which logits they read."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate
from torch import nn

import litdistill.methods
from litdistill.methods import AB, CC, CRD, FSP, FT, KD, NAMES, PKT, SP, SRRL, Online, Shuffled
from litdistill.methods.base import ALL_KINDS, BERNOULLI, BOXES, CATEGORICAL, REAL, Method
from litdistill.types import Outputs
from litdistill.utils.errors import UserError
from tests.methods.contract import batch

CONF = Path(__file__).parents[2] / "conf"
YAMLS = sorted(p.stem for p in (CONF / "method").glob("*.yaml"))
OF_TASKS = {name for name in YAMLS if "litdistill.tasks." in (CONF / "method" / f"{name}.yaml").read_text()}  # of boxes
MAPS = {"ab", "at", "cwd", "fitnet", "fsp", "ft", "ickd", "kdsvd", "mgd", "nst", "ofd", "pkd", "reviewkd", "vid"}
# The published weight of the labels, where it is not 1.
HARD = {"kd": 0.1, "soft_target_ce": 0.1, "logit_std": 0.1, "kd_at": 0.1, "mlkd": 0.2, "hard_pseudo_label": 0.5}
HARD |= {"teacher_free": 0.9, "logit_mse": 0.0, "simkd": 0.0, "feature_only": 0.0, "ard": 0.0, "rslad": 0.0, "mft": 0.0}
SOFTMAX = {"kd", "dkd", "dist", "mlkd", "wttm", "soft_target_ce", "teacher_free", "hard_pseudo_label", "logit_std"}
SOFTMAX |= {"mutual", "online", "srd", "crd", "kd_at", "kd_crd", "pairs", "ard", "rslad", "mft", "nkd", "wkd"}


def make(name: str) -> Method:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return instantiate(compose(overrides=[f"+method={name}"]).method, _convert_="all")


@pytest.mark.parametrize("name", YAMLS)
def test_the_labels_have_their_published_weight(name):
    method = make(name)
    assert method.hard == HARD.get(name, 1.0)
    assert method.hard_factor(10**6) == 1
    assert method.hard_factor(0) == (0 if name in ("ab", "fsp", "ft") else 1)


@pytest.mark.parametrize("name", YAMLS)
def test_methods_say_which_logits_they_read(name):
    own = {"binary_kd": (BERNOULLI,), **dict.fromkeys(SOFTMAX, (CATEGORICAL,)), **dict.fromkeys(OF_TASKS, (BOXES,))}
    own |= dict.fromkeys([*MAPS, "supervised"], ALL_KINDS)
    assert make(name).kinds == own.get(name, (CATEGORICAL, BERNOULLI, REAL))


def test_every_class_has_its_short_name_and_every_yaml_names_one():
    public = {name for name, x in vars(litdistill.methods).items() if inspect.isclass(x)}
    assert public == set(NAMES) == set(litdistill.methods.__all__)
    assert (NAMES["KD"], NAMES["FitNet"], NAMES["LogitMSE"]) == ("kd", "fitnet", "logit_mse")
    files = {p.stem for p in Path(litdistill.methods.__file__).parent.glob("*.py")} - {
        "__init__",
        "base",
        "layers",
        "softening",
    }
    assert set(NAMES.values()) == files
    assert files - {"sum", "shuffled"} == set(YAMLS) - OF_TASKS - {"kd_at", "kd_crd", "feature_only", "logit_std"}
    for name in set(YAMLS) - OF_TASKS - {"feature_only", "logit_std"}:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            target = compose(overrides=[f"+method={name}"]).method["_target_"]
        assert target == f"litdistill.methods.{get_class(target).__name__}"
        assert NAMES[get_class(target).__name__] == ("sum" if name.startswith("kd_") else name)


@pytest.mark.parametrize("cls", [AB, FSP, FT])
def test_the_labels_wait_for_the_first_phase(cls):
    method = cls(init_epochs=3)
    assert [method.hard_factor(epoch) for epoch in (0, 2, 3, 9)] == [0, 0, 1, 1]


def test_a_method_of_vectors_without_any_says_so():
    empty = Outputs.of(torch.zeros(2, 5))
    for method in (CC(), CRD(), PKT(), SP()):
        with pytest.raises(UserError, match="its taps name none"):
            method.build(empty, empty, torch.tensor([0, 1]))


def test_a_weight_of_zero_reads_and_builds_nothing():
    some = Outputs.of(torch.zeros(2, 5), {"pooled": torch.zeros(2, 7)})
    for method in (CC(hint=0), CRD(hint=0), PKT(hint=0), SP(hint=0), SRRL(hint=0, soft=0)):
        method.build(some, None, None)
        assert method.taps() == ((), ())
        assert list(method.parameters()) == []
        assert method(some, None, batch(torch.tensor([0, 1]))) == {}


# -- a control and a teacher of its own --------------------------------------------------------------------------------


class Given(Method):
    """Keeps what it was given."""

    def forward(self, student, teacher, batch):
        self.given = teacher
        return {}


def test_shuffled_gives_all_heads_and_features_of_another_sample_of_the_class():
    inner = Given(hard=0.4)
    rows = torch.arange(5.0)
    teacher = Outputs({"logits": rows[:, None], "embedding": rows[:, None] + 10}, {"tap": rows[:, None, None, None]})
    Shuffled(inner)(Outputs.of(rows[:, None]), teacher, batch(torch.tensor([0, 1, 0, 2, 0])))
    other = torch.tensor([2.0, 1, 4, 3, 0])
    assert torch.equal(inner.given.logits.flatten(), other)
    assert torch.equal(inner.given.heads["embedding"].flatten(), other + 10)
    assert torch.equal(inner.given.features["tap"].flatten(), other)


def test_shuffled_is_its_method_in_all_else():
    inner = AB(hard=0.7, init_epochs=3)
    method = Shuffled(inner)
    method.set_epoch(2)
    assert (method.hard, method.needs_hard, method.init_epochs, inner.epoch) == (0.7, True, 3, 2)
    assert [method.hard_factor(epoch) for epoch in (2, 3)] == [0, 1]
    assert method.taps() == inner.taps()
    assert method.kinds == (CATEGORICAL,)  # samples are paired by their class
    assert Shuffled(KD()).needs_teacher


def test_the_average_of_online_follows_by_its_decay_and_with_the_students_statistics():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    net = Online(decay=0.75).prepare(student, None, torch.randn(2, 3))
    start = [p.detach().clone() for p in student.parameters()]
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1.0)
    net.train()(torch.randn(8, 3))
    for average, first in zip(net.average.parameters(), start, strict=True):
        torch.testing.assert_close(average, first + 0.25)
    assert not net.average.training
    held = [p.clone() for p in net.average.parameters()]
    net.eval()(torch.randn(8, 3))
    assert all(torch.equal(a, b) for a, b in zip(net.average.parameters(), held, strict=True))
    net.train()(torch.randn(8, 3))
    moved = student[1].running_mean.clone()
    net._update_average()
    assert torch.equal(net.average[1].running_mean, moved)
