"""KD against its closed form in float64, and training with labels alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from litdistill import losses
from litdistill.methods.kd import KD
from litdistill.methods.supervised import Supervised
from litdistill.types import Outputs
from litdistill.utils.errors import UserError
from tests.methods.contract import batch


def log_probabilities(z: Tensor) -> Tensor:
    return z - z.logsumexp(dim=1, keepdim=True)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """The mean over samples of Σ_k p_k (log p_k − log q_k), of logits."""
    lp, lq = log_probabilities(p), log_probabilities(q)
    return (lp.exp() * (lp - lq)).sum() / len(p)


def draw(shape: tuple[int, int], scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(hash(shape) % 1000)
    student, teacher = torch.randn(*shape, generator=g) * scale, torch.randn(*shape, generator=g) * scale
    return student, teacher, torch.randint(shape[1], (shape[0],), generator=g)


@pytest.mark.parametrize("shape", [(1, 2), (4, 2), (5, 10), (3, 1000)])
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_equals_the_closed_form_with_its_gradient(shape, scale, temperature):
    student, teacher, target = draw(shape, scale)
    s32, s64 = student.clone().requires_grad_(), student.double().requires_grad_()
    terms = KD(0.3, 1.7, temperature)(Outputs.of(s32), Outputs.of(teacher), batch(target))
    soft = 1.7 * temperature**2 * kl(teacher.double() / temperature, s64 / temperature)
    assert terms.keys() == {"soft"}
    assert terms["soft"].item() == pytest.approx(soft.item(), rel=1e-5)
    (got,) = torch.autograd.grad(terms["soft"], s32)
    (want,) = torch.autograd.grad(soft, s64)
    torch.testing.assert_close(
        got.double(), want, rtol=1e-3, atol=1e-5 * want.abs().max().item() + 1e-30
    )  # float32 ends there


def test_soft_gradient_at_high_temperature_is_that_of_matching_centered_logits():
    """Hinton et al., section 2.1: T² · dKL/dz → (z − v) / K for centered logits, so that it does not vanish with T."""
    student, teacher, _ = draw((6, 10))
    student, teacher = (z - z.mean(1, keepdim=True) for z in (student, teacher))
    z = student.clone().requires_grad_()
    (grad,) = torch.autograd.grad(losses.kl(z, teacher, 1000.0) * len(z), z)
    torch.testing.assert_close(grad, (student - teacher) / 10, rtol=0.02, atol=1e-3)


def test_soft_is_a_mean_over_samples_and_not_over_classes():
    """The reduction that made others' KL as many times too small as there are classes."""
    student, teacher, _ = draw((3, 1000))
    twice = losses.kl(student.repeat(2, 1), teacher.repeat(2, 1), 2.0)
    assert twice.item() == pytest.approx(losses.kl(student, teacher, 2.0).item(), rel=1e-6)
    assert twice.item() == pytest.approx(4 * kl(teacher.double() / 2, student.double() / 2).item(), rel=1e-5)


def test_bf16_logits_under_autocast_are_computed_in_float32():
    student, teacher, target = draw((8, 100), 5.0)
    student, teacher = student.bfloat16(), teacher.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = KD()(Outputs.of(student), Outputs.of(teacher), batch(target))
    assert all(v.dtype == torch.float32 for v in terms.values())
    assert terms["soft"].item() == pytest.approx(14.4 * kl(teacher.double() / 4, student.double() / 4).item(), rel=1e-5)


def test_supervised_learns_from_labels_alone():
    student, _, target = draw((7, 5), 3.0)
    assert Supervised(2.0)(Outputs.of(student), None, batch(target)) == {}
    assert Supervised(2.0).hard == 2.0
    assert not Supervised.needs_teacher


@pytest.mark.parametrize("kwargs", [{"hard": -0.1}, {"soft": -1.0}, {"temperature": 0.0}, {"soft": float("nan")}])
def test_wrong_numbers_are_refused_by_name(kwargs):
    with pytest.raises(UserError, match=f"^{next(iter(kwargs))}="):
        KD(**kwargs)


def test_a_weight_of_zero_leaves_its_term_out():
    student, teacher, target = draw((3, 4))
    assert KD(hard=0)(Outputs.of(student), Outputs.of(teacher), batch(target)).keys() == {"soft"}
    assert KD(soft=0)(Outputs.of(student), None, batch(target)) == {}
