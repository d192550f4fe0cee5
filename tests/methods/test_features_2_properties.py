"""OFD, ReviewKD, ICKD, KDSVD, CWD and PKD: what each is blind to, and what must not upset it."""

import math

import pytest
import torch
from torch import nn

from litdistill.losses import channel_correlation, kl_places, partial_l2, pearson
from litdistill.losses.values import standardize_channels
from litdistill.methods.cwd import CWD
from litdistill.methods.kdsvd import KDSVD, RightVectors, svd_loss
from litdistill.methods.layers import BatchNorm
from litdistill.methods.ofd import MarginReLU
from litdistill.methods.reviewkd import ReviewKD
from litdistill.types import Outputs
from litdistill.utils.errors import UserError
from tests.methods.contract import batch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def outputs(*shapes):
    return Outputs.of(torch.randn(1, 5), {f"stage{i}": torch.randn(1, *shape) for i, shape in enumerate(shapes)})


@pytest.mark.parametrize("loss", [lambda s, t: kl_places(s, t, 4), channel_correlation, pearson])
def test_nothing_to_learn_from_an_equal(loss):
    x = torch.randn(3, 4, 5, 2, requires_grad=True)
    value = loss(x, x.detach().clone())
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert x.grad.abs().max() < 1e-6
    assert loss(torch.randn(3, 4, 5, 2), x) > 0.01


def test_pkd_sees_neither_scale_nor_offset_of_a_channel_and_cwd_no_offset():
    s, t = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    scale, offset = torch.tensor([3.0, 0.01, 50.0])[:, None, None], torch.tensor([-7.0, 2.0, 1.0])[:, None, None]
    assert pearson(s * scale + offset, t) == pytest.approx(pearson(s, t).item(), rel=1e-4)
    assert pearson(-t, t) == pytest.approx(2, rel=1e-5)
    assert kl_places(s + offset, t, 4) == pytest.approx(kl_places(s, t, 4).item(), rel=1e-4)
    assert kl_places(s * scale, t, 4) != pytest.approx(kl_places(s, t, 4).item(), rel=0.1)


def test_autocast_rounds_no_product_in_a_loss():
    """KDSVD: of a teacher's vector between two of the student's, and nearer to one by less than bfloat16 resolves."""
    s, t = torch.randn(3, 4, 5, 2), torch.randn(3, 4, 5, 2)
    student = torch.tensor([[3.0, 0.0], [0.0, 1.0]]).view(1, 2, 2, 1)
    teacher = torch.tensor([[0.706, 0.0], [0.708, 0.0]]).view(1, 2, 2, 1)
    svd = lambda: svd_loss([student, s[:1, :2]], [teacher, t[:1, :2]], 1)  # noqa: E731
    plain = channel_correlation(s, t), svd()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(channel_correlation(s, t), plain[0])
        assert torch.equal(svd(), plain[1])


def test_dead_channels_give_no_gradient_that_explodes():
    x = torch.randn(3, 4, 5, 2)
    x[:, 1:3] = 0
    x.requires_grad_()
    pearson(x, torch.randn(3, 4, 5, 2)).backward()
    assert not standardize_channels(x)[:, 1:3].any()
    assert not x.grad[:, 1:3].any()
    assert x.grad.abs().max() < 1
    before, after = x.detach().requires_grad_(), torch.randn(3, 4, 2, 2)
    svd_loss([before, after], [torch.randn(3, 4, 5, 2), torch.randn(3, 4, 2, 2)], 1).backward()
    assert before.grad.isfinite().all()
    assert before.grad.any()
    channel_correlation(x, torch.randn(3, 4, 5, 2)).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(("positions", "channels"), [(9, 4), (3, 6)])
