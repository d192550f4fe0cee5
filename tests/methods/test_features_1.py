"""The first half of the feature losses against their papers' formulas, written out by loops or einsum in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from litdistill.losses import attention, boundary, factor, mmd, neighbors
from litdistill.methods.fsp import flow
from litdistill.methods.vid import Gaussian

# (student, teacher): batch of one, one channel, not square, other channels, other sizes on one axis or both
SHAPES = [
    ((3, 4, 5, 5), (3, 4, 5, 5)),
    ((1, 3, 4, 6), (1, 5, 4, 6)),
    ((2, 1, 3, 2), (2, 6, 3, 2)),
    ((2, 5, 8, 4), (2, 1, 4, 4)),
    ((2, 3, 4, 6), (2, 4, 8, 12)),
    ((2, 3, 6, 4), (2, 4, 3, 8)),
]


def tensor(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pooled(x: Tensor, h: int, w: int) -> Tensor:
    """Block means of a map whose sides are multiples of h and w."""
    n, c, hx, wx = x.shape
    return x.reshape(n, c, h, hx // h, w, wx // w).mean((3, 5))


def fitted(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    h, w = min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3])
    return pooled(s, h, w), pooled(t, h, w)


def attention_by_hand(s: Tensor, t: Tensor) -> Tensor:
    s, t = fitted(s, t)
    total = s.new_zeros(())
    for a, b in zip(s, t, strict=True):
        q_s, q_t = (a**2).sum(0).flatten(), (b**2).sum(0).flatten()
        total = total + ((q_s / q_s.norm() - q_t / q_t.norm()) ** 2).sum() / len(q_s)
    return total / len(s)


def mmd_by_hand(s: Tensor, t: Tensor) -> Tensor:
    s, t = fitted(s, t)
    total = s.new_zeros(())
    for a, b in zip(s, t, strict=True):
        a = [x.flatten() / x.norm() for x in a]
        b = [x.flatten() / x.norm() for x in b]
        k = lambda xs, ys: sum((x @ y) ** 2 for x in xs for y in ys) / (len(xs) * len(ys))  # noqa: E731
        total = total + k(a, a) + k(b, b) - 2 * k(a, b)
    return total / len(s)


def pkt_by_hand(s: Tensor, t: Tensor) -> Tensor:
    def p(x: Tensor) -> Tensor:
        x = x.flatten(1)
        rows = [torch.stack([(F.cosine_similarity(a, b, dim=0) + 1) / 2 for b in x]) for a in x]
        return torch.stack([r / r.sum() for r in rows])

    q, p_t = p(s), p(t)
    return (p_t * (p_t.log() - q.log())).sum() / len(s) ** 2


def factors_by_hand(p: int):
    def loss(s: Tensor, t: Tensor) -> Tensor:
        s, t = fitted(s, t)
        d = [(a / a.norm() - b / b.norm()).flatten() for a, b in zip(s, t, strict=True)]
        return torch.stack([x.abs().sum() / len(x) if p == 1 else (x**2).sum().sqrt() for x in d]).mean()

    return loss


def boundary_by_hand(s: Tensor, t: Tensor) -> Tensor:
    """The paper's alternative loss with its indicators written out, margin 0.7."""
    rho = (t > 0).double()
    up, down = (0.7 - s).clamp(min=0), (0.7 + s).clamp(min=0)
    return (rho * up**2 + (1 - rho) * down**2).sum() / s.shape[0]


SAME_CHANNELS = [((a[0], b[1], *a[2:]), b) for a, b in SHAPES]
CASES = [
    *[("at", attention, attention_by_hand, s) for s in SHAPES],
    *[("nst", mmd, mmd_by_hand, s) for s in SHAPES],
    *[("pkt", neighbors, pkt_by_hand, s) for s in [*SHAPES, ((5, 3), (5, 7)), ((4, 5, 2), (4, 3, 3))]],
    *[("ft1", lambda s, t: factor(s, t, 1), factors_by_hand(1), s) for s in SAME_CHANNELS],
    *[("ft2", lambda s, t: factor(s, t, 2), factors_by_hand(2), s) for s in SAME_CHANNELS],
    *[("ab", lambda s, t: boundary(s, t, 0.7), boundary_by_hand, (b, b)) for _, b in SHAPES],
]


