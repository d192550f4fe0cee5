"""FGD against its equations, written out by loops in float64; what its scales and attentions are; pictures without labels."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from litdistill.methods import PKD, Sum
from litdistill.tasks.detection.boxes import padded
from litdistill.tasks.detection.fgd import (
    FGD,
    GlobalContext,
    attended_error,
    attention_distance,
    channel_attention,
    objects,
    scales,
    spatial_attention,
)
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError

IMAGE = (32, 48)
T = 0.5


def row(x1: float, y1: float, x2: float, y2: float, label: int = 0, crowd: int = 0) -> Tensor:
    return torch.tensor([[x1, y1, x2, y2, label, crowd]])


# Two overlapping boxes and one apart, a crowd alone, nothing; edges on and off the grid of stride 4 and 8.
TARGETS = padded(
    [
        torch.cat([row(0, 0, 32, 24), row(5, 6, 15, 18, 1), row(40.5, 26, 48, 32)]),
        row(8, 8, 24, 24, 2, 1),
        torch.zeros(0, 6),
    ]
)


def scales_by_hand(targets: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    """Equations 2 and 3: a cell belongs to the smallest of the boxes that its area meets."""
    sy, sx = IMAGE[0] / h, IMAGE[1] / w
    foreground = torch.zeros(len(targets), h, w, dtype=torch.float64)
    background = torch.zeros_like(foreground)
    for n, rows in enumerate(targets):
        boxes = [r for r in rows.tolist() if r[4] >= 0 and not r[5]]
        cells = []  # of each box: the cells that it shares some area with
        for x1, y1, x2, y2, *_ in boxes:
            meets = lambda i, j: i * sy < y2 and (i + 1) * sy > y1 and j * sx < x2 and (j + 1) * sx > x1  # noqa: B023, E731
            cells.append({(i, j) for i in range(h) for j in range(w) if meets(i, j)})
        for i in range(h):
            for j in range(w):
                mine = [len(c) for c in cells if (i, j) in c]
                if mine:
                    foreground[n, i, j] = 1 / min(mine)
        empty = [(i, j) for i in range(h) for j in range(w) if foreground[n, i, j] == 0]
        for i, j in empty:
            background[n, i, j] = 1 / len(empty)
    return foreground, background


def attentions_by_hand(f: Tensor) -> tuple[Tensor, Tensor]:
    """Equations 4 to 7, of one map (C, H, W)."""
    c, h, w = f.shape
    g_s = torch.stack([sum(f[k, i, j].abs() for k in range(c)) / c for i in range(h) for j in range(w)])
    g_c = torch.stack([sum(f[k, i, j].abs() for i in range(h) for j in range(w)) / (h * w) for k in range(c)])
    soft = lambda x: (x / T).exp() / (x / T).exp().sum() * len(x)  # noqa: E731
    return soft(g_s).view(h, w), soft(g_c)


def context_by_hand(f: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Equation 12, of one map (C, H, W)."""
    flat = f.flatten(1)
    key = (p["key.weight"].view(-1, 1) * flat).sum(0) + p["key.bias"]
    context = (flat * (key.exp() / key.exp().sum())).sum(1)
    hidden = p["shrink.weight"] @ context + p["shrink.bias"]
    normed = (hidden - hidden.mean()) / (hidden.var(correction=0) + 1e-5).sqrt()
    hidden = (normed * p["norm.weight"] + p["norm.bias"]).clamp(min=0)
    return f + (p["grow.weight"] @ hidden + p["grow.bias"])[:, None, None]


def maps(channels: int, *sizes: tuple[int, int], seed: int) -> Outputs:
    g = torch.Generator().manual_seed(seed)
    found = {f"{h}x{w}": torch.randn(3, channels, h, w, generator=g) for h, w in sizes}
    return Outputs({"logits": torch.zeros(3, 5, 3)}, found)


def batch(targets: Tensor = TARGETS) -> Batch:
    return Batch(torch.zeros(len(targets), 3, *IMAGE), targets)


def moved(module: torch.nn.Module) -> None:
    """Parameters that are nowhere zero: blocks that begin as the identity do something."""
    g = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.3)


