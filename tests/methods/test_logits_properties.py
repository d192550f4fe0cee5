"""What leaves the logit methods unchanged, what they are of each other, and that their configs hold their defaults."""

from __future__ import annotations

import inspect
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import get_class, instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor

from litdistill.losses.logits import pearson_distance
from litdistill.methods.base import Method
from litdistill.methods.dist import DIST
from litdistill.methods.dkd import DKD
from litdistill.methods.kd import KD
from litdistill.methods.logit_mse import LogitMSE
from litdistill.methods.mft import corrected
from litdistill.methods.nkd import NKD
from litdistill.methods.soft_target_ce import SoftTargetCE
from litdistill.methods.teacher_free import TeacherFree
from litdistill.methods.wttm import WTTM
from litdistill.types import Outputs
from tests.methods.contract import batch

CONF = Path(__file__).parents[2] / "conf" / "method"


def log_p(z: Tensor) -> Tensor:
    return z - z.logsumexp(dim=-1, keepdim=True)


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """The mean over samples."""
    return (log_p(teacher).exp() * (log_p(teacher) - log_p(student))).sum() / len(teacher)


def draw(shape: tuple[int, int], scale: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(*shape, generator=g) * scale, torch.randn(*shape, generator=g) * scale
    return student, teacher, torch.randint(shape[1], (shape[0],), generator=g)


def test_kd_is_its_two_decoupled_halves():
    """Zhao et al., equation 7: KD = TCKD + (1 − p_target) · NCKD, sample by sample."""
    student, teacher, target = draw((1, 10), 3.0)
    terms = DKD(0, 1, 1, 2.0)(Outputs.of(student), Outputs.of(teacher), batch(target))
    p = torch.softmax(teacher.double() / 2, 1)[0, target[0]].item()
    whole = 4 * kl(teacher.double() / 2, student.double() / 2).item()
    assert terms["tckd"].item() + (1 - p) * terms["nckd"].item() == pytest.approx(whole, rel=1e-5)


def test_soft_target_ce_is_kl_plus_the_teachers_entropy():
    student, teacher, target = draw((5, 10), 2.0)
    got = SoftTargetCE(0, 1, 1.0)(Outputs.of(student), Outputs.of(teacher), batch(target))["soft"].item()
    entropy = -(log_p(teacher.double()).exp() * log_p(teacher.double())).sum().item() / 5
    assert got == pytest.approx(kl(teacher.double(), student.double()).item() + entropy, rel=1e-5)


def test_wttm_with_exponent_one_is_kl_at_temperature_one():
    student, teacher, target = draw((5, 10), 2.0)
    got = WTTM(0, 1, gamma=1.0)(Outputs.of(student), Outputs.of(teacher), batch(target))["soft"].item()
    assert got == pytest.approx(kl(teacher.double(), student.double()).item(), rel=1e-5)


def test_centered_logit_mse_does_not_see_a_shift_and_the_plain_one_does():
    student, teacher, target = draw((5, 10))
    shifted = student + torch.arange(5.0)[:, None]
    centered, plain = LogitMSE(centered=True), LogitMSE()
    t, pairs = Outputs.of(teacher), [(m, s) for m in (centered, plain) for s in (student, shifted)]
    values = [m(Outputs.of(s), t, batch(target))["soft"] for m, s in pairs]
    torch.testing.assert_close(values[1], values[0])
    d = (student - teacher).double()
    assert values[0].item() == pytest.approx((d - d.mean(1, keepdim=True)).pow(2).sum().item() / 10, rel=1e-5)
    assert abs(values[3] - values[2]) > 1


@settings(max_examples=20, deadline=None)
@given(st.floats(0.05, 50), st.floats(-100, 100), st.integers(0, 100))
def test_standardized_kd_sees_neither_scale_nor_shift(scale, shift, seed):
    student, teacher, target = draw((4, 10), seed=seed)
    method = KD(hard=0, soft=9.0, temperature=2.0, standardized=True)
    base = method(Outputs.of(student), Outputs.of(teacher), batch(target))["soft"].item()
    moved = method(Outputs.of(student * scale + shift), Outputs.of(teacher), batch(target))["soft"].item()
    assert moved == pytest.approx(base, rel=1e-2, abs=1e-3)
    assert method(Outputs.of(teacher * scale + shift), Outputs.of(teacher), batch(target))[
        "soft"
    ].item() == pytest.approx(0, abs=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.05, 50), st.floats(-10, 10), st.integers(0, 100))
def test_pearson_distance_sees_neither_scale_nor_shift_and_sees_a_sign(scale, shift, seed):
    a, b, _ = draw((4, 10), seed=seed)
    assert pearson_distance(a * scale + shift, b).item() == pytest.approx(pearson_distance(a, b).item(), abs=1e-4)
    assert pearson_distance(a, -a * scale).item() == pytest.approx(2, abs=1e-4)


