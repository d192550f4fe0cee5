"""Detection networks: their heads and losses are torchvision's own on the same weights."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torchvision.models.detection import FCOS, RetinaNet, ssdlite320_mobilenet_v3_large
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.ops import clip_boxes_to_image

from litdistill.config.trust import allowed
from litdistill.models.preprocess import Preprocess, Preprocessed
from litdistill.models.profile import count_macs, count_parameters
from litdistill.tasks.detection.detector import Detector, detector_of, pad_to, sigmoid_logits
from litdistill.tasks.detection.fcos import Pyramid, SlimBody, fcos_slim
from litdistill.utils.errors import UserError

ROOT = Path(__file__).parents[1]
NAN = float("nan")


def pyramid(channels=32):
    body = SlimBody(3, 4, 1, [8, 16, 32])
    return Pyramid(body, body.channels, channels)


def model_of(kind, height, width, classes=3):
    """A network of torchvision whose own transform changes nothing but the padding."""
    same = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    if kind == "ssd":
        boxes = DefaultBoxGenerator([[2], [2], [2]], scales=[0.1, 0.3, 0.6, 0.9])
        return SSD(_Several(pyramid()), boxes, (width, height), 1 + classes, **same)
    same |= {"min_size": min(height, width), "max_size": 10_000}
    if kind == "retinanet":
        anchors = AnchorGenerator(((8, 12), (16, 24), (32, 48)), ((0.5, 1.0, 2.0),) * 3)
        return RetinaNet(pyramid(), classes, anchor_generator=anchors, **same)
    anchors = AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)
    return FCOS(pyramid(), classes, anchor_generator=anchors, **same)


class _Several(nn.Module):
    """SSD counts the channels of each map."""

    def __init__(self, net):
        super().__init__()
        self.net, self.out_channels = net, [net.out_channels] * 3

    def forward(self, x):
        return self.net(x)


def enliven(model):
    """Weights of which no head is constant; running statistics that are none of the initial ones."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.double()


def pictures(height=64, width=64, count=3):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def objects():
    """Three images: two objects and a place in the table that holds none, nothing, one object."""
    none = [0.0, 0.0, 0.0, 0.0, -1.0, 0.0]
    first = [[4.0, 6.0, 30.0, 40.0, 2.0, 0.0], none, [20.0, 10.0, 52.0, 60.0, 0.0, 0.0]]
    return torch.tensor([first, [none] * 3, [[1.5, 2.25, 33.0, 22.0, 1.0, 0.0], none, none]])


def as_torchvision(targets, first=0):
    return [
        {"boxes": t[t[:, 4] >= 0, :4].double(), "labels": t[t[:, 4] >= 0, 4].long() + first} for t in targets.float()
    ]


KINDS = ["fcos", "retinanet", "ssd"]
SIZES = [(64, 64), (72, 100)]