@pytest.mark.parametrize("channels", [4, 3], ids=["same", "projected"])
def test_equals_the_papers_equations_in_float64_with_gradients(channels):
    torch.manual_seed(0)
    s, t = maps(channels, (8, 12), (4, 6), seed=1), maps(4, (8, 12), (4, 6), seed=2)
    method = FGD(foreground=0.7, background=0.3, attention=0.2, context=0.05)
    method.build(s, t, None)
    moved(method)
    for x in s.features.values():
        x.requires_grad_()
    terms = method(s, t, batch())

    p = {k: v.detach().double() for k, v in method.named_parameters()}
    wide = [x.detach().double().requires_grad_() for x in s.features.values()]
    expected = dict.fromkeys(terms, torch.zeros((), dtype=torch.float64))
    for level, (x, y) in enumerate(zip(wide, t.features.values(), strict=True)):
        if channels == 3:
            x = F.conv2d(x, p[f"projectors.{level}.weight"], p[f"projectors.{level}.bias"])
        y = y.double()
        foreground, background = scales_by_hand(TARGETS, *y.shape[2:])
        blocks = [
            {k.removeprefix(f"{of}.{level}."): v for k, v in p.items() if k.startswith(f"{of}.{level}.")}
            for of in ("of_student", "of_teacher")
        ]
        for n in range(3):
            (a_s, a_c), (b_s, b_c) = attentions_by_hand(y[n]), attentions_by_hand(x[n])
            for k in range(4):
                for i in range(y.shape[2]):
                    for j in range(y.shape[3]):
                        error = a_s[i, j] * a_c[k] * (y[n, k, i, j] - x[n, k, i, j]) ** 2 / 3
                        expected["foreground"] = expected["foreground"] + 0.7 * foreground[n, i, j] * error
                        expected["background"] = expected["background"] + 0.3 * background[n, i, j] * error
            distance = (a_s - b_s).abs().sum() + (a_c - b_c).abs().sum()
            expected["attention"] = expected["attention"] + 0.2 * distance / 3
            r_s, r_t = context_by_hand(x[n], blocks[0]), context_by_hand(y[n], blocks[1])
            expected["context"] = expected["context"] + 0.05 * ((r_t - r_s) ** 2).sum() / 3
    assert list(terms) == ["foreground", "background", "attention", "context"]
    for name, value in terms.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-6)
        grads = torch.autograd.grad(value, list(s.features.values()), retain_graph=True)
        for a, b in zip(grads, torch.autograd.grad(expected[name], wide, retain_graph=True), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("size", [(8, 12), (4, 6), (2, 3), (1, 1), (5, 7)])
def test_scales_are_those_of_the_cells_that_boxes_touch(size):
    boxes, real = objects(batch(), Outputs({}), 0.5)
    found = scales(boxes, real, IMAGE, size)
    for a, b in zip(found, scales_by_hand(TARGETS, *size), strict=True):
        torch.testing.assert_close(a.double(), b)


def test_every_object_weighs_the_same_whatever_its_size():
    targets = padded([torch.cat([row(0, 0, 8, 8), row(16, 8, 48, 32)])])
    foreground, background = scales(targets[..., :4], torch.ones(1, 2, dtype=torch.bool), IMAGE, (8, 12))
    assert float(foreground[0, :2, :2].sum()) == pytest.approx(1)
    assert float(foreground[0, 2:, 4:].sum()) == pytest.approx(1)
    assert float(foreground.sum()) == pytest.approx(2)
    assert float(background.sum()) == pytest.approx(1)
    assert not (foreground * background).any()


def test_a_picture_full_of_a_box_has_no_background_and_an_empty_one_is_all_background():
    whole = torch.tensor([[[0.0, 0.0, 48.0, 32.0]]])
    for real, sums in ((True, (1, 0)), (False, (0, 1))):
        found = scales(whole, torch.tensor([[real]]), IMAGE, (4, 6))
        assert [float(x.sum()) for x in found] == pytest.approx(sums)


def test_attentions_sum_to_places_and_channels_and_sharpen_as_the_temperature_falls():
    f = torch.randn(2, 5, 4, 3, generator=torch.Generator().manual_seed(0))
    for attention, count in ((spatial_attention, 12), (channel_attention, 5)):
        hot, cold = attention(f, 5.0), attention(f, 0.1)
        for a in (hot, cold):
            torch.testing.assert_close(a.flatten(1).sum(1), torch.full((2,), float(count)))
        assert bool((cold.flatten(1).amax(1) > hot.flatten(1).amax(1)).all())
        torch.testing.assert_close(attention(-f, T), attention(f, T))


def test_an_error_where_the_teacher_looks_costs_more():
    teacher = torch.zeros(1, 2, 4, 4)
    teacher[0, :, 1, 1] = 3.0
    there, elsewhere = teacher.clone(), teacher.clone()
    there[0, :, 1, 1] += 1
    elsewhere[0, :, 2, 2] += 1
    a, b = (attended_error(x, teacher, T).sum() for x in (there, elsewhere))
    assert float(a / b) == pytest.approx(math.exp(3 / T), rel=1e-3)


def test_equal_maps_cost_nothing():
    f = torch.randn(2, 5, 4, 3)
    assert float(attention_distance(f, f, T)) == 0
    assert not attended_error(f, f, T).any()
    block = GlobalContext(5)
    assert torch.equal(block(f), f)
    moved(block)
    assert not torch.equal(block(f), f)


def test_a_weight_of_zero_leaves_its_term_and_its_parameters_out():
    s, t = maps(4, (4, 6), seed=1), maps(4, (4, 6), seed=2)
    method = FGD(background=0, context=0)
    method.build(s, t, None)
    assert list(method(s, t, batch())) == ["foreground", "attention"]
    assert not list(method.parameters())
    nothing = FGD(foreground=0, background=0, attention=0, context=0)
    nothing.build(s, t, None)
    assert nothing(s, t, batch()) == {}
    assert nothing.taps().student == ()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"context": -1.0}, "context=-1.0 is a loss weight"),
        ({"temperature": 0}, "temperature=0 must be above 0"),
        ({"confidence": 1.0}, "confidence=1.0 is a score"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, line):
    with pytest.raises(UserError, match=line):
        FGD(**options)


