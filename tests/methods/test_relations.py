"""Methods that read features: each against its paper's formula, written here in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from litdistill.methods.cc import CC
from litdistill.methods.rkd import RKD
from litdistill.methods.sp import SP
from litdistill.types import Outputs
from litdistill.utils.errors import UserError
from tests.methods.contract import batch

# -- references: float64, entry by entry -----------------------------------------------------------------------------


def huber(a: Tensor, b: Tensor) -> Tensor:
    d = (a - b).abs()
    return torch.where(d < 1, d * d / 2, d - 0.5).mean()


def ref_rkd(s: Tensor, t: Tensor) -> dict[str, Tensor]:
    def relate(x):
        n = len(x)
        zero = x.new_zeros(())
        pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
        mu = sum((x[i] - x[j]).pow(2).sum().sqrt() for i, j in pairs) / len(pairs) if pairs else 1.0
        distances = [(x[i] - x[j]).pow(2).sum().sqrt() / mu if i != j else zero for i in range(n) for j in range(n)]
        angles = []
        for i in range(n):
            for j in range(n):
                for k in range(n):
                    a, b = x[j] - x[i], x[k] - x[i]
                    angles.append(zero if i in (j, k) else (a * b).sum() / (a.pow(2).sum() * b.pow(2).sum()).sqrt())
        return torch.stack(distances), torch.stack(angles)

    (sd, sa), (td, ta) = relate(s.flatten(1)), relate(t.flatten(1))
    return {"distance": 2.0 * huber(sd, td), "angle": 3.0 * huber(sa, ta)}


def ref_sp(s: Tensor, t: Tensor) -> dict[str, Tensor]:
    def g(x):
        rows = []
        for a in x.flatten(1):
            row = torch.stack([(a * b).sum() for b in x.flatten(1)])
            rows.append(row / row.pow(2).sum().sqrt())
        return torch.stack(rows)

    return {"hint": 5.0 * (g(s) - g(t)).pow(2).sum() / len(s) ** 2}


REFERENCES = {"rkd": (lambda: RKD(0, 2.0, 3.0), ref_rkd), "sp": (lambda: SP(0, 5.0), ref_sp)}


def outputs(feature: Tensor) -> Outputs:
    return Outputs.of(torch.zeros(len(feature), 3), {"tap": feature})


def draw(n: int, *shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *shape, generator=g) for shape in shapes]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("name", REFERENCES)
def test_terms_and_gradients_equal_the_papers_formula(name, n, scale):
    make, reference = REFERENCES[name]
    s, t = draw(n, (3, 2, 2), (8,))
    s32, s64 = (s * scale).requires_grad_(), (s * scale).double().requires_grad_()
    got = make()(outputs(s32), outputs(t), batch(torch.zeros(n, dtype=torch.long)))
    want = reference(s64, t.double())
    assert got.keys() == want.keys()
    for term, value in want.items():
        assert got[term].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), term
        (g,) = torch.autograd.grad(got[term], s32, retain_graph=True)
        w = torch.autograd.grad(value, s64, retain_graph=True, allow_unused=True)[0] if value.requires_grad else None
        w = torch.zeros_like(s64) if w is None else w
        torch.testing.assert_close(g.double(), w, rtol=1e-3, atol=1e-4 * w.abs().max().item() + 1e-5 / scale)


@pytest.mark.parametrize("name", REFERENCES)
def test_bf16_features_under_autocast_lose_nothing(name):
    make, reference = REFERENCES[name]
    s, t = (x.bfloat16() for x in draw(6, (64,), (32,)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = make()(outputs(s), outputs(t), batch(torch.zeros(6, dtype=torch.long)))
    for term, value in reference(s.double(), t.double()).items():
        assert got[term].dtype == torch.float32
        assert got[term].item() == pytest.approx(value.item(), rel=1e-4), term


@pytest.mark.parametrize("name", REFERENCES)
def test_nothing_to_learn_from_a_teacher_seen_rotated_and_scaled(name):
    """RKD is blind to rotation, scale and shift of the features; SP to rotation and scale."""
    make, _ = REFERENCES[name]
    (t,) = draw(6, (8,))
    rotation = torch.linalg.qr(draw(8, (8,), seed=1)[0])[0]
    moved = t @ rotation * 7.0 + (torch.arange(8.0) if name == "rkd" else 0.0)
    for term, value in make()(outputs(moved), outputs(t), batch(torch.zeros(6, dtype=torch.long))).items():
        assert value.item() == pytest.approx(0, abs=1e-5), term
    stretched = moved * torch.linspace(0.1, 3, 8)
    for term, value in make()(outputs(stretched), outputs(t), batch(torch.zeros(6, dtype=torch.long))).items():
        assert value.item() > 1e-3, term


def test_rkd_sees_small_distances_far_from_the_origin():
    s, t = (x * 0.1 for x in draw(5, (4,), (4,)))
    near = RKD(0)(outputs(s), outputs(t), batch(torch.zeros(5, dtype=torch.long)))
    far = RKD(0)(outputs(s + 1000), outputs(t), batch(torch.zeros(5, dtype=torch.long)))
    for term in near:
        assert far[term].item() == pytest.approx(near[term].item(), rel=0.02), term


@pytest.mark.parametrize("name", REFERENCES)
def test_samples_that_coincide_or_are_dead_give_finite_gradients(name):
    s, t = draw(5, (4,), (4,))
    s[1] = s[0]
    s[2] = 0
    s.requires_grad_()
    sum(REFERENCES[name][0]()(outputs(s), outputs(t), batch(torch.zeros(5, dtype=torch.long))).values()).backward()
    assert s.grad is not None
    assert torch.isfinite(s.grad).all()
    assert s.grad.abs().max() < 1e3
    everything = torch.ones(5, 4, requires_grad=True)
    sum(
        REFERENCES[name][0]()(outputs(everything), outputs(t), batch(torch.zeros(5, dtype=torch.long))).values()
    ).backward()
    assert everything.grad is not None
    assert torch.isfinite(everything.grad).all()


def test_several_taps_are_summed_from_the_last():
    a, b, c, d = draw(4, (3,), (5,), (6,), (2,))
    y = torch.zeros(4, dtype=torch.long)
    both = SP(0, 1.0)(Outputs.of(y, {"1": a, "2": b}), Outputs.of(y, {"0": d, "1": c, "2": d}), batch(y))["hint"]
    each = [SP(0, 1.0)(outputs(s), outputs(t), batch(y))["hint"] for s, t in ((a, c), (b, d))]
    torch.testing.assert_close(both, sum(each))


# -- CC --------------------------------------------------------------------------------------------------------------


def built(method: CC, s: Tensor, t: Tensor) -> CC:
    method.build(outputs(s), outputs(t), torch.tensor([0, 1]))
    return method


@pytest.mark.parametrize("n", [1, 2, 6])
@pytest.mark.parametrize("kernel", ["consecutive", "gaussian"])
def test_cc_equals_its_formula(kernel, n):
    s, t = draw(n, (3, 2, 2), (8,))
    method = built(CC(0, 2.0, width=5, kernel=kernel, gamma=0.3, order=3), s, t)
    s32 = s.clone().requires_grad_()
    got = method(outputs(s32), outputs(t), batch(torch.zeros(n, dtype=torch.long)))["hint"]

    def embed(layer, x):
        return x.double().flatten(1) @ layer.weight.double().T + layer.bias.double()

    a, b = embed(method.embed_student, s), embed(method.embed_teacher, t)
    if kernel == "consecutive":
        d = (a - b).abs()
        want = sum((d[i] * d[i + 1]).sum() for i in range(n - 1)) / (n - 1) if n > 1 else torch.zeros(())
    else:

        def k(x, y):
            dot = (x * y).sum() / (x.norm() * y.norm())
            return math.exp(-0.6) * sum(0.6**p / math.factorial(p) * dot**p for p in range(4))

        want = sum((k(a[i], a[j]) - k(b[i], b[j])) ** 2 for i in range(n) for j in range(n)) / n**2
    assert got.item() == pytest.approx(2 * want.item(), rel=1e-4, abs=1e-9)
    got.backward()
    assert s32.grad is not None
    assert torch.isfinite(s32.grad).all()
    parameters = list(method.parameters())
    assert len(parameters) == 4
    assert n == 1 or all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)


def test_cc_kernel_tends_to_the_gaussian_with_its_order():
    """The Taylor series of exp(−γ ‖a − b‖²) for unit vectors."""
    s, t = draw(5, (6,), (6,))
    method = built(CC(0, 1.0, width=4, kernel="gaussian", order=20), s, t)
    got = method(outputs(s), outputs(t), batch(torch.zeros(5, dtype=torch.long)))["hint"].item()

    def kernel(x):
        x = x.double() / x.double().norm(dim=1, keepdim=True)
        return torch.exp(-0.4 * (x[:, None] - x[None]).pow(2).sum(2))

    k = kernel(method.embed_student(s)) - kernel(method.embed_teacher(t))
    assert got == pytest.approx(k.pow(2).sum().item() / 25, rel=1e-4)


def test_cc_refuses_an_unknown_kernel():
    with pytest.raises(UserError, match="consecutive"):
        CC(kernel="rbf")