@pytest.mark.parametrize("size", SIZES, ids=["64x64", "72x100"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_torchvisions(kind, size):
    model = enliven(model_of(kind, *size))
    ours = Detector(copy.deepcopy(model)).train()
    images, targets = pictures(*size), objects()
    theirs = model.train()(list(images), as_torchvision(targets, int(kind == "ssd")))
    losses = ours.compute_loss(ours(images), targets)
    short = {"classification": "cls", "bbox_regression": "box", "bbox_ctrness": "centerness"}
    assert losses.keys() == {short[k] for k in theirs}
    for name, value in theirs.items():
        assert value > 0
        torch.testing.assert_close(losses[short[name]], value, rtol=1e-10, atol=0)
    sum(theirs.values()).backward()
    sum(losses.values()).backward()
    expected = {k: p.grad for k, p in model.named_parameters()}
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("size", SIZES, ids=["64x64", "72x100"])
@pytest.mark.parametrize("kind", KINDS)
def test_heads_give_all_that_torchvision_detects_without_suppression(kind, size):
    model = enliven(model_of(kind, *size)).eval()
    images, ours = pictures(*size), Detector(copy.deepcopy(model)).eval()
    model.score_thresh, model.nms_thresh = -1.0, 1.0
    model.topk_candidates = model.detections_per_img = 10**6
    heads = ours(images)
    assert heads.keys() == {"logits", "boxes"} | ({"centerness"} if kind == "fcos" else set())
    scores = heads["logits"].sigmoid()
    if kind == "fcos":
        scores = (scores * heads["centerness"].sigmoid()[..., None]).sqrt()
    with torch.no_grad():
        found = model(list(images))
    for i, theirs in enumerate(found):
        assert len(theirs["scores"]) == scores[i].numel()
        boxes = clip_boxes_to_image(heads["boxes"][i], size)
        for label in range(3):
            at = theirs["labels"] == label + (kind == "ssd")
            order = scores[i, :, label].argsort(descending=True)
            torch.testing.assert_close(scores[i, order, label], theirs["scores"][at].double(), rtol=1e-6, atol=1e-9)
            again = theirs["scores"][at].argsort(descending=True, stable=True)
            torch.testing.assert_close(boxes[order], theirs["boxes"][at][again].double(), rtol=1e-5, atol=1e-4)


def test_a_softmax_becomes_sigmoids_of_equal_probabilities():
    logits = torch.randn(5, 7, 4, dtype=torch.float64, requires_grad=True)
    every, some = torch.arange(3), torch.tensor([2, 0])
    torch.testing.assert_close(sigmoid_logits(logits, every).sigmoid(), logits.softmax(-1)[..., 1:])
    torch.testing.assert_close(sigmoid_logits(logits, some).sigmoid(), logits.softmax(-1)[..., [3, 1]])
    assert torch.autograd.gradcheck(sigmoid_logits, (logits, some))
    sure = torch.tensor([[0.0, 90.0, 0.0], [90.0, 0.0, 0.0]], requires_grad=True)
    found = sigmoid_logits(sure, torch.arange(2))
    assert found.isfinite().all()
    assert found[0, 0] > 15
    assert found[1, 0] < -80
    found.sum().backward()
    assert sure.grad.isfinite().all()


def test_crowds_and_boxes_without_area_are_not_trained_on():
    net = fcos_slim(3, (3, 64, 64), 4, fpn=32, convs=1).double().train()
    images = pictures()
    heads, targets = net(images), objects()
    more = torch.cat([targets, torch.zeros(3, 3, 6)], 1)
    more[:, 3] = torch.tensor([10.0, 10.0, 40.0, 40.0, 1.0, 1.0])  # a crowd
    more[:, 4] = torch.tensor([30.0, 10.0, 30.0, 40.0, 1.0, 0.0])  # no width
    more[:, 5] = torch.tensor([30.0, 40.0, 50.0, 10.0, 1.0, 0.0])  # upside down
    for name, value in net.compute_loss(heads, more).items():
        assert torch.equal(value, net.compute_loss(heads, targets)[name])
    more[0, 3, 5] = 0.0
    assert net.compute_loss(heads, more)["cls"] != net.compute_loss(heads, targets)["cls"]


@pytest.mark.parametrize("kind", KINDS)
def test_images_without_labels_are_left_out_and_those_without_objects_are_background(kind):
    net = Detector(enliven(model_of(kind, 64, 64))).train()
    images, targets = pictures(), objects()
    heads = net(images)
    targets[0] = NAN
    found = net.compute_loss(heads, targets)
    part = net.compute_loss({k: v[1:] for k, v in heads.items()}, targets[1:])
    assert {k: v.item() for k, v in found.items()} == {k: v.item() for k, v in part.items()}

    background = net.compute_loss(heads, objects()[1:2].expand(3, 3, 6))
    assert background["box"] == 0
    assert background["cls"] > 0 or kind == "ssd"  # SSD takes three times as many negatives as it has objects
    nothing = net.compute_loss(heads, torch.full((3, 3, 6), NAN))
    assert all(v == 0 for v in nothing.values())
    assert nothing.keys() == background.keys()
    (sum(background.values()) + sum(nothing.values())).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    assert net.compute_loss(heads, torch.zeros(3, 0, 6))["box"] == 0


def test_evaluation_mode_gives_what_is_kept_alone_and_no_loss():
    net = fcos_slim(2, (3, 40, 56), 4, fpn=32, convs=1)
    assert set(net.train()(pictures(40, 56).float())) == {"logits", "boxes", "centerness", "deltas", "anchors"}
    heads = net.eval()(pictures(40, 56).float())
    assert {k: v.shape for k, v in heads.items()} == {
        "logits": (3, 84, 2),  # 64x64 after padding: 8·8 + 4·4 + 2·2 places
        "boxes": (3, 84, 4),
        "centerness": (3, 84),
    }
    with pytest.raises(UserError, match="training mode"):
        net.compute_loss(heads, objects())


def test_anchors_survive_the_meta_device_and_other_sizes():
    net = fcos_slim(2, (3, 64, 64), 4, fpn=32, convs=1).eval()
    before = net(pictures().float())["boxes"]
    assert count_macs(net, (3, 64, 64)) > 0
    meta = copy.deepcopy(net).to("meta")
    assert meta(torch.empty(1, 3, 64, 64, device="meta"))["boxes"].shape == (1, 84, 4)
    for side in range(48, 400, 32):
        net(torch.zeros(1, 3, side, side))
    assert len(net.anchors) <= 8
    assert torch.equal(net(pictures().float())["boxes"], before)


def test_half_precision_keeps_boxes_in_float32():
    net = fcos_slim(3, (3, 64, 64), 4, fpn=32, convs=1).train()
    with torch.autocast("cpu", torch.bfloat16):
        heads = net(pictures().float())
        losses = net.compute_loss(heads, objects())
    assert {v.dtype for v in (*heads.values(), *losses.values())} == {torch.float32}


def test_preprocessing_that_resizes_gives_boxes_in_pixels_of_the_images():
    inside = fcos_slim(3, (3, 64, 64), 4, fpn=32, convs=1)
    net = Preprocessed(inside, Preprocess([0.5] * 3, [0.25] * 3, size=(64, 96)))
    assert detector_of(net) is inside
    images, targets = (pictures(32, 32) * 255).byte(), objects()
    targets[..., :4] /= 2
    resized = net.preprocess(images)
    assert resized.shape == (3, 3, 64, 96)
    net.eval()
    factor = torch.tensor([3.0, 2.0, 3.0, 2.0])
    torch.testing.assert_close(net(images)["boxes"] * factor, inside(resized)["boxes"])
    assert "scale" not in net(images)

    net.train()
    scaled = targets.clone()
    scaled[..., :4] *= factor
    inside.eval()  # running statistics stay
    for module in (inside, net):
        module.training = True
    theirs = inside.compute_loss(inside(resized), scaled)
    ours = inside.compute_loss(net(images), targets)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value)


def test_padding_is_at_the_right_and_the_bottom():
    x = torch.ones(1, 3, 33, 64)
    assert pad_to(x, 32).shape == (1, 3, 64, 64)
    assert pad_to(x, 32)[:, :, :33].eq(1).all()
    assert pad_to(x, 32)[:, :, 33:].eq(0).all()
    assert pad_to(x, 1) is x


def test_sizes_count_as_by_hand():
    net = fcos_slim(5, (3, 64, 64), width=8, depth=1, fpn=32, convs=1)
    body = 27 * 8 + 9 * (8 * 8 + 8 * 16 + 16 * 32 + 32 * 64) + 2 * (8 + 8 + 16 + 32 + 64)
    neck = 32 * (16 + 32 + 64) + 3 * 32 + 3 * (9 * 32 * 32 + 32)
    branch = 9 * 32 * 32 + 32 + 2 * 32
    head = 2 * branch + 9 * 32 * (5 + 4 + 1) + 10
    assert count_parameters(net) == body + neck + head
    maps = [8 * 8, 4 * 4, 2 * 2]
    macs = 27 * 8 * 32 * 32 + 9 * (8 * 8 * 256 + 8 * 16 * 64 + 16 * 32 * 16 + 32 * 64 * 4)
    macs += sum(p * c * 32 for p, c in zip(maps, (16, 32, 64), strict=True)) + sum(maps) * 9 * 32 * 32
    macs += sum(maps) * (2 * 9 * 32 * 32 + 9 * 32 * 10)
    assert count_macs(net, (3, 64, 64)) == macs
    deep = fcos_slim(5, (3, 64, 64), width=8, depth=3, fpn=32, convs=1)
    blocks = sum(2 * (9 * c * c + 2 * c) for c in (8, 16, 32, 64))
    assert count_parameters(deep) == body + 2 * blocks + neck + head


def test_strides_and_sizes():
    net = fcos_slim(3, (1, 64, 64), 4, fpn=32, convs=1, strides=[4, 8], sizes=[4, 10]).train()
    heads = net(torch.rand(1, 1, 36, 64))
    assert heads["logits"].shape[1] == 10 * 16 + 5 * 8  # the sides are multiples of 8
    sides = heads["anchors"][0, :, 2] - heads["anchors"][0, :, 0]
    assert sides.unique().tolist() == [4.0, 10.0]
    assert math.isfinite(sum(net.compute_loss(heads, objects()[:1]).values()).item())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fpn": 48}, "multiple of 32"),
        ({"depth": 0}, "1 or more"),
        ({"strides": [8, 12]}, "powers of two"),
        ({"strides": [16, 8]}, "powers of two"),
        ({"strides": [2, 4]}, "powers of two"),
        ({"sizes": [8, 16]}, "one of each"),
        ({"sizes": [8, 8, 16]}, "larger"),
        ({"sizes": [7, 8, 16]}, "even"),
    ],
)
def test_options_that_make_no_network_are_refused_in_a_line(options, said):
    with pytest.raises(UserError, match=said) as refusal:
        fcos_slim(2, (3, 64, 64), **options)
    assert "\n" not in str(refusal.value)