@pytest.mark.parametrize(("name", "loss", "by_hand", "shapes"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_losses_equal_the_papers_formulas_in_value_and_gradient(name: str, loss, by_hand, shapes) -> None:
    s, t = tensor(shapes[0], 1).requires_grad_(), tensor(shapes[1], 2)
    s64 = s.detach().double().requires_grad_()
    value, expected = loss(s, t), by_hand(s64, t.double())
    torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=1e-6)
    grad, grad64 = torch.autograd.grad(value, s)[0], torch.autograd.grad(expected, s64)[0]
    torch.testing.assert_close(grad.double(), grad64, rtol=2e-4, atol=1e-6 * (1 + grad64.abs().max().item()))


@pytest.mark.parametrize("loss", [attention, mmd, neighbors, lambda s, t: factor(s, t, 1)])
def test_equal_maps_cost_nothing_and_others_something(loss) -> None:
    x = tensor((3, 4, 5, 6), 3)
    assert loss(x, x).abs() < 1e-6
    assert loss(tensor((3, 4, 5, 6), 4), x) > 1e-3


def test_attention_ignores_sign_scale_and_order_of_channels() -> None:
    s, t = tensor((2, 3, 4, 5), 1), tensor((2, 6, 4, 5), 2)
    expected = attention(s, t)
    for changed in (-s, 7.3 * s, s.flip(1)):
        torch.testing.assert_close(attention(changed, t), expected)
    assert (attention(s.flip(2), t) - expected).abs() > 1e-4


def test_mmd_ignores_order_and_positive_scale_of_channels() -> None:
    s, t = tensor((2, 3, 4, 5), 1), tensor((2, 6, 4, 5), 2)
    scales = torch.tensor([0.5, 2.0, 9.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(mmd((s * scales).flip(1), t), mmd(s, t))


def test_pkt_ignores_rotation_and_scale_but_not_shift() -> None:
    s, t = tensor((6, 5), 1), tensor((6, 8), 2)
    rotation = torch.linalg.qr(tensor((5, 5), 3).double())[0].float()
    torch.testing.assert_close(neighbors(3 * s @ rotation, t), neighbors(s, t), rtol=1e-4, atol=1e-7)
    assert (neighbors(s + 1, t) - neighbors(s, t)).abs() > 1e-4


def test_boundaries_cost_nothing_beyond_the_margin() -> None:
    t = tensor((2, 3, 4, 4), 1)
    assert boundary(torch.where(t > 0, 1.0, -1.0), t, 1.0) == 0
    assert boundary(torch.where(t > 0, 5.0, -9.0), 100 * t, 1.0) == 0
    assert boundary(torch.full((1, 3), -1.0), torch.tensor([[0.0, -1.0, 2.0]]), 1.0) == 4  # 0 itself is inactive


def test_losses_stay_finite_at_dead_maps() -> None:
    dead, t = torch.zeros(2, 3, 4, 4, requires_grad=True), tensor((2, 3, 4, 4), 1)
    for loss in (attention, mmd, neighbors, lambda s, t: factor(s, t, 2)):
        value = loss(dead, t)
        assert value.isfinite()
        assert torch.autograd.grad(value, dead)[0].isfinite().all()


@pytest.mark.parametrize("sizes", [((4, 6), (4, 6)), ((8, 6), (4, 3)), ((4, 6), (8, 12))])
def test_flow_is_the_mean_product_after_max_pooling(sizes) -> None:
    (h1, w1), (h2, w2) = sizes
    a, b = tensor((2, 3, h1, w1), 1), tensor((2, 5, h2, w2), 2)
    h, w = min(h1, h2), min(w1, w2)
    peak = lambda x: x.double().reshape(*x.shape[:2], h, x.shape[2] // h, w, x.shape[3] // w).amax((3, 5))  # noqa: E731
    expected = torch.einsum("nchw,ndhw->ncd", peak(a), peak(b)) / (h * w)
    torch.testing.assert_close(flow(a, b).double(), expected, rtol=1e-5, atol=1e-6)


def test_gaussian_is_the_log_density_with_its_constant_left_out() -> None:
    q = Gaussian(3, 4)
    with torch.no_grad():
        q.scale.add_(tensor((4,), 5))
    s, t = tensor((2, 3, 8, 6), 1), tensor((2, 4, 4, 6), 2)
    q64 = Gaussian(3, 4).double()
    q64.load_state_dict(q.state_dict())
    std = (q64.scale.exp().log1p() + 1e-5).sqrt().view(1, -1, 1, 1)
    density = torch.distributions.Normal(q64.mean(pooled(s.double(), 4, 6)), std).log_prob(t.double())
    expected = -density.mean() - 0.5 * math.log(2 * math.pi)
    value = q(s, t)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    grad = torch.autograd.grad(value, q.scale)[0]
    torch.testing.assert_close(grad.double(), torch.autograd.grad(expected, q64.scale)[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(F.softplus(Gaussian(3, 4).scale) + 1e-5, torch.full((4,), 5.0))


def test_pooled_factors_are_attention_maps() -> None:
    s, t = tensor((2, 3, 4, 4), 1), tensor((2, 3, 4, 4), 2)
    q = [(x.double() ** 2).sum(1).flatten(1) for x in (s, t)]
    q_s, q_t = (x / (x**2).sum(1, keepdim=True).sqrt() for x in q)
    torch.testing.assert_close(factor(s, t, 1, pool_channels=True).double(), (q_s - q_t).abs().mean())
