"""Detection as a task: what it takes and keeps, and COCO's figures against its own tool, a closed case, several processes."""

from __future__ import annotations

import math
import multiprocessing
from pathlib import Path

import pytest
import torch
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor, nn

from litdistill.distillation.checks import check_method
from litdistill.methods import KD
from litdistill.tasks.detection import metrics as module
from litdistill.tasks.detection.boxes import padded
from litdistill.tasks.detection.decode import detections
from litdistill.tasks.detection.metrics import MeanAP, Split, constant_map, curves, mean_ap
from litdistill.tasks.detection.task import Detection
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError

SIDE = 200


def _boxes(count: int, generator: torch.Generator) -> Tensor:
    corner = torch.rand(count, 2, generator=generator) * SIDE * 0.5
    size = 8 + torch.rand(count, 2, generator=generator) * SIDE * 0.8
    return torch.cat([corner, corner + size], 1)


def _split(pictures: int = 30, classes: int = 4, crowds: bool = True) -> tuple[Tensor, Tensor]:
    """Detections (N, 40, 6), many of them near an object, and targets (N, 8, 6), some of them crowds."""
    g = torch.Generator().manual_seed(5)
    found, truth = [], []
    for i in range(pictures):
        n = i % 7  # some pictures have no object
        objects = torch.zeros(n, 6)
        objects[:, :4] = _boxes(n, g)
        objects[:, 4] = torch.randint(classes - 1, (n,), generator=g)  # the last class has no object
        objects[:, 5] = (torch.rand(n, generator=g) < 0.2) * crowds
        near = objects[:, :4].repeat(3, 1)
        near = near + torch.randn(near.shape, generator=g) * 4
        box = torch.cat([near, _boxes(10, g)])
        rows = torch.zeros(len(box), 6)
        rows[:, :4], rows[:, 4] = box, torch.rand(len(box), generator=g)
        rows[:, 5] = torch.randint(classes, (len(box),), generator=g)
        rows[: 3 * n, 5] = torch.where(torch.rand(3 * n, generator=g) < 0.8, objects[:, 4].repeat(3), rows[: 3 * n, 5])
        rows = rows[rows[:, 4].argsort(descending=True)]
        empty = torch.zeros(40 - len(rows), 6)
        empty[:, 5] = -1
        found.append(torch.cat([rows, empty]))
        truth.append(objects)
    return torch.stack(found), padded(truth, 8)


def _kept(found: Tensor) -> Outputs:
    return Outputs({"detections": found})


def _by_coco(found: Tensor, targets: Tensor) -> dict[str, float]:
    """COCO's own evaluation of plain dictionaries."""
    notes, results, categories = (
        [],
        [],
        sorted({int(c) for c in [*targets[..., 4].unique(), *found[..., 5].unique()] if c >= 0}),
    )
    for i, (rows, objects) in enumerate(zip(found.double().tolist(), targets.double().tolist(), strict=True)):
        for x1, y1, x2, y2, c, crowd in objects:
            if c >= 0:
                box = [x1, y1, x2 - x1, y2 - y1]
                one = {
                    "image_id": i,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "category_id": int(c),
                    "iscrowd": int(crowd),
                }
                notes.append(one | {"id": len(notes) + 1})
        for x1, y1, x2, y2, score, c in rows:
            if c >= 0:
                results.append(
                    {"image_id": i, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score, "category_id": int(c)}
                )
    truth = COCO({"images": [{"id": i} for i in range(len(found))], "annotations": notes,
                  "categories": [{"id": c} for c in categories]})  # fmt: skip
    tool = COCOeval_faster(truth, truth.loadRes(results), "bbox")
    tool.run()
    names = ["map", "map_50", "map_75", "map_small", "map_medium", "map_large"]
    return {k: v for k, v in zip(names, tool.stats[:6].tolist(), strict=True) if v != -1}


@pytest.mark.parametrize("crowds", [True, False])
def test_figures_are_those_of_coco_in_batches_of_any_size(crowds: bool) -> None:
    found, targets = _split(crowds=crowds)
    expected = _by_coco(found, targets)
    for size in (1, 7, 30):
        metric = Detection().metrics()
        for i in range(0, 30, size):
            metric.update(_kept(found[i : i + size]), targets[i : i + size])
        got = metric.compute()
        assert {k: v.item() for k, v in got.items()} == pytest.approx(expected, abs=1e-6)
    assert 0.05 < expected["map"] < 0.9


def test_crowds_change_the_figures() -> None:
    found, targets = _split()
    without = targets.clone()
    without[..., 5] = 0
    assert mean_ap(Split.of(found, targets))["map"] != mean_ap(Split.of(found, without))["map"]


