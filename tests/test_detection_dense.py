"""Methods on the dense heads of detectors: losses against formulas written anchor by anchor in float64, with gradients."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from litdistill.methods.base import BOXES
from litdistill.tasks.detection import dense_losses as losses
from litdistill.tasks.detection.dense_kd import DenseKD
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError

N, A, C = 2, 5, 3


def logits(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def boxes(seed: int) -> Tensor:
    """Boxes (N, A, 4) with an area; of two seeds some overlap and some do not."""
    generator = torch.Generator().manual_seed(seed)
    corner, size = (torch.rand(N, A, 2, generator=generator, dtype=torch.float64) * k for k in (20, 15))
    return torch.cat([corner, corner + size + 1], 2)


def heads(seed: int, centerness: bool = True) -> dict[str, Tensor]:
    found = {"logits": logits(seed, N, A, C), "boxes": boxes(seed)}
    return found | ({"centerness": logits(seed + 100, N, A)} if centerness else {})


def sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-z))


def bce(p: Tensor, target: Tensor) -> Tensor:
    return -(target * torch.log(p) + (1 - target) * torch.log(1 - p))


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Rezatofighi et al. 2019, from the corners."""
    side = lambda low, high: torch.clamp(high - low, min=0)  # noqa: E731
    area = lambda x: (x[2] - x[0]) * (x[3] - x[1])  # noqa: E731
    both = side(max(a[0], b[0]), min(a[2], b[2])) * side(max(a[1], b[1]), min(a[3], b[3]))
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    union = area(a) + area(b) - both
    return both / union - (hull - union) / hull


def strongest(z: Tensor) -> dict[tuple[int, int], Tensor]:
    """The teacher's confidence at each anchor."""
    return {(n, a): max(sigmoid(z[n, a, c]) for c in range(C)) for n, a in product(range(N), range(A))}


def expected(name: str, s: dict[str, Tensor], t: dict[str, Tensor], power: float, least: float) -> Tensor:
    """One term of the loss, anchor by anchor."""
    sure = strongest(t["logits"])
    if name == "soft":
        value = torch.zeros((), dtype=torch.float64)
        for n, a, c in product(range(N), range(A), range(C)):
            p, q = sigmoid(s["logits"][n, a, c]), sigmoid(t["logits"][n, a, c])
            value = value + torch.abs(p - q) ** power * bce(p, q)
        return value / max(1.0, sum(sure.values()))
    weight = {k: v if v >= least else torch.zeros_like(v) for k, v in sure.items()}
    value = torch.zeros((), dtype=torch.float64)
    for k, w in weight.items():
        if name == "soft_box":
            value = value + w * (1 - giou(s["boxes"][k], t["boxes"][k]))
        else:
            p, q = sigmoid(s["centerness"][k]), sigmoid(t["centerness"][k])
            value = value + w * (q * torch.log(q / p) + (1 - q) * torch.log((1 - q) / (1 - p)))
    return value / max(1.0, sum(weight.values()))


def compare(got: Tensor, wanted: Tensor, of: Tensor) -> None:
    """Values and gradients agree."""
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-9)
    pair = [torch.autograd.grad(x, of, retain_graph=True)[0] for x in (got, wanted)]
    assert pair[0].abs().max() > 1e-3
    torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("power", [0, 1, 2, 3.5])
@pytest.mark.parametrize(
    ("name", "head"), [("soft", "logits"), ("soft_box", "boxes"), ("soft_centerness", "centerness")]
)
def test_terms_are_their_formulas_in_float64(name, head, power):
    s, t = heads(1), heads(2)
    s[head] = s[head].requires_grad_()
    method = DenseKD(soft=0.5, box=2.0, centerness=3.0, power=power, least=0.6)
    weight = {"soft": 0.5, "soft_box": 2.0, "soft_centerness": 3.0}[name]
    got = method(Outputs(s), Outputs(t), Batch(None, None))
    assert set(got) == {"soft", "soft_box", "soft_centerness"}
    compare(got[name], weight * expected(name, s, t, power, 0.6), s[head])


