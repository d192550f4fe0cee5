"""OFD, ReviewKD, ICKD, KDSVD, CWD and PKD against their papers' formulas, written out here in float64."""

import inspect
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from torch import nn

from litdistill.methods.cwd import CWD
from litdistill.methods.ickd import ICKD
from litdistill.methods.kdsvd import KDSVD
from litdistill.methods.ofd import OFD
from litdistill.methods.pkd import PKD
from litdistill.methods.reviewkd import ReviewKD
from litdistill.types import Outputs
from litdistill.utils.errors import UserError
from tests.methods.contract import batch

CONF = Path(__file__).parents[2] / "conf" / "method"

# (channels, height, width) of each stage of student and teacher, and the batch size
CASES = {
    "alike": ([(3, 8, 6), (5, 4, 3)], [(3, 8, 6), (5, 4, 3)], 4),
    "unlike": ([(1, 5, 7), (3, 3, 2)], [(4, 9, 9), (2, 6, 8), (7, 3, 1)], 3),
    "one of all": ([(2, 4, 4), (1, 1, 1)], [(1, 3, 5), (1, 2, 2)], 1),
}


def outputs(shapes, n, seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    maps = {f"stage{i}": torch.randn(n, *shape, generator=g).to(dtype) for i, shape in enumerate(shapes)}
    return Outputs.of(torch.randn(n, 5, generator=g).to(dtype), maps)


def built(method, case, dtype=torch.float32):
    student_shapes, teacher_shapes, n = CASES[case]
    student, teacher = outputs(student_shapes, n, 1, dtype), outputs(teacher_shapes, n, 2, dtype)
    torch.manual_seed(3)
    method.build(student, teacher, torch.zeros(9, dtype=torch.int64))
    for f in student.features.values():
        f.requires_grad_()
    return method, student, teacher


# -- references: float64, shared steps ---------------------------------------------------------------------------------


def bn(x):
    """Of a fresh BatchNorm: batch statistics, but its initial running ones where a channel has one value."""
    if x.numel() == x.shape[1]:
        return x / math.sqrt(1 + 1e-5)
    mean = x.mean((0, 2, 3), keepdim=True)
    return (x - mean) / (((x - mean) ** 2).mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()


def conv1(x, layer):
    if isinstance(layer, nn.Identity):
        return x
    out = torch.einsum("oc,nchw->nohw", layer.weight.detach().double()[:, :, 0, 0], x)
    return out if layer.bias is None else out + layer.bias.detach().double()[:, None, None]


def nearest(x, size):
    rows, cols = ([i * a // b for i in range(b)] for a, b in zip(x.shape[2:], size, strict=True))
    return x[:, :, rows][:, :, :, cols]


def paired(student, teacher):
    n = min(len(student), len(teacher))
    return list(zip(student[-n:], teacher[-n:], strict=True))


def pooled(s, t):
    size = [min(a, b) for a, b in zip(s.shape[2:], t.shape[2:], strict=True)]
    return F.adaptive_avg_pool2d(s, size), F.adaptive_avg_pool2d(t, size)


# -- references: one a method ------------------------------------------------------------------------------------------


def ofd(method, student, teacher):
    pairs, total = paired(student, teacher), 0
    for i, (s, t) in enumerate(pairs):
        s, t = pooled(s, t)
        s = bn(conv1(s, method.connectors[i][0]))
        for n in range(len(t)):
            for c in range(t.shape[1]):
                negative = t[:, c][t[:, c] < 0]
                wanted = t[n, c].clamp(min=negative.mean().item() if len(negative) else 0.0)
                skip = (s[n, c] <= wanted) & (wanted <= 0)
                total += torch.where(skip, 0, (s[n, c] - wanted) ** 2).sum() / 2 ** (len(pairs) - 1 - i) / len(t)
    return total


def reviewkd(method, student, teacher):
    total, fused = 0, None
    for (s, t), abf in reversed(list(zip(paired(student, teacher), method.abfs, strict=True))):
        x = bn(conv1(s, abf.conv1[0]))
        if fused is not None:
            y = nearest(fused, x.shape[2:])
            z = torch.sigmoid(conv1(torch.cat([x, y], 1), abf.attention[0]))
            x = x * z[:, 0:1] + y * z[:, 1:2]
        fused = nearest(x, t.shape[2:])
        out = bn(F.conv2d(fused, abf.conv2[0].weight.detach().double(), padding=1))
        losses, weights = [((out - t) ** 2).mean()], [1.0]
        for level in (4, 2, 1):
            if level < min(t.shape[2:]):
                losses.append(((F.adaptive_avg_pool2d(out, level) - F.adaptive_avg_pool2d(t, level)) ** 2).mean())
                weights.append(weights[-1] / 2)
        total += sum(a * b for a, b in zip(losses, weights, strict=True)) / sum(weights)
    return total


def ickd(method, student, teacher):
    total = 0
    for (s, t), p in zip(paired(student, teacher), method.projectors, strict=True):
        s, grams = bn(conv1(s, p[0])), []
        for x in (s, t):
            gram = torch.einsum("nahw,nbhw->nab", x, x)
            grams.append(gram / (gram**2).sum(2, keepdim=True).sqrt())
        total += ((grams[0] - grams[1]) ** 2).sum() / (len(t) * t.shape[1])
    return total


def kdsvd(method, student, teacher):
    total, pairs = 0, paired(student, teacher)
    for n in range(len(teacher[0])):
        before = None
        for (s, t), p in zip(pairs, method.projectors, strict=True):
            s = conv1(s, p)
            (_, values, v_s), (_, _, v_t) = (torch.linalg.svd(x[n].flatten(1).T, full_matrices=False) for x in (s, t))
            w = v_t[0] * torch.sign(v_t[0].sum())
            v_s = v_s[:4][values[:4] > 1e-9 * values[0]]
            v = v_s[(v_s @ w).abs().argmax()]
            v = v * torch.sign(v @ w).detach()
            if before is not None:
                a = torch.exp(-((v[:, None] - before[0][None]) ** 2) / 8)
                b = torch.exp(-((w[:, None] - before[1][None]) ** 2) / 8)
                total += ((a - b) ** 2).sum() / len(t)
            before = v, w
    return total


def cwd(method, student, teacher):
    total = 0
    for (s, t), p in zip(paired(student, teacher), method.projectors, strict=True):
        s, t = pooled(s, t)
        s = conv1(s, p)
        for n in range(len(t)):
            for c in range(t.shape[1]):
                q, w = (x[n, c].flatten().div(4).softmax(0) for x in (s, t))
                total += 16 * (w * (w / q).log()).sum() / (len(t) * t.shape[1])
    return total


def pkd(method, student, teacher):
    total = 0
    for (s, t), p in zip(paired(student, teacher), method.projectors, strict=True):
        s, t = pooled(s, t)
        s = conv1(s, p)
        for c in range(t.shape[1]):
            if t[:, c].numel() > 1:
                r = torch.corrcoef(torch.stack([s[:, c].flatten(), t[:, c].flatten()]))[0, 1]
                total += (1 - r) / t.shape[1]
    return total


METHODS = {OFD: ofd, ReviewKD: reviewkd, ICKD: ickd, KDSVD: kdsvd, CWD: cwd, PKD: pkd}
name = lambda m: m.__name__ if inspect.isclass(m) else None  # noqa: E731


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cls", METHODS, ids=name)
def test_value_and_gradient_are_the_papers(cls, case):
    method, student, teacher = built(cls(hard=0, hint=0.3), case)
    loss = method(student, teacher, batch(torch.zeros(1)))["hint"]
    grads = torch.autograd.grad(loss, list(student.features.values()), allow_unused=True)
    doubles = [f.detach().double().requires_grad_() for f in student.features.values()]
    expected = torch.as_tensor(0.3 * METHODS[cls](method, doubles, [f.double() for f in teacher.features.values()]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=2e-4, abs=1e-6)
    wanted = torch.autograd.grad(expected, doubles, allow_unused=True)
    for a, b in zip(grads, wanted, strict=True):
        if b is None:
            assert a is None or not a.any()
        else:
            torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3 * b.abs().max().item() + 1e-7)


@pytest.mark.parametrize("cls", METHODS, ids=name)
def test_bfloat16_autocast_changes_little(cls):
    """The features as a network under autocast gives them; only projectors compute in bfloat16, never the loss."""
    method, student, teacher = built(cls(), "alike", torch.bfloat16)
    target = batch(torch.tensor([0, 1, 2, 3]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = method(student, teacher, target)
    sum(terms.values()).backward()
    full = [Outputs.of(o.logits, {k: v.float() for k, v in o.features.items()}) for o in (student, teacher)]
    exact = method(*full, target)
    assert all(v.dtype == torch.float32 for v in terms.values())
    assert terms["hint"].item() == pytest.approx(exact["hint"].item(), rel=0.02)
    assert all(f.grad.isfinite().all() for f in student.features.values())


@pytest.mark.parametrize("cls", METHODS, ids=name)
def test_every_projector_is_used_and_none_is_built_for_a_weight_of_zero(cls):
    method, student, teacher = built(cls(), "unlike")
    sum(method(student, teacher, batch(torch.tensor([0, 1, 2]))).values()).backward()
    parameters = list(method.parameters())
    assert parameters
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in parameters)
    off, *_ = built(cls(hint=0), "unlike")
    assert not list(off.parameters())
    assert off.taps() == ((), ())
    assert off(student, teacher, batch(torch.tensor([0, 1, 2]))) == {}


@pytest.mark.parametrize("cls", METHODS, ids=name)
def test_a_network_without_maps_is_told_so(cls):
    vectors = Outputs.of(torch.zeros(2, 5), {"pooled": torch.zeros(2, 7)})
    with pytest.raises(UserError, match="spatial maps"):
        cls().build(vectors, vectors, torch.zeros(9, dtype=torch.int64))
    with pytest.raises(UserError, match=r"^hint=-1"):
        cls(hint=-1)


@pytest.mark.parametrize("key", ["ofd", "reviewkd", "simkd", "srrl", "ickd", "kdsvd", "cwd", "pkd"])
def test_the_yaml_shows_every_argument_with_its_default(key):
    conf = OmegaConf.to_container(OmegaConf.load(CONF / f"{key}.yaml"))
    defaults = {k: p.default for k, p in inspect.signature(get_class(conf["_target_"])).parameters.items()}
    instantiate(conf)
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in conf.items() if k != "_target_"} == defaults
    assert (CONF / f"{key}.yaml").read_text().startswith("# ")
