"""ReviewKD and ICKD against torchdistill 1.1.5. It has no OFD, KDSVD, CWD, PKD, SimKD or SRRL. For SRD see test_srd.py."""

import pytest
import torch

from litdistill.losses import channel_correlation, pyramid
from litdistill.methods.reviewkd import ABF

mid_level = pytest.importorskip("torchdistill.losses.mid_level")
wrapper = pytest.importorskip("torchdistill.models.wrapper")


@pytest.mark.parametrize("shape", [(3, 2, 8, 8), (1, 1, 5, 5), (2, 7, 4, 4), (4, 3, 1, 1), (2, 3, 3, 9)])
def test_hierarchical_context_loss(shape):
    """Equal, without scaling, wherever the height is the shorter side."""
    torch.manual_seed(0)
    s, t = torch.randn(shape, requires_grad=True), torch.randn(shape)
    peer = mid_level.HierarchicalContextLoss("s", "output", "t", "output")
    theirs = peer({"s": {"output": (s, None)}}, {"t": {"output": t}})
    ours = pyramid(s, t)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(x, s)[0] for x in (ours, theirs)))


def test_hierarchical_context_loss_differs_where_the_width_is_the_shorter_side():
    """The peer (and the authors' code) asks for the height alone, and so pools 9x3 to 4x4, which repeats columns.

    The paper knows square maps only. Left out here, as a level that is no smaller than the map says nothing new; and so
    the loss of a map is the loss of the map turned by 90 degrees.
    """
    torch.manual_seed(0)
    s, t = torch.randn(2, 3, 9, 3), torch.randn(2, 3, 9, 3)
    peer = mid_level.HierarchicalContextLoss("s", "output", "t", "output")
    theirs = [peer({"s": {"output": (a, None)}}, {"t": {"output": b}}).item() for a, b in ((s, t), (s.mT, t.mT))]
    assert pyramid(s, t).item() == pytest.approx(pyramid(s.mT, t.mT).item(), rel=1e-6)
    assert pyramid(s, t).item() == pytest.approx(theirs[1], rel=1e-6)
    assert theirs[0] != pytest.approx(theirs[1], rel=1e-3)


@pytest.mark.parametrize("fuse", [True, False])
def test_attention_based_fusion(fuse):
    """Equal with the same weights where teacher and student maps have one size; the peer cannot do other sizes."""
    torch.manual_seed(0)
    ours, theirs = ABF(3, 5, 7, fuse), wrapper.AttentionBasedFusion(3, 5, 7, fuse)
    theirs.load_state_dict({k.replace("attention", "attention_conv"): v for k, v in ours.state_dict().items()})
    x, y = torch.randn(2, 3, 6, 6), torch.randn(2, 5, 2, 2) if fuse else None
    for a, b in zip(ours(x, y, (6, 6)), theirs(x, y, 6), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("n", [1, 4])
def test_inter_channel_correlation(n):
    """Ours is N times the peer's, which took the divisor N² of the authors' ImageNet code.

    The mean over the batch is what the authors' CIFAR code (with the weight 2.5) computes, and is right: with N² the
    weight of the term would fall as batches grow.
    """
    torch.manual_seed(0)
    s, t = torch.randn(n, 5, 4, 3, requires_grad=True), torch.randn(n, 5, 4, 3)
    theirs = mid_level.ChSimLoss.batch_loss(s, t) * n
    ours = channel_correlation(s, t)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(x, s)[0] for x in (ours, theirs)))
