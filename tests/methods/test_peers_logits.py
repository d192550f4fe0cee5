"""Logit and relation methods beside torchdistill 1.1.5, with the scaling that relates the two spelled out.

Its `alpha` weights the hard loss (others' α the soft one). Ours are `hard` and `soft`, so each test names what it maps.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from litdistill.methods.cc import CC
from litdistill.methods.crd import CRD
from litdistill.methods.dist import DIST
from litdistill.methods.kd import KD
from litdistill.methods.rkd import RKD
from litdistill.methods.sp import SP
from litdistill.types import Outputs
from tests.methods.contract import batch

peer = pytest.importorskip("torchdistill.losses.mid_level")

LOGITS = {
    "student_module_path": "m",
    "student_module_io": "output",
    "teacher_module_path": "m",
    "teacher_module_io": "output",
}
FEATURES = {"student_output_path": "m", "teacher_output_path": "m"}


def io(x: Tensor) -> dict[str, dict[str, Tensor]]:
    return {"m": {"output": x}}


def draw(n: int, *sizes: int, scale: float = 1.0) -> list[Tensor]:
    g = torch.Generator().manual_seed(n)
    return [torch.randn(n, size, generator=g) * scale for size in sizes]


def labels(n: int, classes: int) -> Tensor:
    return torch.arange(n) % classes


def features(x: Tensor) -> Outputs:
    return Outputs.of(torch.zeros(len(x), 2), {"m": x})


def assert_same(ours: Tensor, theirs: Tensor, student: Tensor) -> None:
    """Values and gradients with respect to the student."""
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)
    (a,), (b,) = torch.autograd.grad(ours, student), torch.autograd.grad(theirs, student)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd(temperature):
    """The same: alpha weighs the cross-entropy of the labels, as our hard does, beta (by default 1 − alpha) is our soft."""
    s, t = draw(6, 10, 10, scale=3.0)
    s.requires_grad_()
    y = labels(6, 10)
    ours = KD(hard=0.3, soft=0.7, temperature=temperature)(Outputs.of(s), Outputs.of(t), batch(y))["soft"]
    ours = ours + 0.3 * F.cross_entropy(s, y)
    theirs = peer.KDLoss(**LOGITS, temperature=temperature, alpha=0.3)(io(s), io(t), y)
    assert_same(ours, theirs, s)


def test_kd_without_labels():
    """Different: with alpha 0 torchdistill drops β T² as well, and its gradient falls with 1 / T². Ours keeps T²
    (Hinton et al. 2015, section 2: "it is important to multiply them by T²"), with a hard loss beside it or without."""
    s, t = draw(6, 10, 10)
    ours = KD(hard=0, soft=0.7, temperature=4.0)(Outputs.of(s), Outputs.of(t), batch(labels(6, 10)))["soft"]
    theirs = peer.KDLoss(**LOGITS, temperature=4.0, alpha=0, beta=0.7)(io(s), io(t), labels(6, 10))
    assert ours.item() == pytest.approx(0.7 * 16 * theirs.item(), rel=1e-5)


def test_logit_std():
    """The same: alpha weighs the cross-entropy of the labels, as our hard does, beta is our soft."""
    s, t = draw(6, 10, 10, scale=3.0)
    s.requires_grad_()
    y = labels(6, 10)
    ours = KD(hard=0.1, soft=9.0, temperature=2.0, standardized=True)(Outputs.of(s), Outputs.of(t), batch(y))
    theirs = peer.LogitStdKDLoss(**LOGITS, temperature=2.0, alpha=0.1, beta=9.0)(io(s), io(t), y)
    assert_same(ours["soft"] + 0.1 * F.cross_entropy(s, y), theirs, s)


def test_dist():
    """The same up to 1e-4: beta is our inter, gamma our intra, tau² is in both. The two stabilise a correlation
    differently (ours is that of the paper; torchdistill bounds the product of norms from below)."""
    s, t = draw(6, 10, 10, scale=3.0)
    s.requires_grad_()
    ours = DIST(hard=0, inter=1.5, intra=2.5, temperature=4.0)(Outputs.of(s), Outputs.of(t), batch(labels(6, 10)))
    theirs = peer.DISTLoss(**LOGITS, beta=1.5, gamma=2.5, tau=4.0)(io(s), io(t))
    assert_same(sum(ours.values()), theirs, s)


def test_rkd():
    """The same: dist_factor is our distance, angle_factor our angle, both with means over N² and N³."""
    s, t = draw(7, 8, 5)
    s.requires_grad_()
    ours = RKD(hard=0, distance=25.0, angle=50.0)(features(s), features(t), batch(labels(7, 2)))
    theirs = peer.RKDLoss(**FEATURES, dist_factor=25.0, angle_factor=50.0, reduction="mean")(io(s), io(t))
    assert_same(sum(ours.values()), theirs, s)


def test_rkd_of_samples_that_coincide():
    """Different: where two samples share a feature, torchdistill's normalized difference divides by 1e-12 and the
    gradient of its angles explodes. Ours has none there: an angle at such a pair is not defined."""
    s, t = draw(5, 6, 6)
    s[1] = s[0]
    s.requires_grad_()
    theirs = peer.RKDLoss(**FEATURES, dist_factor=0, angle_factor=50.0, reduction="mean")(io(s), io(t))
    assert torch.autograd.grad(theirs, s)[0].abs().max() > 1e4
    ours = RKD(hard=0, distance=0, angle=50.0)(features(s), features(t), batch(labels(5, 2)))["angle"]
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)
    assert torch.autograd.grad(ours, s)[0].abs().max() < 1e3


def test_sp():
    """Different: torchdistill passes 1 to `normalize` as second argument, which is the order of the norm, so its rows
    have a sum of magnitudes of 1. The paper takes the L2 norm, as RepDistiller's form does, which the
    paper's author verified, and as we do. Up to that the same, reduction "batchmean" being the division by N²."""
    s, t = draw(6, 8, 5)
    s.requires_grad_()
    ours = SP(hard=0, hint=1.0)(features(s), features(t), batch(labels(6, 2)))["hint"]

    class L2(peer.SPKDLoss):  # type: ignore[name-defined]
        def matmul_and_normalize(self, z):
            return torch.nn.functional.normalize(z.flatten(1) @ z.flatten(1).T, p=2, dim=1)

    assert_same(ours, L2(**FEATURES, reduction="batchmean")(io(s), io(t)), s)
    assert abs(peer.SPKDLoss(**FEATURES, reduction="batchmean")(io(s), io(t)).item() / ours.item() - 1) > 0.1


