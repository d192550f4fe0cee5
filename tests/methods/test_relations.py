"""Methods that read features: each against its paper's formula, written here in float64; and the sum of methods."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from litdistill.errors import UserError
from litdistill.methods.base import Method, Outputs, Taps
from litdistill.methods.cc import CC
from litdistill.methods.crd import CRD
from litdistill.methods.kd import KD
from litdistill.methods.rkd import RKD
from litdistill.methods.sp import SP
from litdistill.methods.sum import Sum
from litdistill.taps import Tapped

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


def outputs(feature: Tensor, ids: Tensor | None = None) -> Outputs:
    return Outputs(torch.zeros(len(feature), 3), {"tap": feature}, ids)


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
    got = make()(outputs(s32), outputs(t), torch.zeros(n, dtype=torch.long))
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
        got = make()(outputs(s), outputs(t), torch.zeros(6, dtype=torch.long))
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
    for term, value in make()(outputs(moved), outputs(t), torch.zeros(6, dtype=torch.long)).items():
        assert value.item() == pytest.approx(0, abs=1e-5), term
    stretched = moved * torch.linspace(0.1, 3, 8)
    for term, value in make()(outputs(stretched), outputs(t), torch.zeros(6, dtype=torch.long)).items():
        assert value.item() > 1e-3, term


def test_rkd_sees_small_distances_far_from_the_origin():
    s, t = (x * 0.1 for x in draw(5, (4,), (4,)))
    near = RKD(0)(outputs(s), outputs(t), torch.zeros(5, dtype=torch.long))
    far = RKD(0)(outputs(s + 1000), outputs(t), torch.zeros(5, dtype=torch.long))
    for term in near:
        assert far[term].item() == pytest.approx(near[term].item(), rel=0.02), term


@pytest.mark.parametrize("name", REFERENCES)
def test_samples_that_coincide_or_are_dead_give_finite_gradients(name):
    s, t = draw(5, (4,), (4,))
    s[1] = s[0]
    s[2] = 0
    s.requires_grad_()
    sum(REFERENCES[name][0]()(outputs(s), outputs(t), torch.zeros(5, dtype=torch.long)).values()).backward()
    assert torch.isfinite(s.grad).all()
    assert s.grad.abs().max() < 1e3
    everything = torch.ones(5, 4, requires_grad=True)
    sum(REFERENCES[name][0]()(outputs(everything), outputs(t), torch.zeros(5, dtype=torch.long)).values()).backward()
    assert torch.isfinite(everything.grad).all()


def test_several_taps_are_summed_from_the_last():
    a, b, c, d = draw(4, (3,), (5,), (6,), (2,))
    y = torch.zeros(4, dtype=torch.long)
    both = SP(0, 1.0)(Outputs(y, {"1": a, "2": b}), Outputs(y, {"0": d, "1": c, "2": d}), y)["hint"]
    each = [SP(0, 1.0)(outputs(s), outputs(t), y)["hint"] for s, t in ((a, c), (b, d))]
    torch.testing.assert_close(both, sum(each))


# -- CC --------------------------------------------------------------------------------------------------------------


def built(method: Method, s: Tensor, t: Tensor, targets: Tensor | None = None) -> Method:
    method.build(outputs(s), outputs(t), torch.tensor([0, 1]) if targets is None else targets)
    return method


@pytest.mark.parametrize("n", [1, 2, 6])
@pytest.mark.parametrize("kernel", ["consecutive", "gaussian"])
def test_cc_equals_its_formula(kernel, n):
    s, t = draw(n, (3, 2, 2), (8,))
    method = built(CC(0, 2.0, width=5, kernel=kernel, gamma=0.3, order=3), s, t)
    s32 = s.clone().requires_grad_()
    got = method(outputs(s32), outputs(t), torch.zeros(n, dtype=torch.long))["hint"]

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
    assert torch.isfinite(s32.grad).all()
    parameters = list(method.parameters())
    assert len(parameters) == 4
    assert n == 1 or all(p.grad.abs().sum() > 0 for p in parameters)


def test_cc_kernel_tends_to_the_gaussian_with_its_order():
    """The Taylor series of exp(−γ ‖a − b‖²) for unit vectors."""
    s, t = draw(5, (6,), (6,))
    method = built(CC(0, 1.0, width=4, kernel="gaussian", order=20), s, t)
    got = method(outputs(s), outputs(t), torch.zeros(5, dtype=torch.long))["hint"].item()

    def kernel(x):
        x = x.double() / x.double().norm(dim=1, keepdim=True)
        return torch.exp(-0.4 * (x[:, None] - x[None]).pow(2).sum(2))

    k = kernel(method.embed_student(s)) - kernel(method.embed_teacher(t))
    assert got == pytest.approx(k.pow(2).sum().item() / 25, rel=1e-4)


def test_cc_refuses_an_unknown_kernel():
    with pytest.raises(UserError, match="consecutive"):
        CC(kernel="rbf")


# -- CRD -------------------------------------------------------------------------------------------------------------

TARGETS = torch.tensor([0, 1, 2, 0, 0, 1, 2, 2, 2, 1, 4, 0])  # label 3 has no sample


def crd(**kwargs) -> tuple[CRD, Tensor, Tensor, Tensor]:
    s, t = draw(4, (5,), (3, 2, 2))
    torch.manual_seed(0)
    method = CRD(0, 2.0, width=6, negatives=7, temperature=0.5, **kwargs)
    return built(method, s, t, TARGETS), s, t, torch.tensor([2, 10, 0, 7])


def ref_crd(method: CRD, s: Tensor, t: Tensor, ids: Tensor, negatives: Tensor, z: list[float] | None = None):
    """Both contrasts, Z (estimated unless given) and the memories afterwards, of Tian et al.'s equations, in float64."""

    def embed(layer, x):
        v = x.double().flatten(1) @ layer.weight.double().T + layer.bias.double()
        return v / v.pow(2).sum(1, keepdim=True).sqrt()

    v_s, v_t = embed(method.embed_student, s), embed(method.embed_teacher, t)
    m_s, m_t = method.memory_student.double(), method.memory_teacher.double()
    n, k = len(TARGETS), negatives.shape[1]
    chosen = torch.cat([ids[:, None], negatives], 1)
    total, zs = 0.0, []
    for side, (v, m) in enumerate(((v_s, m_t), (v_t, m_s))):
        score = torch.stack([torch.stack([torch.exp(v[i] @ m[j] / 0.5) for j in chosen[i]]) for i in range(len(ids))])
        zs.append(score.mean().item() * n if z is None else z[side])
        p = score / zs[side]
        h = p / (p + k / n)
        total = total - (torch.log(h[:, 0]) + torch.log(1 - h[:, 1:]).sum(1)).mean()
    after = []
    for v, m in ((v_s, m_s), (v_t, m_t)):
        m = m.clone()
        for i, j in enumerate(ids):
            m[j] = m[j] * 0.5 + v[i] * 0.5
            m[j] = m[j] / m[j].norm()
        after.append(m)
    return total, zs, after


