"""Detections against torchvision's own post-processing of the same heads."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNet

from litdistill.tasks.detection.decode import CLASS, SCORE, above, detections

HEIGHT, WIDTH, CLASSES = 64, 96, 5
LEVELS = [(8, 12), (4, 6), (2, 3)]


class _Maps(torch.nn.Module):
    out_channels = 32


def _random(kind: str, spread: float, count: int = 3) -> tuple[torch.nn.Module, dict, dict, list]:
    """A torchvision model, heads by level as it takes them, and all of them decoded as this project has them."""
    torch.manual_seed(3)
    sizes = tuple((2 * HEIGHT // h,) for h, _ in LEVELS)
    anchors = AnchorGenerator(sizes, aspect_ratios=((1.0,),) * len(LEVELS))
    model = (FCOS if kind == "fcos" else RetinaNet)(
        _Maps(), CLASSES, anchor_generator=anchors, score_thresh=0.05, nms_thresh=0.6, detections_per_img=100
    )
    places = [h * w for h, w in LEVELS]
    total = sum(places)
    raw = {
        "cls_logits": spread * torch.randn(count, total, CLASSES) - 1,
        "bbox_regression": torch.randn(count, total, 4),
    }
    if kind == "fcos":
        raw["bbox_regression"] = raw["bbox_regression"].abs()
        raw["bbox_ctrness"] = torch.randn(count, total, 1)
    images = torch.zeros(count, 3, HEIGHT, WIDTH)
    grids = [torch.zeros(count, 32, h, w) for h, w in LEVELS]
    per_picture = model.anchor_generator(ImageList(images, [(HEIGHT, WIDTH)] * count), grids)
    coder = model.box_coder if kind == "fcos" else model.head.regression_head.box_coder
    decode = coder.decode if kind == "fcos" else coder.decode_single
    boxes = torch.stack([decode(d, a) for d, a in zip(raw["bbox_regression"], per_picture, strict=True)])
    heads = {"logits": raw["cls_logits"], "boxes": boxes}
    if kind == "fcos":
        heads["centerness"] = raw["bbox_ctrness"][..., 0]
    split = {name: list(value.split(places, 1)) for name, value in raw.items()}
    return model, split, heads, [list(a.split(places)) for a in per_picture]


@pytest.mark.parametrize("kind", ["fcos", "retinanet"])
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_detections_are_those_of_torchvision(kind: str, spread: float) -> None:
    model, raw, heads, anchors = _random(kind, spread)
    found = detections(heads, (HEIGHT, WIDTH), 0.05, 0.6, 100)
    expected = model.postprocess_detections(raw, anchors, [(HEIGHT, WIDTH)] * len(found))
    assert found.shape == (3, 100, 6)
    for rows, one in zip(found, expected, strict=True):
        n = len(one["scores"])
        assert n > 20
        torch.testing.assert_close(rows[:n, SCORE], one["scores"], rtol=0, atol=1e-6)
        torch.testing.assert_close(rows[:n, :4], one["boxes"], rtol=0, atol=1e-4)
        assert rows[:n, CLASS].tolist() == one["labels"].tolist()
        assert rows[n:, SCORE].eq(0).all()
        assert rows[n:, CLASS].eq(-1).all()


def test_a_picture_has_the_same_detections_alone_as_among_others() -> None:
    _, _, heads, _ = _random("fcos", 3.0, 8)
    whole = detections(heads, (HEIGHT, WIDTH))
    alone = torch.cat([detections({k: v[i : i + 1] for k, v in heads.items()}, (HEIGHT, WIDTH)) for i in range(8)])
    torch.testing.assert_close(whole, alone, rtol=0, atol=1e-6)


def test_detections_of_few_anchors_and_of_none_above_the_threshold() -> None:
    heads = {"logits": torch.tensor([[[2.0], [1.9]], [[-9.0], [-9.0]]]), "boxes": torch.zeros(2, 2, 4)}
    heads["boxes"][0] = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0]])  # an IoU of 0.9
    found = detections(heads, (20, 20), 0.05, 0.6, 4)
    assert found.shape == (2, 4, 6)
    torch.testing.assert_close(
        found[0, 0], torch.tensor([0.0, 0.0, 10.0, 10.0, torch.tensor(2.0).sigmoid().item(), 0.0])
    )
    assert found[0, 1:, SCORE].eq(0).all()
    assert found[1, :, CLASS].eq(-1).all()
    assert detections(heads, (20, 20), 0.05, 0.95, 4)[0, :, CLASS].tolist() == [0, 0, -1, -1]
    assert detections(heads, (8, 9))[0, 0, :4].tolist() == [0, 0, 9, 8]  # clipped


def test_logits_that_are_no_numbers_are_seen_in_the_scores() -> None:
    heads = {"logits": torch.full((1, 3, 2), torch.nan), "boxes": torch.rand(1, 3, 4)}
    assert detections(heads, (8, 8), top=5)[..., SCORE].isnan().any()


def test_detections_below_a_threshold_are_emptied() -> None:
    found = torch.tensor([[[1.0, 2.0, 3.0, 4.0, 0.5, 7.0], [1.0, 2.0, 3.0, 4.0, 0.4, 7.0]]])
    assert above(found, 0.5)[0].tolist() == [[1, 2, 3, 4, 0.5, 7], [0, 0, 0, 0, 0, -1]]
