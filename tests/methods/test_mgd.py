"""MGD against its formula in float64, and what its masks are."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from litdistill.distillation.distiller import Distiller
from litdistill.methods import MGD
from litdistill.methods.mgd import draw_mask
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError
from tests.fits import digits, example, fit, net, same


def outputs(channels: int, *sizes: tuple[int, int], seed: int = 0) -> Outputs:
    g = torch.Generator().manual_seed(seed)
    found = {f"m{i}": torch.randn(3, channels, *size, generator=g) for i, size in enumerate(sizes)}
    return Outputs.of(torch.zeros(3, 5), found)


def shifted(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 3x3 convolution with zeros around, tap by tap."""
    padded = F.pad(x, (1, 1, 1, 1))
    h, w = x.shape[2:]
    out = bias[None, :, None, None].expand(len(x), -1, h, w)
    for i in range(3):
        for j in range(3):
            out = out + torch.einsum("nchw,oc->nohw", padded[:, :, i : i + h, j : j + w], weight[:, :, i, j])
    return out


@pytest.mark.parametrize("mask", ["places", "channels"])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((4, (6, 5), (3, 3)), (4, (6, 5), (3, 3))),
        ((3, (6, 4)), (5, (6, 4))),
        ((2, (8, 4)), (3, (4, 4))),
    ],
    ids=["same", "channels", "sizes"],
)
def test_equals_the_papers_formula_in_float64_with_gradients(student, teacher, mask):
    torch.manual_seed(0)
    s, t = outputs(*student, seed=1), outputs(*teacher, seed=2)
    method = MGD(hint=0.3, masked=0.4, mask=mask, student_taps=list(s.features), teacher_taps=list(t.features))
    method.build(s, t, None)
    for x in s.features.values():
        x.requires_grad_()
    torch.manual_seed(7)
    value = method(s, t, Batch(None, torch.zeros(3)))["hint"]

    torch.manual_seed(7)  # the same draws
    wide = [x.detach().double().requires_grad_() for x in s.features.values()]
    weights = {k: v.detach().double() for k, v in method.named_parameters()}
    expected = torch.zeros((), dtype=torch.float64)
    for i, (a, b) in enumerate(zip(wide, t.features.values(), strict=True)):
        a = a.reshape(3, a.shape[1], b.shape[2], a.shape[2] // b.shape[2], b.shape[3], a.shape[3] // b.shape[3]).mean(
            (3, 5)
        )
        if f"projectors.{i}.weight" in weights:
            a = torch.einsum("nchw,oc->nohw", a, weights[f"projectors.{i}.weight"][:, :, 0, 0])
            a = a + weights[f"projectors.{i}.bias"][None, :, None, None]
        n, c, h, w = b.shape
        r = torch.rand((n, 1, h, w) if mask == "places" else (n, c, 1, 1))
        m = torch.where(r < 0.4, 0.0, 1.0).double()
        hidden = shifted(a * m, weights[f"generators.{i}.0.weight"], weights[f"generators.{i}.0.bias"]).clamp(min=0)
        made = shifted(hidden, weights[f"generators.{i}.2.weight"], weights[f"generators.{i}.2.bias"])
        for row, wanted in zip(made, b.double(), strict=True):
            expected = expected + ((wanted - row) ** 2).sum() / n
    torch.testing.assert_close(value.double(), 0.3 * expected, rtol=1e-5, atol=1e-6)
    grads = torch.autograd.grad(value, list(s.features.values()))
    for a, b in zip(grads, torch.autograd.grad(0.3 * expected, wide), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unit", ["places", "channels"])
def test_masks_zero_whole_units_with_their_probability(unit):
    torch.manual_seed(0)
    x = torch.zeros(50, 40, 8, 5)
    mask = draw_mask(x, 0.3, unit)
    assert mask.shape == ((50, 1, 8, 5) if unit == "places" else (50, 40, 1, 1))
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert float(mask.mean()) == pytest.approx(0.7, abs=3 * (0.21 / 2000) ** 0.5)
    assert not torch.equal(mask, draw_mask(x, 0.3, unit))
    assert draw_mask(x, 0.0, unit).all()


def test_what_is_masked_gets_its_gradient_from_its_neighbors_alone():
    """A masked place of the student is not read, and the places around it are what the teacher's value there is made of."""
    torch.manual_seed(0)
    s, t = outputs(2, (4, 4)), outputs(2, (4, 4), seed=1)
    method = MGD(masked=0.5, mask="places", student_taps="m0", teacher_taps="m0")
    method.build(s, t, None)
    s.features["m0"].requires_grad_()
    torch.manual_seed(3)
    mask = draw_mask(t.features["m0"], 0.5, "places")
    torch.manual_seed(3)
    (grad,) = torch.autograd.grad(method(s, t, Batch(None, torch.zeros(3)))["hint"], s.features["m0"])
    assert bool((grad == 0).all(1, keepdim=True).eq(mask == 0).all())


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match=r"masked=1\.0 is the share"):
        MGD(masked=1.0)
    with pytest.raises(UserError, match=r"mask=pixels is not known: use places or channels"):
        MGD(mask="pixels")


def run(tmp_path, seed: int, **options) -> Distiller:
    data = digits()
    torch.manual_seed(0)
    distiller = Distiller(
        net(), MGD(**options), net(16, seed=1), example(data), optimizer=functools.partial(torch.optim.SGD, lr=0.01),
        allow_chance=True, seed=seed,
    )  # fmt: skip
    fit(distiller, data, tmp_path, enable_checkpointing=False, limit_val_batches=0)
    return distiller


def test_masks_are_draws_of_the_runs_seed(tmp_path):
    first, again, other = (run(tmp_path, seed).student for seed in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)
    assert same(run(tmp_path, 1, masked=0.0).student, run(tmp_path, 2, masked=0.0).student)