def test_images_of_one_place_are_refused():
    with pytest.raises(UserError, match=r"strides=\[8, 16\]"):
        fcos_slim(2, (3, 32, 32))
    assert (
        fcos_slim(2, (3, 32, 32), 4, fpn=32, strides=[8, 16]).eval()(torch.zeros(1, 3, 32, 32))["boxes"].shape[1] == 20
    )


@pytest.mark.parametrize("name", ["fcos_on", "fcos_slim", "torchvision_detector"])
@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 96, 130)])
def test_every_yaml_builds_a_detector(name, shape):
    path = ROOT / "conf" / "net" / f"{name}.yaml"
    assert path.read_text().startswith("# Detection")
    node = OmegaConf.load(path)
    net = instantiate(node, num_classes=3, input_shape=shape).eval()
    heads = detector_of(net)(torch.rand(2, *shape))
    assert heads["logits"].shape[2] == 3
    assert node["_target_"] in allowed()


def test_other_networks_are_no_detectors():
    with pytest.raises(UserError, match="one-stage"):
        Detector(nn.Linear(2, 2))
    with pytest.raises(UserError, match="net@student=fcos_slim"):
        detector_of(nn.Linear(2, 2))


def test_ssdlite_of_torchvision():
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    net = Detector(model).eval()
    with torch.no_grad():
        heads = net(torch.rand(1, 3, 320, 320))
    assert heads["logits"].shape == (1, 3234, 3)
    assert net.state_dict().keys() == model.state_dict().keys()