def test_a_closed_case() -> None:
    """Two objects of one class; the first is found exactly, the second by a box of an IoU of 0.6, and one box is wrong between.

    Up to an IoU of 0.6 (three of ten thresholds: 0.5, 0.55, 0.6) precision is 1 up to a recall of 1/2 and 2/3 up to 1; above it
    is 1 up to a recall of 1/2, and 0 beyond. COCO takes 101 recalls, 51 of them up to 1/2.
    """
    truth = torch.tensor([[[0.0, 0, 10, 10, 0, 0], [20, 20, 30, 30, 0, 0]]])
    found = torch.tensor([[[0.0, 0, 10, 10, 0.9, 0], [50, 50, 60, 60, 0.8, 0], [20, 20, 30, 26.0001, 0.7, 0]]])
    low, high = (51 + 50 * 2 / 3) / 101, 51 / 101
    got = mean_ap(Split.of(found, truth))
    assert got["map"] == pytest.approx(0.3 * low + 0.7 * high, abs=1e-6)
    assert got["map_50"] == pytest.approx(low, abs=1e-6)
    assert got["map_75"] == pytest.approx(high, abs=1e-6)
    assert got["map_small"] == got["map"]
    assert "map_large" not in got
    curve = curves(Split.of(found, truth))
    assert curve.classes == [0]
    assert curve.average.item() == pytest.approx(got["map"], abs=1e-6)
    assert curve.precision[0].tolist() == pytest.approx([1.0] * 51 + [2 / 3] * 50, abs=1e-6)


def test_curves_average_to_the_figures() -> None:
    found, targets = _split()
    split = Split.of(found, targets)
    curve, figures = curves(split), mean_ap(split)
    assert curve.classes == [0, 1, 2, 3]
    assert math.isnan(curve.average[3])  # no object of it
    assert curve.average[:3].mean().item() == pytest.approx(figures["map"], abs=1e-6)
    assert curve.average_50[:3].mean().item() == pytest.approx(figures["map_50"], abs=1e-6)


def test_pictures_without_labels_are_left_out_and_those_without_objects_count() -> None:
    found, targets = _split()
    unlabelled = targets.clone()
    unlabelled[3] = torch.nan
    rest = torch.arange(30) != 3
    assert mean_ap(Split.of(found, unlabelled)) == mean_ap(Split.of(found[rest], targets[rest]))
    empty = torch.arange(30) % 7 == 0
    assert mean_ap(Split.of(found, targets))["map"] < mean_ap(Split.of(found[~empty], targets[~empty]))["map"]


def test_figures_without_any_object_are_no_numbers() -> None:
    found, targets = _split(3)
    nothing = padded([torch.zeros(0, 6)] * 3)
    assert all(math.isnan(v) for v in mean_ap(Split.of(found, nothing)).values())
    assert constant_map(Split.of(found, nothing).truth) is None
    silent = torch.zeros(3, 5, 6)
    silent[..., 5] = -1
    assert mean_ap(Split.of(silent, targets))["map"] == 0


def test_scores_that_are_no_numbers_are_refused() -> None:
    found, targets = _split(3)
    found[1, 0, 4] = torch.nan
    with pytest.raises(UserError, match="The outputs for 1 of 3 pictures are not finite"):
        mean_ap(Split.of(found, targets))


def _rank(rank: int, folder: Path, parts: list[list[int]]) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    found, targets = _split()
    metric = Detection().metrics()
    for i in parts[rank]:
        targets_of = targets[i : i + 1, : 5 + rank + 2]  # padded to another width in each process
        metric.update(_kept(found[i : i + 1]), targets_of)
    torch.save({k: v.item() for k, v in metric.compute().items()}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("first", [11, 0])
def test_figures_of_two_processes_with_uneven_parts(tmp_path: Path, first: int) -> None:
    parts = [list(range(first)), list(range(first, 30))]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(r, tmp_path, parts)) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    expected = mean_ap(Split.of(*_split()))
    for r in range(2):
        assert torch.load(tmp_path / f"{r}.pt") == pytest.approx(expected, abs=1e-9)


def test_a_missing_package_is_named_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'litdistill\[detection\]'"):
        Detection().metrics()


def test_chance_is_the_map_of_boxes_that_are_the_same_for_every_picture() -> None:
    g = torch.Generator().manual_seed(0)
    still = padded([torch.tensor([[10.0, 10, 50, 50, 1, 0], [60, 60, 90, 90, 0, 0]])] * 30)
    assert Detection().chance(still) == pytest.approx(1.0)
    scattered = torch.zeros(60, 2, 6)
    scattered[..., :4] = torch.stack([_boxes(2, g) for _ in range(60)])
    scattered[..., 4] = torch.randint(3, (60, 2), generator=g)
    chance = Detection().chance(scattered)
    assert chance is not None
    assert 0 < chance < 0.1
    assert Detection().can_judge(0.0, scattered)
    assert not Detection().can_judge(0.0, scattered[:9])


