"""Runs of the task `embedding`, from the command's config to the files that are shipped, and of what comes after it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from litdistill import load_student
from litdistill.config.build import build_data
from litdistill.config.recipes import student_config, student_folder
from litdistill.evaluation.evaluate import differences, evaluate, load_run
from litdistill.export.export import export
from litdistill.export.predict import load, predict
from litdistill.features.outputs import run_network
from litdistill.models.small import conv4
from litdistill.report.tables import rows
from litdistill.utils.checkpoint import load_weights, read_metadata
from litdistill.utils.errors import UserError
from tests.conftest import compose_config
from tests.test_tasks_runs import finished

SHORT = ["trainer=cpu", "trainer.max_epochs=2", "data.epoch_size=128", "logger=none"]
EMBED = ["task=embedding", "method=cosine", "net@teacher=conv4", "teacher.widths=[8,16,24]", *SHORT]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("embedding")


@pytest.fixture(scope="module")
def classifier(runs) -> Path:
    """A finished run whose student is used as a backbone."""
    return finished(runs / "c", "method=supervised", "teacher=null", "student.widths=[8,16,24]", *SHORT, runs=runs)


@pytest.fixture(scope="module")
def run(runs, classifier) -> Path:
    return finished(runs / "e", *EMBED, f"teacher.checkpoint={classifier}", runs=runs)


def test_the_student_has_its_teachers_width_and_follows_it(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["metric"] == {"name": "spearman", "direction": "max"}
    assert read_metadata(run, "outputs") == 24
    assert 0.3 < summary["student"]["test"]["spearman"]["best"] < 1
    assert summary["teacher"]["test"] == pytest.approx({"spearman": 1, "cosine": 1})
    assert summary["findings"] == {}
    assert {"spearman", "cosine"} <= {name for row in rows([summary]) for name in " ".join(row).split()}


def test_it_is_evaluated_to_the_digit(run):
    assert differences(evaluate(run, device="cpu"), load_run(run)[1]) == []


def test_it_is_exported_without_its_teacher_and_predicts_vectors(run, classifier, tmp_path):
    hidden = classifier.rename(classifier.with_name("away"))
    try:
        path, check = export(run)
        assert check["difference"] < 1e-4
        assert (check["metric"], check["exported"]) == ("spearman", pytest.approx(1))
        images = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / f"{i}.png")
        found = predict(load(path), [tmp_path / f"{i}.png" for i in range(3)])
        student = load_student(run).eval()
        with torch.no_grad():
            wanted = run_network(student, torch.from_numpy(images)[:, None]).main
        assert len(found[0]["embedding"]) == 24
        np.testing.assert_allclose([one["embedding"] for one in found], wanted, rtol=1e-4, atol=1e-4)
    finally:
        hidden.rename(classifier)


def test_a_width_of_ones_own_needs_a_projector(runs, classifier):
    run = finished(
        runs / "w", *EMBED, f"teacher.checkpoint={classifier}", "task.width=6", "trainer.max_epochs=1", runs=runs
    )
    assert read_metadata(run, "outputs") == 6
    summary = json.loads((run / "summary.json").read_text())
    assert "cosine" not in summary["student"]["test"]
    assert load_weights(run)["fc.weight"].shape[0] == 6


def test_few_labels_follow_in_one_experiment(runs, classifier):
    """What `experiment=schemes/backbone` does, with a small backbone."""
    options = ["experiment=schemes/backbone", "net@teacher=conv4", "teacher.widths=[8,16,24]", *SHORT]
    options += [f"teacher.checkpoint={classifier}", "teacher.preprocess=null", "student.recipe.trainer.max_epochs=2"]
    cfg = compose_config(runs / "f", *options)
    source = student_config(cfg)
    assert (source.task["_target_"], source.method["_target_"]) == (
        "litdistill.tasks.Embedding",
        "litdistill.methods.Cosine",
    )
    assert set(source.task) == {"_target_", "width"}
    run = finished(runs / "f", *options, runs=runs)
    cfg.runs = str(runs)
    first, summary = student_folder(cfg), json.loads((run / "summary.json").read_text())
    assert json.loads((first / "summary.json").read_text())["task"] == "Embedding"
    assert summary["task"] == "Classification"
    assert summary["start"]["run"] == first.name
    assert summary["teacher"]["test"] in (None, {})
    assert differences(evaluate(run, device="cpu"), summary) == []
    assert rows([summary])  # a table without the teacher's row
    assert not any(row["method"] == "teacher" for row in rows([summary]))


def test_labels_and_a_backbone_at_once(runs, classifier):
    run = finished(
        runs / "o", "method=srd", "method.soft=0", "net@teacher=conv4", "teacher.widths=[8,16,24]", "teacher.head=cut",
        f"teacher.checkpoint={classifier}", "data.per_class=5", *SHORT, runs=runs,
    )  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    assert summary["metric"]["name"] == "accuracy"
    assert not summary["teacher"]["test"]


def test_labels_alone_teach_no_embedding(runs, classifier):
    with pytest.raises(UserError, match="Embedding has no labels to train a teacher on"):
        finished(runs / "x", "task=embedding", "method=cosine", *SHORT, runs=runs)
    with pytest.raises(UserError, match="Supervised learns from labels, and Embedding has none"):
        finished(runs / "y", *EMBED, f"teacher.checkpoint={classifier}", "method=supervised", runs=runs)


# -- a folder without classes ------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path) -> Path:
    root = tmp_path / "pictures"
    root.mkdir()
    for i in range(40):
        pixels = np.random.default_rng(i).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
    return root


def options(root: Path, *more: str) -> list[str]:
    return ["data=folder", f"data.root={root}", "data.image_size=8", "data.batch_size=8", *more]


def test_a_folder_without_classes_teaches_an_embedding(runs, pictures, tmp_path):
    torch.manual_seed(0)
    save_file(conv4(1, (3, 8, 8), widths=[8, 16, 24]).state_dict(), tmp_path / "teacher.safetensors")
    checkpoint = f"teacher.checkpoint={tmp_path / 'teacher.safetensors'}"
    run = finished(runs / "p", *EMBED, *options(pictures, "data.epoch_size=null"), checkpoint, runs=runs)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["data"]["train"] + summary["data"]["val"], summary["data"]["test"]) == (32, 8)
    assert read_metadata(run, "outputs") == 24


def test_a_folder_without_classes_is_for_no_other_task(tmp_path, pictures):
    cfg = compose_config(tmp_path / "run", *options(pictures))
    with pytest.raises(UserError, match="These data are for task=embedding"):
        build_data(cfg)
    cfg = compose_config(tmp_path / "run", "task=embedding", *options(pictures, "data.per_class=2"))
    with pytest.raises(UserError, match=r"data\.per_class goes by classes"):
        build_data(cfg)
    for path in sorted(pictures.iterdir())[9:]:
        path.unlink()
    cfg = compose_config(tmp_path / "run", "task=embedding", *options(pictures))
    with pytest.raises(UserError, match=r"has 0 class folders and 9 images.*task=embedding"):
        build_data(cfg)
