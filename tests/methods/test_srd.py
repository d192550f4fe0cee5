"""SRD (Miles & Mikolajczyk 2024) against its formula in float64 and against torchdistill, and what it is blind to."""

import inspect
import math
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from litdistill.losses import log_power
from litdistill.methods.base import CATEGORICAL, Method
from litdistill.methods.srd import SRD
from litdistill.types import Outputs
from litdistill.utils.errors import UserError
from tests.methods.contract import batch

CONF = Path(__file__).parents[2] / "conf" / "method" / "srd.yaml"


def outputs(n, shape, seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    feature = torch.randn(n, *shape, generator=g).to(dtype)
    return Outputs.of(torch.randn(n, 5, generator=g).to(dtype), {"early": torch.randn(n, 9), "last": feature})


def built(method, n, student=(3,), teacher=(6,), dtype=torch.float32):
    s, t = outputs(n, student, 1, dtype), outputs(n, teacher, 2, dtype)
    torch.manual_seed(3)
    method.build(outputs(2, student, 4), outputs(2, teacher, 5), torch.zeros(9, dtype=torch.int64))
    s.features["last"].requires_grad_()
    s.logits.requires_grad_()
    return method, s, t


def vector(x):
    return torch.stack([row.reshape(row.shape[0], -1).mean(1) if row.ndim == 3 else row.mean(0) for row in x])


def normed(x):
    """By the batch; of one sample by a fresh layer's running statistics, mean 0 and variance 1."""
    if len(x) == 1:
        return x / math.sqrt(1 + 1e-4)
    mean = x.mean(0)
    return (x - mean) / (((x - mean) ** 2).mean(0) + 1e-4).sqrt()


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("shapes", [((3,), (6,)), ((4, 5, 3), (2, 2, 2)), ((5, 4), (7,))], ids=str)
@pytest.mark.parametrize("exponent", [4.0, 2.5])
def test_value_and_gradient_are_the_papers(n, shapes, exponent):
    method, s, t = built(SRD(hint=0.3, soft=0.7, temperature=2, exponent=exponent), n, *shapes)
    assert [k for k, _ in method.named_parameters()] == ["projector.weight"]
    method.projector.weight.data *= 0.03  # so small that BatchNorm's ε shows
    t = t._replace(features={"last": t.features["last"] * 0.03})
    target = torch.arange(n) % 5
    terms = method(s, t, batch(target))
    assert list(terms) == ["hint", "soft"]
    logits, f = (x.detach().double().requires_grad_() for x in (s.logits, s.features["last"]))
    weight = method.projector.weight.detach().double().requires_grad_()
    a, b = (vector(x) if x.ndim > 2 else x for x in (f, t.features["last"].double()))
    difference = normed(a @ weight.T) - normed(b)
    p, q = (t.logits.double() / 2).softmax(1), (logits / 2).softmax(1)
    expected = {
        "hint": 0.3 * (difference**2).pow(exponent / 2).sum().log(),
        "soft": 0.7 * 4 * (p * (p / q).log()).sum() / n,
    }
    for k, v in expected.items():
        assert terms[k].item() == pytest.approx(v.item(), rel=1e-4, abs=1e-5), k
        assert terms[k].dtype == torch.float32
    mine = torch.autograd.grad(sum(terms.values()), [s.logits, s.features["last"], method.projector.weight])
    wanted = torch.autograd.grad(sum(expected.values()), [logits, f, weight])
    for x, y in zip(mine, wanted, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-3, atol=1e-3 * y.abs().max().item() + 1e-7)


@pytest.mark.parametrize("n", [2, 6])
def test_torchdistills_loss_and_layers(n):
    """Its hint has the factor 2 inside, and its KL no T²: equal as it stands at T = 1, with the authors' weights."""
    mid_level = pytest.importorskip("torchdistill.losses.mid_level")
    wrapper = pytest.importorskip("torchdistill.models.wrapper")
    method, s, t = built(SRD(hard=0), n, (3, 4, 2), (6, 3, 5))
    norm = {"num_features": 6, "eps": 1e-4, "affine": False}
    common = {"input_module": {"path": "net", "io": "output"}, "norm_kwargs": norm}
    common |= {"device": torch.device("cpu"), "device_ids": None, "distributed": False}
    linear = {"in_features": 3, "out_features": 6}
    student = wrapper.SRDModelWrapper(**common, linear_kwargs=linear, student_model=nn.Identity())
    teacher = wrapper.SRDModelWrapper(**common, teacher_model=nn.Identity())
    student.linear.weight = method.projector.weight  # its bias, which ours lacks, is as good as none before BatchNorm
    peer = mid_level.SRDLoss(*("norm", "output") * 2, *("fc", "output") * 2, exponent=4.0)
    taken = []
    for side, o in ((student, s), (teacher, t)):
        io = {"fc": {"output": o.logits}}
        side.norm_layer.register_forward_hook(lambda m, a, out, io=io: io.update(norm={"output": out}))
        side.secondary_forward({"net": {"output": o.features["last"]}})
        taken.append(io)
    theirs = peer(*taken)
    ours = sum(method(s, t, batch(torch.zeros(n))).values())
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)
    leaves = [s.features["last"], s.logits, method.projector.weight]
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def test_bfloat16_autocast_rounds_no_product():
    method, s, t = built(SRD(), 4, dtype=torch.bfloat16)
    target = torch.tensor([0, 1, 2, 3])
    full = [Outputs.of(o.logits.float(), {k: v.float() for k, v in o.features.items()}) for o in (s, t)]
    exact = method(*full, batch(target))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = method(s, t, batch(target))
    assert {k: v.item() for k, v in terms.items()} == {k: v.item() for k, v in exact.items()}
    sum(terms.values()).backward()
    assert s.features["last"].grad.isfinite().all()


