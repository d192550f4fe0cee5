"""Segmentation from the command's config to the files that are shipped, its figures and its page."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from sklearn.metrics import jaccard_score

from litdistill.evaluation.doctor import diagnose
from litdistill.evaluation.evaluate import differences, evaluate, load_run, rebuild
from litdistill.evaluation.predictions import predict_split
from litdistill.export.export import export, verify
from litdistill.export.predict import load, main
from litdistill.report.build import build
from litdistill.report.collect import Settings
from litdistill.tasks.base import Samples
from litdistill.tasks.segmentation.figures import colored, mask_figures, picture_iou
from litdistill.tasks.segmentation.task import by_pixel
from litdistill.training.train import train
from litdistill.types import Outputs
from litdistill.utils.files import write_text
from tests.conftest import compose_config
from tests.test_cli import call

SMALL = [
    *("experiment=segmentation/digit_scenes", "data.count=60", "data.val_size=20", "data.labels=20"),
    *("student.widths=[8,8]", "student.pyramid=8", "teacher.widths=[8,16]", "teacher.depth=1", "teacher.pyramid=8"),
    *("teacher.recipe.trainer.max_epochs=1", "trainer=cpu", "trainer.max_epochs=2", "logger=none"),
    "teacher.allow_chance=true",
]


def trained(place, name, *options):
    cfg = compose_config(place / name, *SMALL, *options)
    cfg.runs = str(place)
    write_text(place / name / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
    train(cfg)
    return place / name


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("masks"), "run", "data.augment=[Flip,{Crop:{pad:2}}]", "data.fixed_views=2")


def test_a_run_is_measured_again_to_the_digit_by_mean_iou(run):
    _, summary = load_run(run)
    assert differences(evaluate(run, device="cpu"), summary) == []
    assert summary["metric"] == {"name": "miou", "direction": "max"}
    assert set(summary["student"]["test"]) >= {"miou", "pixel_accuracy"}
    assert 0 <= summary["student"]["agreement"] <= 1


def test_an_exported_file_gives_the_class_of_each_pixel(run):
    path, checked = export(run)
    assert checked["agreement"] >= 0.999
    assert checked["exported"] == pytest.approx(checked["student"], abs=1e-3)
    data, distiller = rebuild(run)
    model = load(path)
    batch = next(iter(data.batches("test")))
    found = model.run(batch.inputs[:5].numpy())
    expected = predict_split(distiller.deployed_student, data, "test", task=distiller.task)[0].heads["label"]
    assert found.shape == (5, 32, 32)
    assert (found.reshape(5, -1) == expected[:5].numpy()).mean() > 0.999
    assert model.facts.kind == "mask"
    assert list(verify(run)) == ["student.onnx"]


@pytest.mark.parametrize(("precision", "share"), [("fp16", 0.99), ("int8", 0.95)])
def test_files_of_less_precision_give_the_same_masks(run, precision, share):
    path, checked = export(run, precision=precision)
    assert path.name == f"student-{precision}.onnx"
    assert checked["agreement"] >= share
    assert checked["samples"] == 40
    assert checked["exported"] == pytest.approx(checked["student"], abs=0.01)


def test_the_doctor_examines_a_run(run):
    assert "teacher at chance" in {
        finding.name for finding in diagnose(run).findings
    }  # it has had one epoch on 40 scenes


def test_a_teacher_of_two_networks_averages_their_maps(run):
    """The first is that of `run`, which is found again."""
    both = "teacher.ensemble=[{},{widths: [8, 8], recipe: {seed: 5}}]"
    folder = trained(run.parent, "two", both, "teacher.ensemble_weights=[3,1]", "trainer.max_epochs=1")
    _, summary = load_run(folder)
    assert differences(evaluate(folder, device="cpu"), summary) == []
    assert summary["teacher"]["name"] == "fcn_slim-1-8x16 + fcn_slim-1-8x8"
    data, distiller = rebuild(folder)
    batch = next(iter(data.batches("test")))
    first, second = (by_pixel(net(batch.inputs), (32, 32)) for net in distiller.teacher.net.parts().values())
    outputs = distiller.task.forward(distiller.teacher.net, batch, False)
    assert torch.allclose(outputs.logits, 0.75 * first + 0.25 * second, atol=1e-5)


def test_a_student_that_resizes_its_pictures_gives_masks_of_their_size(run):
    folder = trained(run.parent, "small", "student.preprocess={size: [16, 24]}", "trainer.max_epochs=1")
    assert differences(evaluate(folder, device="cpu"), load_run(folder)[1]) == []
    path, checked = export(folder)
    assert checked["agreement"] >= 0.999
    data, distiller = rebuild(folder)
    images = next(iter(data.batches("test"))).inputs
    assert load(path).run(images.numpy()).shape == (len(images), 32, 32)
    assert distiller.deployed_student(images).shape[2:] == (16, 24)


@pytest.mark.process
def test_two_processes_measure_masks_as_one(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "litdistill.tasks.segmentation.data.TESTED", 500
    )  # as in processes that these tests do not patch
    options = [option for option in SMALL if option != "trainer=cpu"]
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.eval_batch_size=7", "name=two"]
    done = call("train", *options, *ddp, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs" / "two").iterdir()
    _, summary = load_run(folder)
    assert summary["device"]["world_size"] == 2
    assert differences(evaluate(folder, device="cpu"), summary) == []  # one process
    data, distiller = rebuild(folder)
    found, targets = predict_split(distiller.deployed_student, data, "val", task=distiller.task)
    labels = [targets.flatten().numpy(), found.heads["label"].flatten().long().numpy()]
    assert summary["val"]["best"] == pytest.approx(jaccard_score(*labels, average="macro", zero_division=0), abs=1e-6)


def test_predict_writes_masks_of_the_pictures_own_size(run, tmp_path):
    if not (run / "export" / "student.onnx").is_file():
        export(run)
    scene = next(iter(rebuild(run)[0].batches("test"))).inputs[0].permute(1, 2, 0).numpy()
    Image.fromarray(scene).resize((80, 40)).save(tmp_path / "street.png")
    main([str(run / "export" / "student.onnx"), str(tmp_path / "street.png"), "--out", str(tmp_path / "out")])
    (found,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    with Image.open(tmp_path / "out" / found["mask"]) as mask, Image.open(tmp_path / "out" / found["drawn"]) as drawn:
        assert (mask.mode, mask.size, drawn.size) == ("P", (80, 40), (80, 40))
        classes, shown = np.asarray(mask), np.asarray(mask.convert("RGB"))
    for area in found["areas"]:
        assert (classes == area["index"]).mean() == pytest.approx(area["share"])
        assert len(np.unique(shown[classes == area["index"]], axis=0)) == 1  # one color a class


def test_the_page_shows_the_iou_of_each_class(run, tmp_path):
    build([run], tmp_path / "page.html", "masks", Settings(rounds=1, robustness=10, device="cpu"))
    page = (tmp_path / "page.html").read_text()
    assert "Intersection over union of each class" in page
    data, distiller = rebuild(run)
    outputs, targets = predict_split(distiller.deployed_student, data, "test", task=distiller.task)
    iou = jaccard_score(targets.flatten(), outputs.heads["label"].flatten().long(), average=None, labels=[0])
    assert f">{100 * iou[0]:.1f}<" in page


def test_cwd_on_the_logit_maps_trains(run):
    """The teacher and the scenes are those of `run`, which are found again."""
    folder = trained(run.parent, "cwd", "method=cwd", "method.hint=3", "method.student_taps=[classifier]",
                     "method.teacher_taps=[classifier]")  # fmt: skip
    assert load_run(folder)[1]["student"]["test"]["miou"]["best"] > 0


def samples(student, teacher, targets, names=("ground", "a", "b")):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (len(targets), 3, 8, 8), generator=g, dtype=torch.uint8)
    kept = [None if x is None else Outputs({"label": x.flatten(1).float()}) for x in (student, teacher)]
    return Samples(lambda i: images[i], targets, names, kept[0], kept[1])


def test_the_figures_show_the_worst_pictures_first():
    g = torch.Generator().manual_seed(1)
    targets = torch.randint(0, 3, (4, 8, 8), generator=g)
    student = targets.clone()
    student[2] = 0
    student[1, :2] = 0
    targets[1, 7] = 255
    iou = picture_iou(student.flatten(1), targets.flatten(1), 3, 255)
    assert iou.argsort()[:2].tolist() == [2, 1]
    found = mask_figures(samples(student, targets, targets), 255, 3)
    assert set(found) == {"masks, worst first", "IoU of classes"}
    rows = [axes.get_title() for axes in found["masks, worst first"].axes]
    assert rows[:4] == ["", "truth", "teacher: IoU 1.00", f"student: IoU {float(iou[2]):.2f}"]
    assert len(rows) == 12
    drawn = found["masks, worst first"].axes[1].images[0].get_array()
    assert np.array_equal(np.asarray(drawn), colored(targets[2], 3))


def test_pixels_that_do_not_count_are_gray():
    mask = torch.tensor([[0, 1], [255, 2]])
    assert colored(mask, 3, mask != 255)[1, 0].tolist() == [224, 224, 224]
    assert len(np.unique(colored(mask, 3).reshape(-1, 3), axis=0)) == 3


def test_a_folder_of_masks_is_trained_on(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / "own" / kind).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(12):
        mask = np.zeros((16, 24), np.uint8)
        mask[4 : 6 + i % 6, 5:15] = 1
        mask[0] = 255
        picture = (np.stack([mask % 2] * 3, 2) * 150 + rng.integers(0, 80, (16, 24, 3))).astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / "own" / "images" / f"{i}.png")
        Image.fromarray(mask).save(tmp_path / "own" / "masks" / f"{i}.png")
    cfg = compose_config(
        tmp_path / "run", "data=masks", f"data.root={tmp_path / 'own'}", "data.classes=[ground,bar]", "data.val_size=2",
        "task=segmentation", "net@student=fcn_slim", "student.widths=[8,8]", "method=supervised", "teacher=null",
        "trainer=cpu", "trainer.max_epochs=30", "optimizer.lr=0.01", "logger=none",
    )  # fmt: skip
    cfg.runs = str(tmp_path)
    write_text(tmp_path / "run" / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
    train(cfg)
    assert load_run(tmp_path / "run")[1]["student"]["test"]["miou"]["best"] > 0.8
