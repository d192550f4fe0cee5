"""CRD against the equations of its paper, written here in float64: loss, Z, memories, draws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from litdistill.methods.crd import CRD
from litdistill.types import Outputs
from litdistill.utils.errors import UserError
from tests.methods.contract import batch

TARGETS = torch.tensor([0, 1, 2, 0, 0, 1, 2, 2, 2, 1, 4, 0])  # label 3 has no sample


def outputs(feature: Tensor) -> Outputs:
    return Outputs.of(torch.zeros(len(feature), 3), {"tap": feature})


def built(method: CRD, s: Tensor, t: Tensor, targets: Tensor) -> CRD:
    method.build(outputs(s), outputs(t), targets)
    return method


def features() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(4, 5, generator=g), torch.randn(4, 3, 2, 2, generator=g)


def crd(**kwargs) -> tuple[CRD, Tensor, Tensor, Tensor]:
    s, t = features()
    torch.manual_seed(0)
    method = CRD(0, 2.0, width=6, negatives=7, temperature=0.5, **kwargs)
    return built(method, s, t, TARGETS), s, t, torch.tensor([2, 10, 0, 7])


def ref_crd(method: CRD, s: Tensor, t: Tensor, ids: Tensor, negatives: Tensor, z: list[float] | None = None):
    """Both contrasts, Z (estimated unless given) and the memories afterwards, by the paper, in float64."""

    def embed(layer, x):
        v = x.double().flatten(1) @ layer.weight.double().T + layer.bias.double()
        return v / v.pow(2).sum(1, keepdim=True).sqrt()

    v_s, v_t = embed(method.embed_student, s), embed(method.embed_teacher, t)
    m_s, m_t = method.memory_student.double(), method.memory_teacher.double()
    n, k = len(TARGETS), negatives.shape[1]
    chosen = torch.cat([ids[:, None], negatives], 1)
    total, zs = torch.zeros(()), []
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
        got = method(outputs(s32), outputs(t), batch(torch.zeros(4, dtype=torch.long), ids))["hint"]
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
    assert method(outputs(s), outputs(t), batch(y, ids))["hint"].isfinite()
    assert method(outputs(s), outputs(t), batch(y)) == {}
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())
    method.train()
    some = torch.tensor([2, -1, 0, -1])
    method(outputs(s), outputs(t), batch(y, some))
    changed = (method.memory_student != before["memory_student"]).any(1).nonzero().flatten().tolist()
    assert changed == [0, 2, len(TARGETS)]  # the last row is no sample's
    with pytest.raises(UserError, match="id"):
        method(outputs(s), outputs(t), batch(y))


def test_crd_counts_only_samples_with_an_id(monkeypatch):
    method, s, t, _ = crd()
    method.eval()
    monkeypatch.setattr(method, "_draw", lambda labels: torch.tensor([[1, 5, 9, 1, 5, 9, 1]]).expand(len(labels), 7))
    method.z_student.fill_(20.0)
    method.z_teacher.fill_(30.0)
    y = torch.zeros(4, dtype=torch.long)
    some = torch.tensor([2, -1, 0, -1])
    got = method(outputs(s), outputs(t), batch(y, some))["hint"]
    want = method(outputs(s[[0, 2]]), outputs(t[[0, 2]]), batch(y[:2], some[[0, 2]]))["hint"]
    torch.testing.assert_close(got, want)
    none = torch.full((4,), -1)
    assert method(outputs(s), outputs(t), batch(y, none))["hint"].item() == 0


def test_crd_starts_alike_in_every_process_and_moves_with_its_state():
    a, s, t, ids = crd()
    torch.manual_seed(99)
    b = built(CRD(0, 2.0, width=6, negatives=7, temperature=0.5), s, t, TARGETS)
    assert torch.equal(a.memory_student, b.memory_student)
    assert not torch.equal(a.memory_student, a.memory_teacher)
    a(outputs(s), outputs(t), batch(torch.zeros(4, dtype=torch.long), ids))
    b.load_state_dict(a.state_dict())
    torch.manual_seed(5)
    one = a(outputs(s), outputs(t), batch(torch.zeros(4, dtype=torch.long), ids))["hint"]
    torch.manual_seed(5)
    two = b(outputs(s), outputs(t), batch(torch.zeros(4, dtype=torch.long), ids))["hint"]
    assert torch.equal(one, two)
    assert torch.equal(a.memory_teacher, b.memory_teacher)


@pytest.mark.parametrize("kwargs", [{"temperature": 0}, {"momentum": 1.0}, {"negatives": 0}, {"hint": -1}])
def test_crd_refuses_wrong_numbers_by_name(kwargs):
    with pytest.raises(UserError, match=f"^{next(iter(kwargs))}="):
        CRD(**kwargs)


def test_crd_refuses_a_single_label_and_data_without_ids():
    s, t = features()
    with pytest.raises(UserError, match="id of every training sample"):
        CRD().build(outputs(s), outputs(t), None)
    with pytest.raises(UserError, match="one label"):
        built(CRD(), s, t, torch.zeros(5, dtype=torch.long))


def test_crd_under_autocast_with_bf16_features():
    method, s, t, ids = crd()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = method(outputs(s.bfloat16()), outputs(t.bfloat16()), batch(torch.zeros(4, dtype=torch.long), ids))[
            "hint"
        ]
    assert value.dtype == method.memory_student.dtype == torch.float32
    value.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in method.parameters())
