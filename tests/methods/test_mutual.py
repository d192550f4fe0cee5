"""Mutual learning: its loss in float64, and its peers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer

from litdistill.methods.mutual import Mutual
from litdistill.types import Outputs
from tests.methods.contract import Reader, batch


@pytest.mark.parametrize("peers", [1, 3])
def test_everyone_learns_from_the_mean_of_the_others(peers):
    g = torch.Generator().manual_seed(0)
    logits = [torch.randn(4, 5, generator=g).requires_grad_() for _ in range(1 + peers)]
    doubles = [z.detach().double().requires_grad_() for z in logits]
    student = Outputs.of(logits[0], {f"peers.{i}": z for i, z in enumerate(logits[1:])})
    method = Mutual(hard=0.5, soft=0.7, temperature=2.0, peers=peers)
    terms = method(student, None, batch(torch.tensor([0, 1, 2, 3])))
    assert list(terms) == ["soft"]
    want = 0
    for i, z in enumerate(doubles):
        for j, other in enumerate(doubles):
            p, q = (other.detach() / 2).softmax(1), (z / 2).softmax(1)
            want = want + (0.7 * 4 * (p * (p / q).log()).sum() / 4 / peers if i != j else 0)
    assert terms["soft"].item() == pytest.approx(want.item(), rel=1e-5)
    for a, b in zip(torch.autograd.grad(terms["soft"], logits), torch.autograd.grad(want, doubles), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)
    assert Mutual(soft=0)(student, None, batch(torch.zeros(4))) == {}


def test_peers_are_companions_that_learn_from_the_labels_and_are_not_deployed():
    torch.manual_seed(0)
    student, x = nn.Sequential(nn.Linear(3, 5)), torch.randn(4, 3)
    method = Mutual(peers=2)
    cohort = method.prepare(student, None, x)
    outputs = Reader(cohort, x, method.taps().student)(x)
    found = [companion.logits for companion in method.companions(outputs)]
    assert len(found) == 2
    for logits, peer in zip(found, cohort.peers, strict=True):
        assert torch.equal(logits, peer(x))
        assert not torch.equal(logits, student(x))
        assert logits.requires_grad
    assert torch.equal(outputs.logits, student(x))
    assert method.ship(cohort) is student


def test_peers_start_from_weights_of_their_own_in_attention_and_positions_too():
    torch.manual_seed(0)
    student = VisionTransformer(8, 4, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=10)
    torch.nn.init.normal_(student.heads.head.weight)  # zero in torchvision
    torch.nn.init.normal_(student.class_token)  # likewise
    (peer,) = Mutual().prepare(student, None, torch.randn(1, 3, 8, 8)).peers
    for (name, own), other in zip(student.named_parameters(), peer.parameters(), strict=True):
        if own.std() > 0:
            assert not torch.equal(own, other), name
    place = "encoder.pos_embedding"
    assert torch.equal(*(net.get_parameter(place).flatten().sort().values for net in (student, peer)))


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"kdim": 12, "vdim": 20}, {"bias": False}])
def test_attention_of_a_peer_is_drawn_by_torchs_own_rule(options):
    """Zero where a new layer of the same options has zeros, and as wide where it has random numbers."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(256, 2, **options)
    for p in attention.parameters():
        nn.init.constant_(p, 7.0)
    (peer,) = Mutual().prepare(attention, None, None).peers
    drawn = nn.MultiheadAttention(256, 2, **options)
    for (name, a), b in zip(peer.named_parameters(), drawn.parameters(), strict=True):
        assert a.shape == b.shape
        assert (a == 0).all() == (b == 0).all(), name
        if b.any():
            assert a.std().item() == pytest.approx(b.std().item(), rel=0.2), name
