"""The sum of methods: routing of features, names of terms, state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from litdistill.features.feature_extractor import FeatureExtractor
from litdistill.methods.ab import AB
from litdistill.methods.base import Method
from litdistill.methods.fsp import FSP
from litdistill.methods.ft import FT
from litdistill.methods.kd import KD
from litdistill.methods.sp import SP
from litdistill.methods.sum import Sum
from litdistill.types import Taps
from litdistill.utils.errors import UserError


class Probe(Method):
    """Gives what it was given, so that a test can look at it."""

    def __init__(self, student_taps, teacher_taps):
        super().__init__()
        self.read = Taps(student_taps, teacher_taps)

    def taps(self):
        return self.read

    def build(self, student, teacher, targets):
        self.built = list(student.features), list(teacher.features)

    def forward(self, student, teacher, target):
        self.seen = list(student.features), list(teacher.features), self.epoch, student.ids
        return {"hint": student.logits.sum() * 0 + 1}


class Headless(Method):
    """Gives the student another head, as some methods do."""

    needs_teacher = False

    def prepare(self, student, teacher, example):
        return nn.Sequential(*student, nn.Linear(3, 3))

    def forward(self, student, teacher, target):
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
    s, t = FeatureExtractor(student, taps.student)(x)._replace(ids=ids), FeatureExtractor(teacher, taps.teacher)(x)
    method.build(s, t, torch.tensor([0, 1, 2]))
    assert a.built == (["7:in"], ["0"])
    method.epoch = 7
    assert {k: v.item() for k, v in method(s, t, ids).items()} == {"a_hint": 1, "b_hint": 1}
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
    s, t = FeatureExtractor(student, method.taps().student)(x), FeatureExtractor(teacher, method.taps().teacher)(x)
    terms = method(s, t, y)
    want = {
        "hard": KD(0.5, 0)(s, t, y)["hard"],
        "kd_soft": KD(0, 2.0)(s, t, y)["soft"],
        "sp_hint": SP(0, 3.0)(s, t, y)["hint"],
    }
    assert terms.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(terms[name], value)


def test_sum_refuses_labels_that_count_twice_and_an_empty_sum():
    with pytest.raises(UserError, match=r"methods\.sp\.hard=0"):
        Sum({"kd": KD(), "sp": SP()})
    for parts in ({"kd": KD(), "ab": AB()}, {"fsp": FSP(), "kd": KD()}):  # of which one comes to its labels later
        with pytest.raises(UserError, match=r"methods\.kd\.hard=0"):
            Sum(parts)
        Sum(parts | {"kd": KD(hard=0)})
    with pytest.raises(UserError, match="ab and fsp must both"):
        Sum({"ab": AB(), "fsp": FSP()})
    with pytest.raises(UserError, match="empty"):
        Sum({})


def test_two_terms_of_the_labels_are_refused_where_no_option_tells_of_them():
    class Labels(Method):
        def forward(self, student, teacher, target):
            return {"hard": student.logits.sum()}

    student, x = net(4), torch.randn(3, 1, 8, 8)
    method = Sum({"kd": KD(soft=0), "own": Labels()})
    method.prepare(student, None, x)
    with pytest.raises(UserError, match=r"methods\.own\.hard=0"):
        method(FeatureExtractor(student, [])(x), None, torch.tensor([0, 1, 2]))


def test_a_sum_is_untrained_as_long_as_all_its_methods_are():
    assert Sum({"kd": KD(hard=0), "ab": AB(init_epochs=5)}).init_epochs == 0
    assert Sum({"ab": AB(init_epochs=5), "ft": FT(hard=0, init_epochs=3)}).init_epochs == 3


def test_sum_config_trains_its_projectors_and_loads_again():
    config = OmegaConf.load(Path(__file__).parents[2] / "conf/method/kd_crd.yaml")
    student, teacher, x, y = net(4), net(6), torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2])
    states = []
    for _ in range(2):
        method = instantiate(config)
        method.prepare(student, teacher, x)
        s, t = FeatureExtractor(student, method.taps().student)(x), FeatureExtractor(teacher, method.taps().teacher)(x)
        ids = torch.arange(3)
        method.build(s, t, y)
        states.append((method, s._replace(ids=ids), t))
    method, s, t = states[0]
    terms = method(s, t, y)
    assert terms.keys() == {"hard", "kd_soft", "crd_hint"}
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in method.parameters())
    states[1][0].load_state_dict(method.state_dict())
