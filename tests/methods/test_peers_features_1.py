"""The same losses from torchdistill 1.1.5, where it has the same formula; where not, who is right and why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from litdistill.losses import attention, boundary, factor, neighbors
from litdistill.methods.fsp import flow
from litdistill.methods.vid import Gaussian

peers = pytest.importorskip("torchdistill.losses.mid_level")


def tensor(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def io(**modules: Tensor | tuple[Tensor, ...]) -> dict:
    return {name: {"output": value} for name, value in modules.items()}


def end(path: str = "x") -> dict[str, str]:
    return {"io": "output", "path": path}


def both(ours, theirs, s: Tensor) -> None:
    """Equal values and equal gradients with respect to `s`."""
    a, b = s.clone().requires_grad_(), s.clone().requires_grad_()
    x, y = ours(a), theirs(b)
    torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.autograd.grad(x, a)[0], torch.autograd.grad(y, b)[0], rtol=1e-4, atol=1e-7)


def test_attention_transfer_is_their_code_mode() -> None:
    s, t = tensor((3, 4, 5, 6), 1), tensor((3, 7, 5, 6), 2)
    theirs = peers.ATLoss({"p": {"student": end(), "teacher": end()}}, mode="code")
    both(lambda x: attention(x, t), lambda x: theirs(io(x=x), io(x=t)), s)


def test_their_paper_mode_of_attention_transfer_is_another_loss() -> None:
    """Equation 2 of the paper has the norm of the difference, the authors' code its mean square.

    The paper's tables and β = 1000 came from the code, so the code is followed. For one sample the one is the other's
    square times the number of places.
    """
    s, t = tensor((1, 4, 5, 6), 1), tensor((1, 7, 5, 6), 2)
    theirs = peers.ATLoss({"p": {"student": end(), "teacher": end()}}, mode="paper")
    torch.testing.assert_close(attention(s, t) * 30, theirs(io(x=s), io(x=t)) ** 2)


def test_probabilistic_knowledge_transfer() -> None:
    """Equal but for where 1e-7 is added to a norm."""
    s, t = tensor((6, 5), 1), tensor((6, 9), 2)
    theirs = peers.PKTLoss("x", "output", "x", "output")
    both(lambda x: neighbors(x, t), lambda x: theirs(io(x=x), io(x=t.clone())), s)


@pytest.mark.parametrize("p", [1, 2])
def test_factor_transfer(p: int) -> None:
    s, t = tensor((3, 4, 5, 6), 1), tensor((3, 4, 5, 6), 2)
    theirs = peers.FTLoss(p=p)
    both(lambda x: factor(x, t, p), lambda x: theirs(io(translator=x), io(paraphraser=t)), s)


@pytest.mark.parametrize("margin", [0.5, 1.0, 2.0])
def test_activation_boundaries(margin: float) -> None:
    """Equal for one pair of weight 1; AB's scale of a stage (0.003, halved towards the input) is their `weight`."""
    s, t = tensor((3, 4, 5, 6), 1), tensor((3, 4, 5, 6), 2)
    theirs = peers.AltActTransferLoss({"p": {"student": end(), "teacher": end()}}, margin=margin, reduction="mean")
    both(lambda x: boundary(x, t, margin), lambda x: theirs(io(x=x), io(x=t)), s)


def test_variational_information_distillation() -> None:
    """Theirs takes the regressed mean and the variance from a wrapper; here both come from ours."""
    q, t = Gaussian(4, 7), tensor((3, 7, 5, 6), 2)
    variance = (q.scale.exp().log1p() + q.eps).view(1, -1, 1, 1).detach()
    theirs = peers.VIDLoss({"p": {"student": end(), "teacher": end()}})
    both(lambda x: q(x, t), lambda x: theirs(io(x=(q.mean(x), variance)), io(x=t)), tensor((3, 4, 5, 6), 1))


@pytest.mark.parametrize("sizes", [((4, 6), (4, 6)), ((8, 6), (4, 3)), ((4, 6), (8, 12))])
def test_flow_matrices(sizes) -> None:
    b = tensor((2, 5, *sizes[1]), 2)
    theirs = peers.FSPLoss.compute_fsp_matrix
    both(lambda x: flow(x, b).square().sum(), lambda x: theirs(x, b).square().sum(), tensor((2, 3, *sizes[0]), 1))


def test_their_fsp_loss_is_no_square() -> None:
    """Equation 2 of the paper has the squared L2 norm of the matrices' difference; theirs sums norms of columns.

    The square is right: with it the gradient fades as the flows meet. Theirs is 1-homogeneous, ours 2-homogeneous.
    """
    names = ("teacher_first", "teacher_second", "student_first", "student_second")
    theirs = peers.FSPLoss({"p": {name: end(name[8:]) for name in names}})
    first, second = tensor((2, 3, 4, 4), 1), tensor((2, 5, 4, 4), 2)
    zero = io(first=0 * first, second=0 * second)
    once, twice = theirs(io(first=first, second=second), zero), theirs(io(first=2 * first, second=second), zero)
    torch.testing.assert_close(twice, 2 * once)
    torch.testing.assert_close(flow(2 * first, second).square().mean(), 4 * flow(first, second).square().mean())