def test_cc_gaussian():
    """Different: torchdistill takes the norm of the difference of the kernels, divided by N²; the paper its square. So
    ours is theirs², times N². Theirs also leaves it to the caller to give vectors of unit length, without which the
    series is none of a Gaussian; ours makes them so."""
    s, t = draw(6, 8, 5)
    method = CC(hard=0, hint=1.0, width=4, kernel="gaussian", gamma=0.4, order=2)
    method.build(features(s), features(t), batch(labels(6, 2)))
    ours = method(features(s), features(t), batch(labels(6, 2)))["hint"]
    embedded = [
        torch.nn.functional.normalize(layer(x), dim=1)
        for layer, x in ((method.embed_student, s), (method.embed_teacher, t))
    ]
    config = {"type": "gaussian", "gamma": 0.4, "max_p": 2}
    loss = peer.CCKDLoss(student_linear_path="m", teacher_linear_path="m", kernel_config=config, reduction="batchmean")
    theirs = loss(io(embedded[0]), io(embedded[1]))
    assert ours.item() == pytest.approx((theirs.item() * 36) ** 2 / 36, rel=1e-4)


def test_crd():
    """The same over several steps, memories and Z included: pos_idx is our ids, contrast_idx the ids and then our draw.
    (Its own draw reads `self.prob`, which is named `self.probs`, and fails: torchdistill needs contrast_idx.)"""
    s, t = draw(4, 6, 5)
    s.requires_grad_()
    ids, targets = torch.tensor([2, 9, 0, 7]), labels(20, 4)
    method = CRD(hard=0, hint=1.0, width=8, negatives=6, temperature=0.07, momentum=0.5)
    method.build(features(s), features(t), targets)
    negatives = torch.arange(24).view(4, 6) % 20
    method._draw = lambda labels: negatives  # type: ignore[method-assign]
    loss = peer.CRDLoss("m", "ids", "m", input_size=8, output_size=20, num_negative_samples=6, num_samples=20)
    loss.memory_v1.copy_(method.memory_student[:20])
    loss.memory_v2.copy_(method.memory_teacher[:20])
    supplement = {"pos_idx": ids, "contrast_idx": torch.cat([ids[:, None], negatives], 1)}
    for _ in range(3):
        ours = method(features(s), features(t), batch(targets[ids], ids))["hint"]
        a, b = (torch.nn.functional.normalize(f(x)) for f, x in ((method.embed_student, s), (method.embed_teacher, t)))
        theirs = loss(io(a) | {"ids": {"input": supplement}}, io(b)).squeeze()
        assert_same(ours, theirs, s)
        torch.testing.assert_close(method.memory_student[:20], loss.memory_v1)
        torch.testing.assert_close(method.memory_teacher[:20], loss.memory_v2)