def test_least_leaves_out_boxes_of_which_the_teacher_is_unsure():
    t = heads(2)
    sure = strongest(t["logits"])
    cut = float(sorted(sure.values())[N * A // 2])
    dropped = [k for k, v in sure.items() if float(v) < cut]
    s = boxes(1).requires_grad_()
    weight = losses.above(losses.confidence(t["logits"]), cut)
    (gradient,) = torch.autograd.grad(losses.weighted_giou(s, t["boxes"], weight), s)
    moved = gradient.abs().amax(2) > 0
    assert len(dropped) == N * A // 2
    assert {k for k in sure if not moved[k]} == set(dropped)


def test_a_box_of_the_teacher_without_area_teaches_nothing():
    t = boxes(2)
    t[0, 0, 2:] = t[0, 0, :2]
    s, weight = boxes(1).requires_grad_(), torch.ones(N, A, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(losses.weighted_giou(s, t, weight), s)
    assert (gradient.abs().amax(2) == 0).nonzero().tolist() == [[0, 0]]


def test_a_student_that_agrees_has_no_loss_and_no_gradient():
    t = heads(2)
    s = {k: v.clone().requires_grad_() for k, v in t.items()}
    got = DenseKD()(Outputs(s), Outputs(t), Batch(None, None))
    gradients = torch.autograd.grad(sum(got.values()), [s["logits"], s["centerness"]])
    assert all(abs(float(v.detach())) < 1e-6 for v in got.values())
    assert all(float(g.abs().max()) < 1e-12 for g in gradients)


def test_classes_count_by_how_far_both_are_apart():
    """The paper's reason for the factor: anchors on which both agree, most of them background, do not add up."""
    easy = torch.full((1, 1000, C), -4.0, dtype=torch.float64)
    s, t = easy.clone(), easy - 0.5
    s[0, 0, 0], t[0, 0, 0] = -4.0, 3.0
    plain, focal = (losses.quality_focal(s, t, power) for power in (0, 2))
    hard = (1 / (1 + math.exp(-3)) - 1 / (1 + math.exp(4))) ** 2
    one = hard * float(bce(sigmoid(s[0, 0, 0]), sigmoid(t[0, 0, 0])))
    total = float(losses.confidence(t).sum())
    assert abs(float(focal) * total / one - 1) < 0.05
    assert float(plain) * total > 5 * one


def test_a_batch_without_objects_is_not_divided_by_almost_nothing():
    t = {"logits": torch.full((1, 4, C), -30.0), "boxes": torch.zeros(1, 4, 4), "centerness": torch.zeros(1, 4)}
    s = {"logits": torch.zeros(1, 4, C), "boxes": torch.ones(1, 4, 4), "centerness": torch.ones(1, 4)}
    got = DenseKD()(Outputs(s), Outputs(t), Batch(None, None))
    assert float(got["soft"]) < 4 * C
    assert float(got["soft_box"]) == float(got["soft_centerness"]) == 0


def test_losses_are_computed_in_float32_under_half_precision():
    s, t = ({k: v.to(torch.bfloat16) for k, v in heads(seed).items()} for seed in (1, 2))
    wide = DenseKD()(*(Outputs({k: v.float() for k, v in x.items()}) for x in (s, t)), Batch(None, None))
    got = DenseKD()(Outputs(s), Outputs(t), Batch(None, None))
    assert all(torch.equal(got[k], wide[k]) and got[k].dtype == torch.float32 for k in wide)


def test_terms_without_weight_or_head_are_left_out():
    s, t = Outputs(heads(1)), Outputs(heads(2))
    assert set(DenseKD(soft=0)(s, t, Batch(None, None))) == {"soft_box", "soft_centerness"}
    assert set(DenseKD(box=0, centerness=0)(s, t, Batch(None, None))) == {"soft"}
    plain = Outputs(heads(2, centerness=False))
    assert set(DenseKD()(s, plain, Batch(None, None))) == {"soft", "soft_box"}


def test_other_anchors_classes_and_heads_are_refused_in_one_line():
    s = Outputs(heads(1))
    fewer = Outputs({k: v[:, :4] for k, v in heads(2).items()})
    other = Outputs({"logits": logits(3, N, A, C + 1), "boxes": boxes(2)})
    two_stage = Outputs({"logits": logits(3, N, C)})
    for teacher, words in (
        (fewer, "the student has 5 anchors and 3 classes, the teacher 4 and 3"),
        (other, "the teacher 5 and 4"),
        (two_stage, "this teacher gives logits"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            DenseKD().build(s, teacher, None)
        assert "\n" not in str(caught.value)
    DenseKD().build(s, Outputs(heads(2, centerness=False)), None)


@pytest.mark.parametrize("options", [{"power": 0.5}, {"power": -1}, {"least": 1}, {"least": -0.1}, {"box": -1}])
def test_options_that_make_no_loss_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        DenseKD(**options)


def test_dense_methods_are_for_boxes_alone():
    assert DenseKD.kinds == (BOXES,)