# -- pictures without labels --------------------------------------------------------------------------------------------


def dense(scores: list[list[float]]) -> dict[str, Tensor]:
    """Heads of a teacher with one anchor for each score, whose boxes lie side by side."""
    p = torch.tensor(scores)
    left = torch.arange(p.shape[1]) * 8.0
    boxes = torch.stack([left, torch.zeros_like(left), left + 8, torch.full_like(left, 8)], 1)
    return {"logits": p.logit()[..., None], "boxes": boxes.expand(len(p), -1, -1)}


def test_the_teachers_detections_are_the_foreground_of_a_picture_without_labels():
    targets = TARGETS.clone()
    targets[1] = torch.nan
    teacher = Outputs(dense([[0.9, 0.9, 0.9], [0.8, 0.3, 0.6], [0.9, 0.9, 0.9]]))
    boxes, real = objects(batch(targets), teacher, 0.5)
    assert not boxes.isnan().any()
    assert real.sum(1).tolist() == [3, 2, 0]  # labels say of the last that it is empty, whatever the teacher finds
    assert sorted(boxes[1][real[1]][:, 0].tolist()) == [0.0, 16.0]
    assert torch.equal(boxes[0][real[0]], TARGETS[0, :, :4])
    assert objects(batch(targets), teacher, 0.7)[1].sum(1).tolist() == [3, 1, 0]


def test_a_teacher_of_two_stages_gives_its_detections():
    targets = torch.full_like(TARGETS, torch.nan)
    found = torch.zeros(3, 2, 6)
    found[0] = torch.tensor([[0, 0, 8, 8, 0.9, 1], [8, 0, 16, 8, 0.2, 1]])
    boxes, real = objects(batch(targets), Outputs({"detections": found}), 0.5)
    assert real.sum(1).tolist() == [1, 0, 0]
    assert boxes[0][real[0]].tolist() == [[0, 0, 8, 8]]


def test_without_labels_or_detections_all_is_background():
    targets = torch.full_like(TARGETS, torch.nan)
    s, t = maps(4, (8, 12), seed=1), maps(4, (8, 12), seed=2)
    method = FGD()
    method.build(s, t, None)
    for x in s.features.values():
        x.requires_grad_()
    terms = method(s, t._replace(heads={"embedding": torch.zeros(3, 2)}), batch(targets))
    assert all(v.isfinite() for v in terms.values())
    assert float(terms["foreground"].detach()) == 0
    assert float(terms["background"].detach()) > 0
    sum(terms.values()).backward()
    assert all(bool(x.grad.isfinite().all()) for x in s.features.values())


def test_the_sum_with_another_method_reads_the_boxes():
    s, t = maps(4, (8, 12), seed=1), maps(4, (8, 12), seed=2)
    method = Sum({"pkd": PKD(student_taps="pyramid", teacher_taps="pyramid"), "fgd": FGD(hard=0)})
    method.names = dict.fromkeys(("pkd", "fgd"), (["8x12"], ["8x12"]))
    method.build(s, t, None)
    terms = method(s, t, batch())
    assert list(terms) == ["pkd_hint", "fgd_foreground", "fgd_background", "fgd_attention", "fgd_context"]
    assert method.kinds == ("boxes",)
