"""The sum of methods: routing of features, names of terms, state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from litdistill.methods.ab import AB
from litdistill.methods.base import BERNOULLI, CATEGORICAL, REAL, Method
from litdistill.methods.fsp import FSP
from litdistill.methods.ft import FT
from litdistill.methods.kd import KD
from litdistill.methods.logit_mse import LogitMSE
from litdistill.methods.mutual import Mutual
from litdistill.methods.shuffled import Shuffled
from litdistill.methods.sp import SP
from litdistill.methods.sum import Sum
from litdistill.types import Taps
from litdistill.utils.errors import UserError
from tests.methods.contract import Reader, batch


class Probe(Method):
    """Gives what it was given, so that a test can look at it."""

    def __init__(self, student_taps, teacher_taps):
        super().__init__(hard=0)
        self.read = Taps(student_taps, teacher_taps)

    def taps(self):
        return self.read

    def build(self, student, teacher, targets):
        self.built = list(student.features), list(teacher.features)

    def forward(self, student, teacher, batch):
        self.seen = list(student.features), list(teacher.features), self.epoch, batch.ids
        return {"hint": student.logits.sum() * 0 + 1}


class Headless(Method):
    """Gives the student another head, as some methods do."""

    needs_teacher = False

    def __init__(self):
        super().__init__(hard=0)

    def prepare(self, student, teacher, example):
        return nn.Sequential(*student, nn.Linear(3, 3))

    def forward(self, student, teacher, batch):
        return {}


def net(width: int) -> nn.Sequential:
    return nn.Sequential(
        *(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
        ),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)),
    )


def outputs(method, student, teacher, x):
    taps = method.taps()
    return Reader(student, x, taps.student)(x), Reader(teacher, x, taps.teacher)(x)


def test_sum_gives_each_method_its_own_features_and_the_epoch():
    student, teacher, x = net(4), net(6), torch.randn(3, 1, 8, 8)
    a, b = Probe("pooled", ["0"]), Probe(["3", "0"], "stages")
    method = Sum({"a": a, "b": b})
    with pytest.raises(UserError, match="prepare"):
        method.taps()
    assert method.prepare(student, teacher, x) is student
    taps = method.taps()
    assert taps == Taps(["7:in", "3", "0"], ["0", "1", "4"])
    ids = torch.arange(3)
    s, t = outputs(method, student, teacher, x)
    method.build(s, t, torch.tensor([0, 1, 2]))
    assert a.built == (["7:in"], ["0"])
    method.set_epoch(7)
    assert {k: v.item() for k, v in method(s, t, batch(ids, ids)).items()} == {"a_hint": 1, "b_hint": 1}
    assert a.seen == (["7:in"], ["0"], 7, ids)
    assert b.seen == (["3", "0"], ["1", "4"], 7, ids)
    assert method.needs_teacher


def test_sum_taps_the_student_that_a_method_has_changed():
    method = Sum({"head": Headless(), "probe": Probe("pooled", ())})
    student = method.prepare(net(4), None, torch.randn(2, 1, 8, 8))
    assert [name for name, _ in student.named_children()][-1] == "8"
    assert method.taps().student == ["8:in"]
    assert not Sum({"head": Headless()}).needs_teacher


def test_sum_adds_the_terms_of_its_methods():
    student, teacher, x, y = net(4), net(6), torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2])
    method = Sum({"kd": KD(0.5, 2.0), "sp": SP(0.0, 3.0)})
    method.prepare(student, teacher, x)
    s, t = outputs(method, student, teacher, x)
    terms = method(s, t, batch(y))
    want = {"kd_soft": KD(0, 2.0)(s, t, batch(y))["soft"], "sp_hint": SP(0, 3.0)(s, t, batch(y))["hint"]}
    assert terms.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(terms[name], value)


def test_sum_refuses_labels_that_count_twice_and_an_empty_sum():
    with pytest.raises(UserError, match=r"Set methods\.sp\.hard=0"):
        Sum({"kd": KD(), "sp": SP()})
    for parts in ({"kd": KD(), "ab": AB()}, {"fsp": FSP(), "kd": KD()}):  # of which one comes to its labels later
        with pytest.raises(UserError, match=r"Set methods\.kd\.hard=0"):
            Sum(parts)
        assert Sum(parts | {"kd": KD(hard=0)}).needs_hard
    with pytest.raises(UserError, match="ab and fsp must both"):
        Sum({"ab": AB(), "fsp": FSP()})
    with pytest.raises(UserError, match="empty"):
        Sum({})


def test_the_labels_count_as_in_the_one_method_that_weighs_them():
    kd_first = Sum({"kd": KD(hard=0.3), "ft": FT(hard=0, init_epochs=5)})
    assert kd_first.hard == 0.3
    assert [kd_first.hard_factor(epoch) for epoch in (0, 4, 5)] == [1, 1, 1]
    ab_first = Sum({"kd": KD(hard=0), "ab": AB(hard=0.7, init_epochs=5)})
    assert ab_first.hard == 0.7
    assert [ab_first.hard_factor(epoch) for epoch in (0, 4, 5)] == [0, 0, 1]
    assert Sum({"kd": KD(hard=0)}).hard == 0


def test_a_sum_is_in_a_first_phase_as_long_as_any_of_its_methods():
    assert Sum({"kd": KD(hard=0), "ab": AB(init_epochs=5)}).init_epochs == 5
    assert Sum({"ab": AB(init_epochs=5), "ft": FT(hard=0, init_epochs=3)}).init_epochs == 5
    assert Sum({"kd": KD(), "sp": SP(hard=0)}).init_epochs == 0


def test_a_sum_reads_the_kinds_of_logits_that_all_its_methods_read():
    assert Sum({"mse": LogitMSE(), "sp": SP(hard=0)}).kinds == (CATEGORICAL, BERNOULLI, REAL)
    assert Sum({"kd": KD(), "sp": SP(hard=0)}).kinds == (CATEGORICAL,)


def test_companions_of_one_method_are_those_of_the_sum():
    student, teacher, x = net(4), net(6), torch.randn(3, 1, 8, 8)
    method = Sum({"sp": SP(0.0, 3.0), "mutual": Mutual(peers=2)})
    cohort = method.prepare(student, teacher, x)
    s, _ = outputs(method, cohort, teacher, x)
    want = [peer(x) for peer in cohort.peers]
    for companion, logits in zip(method.companions(s), want, strict=True):
        torch.testing.assert_close(companion.logits, logits)
    assert method.ship(cohort) is student


def test_sum_config_trains_its_projectors_and_loads_again():
    config = OmegaConf.load(Path(__file__).parents[2] / "conf/method/kd_crd.yaml")
    student, teacher, x, y = net(4), net(6), torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2])
    states = []
    for _ in range(2):
        method = instantiate(config)
        method.prepare(student, teacher, x)
        s, t = outputs(method, student, teacher, x)
        method.build(s, t, y)
        states.append((method, s, t))
    method, s, t = states[0]
    terms = method(s, t, batch(y, torch.arange(3)))
    assert method.hard == 1.0
    assert terms.keys() == {"kd_soft", "crd_hint"}
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in method.parameters())
    states[1][0].load_state_dict(method.state_dict())


def test_what_several_methods_watch_under_one_name_is_told_apart_by_their_keys():
    both = Sum({"a": KD(hard=0, learnt=1, temperature=2.0), "b": KD(learnt=1, temperature=3.0)}).watched()
    assert {name: round(value.item(), 3) for name, value in both.items()} == {"a_temperature": 2, "b_temperature": 3}
    assert list(Sum({"kd": KD(learnt=1), "sp": SP(hard=0)}).watched()) == ["temperature"]
    assert list(Shuffled(KD(learnt=1)).watched()) == ["temperature"]