def test_a_row_whose_variance_is_rounding_gets_no_gradient():
    _, teacher, _ = draw((8, 10))
    for student, largest in ((torch.zeros(8, 10), 0.0), (torch.full((8, 10), 3.3), 0.0), (torch.randn(8, 10), 50.0)):
        student.requires_grad_()
        sum(DIST(hard=0)(Outputs.of(student), Outputs.of(teacher), batch(torch.arange(8))).values()).backward()
        assert student.grad.abs().max() <= largest
    for dtype in (torch.float32, torch.float64):  # as ever where there is any variance
        a, b = torch.randn(4, 10, dtype=dtype) * 1e-3 + 0.1, torch.randn(4, 10, dtype=dtype)
        x, y = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        plain = 1 - ((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))).mean()
        torch.testing.assert_close(pearson_distance(a, b), plain)


@pytest.mark.parametrize("classes", [10, 101, 1000])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_dist_of_a_student_equal_to_its_teacher_is_zero_however_many_classes_and_few_samples(classes, dtype, error):
    _, teacher, target = draw((2, classes))
    teacher = teacher.to(dtype)
    for value in DIST(hard=0)(Outputs.of(teacher.clone()), Outputs.of(teacher), batch(target)).values():
        assert value.item() == pytest.approx(0, abs=error)  # the authors' 1e-8 makes it 12.7 for 1,000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("value", [0.0, 3.3])
def test_logits_that_are_equal_have_the_gradient_of_those_with_a_deviation_of_one(value, dtype):
    student = torch.full((3, 10), value, dtype=dtype, requires_grad=True)
    _, teacher, target = draw((3, 10))
    sum(
        KD(hard=0, soft=9.0, temperature=2.0, standardized=True)(
            Outputs.of(student), Outputs.of(teacher), batch(target)
        ).values()
    ).backward()
    z = torch.zeros(3, 10, dtype=torch.float64, requires_grad=True)
    t = (teacher.double() - teacher.double().mean(1, keepdim=True)) / teacher.double().std(1, keepdim=True)
    centered = z - z.mean(1, keepdim=True)
    (9 * 4 * F.kl_div((centered / 2).log_softmax(1), (t / 2).softmax(1), reduction="batchmean")).backward()
    torch.testing.assert_close(student.grad.double(), z.grad, rtol=2e-3, atol=2e-3)


def test_nkd_of_the_other_classes_is_least_where_both_rank_them_alike_whatever_the_target_gets():
    """The paper's reason for normalizing: sums of the other classes differ, so that plain soft labels have another minimum."""
    _, teacher, target = draw((6, 10))
    student = (teacher + 5 * F.one_hot(target, 10) + 2).requires_grad_()  # surer of the target, else the same
    others = NKD(hard=0)(Outputs.of(student), Outputs.of(teacher), batch(target))["others"]
    (grad,) = torch.autograd.grad(others, student)
    assert grad.abs().max() < 1e-6
    plain = -(teacher.softmax(1) * student.log_softmax(1) * (1 - F.one_hot(target, 10))).sum(1).mean()
    (grad,) = torch.autograd.grad(plain, student)
    assert grad.abs().max() > 1e-2


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 1), st.floats(0.1, 10), st.integers(0, 100))
def test_the_corrected_teacher_is_right_by_the_margin_and_keeps_the_ratios_of_the_other_classes(margin, scale, seed):
    _, teacher, target = draw((8, 5), scale, seed)
    p = teacher.double().softmax(1)
    found = corrected(p, target, margin)
    torch.testing.assert_close(found.sum(1), torch.ones(8, dtype=torch.float64))
    label = found.gather(1, target[:, None])[:, 0]
    others = F.one_hot(target, 5) == 0
    lead = label - found.masked_fill(~others, 0).amax(1)
    was_wrong = p.argmax(1) != target
    torch.testing.assert_close(lead[was_wrong], torch.full_like(lead[was_wrong], margin))
    right = (p.gather(1, target[:, None])[:, 0] + margin).clamp(max=1)[~was_wrong]
    torch.testing.assert_close(label[~was_wrong], right)
    share = (found / p)[others].reshape(8, 4)
    torch.testing.assert_close(share, share[:, :1].expand(8, 4))


def test_teacher_free_needs_no_teacher_and_its_teacher_is_right():
    method = TeacherFree(hard=0, soft=1, correct=0.99, temperature=1e-3)
    assert not method.needs_teacher
    z = torch.zeros(1, 4)  # a uniform student: KL = log 4 − entropy of a teacher that is all but sure
    assert method(Outputs.of(z), None, batch(torch.tensor([2])))["soft"].item() == pytest.approx(math.log(4), rel=1e-4)


NAMES = [
    *(
        "supervised",
        "kd",
        "dkd",
        "dist",
        "mlkd",
        "mft",
        "nkd",
        "wkd",
        "wttm",
        "teacher_free",
        "soft_target_ce",
        "logit_mse",
    ),
    *("hard_pseudo_label", "rkd", "sp", "cc", "crd"),
]


@pytest.mark.parametrize("name", NAMES)
def test_config_holds_every_argument_with_its_default(name):
    config = dict(OmegaConf.load(CONF / f"{name}.yaml").items())
    signature = inspect.signature(get_class(config.pop("_target_"))).parameters
    defaults = {k: list(p.default) if isinstance(p.default, tuple) else p.default for k, p in signature.items()}
    assert config == defaults
    assert isinstance(instantiate(OmegaConf.load(CONF / f"{name}.yaml")), Method)
    assert (CONF / f"{name}.yaml").read_text().startswith("# ")
