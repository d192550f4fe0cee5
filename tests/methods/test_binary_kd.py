"""KD of several labels a sample against the Bernoulli divergence in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from litdistill.losses import binary_kl, kl
from litdistill.methods.base import BERNOULLI
from litdistill.methods.binary_kd import BinaryKD
from litdistill.types import Outputs
from litdistill.utils.errors import UserError
from tests.methods.contract import batch


def draw(shape: tuple[int, int], scale: float) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=g) * scale, torch.randn(*shape, generator=g) * scale


def by_hand(s: Tensor, t: Tensor) -> Tensor:
    """The mean over samples of Σ over labels of p log(p / q) + (1 − p) log((1 − p) / (1 − q)), of logits in float64."""
    total = s.new_zeros(())
    for z_s, z_t in zip(s.flatten(), t.flatten(), strict=True):
        log_p, log_not_p = -torch.log1p(torch.exp(-z_t)), -torch.log1p(torch.exp(z_t))
        log_q, log_not_q = -torch.log1p(torch.exp(-z_s)), -torch.log1p(torch.exp(z_s))
        total = total + log_p.exp() * (log_p - log_q) + log_not_p.exp() * (log_not_p - log_not_q)
    return total / len(s)


@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (5, 20)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_it_equals_the_closed_form_with_its_gradient(shape, scale, temperature):
    student, teacher = draw(shape, scale)
    s32, s64 = student.clone().requires_grad_(), student.double().requires_grad_()
    terms = BinaryKD(0.3, 1.7, temperature)(Outputs.of(s32), Outputs.of(teacher), batch(torch.zeros(shape)))
    want = 1.7 * temperature**2 * by_hand(s64 / temperature, teacher.double() / temperature)
    assert terms.keys() == {"soft"}
    assert terms["soft"].item() == pytest.approx(want.item(), rel=1e-4)
    (got,), (wanted,) = torch.autograd.grad(terms["soft"], s32), torch.autograd.grad(want, s64)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-6 * wanted.abs().max().item())


def test_the_gradient_is_the_difference_of_probabilities_at_any_logits():
    """T · (q − p) / N, also where float32 knows no probability between p and 1."""
    student = torch.tensor([[-200.0, 1e4, 50.0]], requires_grad=True)
    teacher = torch.tensor([[200.0, -1e4, 0.0]])
    value = binary_kl(student, teacher, 2.0)
    (grad,) = torch.autograd.grad(value, student)
    assert value.isfinite()
    torch.testing.assert_close(grad, torch.tensor([[-2.0, 2.0, 1.0]]))


def test_of_one_label_it_is_kd_of_two_classes():
    """A sigmoid of z is a softmax of (z, 0)."""
    student, teacher = draw((6, 1), 2.0)
    pair = lambda z: torch.cat([z, torch.zeros_like(z)], dim=1)  # noqa: E731
    torch.testing.assert_close(binary_kl(student, teacher, 4.0), kl(pair(student), pair(teacher), 4.0))


def test_labels_do_not_compete():
    """Another label changes neither the loss nor the gradient of a label, as it does in a softmax."""
    student, teacher = draw((6, 3), 2.0)
    alone = sum(binary_kl(student[:, [i]], teacher[:, [i]], 2.0) for i in range(3))
    torch.testing.assert_close(binary_kl(student, teacher, 2.0), alone)
    assert binary_kl(teacher, teacher, 2.0) == 0


def test_bf16_logits_under_autocast_are_computed_in_float32():
    student, teacher = (z.bfloat16() for z in draw((8, 20), 3.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        soft = BinaryKD()(Outputs.of(student), Outputs.of(teacher), batch(torch.zeros(8, 20)))["soft"]
    assert soft.dtype == torch.float32
    assert soft.item() == pytest.approx(by_hand(student.double(), teacher.double()).item(), rel=1e-5)


def test_a_weight_of_zero_asks_for_no_teacher_and_wrong_numbers_are_refused():
    assert BinaryKD(soft=0)(Outputs.of(torch.zeros(2, 3)), None, batch(torch.zeros(2, 3))) == {}
    assert BinaryKD.kinds == (BERNOULLI,)
    for wrong in ({"hard": -1}, {"soft": -1}, {"temperature": 0}):
        with pytest.raises(UserError, match=f"^{next(iter(wrong))}="):
            BinaryKD(**wrong)