class _Dense(nn.Module):
    """Dense heads of a network that says the same of every picture."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(1)
        n = len(images)
        return {
            "logits": torch.randn(n, 50, 3, generator=g),
            "boxes": _boxes(50, g).expand(n, -1, -1),
            "centerness": torch.randn(n, 50, generator=g),
        }


def test_dense_heads_are_kept_as_detections() -> None:
    task, images = Detection(score_threshold=0.3, nms=0.5, detections=7), torch.zeros(3, 3, 120, 90)
    outputs = task.forward(_Dense(), Batch(images, None), False)
    kept = task.keep(outputs)
    expected = detections(_Dense()(images), (120, 90), 0.3, 0.5, 7)
    torch.testing.assert_close(kept.heads["detections"], expected, rtol=0, atol=1e-6)
    assert list(kept.heads) == ["detections"]
    assert task.keep(kept) is kept
    assert task.measures(outputs)
    assert task.measures(kept)
    decoded = task.decode(outputs)
    assert {k: tuple(v.shape) for k, v in decoded.items()} == {"boxes": (3, 7, 4), "scores": (3, 7), "labels": (3, 7)}
    assert decoded["labels"].dtype == torch.int64


def test_networks_that_are_no_detectors_are_refused() -> None:
    with pytest.raises(UserError, match="net=fcos_slim"):
        Detection().forward(nn.Flatten(), Batch(torch.zeros(2, 3, 4, 4), None), False)


def test_torchvisions_lists_are_a_batch() -> None:
    images = [torch.rand(3, 8, 8) for _ in range(3)]
    objects = [
        {
            "boxes": torch.tensor([[0.0, 0, 4, 4], [1, 1, 8, 8]]),
            "labels": torch.tensor([2, 0]),
            "iscrowd": torch.tensor([0, 1]),
        },
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
        None,
    ]
    batch = Detection().batch((images, objects))
    assert batch.inputs.shape == (3, 3, 8, 8)
    assert batch.targets[0].tolist() == [[0, 0, 4, 4, 2, 0], [1, 1, 8, 8, 0, 1]]
    assert batch.targets[1, :, 4].eq(-1).all()
    assert batch.targets[2].isnan().all()
    whole = Detection().batch((torch.zeros(1, 3, 8, 8), batch.targets[:1]))
    assert whole.targets.shape == (1, 2, 6)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            (torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])),
            r"The targets are int64 \(2,\), and detection needs boxes",
        ),
        ((torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 5)), r"float32 \(2, 3, 5\)"),
        (
            ([torch.zeros(3, 8, 8)], [{"boxes": torch.zeros(1, 4)}]),
            "picture 0 of a batch have boxes, and detection needs",
        ),
        (([torch.zeros(3, 8, 8)], [{"boxes": torch.zeros(2, 4), "labels": torch.zeros(1)}]), "1 labels: one of each"),
        (([torch.zeros(3, 8, 8)], [{"boxes": torch.ones(1, 4), "labels": torch.tensor([-1])}]), "classes count from 0"),
        (([torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)], [None, None]), "of 2 sizes"),
        (torch.zeros(3), "batch"),
    ],
)
def test_other_batches_are_refused(raw: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Detection().batch(raw)


@pytest.mark.parametrize("options", [{"score_threshold": 1.0}, {"nms": 0.0}, {"detections": 0}, {"detections": 1.5}])
def test_options_without_sense_are_refused(options: dict) -> None:
    with pytest.raises(UserError, match=rf"task\.{next(iter(options))}"):
        Detection(**options)


def test_metrics_take_dense_heads_too() -> None:
    task, images, (_, targets) = Detection(), torch.zeros(3, 3, 200, 200), _split(3)
    outputs = task.forward(_Dense(), Batch(images, None), False)
    dense, kept = task.metrics(), task.metrics()
    dense.update(outputs, targets)
    kept.update(task.keep(outputs), targets)
    assert dense.compute() == kept.compute()
    assert isinstance(dense, MeanAP)


def test_a_method_for_other_logits_is_refused_with_those_for_boxes():
    with pytest.raises(UserError, match=r"those of Detection are boxes: use dense_kd, pkd, fgd or pseudo_boxes\.$"):
        check_method(KD(), object(), Detection())
