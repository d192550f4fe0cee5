"""WKD-L: against Sinkhorn's iteration sample by sample in float64, the exact transport, and what the paper says of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from litdistill.losses import kl
from litdistill.methods import WKD, wkd
from litdistill.models.small import conv4
from litdistill.types import Outputs
from litdistill.utils.errors import UserError
from tests.methods.contract import batch

IMAGES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def draw(samples: int, classes: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of student and teacher, targets, and weights of a classifier."""
    g = torch.Generator().manual_seed(classes)
    student, teacher = (torch.randn(samples, classes, generator=g) * scale for _ in range(2))
    return student, teacher, torch.randint(classes, (samples,), generator=g), torch.randn(classes, 7, generator=g)


def reference(student: Tensor, teacher: Tensor, targets: Tensor, weight: Tensor, kappa: float, t: float) -> Tensor:
    """The authors' way: row and column of each sample's target are removed; u and v are scaled in turn."""
    norms = weight.norm(dim=1)
    cosine = (weight @ weight.T) / norms[:, None] / norms[None]
    costs = 1 - torch.exp(-kappa * (1 - cosine))
    costs = costs - torch.diag(costs.diagonal())
    found = []
    for a, b, c in zip(student, teacher, targets.tolist(), strict=True):
        keep = [k for k in range(len(a)) if k != c]
        q, p, cost = torch.softmax(a[keep] / t, 0), torch.softmax(b[keep] / t, 0), costs[keep][:, keep]
        k, u = torch.exp(-cost / 0.05), torch.full_like(q, 1 / len(keep))
        for _ in range(10):
            v = p / (k.T @ u)
            u = q / (k @ v)
        found.append((u[:, None] * k * v[None] * cost).sum())
    return torch.stack(found).mean()


def made(weight: Tensor, **options: float) -> WKD:
    method = WKD(**options)
    method.register_buffer("costs", wkd.class_costs(weight, method.sharpness))
    return method


@pytest.mark.parametrize(
    ("samples", "classes", "scale"), [(1, 2, 1), (5, 3, 4), (6, 10, 4), (3, 100, 10), (4, 10, 1e4)]
)
def test_terms_and_gradients_equal_the_papers_formula(samples, classes, scale):
    student, teacher, targets, weight = draw(samples, classes, scale)
    method = made(weight, others=30.0, temperature=2.0, sharpness=1.5)
    s32, s64 = student.clone().requires_grad_(), student.double().requires_grad_()
    got = method(Outputs.of(s32), Outputs.of(teacher), batch(targets))
    want = 30 * reference(s64, teacher.double(), targets, weight.double(), 1.5, 2.0)
    assert got["others"].item() == pytest.approx(want.item(), rel=2e-4, abs=1e-5)
    (g,) = torch.autograd.grad(got["others"], s32, retain_graph=True)
    (w,) = torch.autograd.grad(want, s64)
    torch.testing.assert_close(g.double(), w, rtol=2e-3, atol=2e-4 * w.abs().max().item() + 1e-6)
    p, log_q = teacher.double().softmax(1), student.double().log_softmax(1)
    rows = torch.arange(samples)
    assert got["target"].item() == pytest.approx(-(p * log_q)[rows, targets].mean().item(), rel=1e-4, abs=1e-6)


def test_enough_steps_find_the_cheapest_transport(monkeypatch):
    monkeypatch.setattr(wkd, "STEPS", 3000)
    student, teacher, targets, weight = draw(1, 6, 3.0)
    costs = wkd.class_costs(weight, 1.0)
    found = wkd.transport(student, teacher, targets, costs, 1.0, eta=0.02).item()
    keep = [k for k in range(6) if k != targets.item()]
    q, p = (torch.softmax(z[0, keep].double(), 0).numpy() for z in (student, teacher))
    sums = [np.kron(np.eye(5), np.ones(5)), np.kron(np.ones(5), np.eye(5))]
    exact = linprog(costs[keep][:, keep].double().flatten(), A_eq=np.vstack(sums), b_eq=np.concatenate([q, p])).fun
    assert exact > 0.1
    assert found == pytest.approx(exact, rel=0.01)  # with an η so small the entropy adds little


def test_a_student_that_takes_a_class_for_a_similar_one_is_nearer_than_for_an_unlike_one():
    """The paper's reason: KL compares each class with itself alone, and sees no difference."""
    weight = torch.tensor([[1.0, 0.0], [0.9, 0.3], [-1.0, 0.2], [0.1, 1.0]])  # class 1 is like class 0, class 2 is not
    teacher = torch.tensor([[4.0, 0.0, 0.0, 9.0]])
    like, unlike = torch.tensor([[0.0, 4.0, 0.0, 9.0]]), torch.tensor([[0.0, 0.0, 4.0, 9.0]])
    method = made(weight, temperature=1.0)
    near, far = (method(Outputs.of(s), Outputs.of(teacher), batch(torch.tensor([3])))["others"] for s in (like, unlike))
    assert near < far / 3
    torch.testing.assert_close(kl(like, teacher), kl(unlike, teacher))


def test_it_reads_the_weights_of_the_teachers_classifier_and_changes_no_student():
    teacher, student = conv4(5, (1, 8, 8), widths=[4, 6]).eval(), conv4(5, (1, 8, 8), widths=[4])
    method = WKD(sharpness=2.0)
    assert method.prepare(student, teacher, IMAGES) is student
    torch.testing.assert_close(method.costs, wkd.class_costs(teacher.fc.weight.detach(), 2.0))
    assert method.costs.diagonal().abs().max() == 0
    assert not method.costs.requires_grad
    assert list(method.parameters()) == []


def test_a_teacher_without_a_linear_classifier_is_refused_in_a_line():
    class Squared(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = conv4(5, (1, 8, 8), widths=[4])

        def forward(self, x):
            return self.net(x) ** 2

    with pytest.raises(UserError, match=r"^wkd reads the weights of the teacher's classifier"):
        WKD().prepare(nn.Identity(), Squared().eval(), IMAGES)


def test_a_weight_of_zero_leaves_its_term_out_and_mixed_labels_are_taken():
    student, teacher, targets, weight = draw(6, 5)
    assert made(weight, target=0.0)(Outputs.of(student), Outputs.of(teacher), batch(targets)).keys() == {"others"}
    alone = WKD(others=0.0)
    assert alone.prepare(nn.Identity(), nn.Identity(), IMAGES) is not None  # no classifier is read
    assert alone(Outputs.of(student), Outputs.of(teacher), batch(targets)).keys() == {"target"}
    plain = made(weight)(Outputs.of(student), Outputs.of(teacher), batch(targets))
    mixed = made(weight)(Outputs.of(student), Outputs.of(teacher), batch(torch.eye(5)[targets]))
    for term in plain:
        torch.testing.assert_close(mixed[term], plain[term])


@pytest.mark.parametrize("option", ["target", "others", "temperature", "sharpness", "eta"])
def test_wrong_numbers_are_refused_by_name(option):
    with pytest.raises(UserError, match=f"^{option}="):
        WKD(**{option: -1.0})