def test_crd_loss_gradient_constants_and_memories_equal_the_papers(monkeypatch):
    method, s, t, ids = crd()
    negatives = torch.tensor(
        [[0, 1, 3, 4, 5, 9, 10], [0, 1, 2, 3, 4, 5, 6], [1, 2, 5, 6, 7, 8, 9], [0, 0, 1, 3, 4, 4, 5]]
    )
    monkeypatch.setattr(method, "_draw", lambda labels: negatives)
    z = None
    for _ in range(3):  # the second and third steps meet moved memories and keep the first one's Z
        s64 = s.double().requires_grad_()
        want, z, after = ref_crd(method, s64, t, ids, negatives, z)
        s32 = s.clone().requires_grad_()
        got = method(outputs(s32, ids), outputs(t, ids), torch.zeros(4, dtype=torch.long))["hint"]
        assert got.item() == pytest.approx(2 * want.item(), rel=1e-5)
        (g,), (w,) = torch.autograd.grad(got, s32), torch.autograd.grad(2 * want, s64)
        torch.testing.assert_close(g.double(), w, rtol=1e-3, atol=1e-5)
        assert method.z_student.item() == pytest.approx(z[0], rel=1e-5)
        assert method.z_teacher.item() == pytest.approx(z[1], rel=1e-5)
        torch.testing.assert_close(method.memory_student.double(), after[0].detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(method.memory_teacher.double(), after[1].detach(), rtol=1e-4, atol=1e-6)


def test_crd_negatives_have_other_labels_are_uniform_and_repeat_with_the_seed():
    method, *_ = crd()
    method.negatives = 20_000
    labels = torch.tensor([0, 1, 2, 4])
    torch.manual_seed(3)
    drawn = method._draw(labels)
    for label, row in zip(labels, drawn, strict=True):
        others = (label != TARGETS).nonzero().flatten()
        share = torch.bincount(row, minlength=len(TARGETS))[others] / len(row)
        assert share.sum() == pytest.approx(1)  # nothing else was drawn
        deviation = math.sqrt(1 / len(others) / len(row))
        assert (share - 1 / len(others)).abs().max() < 5 * deviation
    torch.manual_seed(3)
    assert torch.equal(method._draw(labels), drawn)


def test_crd_updates_no_memory_outside_training_or_without_an_id():
    method, s, t, ids = crd()
    y = torch.zeros(4, dtype=torch.long)
    before = {k: v.clone() for k, v in method.state_dict().items()}
    method.eval()
    assert method(outputs(s, ids), outputs(t, ids), y)["hint"].isfinite()
    assert method(outputs(s), outputs(t), y) == {}
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())
    method.train()
    some = torch.tensor([2, -1, 0, -1])
    method(outputs(s, some), outputs(t, some), y)
    changed = (method.memory_student != before["memory_student"]).any(1).nonzero().flatten().tolist()
    assert changed == [0, 2, len(TARGETS)]  # the last row is no sample's
    with pytest.raises(UserError, match="id"):
        method(outputs(s), outputs(t), y)


