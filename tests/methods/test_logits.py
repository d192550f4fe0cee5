"""Methods that read logits: each against its paper's formula, written here in float64."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from litdistill.methods.base import Method
from litdistill.methods.dist import DIST
from litdistill.methods.dkd import DKD
from litdistill.methods.hard_pseudo_label import HardPseudoLabel
from litdistill.methods.kd import KD
from litdistill.methods.logit_mse import LogitMSE
from litdistill.methods.mft import MFT
from litdistill.methods.mlkd import MLKD
from litdistill.methods.nkd import NKD
from litdistill.methods.soft_target_ce import SoftTargetCE
from litdistill.methods.teacher_free import TeacherFree
from litdistill.methods.wttm import WTTM
from litdistill.types import Outputs
from litdistill.utils.errors import UserError
from tests.methods.contract import batch

# -- references: float64, sample by sample ---------------------------------------------------------------------------


def log_p(z: Tensor) -> Tensor:
    return z - z.logsumexp(dim=-1, keepdim=True)


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    return (log_p(teacher).exp() * (log_p(teacher) - log_p(student))).sum()


def ce(z: Tensor, y: Tensor) -> Tensor:
    return -torch.stack([log_p(row)[label] for row, label in zip(z, y, strict=True)]).mean()


def mean(loss: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    return torch.stack([loss(*r) for r in zip(*rows, strict=True)]).mean()


def ref_logit_std(s, t, y):
    def z(row):
        m = row.sum() / len(row)
        return (row - m) / (1e-7 + ((row - m).pow(2).sum() / (len(row) - 1)).sqrt())

    return {"soft": 3.0 * 4 * mean(lambda a, b: kl(z(b) / 2, z(a) / 2), s, t)}


def ref_dkd(s, t, y):
    def tckd(a, b, c):
        others = torch.arange(len(a)) != c
        log_b = [log_p(b)[c], log_p(b)[others].logsumexp(0)]
        log_a = [log_p(a)[c], log_p(a)[others].logsumexp(0)]
        return sum(v.exp() * (v - u) for u, v in zip(log_a, log_b, strict=True))

    def nckd(a, b, c):
        others = torch.arange(len(a)) != c
        return kl(b[others], a[others])

    s3, t3 = s / 3, t / 3
    return {"tckd": 1.3 * 9 * mean(tckd, s3, t3, y), "nckd": 2.0 * 9 * mean(nckd, s3, t3, y)}


def ref_dist(s, t, y):
    def distance(a, b):
        a, b = a - a.mean(), b - b.mean()
        size_a, size_b = (a * a).sum().sqrt(), (b * b).sum().sqrt()
        return 1 - ((a * b).sum() / (size_a * size_b) if min(size_a, size_b) >= 1e-12 else 0 * a.sum())

    q, p = log_p(s / 4).exp(), log_p(t / 4).exp()
    intra = mean(distance, q.T, p.T) if len(q) > 1 else torch.zeros((), dtype=torch.float64)
    return {"inter": 1.5 * 16 * mean(distance, q, p), "intra": 2.5 * 16 * intra}


def ref_mlkd(s, t, y):
    instance = batch = classes = torch.zeros((), dtype=torch.float64)
    for tau in (2, 5):
        q, p = log_p(s / tau).exp(), log_p(t / tau).exp()
        instance = instance + tau**2 * mean(kl, t / tau, s / tau)
        b = torch.einsum("ik,jk->ij", q, q) - torch.einsum("ik,jk->ij", p, p)
        c = torch.einsum("ik,il->kl", q, q) - torch.einsum("ik,il->kl", p, p)
        batch, classes = batch + b.pow(2).sum() / s.shape[0], classes + c.pow(2).sum() / s.shape[1]
    return {"instance": 0.6 * instance, "batch": 0.8 * batch, "classes": 1.1 * classes}


def ref_nkd(s, t, y):
    def target(a, b, c):
        return -(log_p(b)[c].exp() * log_p(a)[c])

    def others(a, b, c):
        rest = [k for k in range(len(a)) if k != c]
        return -(log_p(b[rest] / 3).exp() * log_p(a[rest] / 3)).sum()

    return {"target": 0.8 * mean(target, s, t, y), "others": 1.7 * 9 * mean(others, s, t, y)}


def ref_mft(s, t, y):
    def corrected(p, c):
        """Whose share m of the label makes it lead by 0.3 where it does not lead, and 0.3 larger where it does."""
        if (first := p.max()) > p[c]:
            m = (0.3 + first - p[c]) / (1 + first - p[c])
        else:
            m = min((0.3 / (1 - p[c])).item(), 1.0) if p[c] < 1 else 0.0
        return (1 - m) * p + m * (torch.arange(len(p)) == c)

    def divergence(a, b, c):
        p = corrected(log_p(b / 2).exp(), c)
        return (torch.xlogy(p, p) - p * log_p(a / 2)).sum()

    return {"soft": 0.9 * 4 * mean(divergence, s, t, y)}


def ref_wttm(s, t, y, weighted=True):
    def matching(a, b):
        power = torch.exp(0.3 * log_p(b))
        u, p = power.sum(), power / power.sum()
        return (u if weighted else 1) * (p * (torch.log(p.clamp(min=1e-300)) - log_p(a))).sum()

    return {"soft": 4.0 * mean(matching, s, t)}


def ref_teacher_free(s, t, y):
    def regularizer(a, c):
        p = torch.full_like(a, (1 - 0.9) / (len(a) - 1))
        p = torch.where(torch.arange(len(a)) == c, 0.9, p) / 20
        return kl(p, a)

    return {"soft": 0.2 * mean(regularizer, s, y)}


def ref_soft_target_ce(s, t, y):
    return {
        "soft": 0.9 * 9 * mean(lambda a, b: -(log_p(b / 3).exp() * log_p(a / 3)).sum(), s, t),
    }


def ref_logit_mse(s, t, y):
    return {
        "soft": 2.0 * mean(lambda a, b: sum((u - v) ** 2 for u, v in zip(a, b, strict=True)) / 2, s, t),
    }


def ref_hard_pseudo_label(s, t, y):
    return {"pseudo": 0.6 * ce(s, torch.stack([row.argmax() for row in t]))}


CASES: dict[str, tuple[Callable[[], Method], Callable]] = {
    "logit_std": (lambda: KD(0.5, 3.0, 2.0, standardized=True), ref_logit_std),
    "dkd": (lambda: DKD(0.7, 1.3, 2.0, 3.0), ref_dkd),
    "dist": (lambda: DIST(1.0, 1.5, 2.5, 4.0), ref_dist),
    "mlkd": (lambda: MLKD(0.4, 0.6, 0.8, 1.1, [2.0, 5.0]), ref_mlkd),
    "nkd": (lambda: NKD(0.5, 0.8, 1.7, 3.0), ref_nkd),
    "mft": (lambda: MFT(0.5, 0.9, 2.0, 0.3), ref_mft),
    "wttm": (lambda: WTTM(gamma=0.3), ref_wttm),
    "ttm": (lambda: WTTM(gamma=0.3, weighted=False), lambda s, t, y: ref_wttm(s, t, y, weighted=False)),
    "teacher_free": (lambda: TeacherFree(0.9, 0.2, 0.9, 20.0), ref_teacher_free),
    "soft_target_ce": (lambda: SoftTargetCE(temperature=3.0), ref_soft_target_ce),
    "logit_mse": (lambda: LogitMSE(0.1, 2.0), ref_logit_mse),
    "hard_pseudo_label": (lambda: HardPseudoLabel(0.4, 0.6), ref_hard_pseudo_label),
}


def draw(shape: tuple[int, int], scale: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(*shape, generator=g) * scale, torch.randn(*shape, generator=g) * scale
    return student, teacher, torch.randint(shape[1], (shape[0],), generator=g)


# -- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 2), (4, 2), (1, 10), (6, 10), (3, 1000)])
@pytest.mark.parametrize("scale", [1.0, 10.0, 1e4])
@pytest.mark.parametrize("name", CASES)
def test_terms_and_gradients_equal_the_papers_formula(name, scale, shape):
    make, reference = CASES[name]
    student, teacher, target = draw(shape, scale)
    s32, s64 = student.clone().requires_grad_(), student.double().requires_grad_()
    got = make()(Outputs.of(s32), Outputs.of(teacher), batch(target))
    want = reference(s64, teacher.double(), target)
    assert got.keys() == want.keys()
    for term, value in want.items():
        assert got[term].item() == pytest.approx(value.item(), rel=2e-4, abs=1e-5), term
        if not want[term].requires_grad:
            continue
        (g,) = torch.autograd.grad(got[term], s32, retain_graph=True)
        (w,) = torch.autograd.grad(value, s64, retain_graph=True)
        assert torch.isfinite(g).all(), term
        if name == "dist" and scale == 1e4:
            continue  # probabilities that are 0 and 1 have no variance: the formula has no derivative
        floor = 1e-4 if name == "dist" else 1e-6  # of two classes all correlations are ±1: the gradient is rounding
        torch.testing.assert_close(g.double(), w, rtol=2e-3, atol=2e-4 * w.abs().max().item() + floor)


@pytest.mark.parametrize("name", CASES)
def test_bf16_logits_under_autocast_lose_nothing(name):
    make, reference = CASES[name]
    student, teacher, target = draw((8, 100), 4.0)
    student, teacher = student.bfloat16().requires_grad_(), teacher.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = make()(Outputs.of(student), Outputs.of(teacher), batch(target))
    want = reference(student.detach().double(), teacher.double(), target)
    for term, value in want.items():
        assert got[term].dtype == torch.float32
        assert got[term].item() == pytest.approx(value.item(), rel=1e-4), term
    sum(got.values()).backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("name", CASES)
def test_a_weight_of_zero_leaves_its_term_out_and_a_negative_one_is_refused(name):
    method = type(CASES[name][0]())
    student, teacher, target = draw((3, 5))
    weights = [p for p in inspect.signature(method).parameters if p in CASES[name][1](*draw((3, 5)))]
    for weight in weights:
        terms = method(**dict.fromkeys(weights, 1.0) | {weight: 0.0})(
            Outputs.of(student), Outputs.of(teacher), batch(target)
        )
        assert terms.keys() == set(weights) - {weight}
        with pytest.raises(UserError, match=f"^{weight}="):
            method(**{weight: -1.0})


@pytest.mark.parametrize("name", CASES)
def test_mixed_labels_are_taken(name):
    """A mixture of one label only is that label."""
    make, _ = CASES[name]
    student, teacher, target = draw((6, 5))
    plain = make()(Outputs.of(student), Outputs.of(teacher), batch(target))
    mixed = make()(Outputs.of(student), Outputs.of(teacher), batch(torch.eye(5)[target]))
    for term in plain:
        torch.testing.assert_close(mixed[term], plain[term])


@pytest.mark.parametrize("name", ["logit_std", "dkd", "dist", "mlkd", "logit_mse"])
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(name):
    make, _ = CASES[name]
    _, teacher, target = draw((6, 10), 3.0)
    student = teacher.clone().requires_grad_()
    for term, value in make()(Outputs.of(student), Outputs.of(teacher), batch(target)).items():
        assert value.item() == pytest.approx(0, abs=1e-4), term
        (grad,) = torch.autograd.grad(value, student, retain_graph=True)
        assert grad.abs().max().item() < 1e-4, term


@pytest.mark.parametrize("name", CASES)
def test_no_gradient_is_asked_of_the_teacher(name):
    student, teacher, target = draw((4, 6))
    student.requires_grad_()
    sum(CASES[name][0]()(Outputs.of(student), Outputs.of(teacher), batch(target)).values()).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: DKD(temperature=0), "temperature"),
        (lambda: MLKD(temperatures=[]), "temperatures"),
        (lambda: MLKD(temperatures=[2.0, -1.0]), "temperature"),
        (lambda: NKD(temperature=0), "temperature"),
        (lambda: MFT(margin=1.5), "margin"),
        (lambda: WTTM(gamma=0), "gamma"),
        (lambda: TeacherFree(correct=1.5), "correct"),
    ],
)
def test_wrong_numbers_are_refused_by_name(make, key):
    with pytest.raises(UserError, match=f"^{key}[= ]"):
        make()
