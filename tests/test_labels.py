"""Pictures with a table of labels: one class, several labels or numbers each, through data, losses, figures and predict."""

from __future__ import annotations

import csv
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from litdistill.data import folder
from litdistill.data.columns import read_table
from litdistill.data.datamodule import ImageData
from litdistill.data.mixing import Mixup
from litdistill.data.targets import read_targets
from litdistill.distillation.running_means import RunningMeans, Seen
from litdistill.tasks import MultiLabel, Regression
from litdistill.tasks.base import Samples
from litdistill.types import Outputs, has_label
from litdistill.utils.errors import UserError

COUNT = 40


@pytest.fixture(autouse=True)
def log_level(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(folder, "_SAID", set())


def paint(root: Path, count: int = COUNT, under: str = "") -> list[str]:
    (root / under).mkdir(parents=True, exist_ok=True)
    names = [f"{under}{i:02}.png" for i in range(count)]
    for i, name in enumerate(names):
        pixels = np.random.default_rng([i, *under.encode()]).integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(pixels).save(root / name)
    return names


def write(path: Path, header: list[str], rows: list[tuple]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def data(root: Path, labels: Path | str, **options) -> ImageData:
    options = {"image_size": 6, "subset_seed": 0, **options}
    module = ImageData("folder", root, labels=labels, **options)
    module.setup()
    return module


def refusal(root: Path, labels: Path | str, **options) -> str:
    with pytest.raises(UserError) as caught:
        data(root, labels, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_several_labels_are_those_of_the_files_in_the_table(tmp_path, caplog):
    names = paint(tmp_path / "photos")
    truth = {name: [i % 2, int(i % 3 == 0), int(i % 5 == 0)] for i, name in enumerate(names)}
    rows = [(name, *truth[name]) for name in reversed(names[:-3])]
    labels = write(tmp_path / "labels.csv", ["image", "red", "green", "blue"], rows)
    module = data(tmp_path / "photos", labels, resident=False)
    assert (module.task, module.class_names, module.num_classes) == ("multilabel", ("red", "green", "blue"), 3)
    assert (len(module.test_ids), len(module.val_ids), len(module.train_ids)) == (7, 3, 27)
    for split, ids in (("train", module.train_ids), ("train", module.val_ids), ("test", module.test_ids)):
        batch = module.get_batch(split, ids)
        files = (module.source.test if split == "test" else module.source.train).images.files
        assert batch.targets.dtype == torch.float32
        for i, target in zip(ids.tolist(), batch.targets.tolist(), strict=True):
            assert target == truth[Path(files[i][0]).name]
    said = [record.getMessage() for record in caplog.records]
    assert said[0].endswith("labels.csv: 37 images of " + f"{tmp_path}/photos (37 .png).")
    assert said[1:4] == [
        "3 files are skipped: 3 not in the table (data.unlabelled=<folder> trains on those too).",
        "Target red, green, blue: 3 labels of 0 and 1 a row, task=multilabel.",
        "Splits: 30 to train on, 7 to test (a fifth is the test set: no column 'split').",
    ]


def test_classes_are_stratified_and_numbers_are_numbers(tmp_path):
    names = paint(tmp_path)
    kinds = ["cat" if i % 4 else "dog" for i in range(COUNT)]
    labels = write(
        tmp_path / "labels.csv",
        ["file", "kind", "age"],
        [(n, k, i / 8) for i, (n, k) in enumerate(zip(names, kinds, strict=True))],
    )
    module = data(tmp_path, "labels.csv", target="kind")
    assert (module.task, module.class_names) == ("classification", ("cat", "dog"))
    assert torch.bincount(module.source.test.targets).tolist() == [6, 2]
    assert torch.bincount(module.train_targets[module.val_ids]).tolist() == [2, 1]
    numbers = data(tmp_path, labels, target=["age"])
    assert (numbers.task, numbers.class_names, tuple(numbers.train_targets.shape)) == ("regression", ("age",), (32, 1))
    both = torch.cat([numbers.train_targets, numbers.source.test.targets]).flatten().sort().values
    assert both.tolist() == [i / 8 for i in range(COUNT)]
    assert len(data(tmp_path, labels, target=["age"], fraction=0.5).train_ids) == len(numbers.train_ids) // 2


def test_splits_are_those_of_a_column_or_of_folders(tmp_path, caplog):
    names = paint(tmp_path, 20)
    parts = ["train"] * 10 + ["Validation"] * 4 + ["TEST"] * 6
    write(
        tmp_path / "labels.csv",
        ["file", "y", "split"],
        [(n, i % 2, s) for i, (n, s) in enumerate(zip(names, parts, strict=True))],
    )
    module = data(tmp_path, "labels.csv", resident=False)
    named = lambda images, ids: [Path(images.files[i][0]).name for i in ids]  # noqa: E731
    assert named(module.source.train.images, module.train_ids) == names[:10]
    assert named(module.source.train.images, module.val_ids) == names[10:14]
    assert named(module.source.test.images, module.test_ids) == names[14:]
    inner = tmp_path / "inner"
    some = [*paint(inner, 12, "train/"), *paint(inner, 5, "test/")]
    Image.open(inner / "train/00.png").save(inner / "test/00.png")
    write(tmp_path / "inner.csv", ["file", "y"], [(name, i % 2) for i, name in enumerate(some)])
    caplog.clear()
    assert data(inner, tmp_path / "inner.csv").count("test") == 5
    assert "1 test image is training images too, byte by byte, such as 00.png and 00.png." in caplog.text


def test_copies_with_other_labels_are_left_out(tmp_path, caplog):
    names = paint(tmp_path, 20)
    for source, name in ((names[0], "copy.png"), (names[1], "other.png")):
        (tmp_path / name).write_bytes((tmp_path / source).read_bytes())
    rows = [*((n, i % 2) for i, n in enumerate(names)), ("copy.png", 0), ("other.png", 0)]
    write(tmp_path / "labels.csv", ["file", "y"], rows)
    module = data(tmp_path, "labels.csv")
    assert module.count("train") + module.count("val") + module.count("test") == 19  # 00 once, 01 and other not at all
    assert "2 with the same bytes and other labels, 1 copies of other images" in caplog.text


@pytest.mark.parametrize("columns", [["a", "b"], ["size"]])
def test_unlabelled_pictures_have_no_part_in_the_labels_loss(tmp_path, columns):
    names = paint(tmp_path)
    rows = [(n, *((i % 2, i % 3 == 0) if len(columns) > 1 else (i / 4,))) for i, n in enumerate(names[:30])]
    write(
        tmp_path / "labels.csv",
        ["file", *columns],
        [tuple(int(v) if isinstance(v, bool) else v for v in row) for row in rows],
    )
    module = data(tmp_path, "labels.csv", unlabelled=tmp_path)
    assert (module.train_labels, module.source.unlabelled) == ("some", 10)
    targets = module.train_targets[module.train_ids]
    assert has_label(targets).sum() == len(module.train_ids) - 10
    assert targets[-10:].isnan().all()
    task = MultiLabel() if len(columns) > 1 else Regression([3.0], [2.0])
    means = RunningMeans(task, "some")
    outputs = Outputs.of(torch.randn(len(targets), len(columns)))
    means.add(Seen({}, outputs, None, targets, len(targets)))
    found = means.means()
    known = has_label(targets)
    for name, values in task.scores(outputs.rows(known.nonzero().squeeze(1)), targets[known]).items():
        torch.testing.assert_close(found[name].double(), values.double().mean(), rtol=1e-5, atol=1e-6)


def test_several_labels_are_mixed(tmp_path):
    names = paint(tmp_path)
    write(tmp_path / "labels.csv", ["file", "a", "b"], [(n, i % 2, int(i % 3 == 0)) for i, n in enumerate(names)])
    module = data(tmp_path, "labels.csv", mix=Mixup(0.5))
    ids = module.train_ids
    batch = module.get_batch("train", ids, torch.zeros_like(ids))
    plain = module.train_targets[ids]
    assert batch.targets.shape == plain.shape
    assert ((batch.targets > 0) & (batch.targets < 1)).any()
    assert ((batch.targets == 0) | (plain == 1) | (batch.targets < 1)).all()


def test_options_of_classes_are_refused_for_several_labels(tmp_path):
    names = paint(tmp_path)
    write(tmp_path / "labels.csv", ["file", "a", "b"], [(n, i % 2, int(i % 3 == 0)) for i, n in enumerate(names)])
    for options in ({"per_class": 2}, {"omit": ["a"]}, {"classes": ["a", "b"]}, {"balanced": True}):
        assert refusal(tmp_path, "labels.csv", **options).startswith(
            f"data.{next(iter(options))} goes by classes, and these"
        )
    with pytest.raises(UserError, match="goes with data=folder, and this is data=digits"):
        ImageData("digits", labels="labels.csv")


# -- what is wrong -----------------------------------------------------------------------------------------------------


def test_names_without_a_file_are_counted_and_the_first_is_named(tmp_path):
    names = paint(tmp_path, 12)
    rows = [(n, i % 2) for i, n in enumerate([*names, "13x.png", "lost.png"])]
    labels = write(tmp_path / "labels.csv", ["file", "y"], rows)
    assert refusal(tmp_path, labels).startswith(
        f"{labels} names 2 files of 14 that are not in {tmp_path}, first 13x.png (line 14)"
    )
    write(labels, ["file", "y"], [(n, i % 2) for i, n in enumerate([*names[1:], "OO.png"])])
    assert "first OO.png (line 13)" in refusal(tmp_path, labels)


def test_a_row_without_a_label_and_a_file_with_two_are_refused(tmp_path):
    names = paint(tmp_path, 12)
    labels = tmp_path / "labels.csv"
    write(labels, ["file", "y"], [(n, "" if i == 4 else i % 2) for i, n in enumerate(names)])
    assert refusal(tmp_path, labels).startswith(f"{labels}: 1 row of 12 have no y, first line 6.")
    write(labels, ["file", "y"], [*((n, i % 2) for i, n in enumerate(names)), (names[0], 1)])
    assert f"{labels}: 00.png has one label in line 2 and another in line 14." in refusal(tmp_path, labels)
    write(labels, ["file", "y", "split"], [(n, i % 2, "holdout") for i, n in enumerate(names)])
    assert "split is 'holdout', and must be train, val or test." in refusal(tmp_path, labels)


def test_columns_are_named_where_they_are_not_found(tmp_path):
    names = paint(tmp_path, 12)
    labels = write(tmp_path / "labels.csv", ["file", "kind"], [(n, "ab"[i % 2]) for i, n in enumerate(names)])
    assert refusal(tmp_path, labels, target="kinds").endswith("has no such column; did you mean kind?")
    assert (
        refusal(tmp_path, "label.csv")
        == f"data.labels={tmp_path}/label.csv: there is no such file. Did you mean {labels}?"
    )
    write(labels, ["where", "kind"], [(n, "ab"[i % 2]) for i, n in enumerate(names)])
    assert refusal(tmp_path, labels).endswith("none of file names: call one of them file.")
    write(labels, ["file"], [(n,) for n in names])
    assert "has no column of labels beside file" in refusal(tmp_path, labels)


# -- figures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [MultiLabel(), Regression([1.0, 2.0, 3.0], [2.0, 2.0, 2.0])])
def test_figures_of_images_show_the_worst_first(task):
    torch.manual_seed(0)
    logits = torch.randn(30, 3)
    targets = (logits > 0).float() if isinstance(task, MultiLabel) else task.values(Outputs.of(logits)).float()
    targets[17] = 1 - targets[17] if isinstance(task, MultiLabel) else targets[17] + 50
    logits[17] *= 20
    images = torch.randint(0, 255, (30, 3, 8, 8), dtype=torch.uint8)
    asked: list[int] = []
    samples = Samples(
        lambda i: asked.append(i) or images[i], targets, ["a", "b", "$c_"], Outputs.of(logits), Outputs.of(-logits)
    )
    figures = task.figures(samples)
    assert len(figures) == 2
    assert asked[0] == 17
    assert len(asked) == 12
    for figure in figures.values():
        figure.canvas.draw()


def test_targets_are_read_as_python_reads_them(tmp_path):
    rows = [("1,5", "ja", i) for i in range(30)]
    path = tmp_path / "t.csv"
    path.write_text("wert;art;zahl\n" + "".join(f"{a};{b};{c}\n" for a, b, c in rows))
    table = read_table(path)
    found = read_targets(table, ["wert", "zahl"])
    assert found.task == "regression"
    assert found.values.tolist() == [[1.5, float(i)] for i in range(30)]
    assert not math.isnan(found.values.sum())