def test_crd_counts_only_samples_with_an_id(monkeypatch):
    method, s, t, ids = crd()
    method.eval()
    monkeypatch.setattr(method, "_draw", lambda labels: torch.tensor([[1, 5, 9, 1, 5, 9, 1]]).expand(len(labels), 7))
    method.z_student.fill_(20.0)
    method.z_teacher.fill_(30.0)
    y = torch.zeros(4, dtype=torch.long)
    some = torch.tensor([2, -1, 0, -1])
    got = method(outputs(s, some), outputs(t, some), y)["hint"]
    want = method(outputs(s[[0, 2]], some[[0, 2]]), outputs(t[[0, 2]], some[[0, 2]]), y[:2])["hint"]
    torch.testing.assert_close(got, want)
    none = torch.full((4,), -1)
    assert method(outputs(s, none), outputs(t, none), y)["hint"].item() == 0


def test_crd_starts_alike_in_every_process_and_moves_with_its_state():
    a, s, t, ids = crd()
    torch.manual_seed(99)
    b = built(CRD(0, 2.0, width=6, negatives=7, temperature=0.5), s, t, TARGETS)
    assert torch.equal(a.memory_student, b.memory_student)
    assert not torch.equal(a.memory_student, a.memory_teacher)
    a(outputs(s, ids), outputs(t, ids), torch.zeros(4, dtype=torch.long))
    b.load_state_dict(a.state_dict())
    torch.manual_seed(5)
    one = a(outputs(s, ids), outputs(t, ids), torch.zeros(4, dtype=torch.long))["hint"]
    torch.manual_seed(5)
    two = b(outputs(s, ids), outputs(t, ids), torch.zeros(4, dtype=torch.long))["hint"]
    assert torch.equal(one, two)
    assert torch.equal(a.memory_teacher, b.memory_teacher)


@pytest.mark.parametrize("kwargs", [{"temperature": 0}, {"momentum": 1.0}, {"negatives": 0}, {"hint": -1}])
def test_crd_refuses_wrong_numbers_by_name(kwargs):
    with pytest.raises(UserError, match=f"method.{next(iter(kwargs))}"):
        CRD(**kwargs)


def test_crd_refuses_a_single_label():
    s, t = draw(3, (4,), (4,))
    with pytest.raises(UserError, match="one label"):
        built(CRD(), s, t, torch.zeros(5, dtype=torch.long))


def test_crd_under_autocast_with_bf16_features():
    method, s, t, ids = crd()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = method(outputs(s.bfloat16(), ids), outputs(t.bfloat16(), ids), torch.zeros(4, dtype=torch.long))["hint"]
    assert value.dtype == method.memory_student.dtype == torch.float32
    value.backward()
    assert all(torch.isfinite(p.grad).all() for p in method.parameters())


# -- Sum -------------------------------------------------------------------------------------------------------------


