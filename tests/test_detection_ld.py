"""Distributions of the sides of boxes, their focal loss, and method=ld: against formulas by hand in float64, with gradients."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from litdistill.tasks.detection.crosskd import CrossKD
from litdistill.tasks.detection.decode import detections
from litdistill.tasks.detection.detector import Detector
from litdistill.tasks.detection.fcos import fcos_slim
from litdistill.tasks.detection.ld import LD
from litdistill.tasks.detection.sides import distribution_focal, expected
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError

N, A, C, BINS = 2, 5, 3, 4


def logits(seed: int, *shape: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slim(bins: int | None, **options: object) -> Detector:
    torch.manual_seed(0)
    net = fcos_slim(C, (3, 32, 32), width=4, fpn=32, convs=1, strides=[4, 8], bins=bins, **options).double()
    for parameter in net.head.regression_head.bbox_reg.parameters():
        parameter.data.normal_(0, 0.5)
    return net


def softmax(z: Tensor) -> list[Tensor]:
    total = sum(torch.exp(v) for v in z)
    return [torch.exp(v) / total for v in z]


def compare(got: Tensor, wanted: Tensor, of: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)
    pair = [torch.autograd.grad(x, of, retain_graph=True)[0] for x in (got, wanted)]
    assert pair[0].abs().max() > 1e-4
    torch.testing.assert_close(*pair, rtol=1e-7, atol=1e-10)


def test_the_focal_loss_of_distributions_by_hand():
    even = torch.zeros(1, 4, BINS + 1, dtype=torch.float64)
    at = torch.tensor([[0.0, 1.25, 4.0, 9.0]], dtype=torch.float64)  # the last is beyond, and taken for 4
    assert distribution_focal(even, at).item() == pytest.approx(math.log(5))
    z = logits(1, 1, 4, BINS + 1).requires_grad_()
    p = [softmax(side) for side in z[0]]
    parts = [p[0][0].log(), 0.75 * p[1][1].log() + 0.25 * p[1][2].log(), p[2][4].log(), p[3][4].log()]
    compare(distribution_focal(z, at), -sum(parts) / 4, z)
    assert distribution_focal(even[:0], at[:0]).item() == 0


def test_the_focal_loss_is_least_where_the_expectation_is_the_distance():
    z = torch.zeros(1, 4, BINS + 1, dtype=torch.float64, requires_grad=True)
    at = torch.tensor([[0.3, 1.25, 2.5, 3.9]], dtype=torch.float64)
    optimizer = torch.optim.Adam([z], lr=0.3)
    for _ in range(400):
        optimizer.zero_grad()
        distribution_focal(z, at).backward()
        optimizer.step()
    torch.testing.assert_close(expected(z.detach()), at, atol=0.03, rtol=0)


def test_boxes_are_expectations_from_the_centers_in_sizes_of_the_map():
    net = slim(BINS, sizes=[4, 10]).eval()
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        heads = net(images)
        maps = list(net.backbone(images).values())
        level = net.head.regression_head.bbox_reg(net.head.regression_head.conv(maps[1]))
    assert heads["sides"].shape == (2, 64 + 16, 4, BINS + 1)
    # Row 2, column 1 of the second map: the anchors of torchvision are around the places' corners.
    left, top, right, bottom = (
        sum(i * p for i, p in enumerate(softmax(level[0, k * (BINS + 1) : (k + 1) * (BINS + 1), 2, 1])))
        for k in range(4)
    )
    x, y = 8.0, 16.0
    wanted = torch.stack([x - 10 * left, y - 10 * top, x + 10 * right, y + 10 * bottom])
    torch.testing.assert_close(heads["boxes"][0, 64 + 2 * 4 + 1], wanted)


def test_the_labels_losses_are_torchvisions_of_the_expectations_and_the_focal_loss_of_the_matches():
    net, plain = slim(BINS).train(), slim(None).train()
    images = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    rows = [[[2.0, 3, 17, 19, 1, 0], [0, 0, 0, 0, -1, 0]], [[0.0, 0, 0, 0, -1, 0]] * 2, [[math.nan] * 6] * 2]
    targets = torch.tensor(rows, dtype=torch.float64)
    heads = net(images)
    got = net.compute_loss(heads, targets)
    assert set(got) == {"cls", "box", "centerness", "dfl"}
    wanted = plain.compute_loss({k: v for k, v in heads.items() if k != "sides"}, targets)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value)
    # The object's half is 8: places of the first map (to 4 · 8 pixels, size 4) within 1.5 · 4 of its center (9.5, 11), in it.
    centers = (heads["anchors"][0, :64, :2] + heads["anchors"][0, :64, 2:]) / 2
    found = [i for i, (x, y) in enumerate(centers.tolist()) if abs(x - 9.5) < 6 and abs(y - 11) < 6]
    assert len(found) == 9
    terms = []
    for i in found:
        x, y = centers[i].tolist()
        for k, distance in enumerate([x - 2, y - 3, 17 - x, 19 - y]):
            value = min(distance / 4, BINS)
            low = min(int(value), BINS - 1)
            p = softmax(heads["sides"][0, i, k])
            terms.append(-(low + 1 - value) * p[low].log() - (value - low) * p[low + 1].log())
    compare(got["dfl"], 0.25 * sum(terms) / len(terms), heads["sides"])
    for empty in (targets[1:], targets[2:]):
        assert net.compute_loss(net(images[:2][: len(empty)]), empty)["dfl"].item() == 0


def test_a_copy_learns_by_its_own_weights_and_the_file_has_only_these():
    net = slim(BINS).train()
    twin = copy.deepcopy(net)
    names = {k.removeprefix("head.regression_head.") for k in net.state_dict() if "head.regression_head" in k}
    assert {n.split(".")[0] for n in names} == {"conv", "bbox_reg", "bbox_ctrness"}
    images = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    targets = torch.tensor([[[2.0, 3, 17, 19, 1, 0]]], dtype=torch.float64)
    sum(twin.compute_loss(twin(images), targets).values()).backward()
    assert all(p.grad is None for p in net.parameters())
    assert twin.head.regression_head.bbox_reg.weight.grad.abs().max() > 0


def test_a_file_gives_the_same_detections():
    class Found(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = slim(BINS).float().eval()

        def forward(self, images: Tensor) -> Tensor:
            return detections(self.net(images), (32, 32), 0.0, 1.0, 5)

    net, images = Found().eval(), torch.rand(2, 3, 32, 32)
    program = torch.export.export(net, (images,))
    torch.testing.assert_close(program.module()(images), net(images))


def outputs(seed: int, bins: int = BINS) -> Outputs:
    heads = {"logits": logits(seed, N, A, C), "boxes": logits(seed + 10, N, A, 4)}
    return Outputs(heads | ({"sides": logits(seed + 20, N, A, 4, bins + 1)} if bins else {}))


def test_terms_are_their_formulas_in_float64():
    s, t = outputs(1), outputs(2)
    z = s.heads["sides"].requires_grad_()
    got = LD(soft=0.5, valuable=2.0, temperature=3.0, least=0.8, near=0.6)(s, t, Batch(None, None))
    for name, factor, low, high in (("soft", 0.5, 0.8, 1.1), ("valuable", 2.0, 0.6, 0.8)):
        value, weights = torch.zeros((), dtype=torch.float64), 0.0
        for n in range(N):
            for a in range(A):
                sure = max(1 / (1 + math.exp(-v)) for v in t.heads["logits"][n, a].tolist())
                if not low <= sure < high:
                    continue
                weights += sure
                for k in range(4):
                    q, p = softmax(t.heads["sides"][n, a, k] / 3), softmax(z[n, a, k] / 3)
                    value = value + sure * 9 * sum(y * (y.log() - x.log()) for x, y in zip(p, q, strict=True)) / 4
        assert weights > 0
        compare(got[name], factor * value / max(1, weights), z)
    assert set(LD()(s, t, Batch(None, None))) == {"soft"}
    assert LD()(t, t, Batch(None, None))["soft"].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("own", "other"), [(0, 0), (BINS, 0), (0, BINS), (BINS, 8)])
def test_networks_without_equal_distributions_are_refused_in_a_line(own, other):
    with pytest.raises(UserError, match=rf"student has bins={own}, the teacher bins={other}") as refusal:
        LD().build(outputs(1, own), outputs(2, other), None)
    assert "\n" not in str(refusal.value)
    LD().build(outputs(1), outputs(2), None)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"near": 0.5, "least": 0.3}, {"least": 1.0}, {"soft": -1}])
def test_options_without_sense_are_refused(options):
    with pytest.raises(UserError):
        LD(**options)


@pytest.mark.parametrize("bins", [-1, 0, 2.5, True])
def test_other_bins_are_refused(bins):
    with pytest.raises(UserError, match="bins="):
        slim(bins)


def test_crosskd_passes_a_head_of_distributions():
    student, teacher = slim(None).train(), slim(BINS).eval()
    method = CrossKD(remaining=0)
    method.prepare(student, teacher, None)
    images = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        anchors = student(images)["anchors"]
        branch = teacher.head.regression_head
        maps = [branch.conv(m) for m in teacher.backbone(images).values()]
        assert method.rest is not None
        torch.testing.assert_close(method.rest({"regression_head": maps}, anchors)["boxes"], teacher(images)["boxes"])