def test_scale_and_offset_of_the_teachers_channels_are_not_seen():
    method, s, t = built(SRD(hard=0, soft=0), 8)
    scale, offset = torch.tensor([5.0, 40.0, 2.0, 9.0, 3.0, 70.0]), torch.tensor([-3.0, 0, 7, 1, 2, -1])
    moved = t._replace(features={"last": t.features["last"] * scale + offset})
    target = batch(torch.zeros(8))
    assert method(s, moved, target)["hint"].item() == pytest.approx(method(s, t, target)["hint"].item(), rel=1e-3)
    other = t._replace(features={"last": t.features["last"].roll(1, 0)})
    assert method(s, other, target)["hint"].item() != pytest.approx(method(s, t, target)["hint"].item(), rel=1e-2)


def test_log_sum_of_equals_is_finite_and_asks_for_nothing():
    x = torch.randn(3, 4, requires_grad=True)
    value = log_power(x, x.detach().clone(), 4)
    (gradient,) = torch.autograd.grad(value, x)
    assert value.isfinite()
    assert not gradient.any()
    # the gradient does not depend on the scale of the differences but as its inverse: what the logarithm is for
    grads = []
    for scale in (1.0, 1e-3):
        d = (torch.tensor([[0.5, -1.0, 2.0]]) * scale).requires_grad_()
        grads.append(torch.autograd.grad(log_power(d, torch.zeros(1, 3), 4), d)[0] * scale)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-6)


def test_parts_left_out_build_nothing_and_wrong_values_are_refused():
    method, s, t = built(SRD(hint=0), 3)
    assert not list(method.parameters())
    assert method.taps() == ((), ())
    assert list(method(s, t, batch(torch.tensor([0, 1, 2])))) == ["soft"]
    assert list(built(SRD(soft=0), 3)[0](s, t, batch(torch.tensor([0, 1, 2])))) == ["hint"]
    assert (SRD(soft=0).kinds, SRD().kinds) == (Method.kinds, (CATEGORICAL,))
    for wrong in ({"hint": -1}, {"exponent": 0.5}, {"temperature": 0}):
        with pytest.raises(UserError, match=f"^{next(iter(wrong))}="):
            SRD(**wrong)


def test_the_yaml_shows_every_argument_with_its_default():
    conf = dict(OmegaConf.load(CONF))
    defaults = {k: p.default for k, p in inspect.signature(SRD).parameters.items()}
    assert isinstance(instantiate(conf), SRD)
    assert {k: v for k, v in conf.items() if k != "_target_"} == defaults