def test_gradient_of_singular_vectors(positions, channels):
    x = torch.randn(2, positions, channels, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(channels, 2, dtype=torch.float64)
    signed = lambda x: (lambda v: v * v[:, :1].sign().detach())(RightVectors.apply(x, 2)[0])  # noqa: E731
    assert torch.autograd.gradcheck(lambda x: (signed(x) * weight).sum((1, 2)), x)


def test_kdsvd_with_several_vectors_does_not_see_signs_and_equals_none_for_equals():
    maps = [torch.randn(2, 5, 4, 3), torch.randn(2, 6, 2, 2)]
    assert svd_loss(maps, maps, 3).item() == pytest.approx(0, abs=1e-9)
    other = [torch.randn(2, 5, 4, 3), torch.randn(2, 6, 2, 2)]
    assert svd_loss(maps, other, 3) == pytest.approx(svd_loss([-maps[0], maps[1]], other, 3).item(), rel=1e-3)
    one = Outputs.of(torch.zeros(2, 5), {"last": maps[0]})
    with pytest.raises(UserError, match="two maps"):
        KDSVD().build(one, one, torch.zeros(9))


def test_margin_is_the_mean_negative_response_over_all_batches():
    """Exactly; and for normal responses the closed form that the authors compute from a BatchNorm's weight and bias."""
    relu, mean, std = MarginReLU(3), torch.tensor([0.5, -1.0, 9.0]), torch.tensor([1.0, 0.5, 0.1])
    g = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, 3, 40, 25, generator=g) * std[:, None, None] + mean[:, None, None] for n in (30, 7, 20)]
    for x in batches:
        out = relu(x)
    seen = torch.cat(batches).double().transpose(0, 1).flatten(1)
    for c in (0, 1):
        exact = seen[c][seen[c] < 0].mean().item()
        z = -mean[c].item() / std[c].item()
        phi, cdf = math.exp(-z * z / 2) / math.sqrt(2 * math.pi), (1 + math.erf(z / math.sqrt(2))) / 2
        assert relu.margin[c].item() == pytest.approx(exact, rel=1e-5)
        assert relu.margin[c].item() == pytest.approx(mean[c].item() - std[c].item() * phi / cdf, rel=0.02)
        assert out[:, c].min().item() == pytest.approx(exact, rel=1e-5)
    assert relu.margin[2] == 0  # never negative
    kept = relu.margin.clone()
    relu.eval()(torch.full((1, 3, 1, 1), -100.0))
    assert torch.equal(relu.margin, kept)


def test_partial_l2_asks_nothing_of_a_student_below_a_negative_teacher():
    s, t = torch.tensor([-3.0, -1.0, -3.0, 1.0]), torch.tensor([-2.0, -2.0, 2.0, 3.0])
    squares = [partial_l2(a.view(1, 1, 1, 1), b.view(1, 1, 1, 1)).item() for a, b in zip(s, t, strict=True)]
    assert squares == [0, 1, 25, 4]


def test_cwd_refuses_maps_of_one_position():
    dots = Outputs.of(torch.zeros(2, 5), {"last": torch.zeros(2, 7, 1, 1)})
    with pytest.raises(UserError, match="1x1"):
        CWD().build(dots, dots, torch.zeros(9))


def test_reviewkd_takes_the_pooled_vector_as_a_stage():
    student, teacher = outputs((3, 7, 5), (5, 3, 3)), outputs((3, 9, 9), (7, 5, 4))
    for o, c in ((student, 5), (teacher, 7)):
        o.features["pooled"] = torch.randn(1, c)
    method = ReviewKD()
    method.build(student, teacher, torch.zeros(9))
    assert [abf.attention is None for abf in method.abfs] == [False, False, True]
    assert method(student, teacher, batch(torch.tensor([0])))["hint"].isfinite()


def test_batchnorm_differs_from_torchs_only_where_that_one_stops():
    own, theirs = BatchNorm(3), nn.BatchNorm2d(3)
    x = torch.randn(2, 3, 1, 1)
    torch.testing.assert_close(own(x), theirs(x))
    assert own.state_dict().keys() == theirs.state_dict().keys()
    with pytest.raises(ValueError, match="more than 1 value"):
        theirs(x[:1])
    expected = (x[:1].double().flatten() - own.running_mean.double()) / (own.running_var.double() + 1e-5).sqrt()
    torch.testing.assert_close(own(x[:1]).flatten().double(), expected, rtol=1e-5, atol=1e-6)
