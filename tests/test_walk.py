"""The walk of a new user: photos, teacher, student, report, export, prediction; each by its command, in a fresh folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images

from litdistill.data.folder import read_splits
from litdistill.export.predict import load, predict

pytestmark = pytest.mark.slow
SOURCES = Path(__file__).resolve().parents[1] / "src"
CLASSES = {"disks": 160, "lines": 80, "squares": 45}  # unbalanced on purpose


def picture(label: str, draw: np.random.Generator, grounds: list[Image.Image]) -> Image.Image:
    """A part of a photograph with things of one kind all over it, of random colors, sizes and places."""
    ground = grounds[draw.integers(len(grounds))]
    wide, tall = (int(n) for n in draw.integers(80, 160, 2))
    left, top = int(draw.integers(ground.width - wide)), int(draw.integers(ground.height - tall))
    image = ground.crop((left, top, left + wide, top + tall))
    pen = ImageDraw.Draw(image)
    for _ in range(8):
        color, side = tuple(int(c) for c in draw.integers(0, 256, 3)), int(draw.integers(34, 54))
        x, y = int(draw.integers(wide - side)), int(draw.integers(tall - side))
        if label == "disks":
            pen.ellipse((x, y, x + side, y + side), color)
        elif label == "squares":
            pen.rectangle((x, y, x + side, y + side), color)
        else:
            pen.line((x, y, x + side, y + side), color, 5)
    return image


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Generated JPEG files of three classes, of many sizes and of unequal numbers."""
    root, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    grounds = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for label, count in CLASSES.items():
        (root / label).mkdir()
        for i in range(count):
            picture(label, draw, grounds).save(root / label / f"IMG_{i:04d}.JPG", format="JPEG", quality=90)
    (root / "disks" / "notes.txt").write_text("not a picture")
    return root


def litdistill(folder: Path, *arguments: str) -> str:
    """What a command prints; it must end well."""
    env = os.environ | {"PYTHONPATH": str(SOURCES), "OMP_NUM_THREADS": "1"}
    env.pop("RUN_STAMP", None)
    command = [sys.executable, "-m", "litdistill", *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_from_a_folder_of_photos_to_a_prediction(photos, tmp_path):
    # A teacher from nothing, since its pretrained weights are a download.
    teacher = ["net@teacher=conv4_wide", "teacher.preprocess=null", "teacher.recipe.optimizer.lr=3.0e-3"]
    teacher += ["teacher.recipe.trainer.max_epochs=30", "teacher.recipe.min_steps=600"]
    printed = litdistill(tmp_path, "train", "experiment=photos/cpu", f"data.root={photos}", *teacher, "min_steps=900")
    assert "285 images (285 .jpg" in printed
    assert "1 .txt" in printed
    (run,) = (path.parent for path in (tmp_path / "runs" / "photos").rglob("summary.json"))
    summary = json.loads((run / "summary.json").read_text())
    accuracy = summary["student"]["test"]["accuracy"]["best"]
    largest = max(CLASSES.values()) / sum(CLASSES.values())
    assert accuracy > largest + 0.2, "the student should beat the largest class by far"
    shown = float(re.findall(r"test accuracy (\d+\.\d+) %", printed)[-1])
    assert shown == pytest.approx(100 * accuracy, abs=0.005)

    assert "reproduced to the digit" in litdistill(tmp_path, "evaluate", f"run={run}")
    litdistill(tmp_path, "report", "runs=runs/photos", "out=page/")
    assert f"{shown:.2f}" in (tmp_path / "page" / "index.html").read_text()
    litdistill(tmp_path, "export", f"run={run}")

    listed = read_splits(photos)
    classes, test = listed.classes, listed.test
    model = load(str(run / "export" / "student.onnx"))
    found = predict(model, [str(file.path) for file, _ in test], 1)
    right = sum(one["top"][0]["class"] == classes[label] for one, (_, label) in zip(found, test, strict=True))
    assert 100 * right / len(test) == pytest.approx(shown, abs=0.005)
    name = test[0][0].path
    assert found[0]["top"][0]["class"] in litdistill(
        tmp_path, "predict", str(run / "export" / "student.onnx"), str(name)
    )