class Probe(Method):
    """Gives what it was given, so that a test can look at it."""

    def __init__(self, student_taps, teacher_taps):
        super().__init__()
        self.read = Taps(student_taps, teacher_taps)

    def taps(self):
        return self.read

    def build(self, student, teacher, targets):
        self.built = list(student.features), list(teacher.features)

    def forward(self, student, teacher, target):
        self.seen = list(student.features), list(teacher.features), self.epoch, student.ids
        return {"hint": student.logits.sum() * 0 + 1}


class Headless(Method):
    """Gives the student another head, as some methods do."""

    needs_teacher = False

    def prepare(self, student, teacher, example):
        return nn.Sequential(*student, nn.Linear(3, 3))

    def forward(self, student, teacher, target):
        return {}


def net(width: int) -> nn.Sequential:
    return nn.Sequential(
        *(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
        ),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)),
    )


def test_sum_gives_each_method_its_own_features_and_the_epoch():
    student, teacher, x = net(4), net(6), torch.randn(3, 1, 8, 8)
    a, b = Probe("pooled", ["0"]), Probe(["3", "0"], "stages")
    method = Sum({"a": a, "b": b})
    with pytest.raises(UserError, match="prepare"):
        method.taps()
    assert method.prepare(student, teacher, x) is student
    taps = method.taps()
    assert taps == Taps(["7:in", "3", "0"], ["0", "1", "4"])
    ids = torch.arange(3)
    s, t = Tapped(student, taps.student)(x)._replace(ids=ids), Tapped(teacher, taps.teacher)(x)
    method.build(s, t, torch.tensor([0, 1, 2]))
    assert a.built == (["7:in"], ["0"])
    method.epoch = 7
    assert {k: v.item() for k, v in method(s, t, ids).items()} == {"a_hint": 1, "b_hint": 1}
    assert a.seen == (["7:in"], ["0"], 7, ids)
    assert b.seen == (["3", "0"], ["1", "4"], 7, ids)
    assert method.needs_teacher


def test_sum_taps_the_student_that_a_method_has_changed():
    method = Sum({"head": Headless(), "probe": Probe("pooled", ())})
    student = method.prepare(net(4), None, torch.randn(2, 1, 8, 8))
    assert len(student) == 9
    assert method.taps().student == ["8:in"]
    assert not Sum({"head": Headless()}).needs_teacher


def test_sum_adds_the_terms_of_its_methods():
    student, teacher, x, y = net(4), net(6), torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2])
    method = Sum({"kd": KD(0.5, 2.0), "sp": SP(0.0, 3.0)})
    method.prepare(student, teacher, x)
    s, t = Tapped(student, method.taps().student)(x), Tapped(teacher, method.taps().teacher)(x)
    terms = method(s, t, y)
    want = {
        "hard": KD(0.5, 0)(s, t, y)["hard"],
        "kd_soft": KD(0, 2.0)(s, t, y)["soft"],
        "sp_hint": SP(0, 3.0)(s, t, y)["hint"],
    }
    assert terms.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(terms[name], value)


def test_sum_refuses_labels_that_count_twice_and_an_empty_sum():
    student, teacher, x, y = net(4), net(6), torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2])
    method = Sum({"kd": KD(), "sp": SP()})
    method.prepare(student, teacher, x)
    s, t = Tapped(student, method.taps().student)(x), Tapped(teacher, method.taps().teacher)(x)
    with pytest.raises(UserError, match=r"methods\.sp\.hard=0"):
        method(s, t, y)
    with pytest.raises(UserError, match="empty"):
        Sum({})


def test_sum_config_trains_its_projectors_and_loads_again():
    config = OmegaConf.load(Path(__file__).parents[2] / "conf/method/sum.yaml")
    student, teacher, x, y = net(4), net(6), torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2])
    states = []
    for _ in range(2):
        method = instantiate(config)
        method.prepare(student, teacher, x)
        s, t = Tapped(student, method.taps().student)(x), Tapped(teacher, method.taps().teacher)(x)
        ids = torch.arange(3)
        method.build(s, t, y)
        states.append((method, s._replace(ids=ids), t))
    method, s, t = states[0]
    terms = method(s, t, y)
    assert terms.keys() == {"hard", "kd_soft", "crd_hint"}
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in method.parameters())
    states[1][0].load_state_dict(method.state_dict())
