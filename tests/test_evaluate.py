"""Finished runs that are measured again: by what they were trained with, and with words for what has changed or is damaged."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from litdistill.evaluation.evaluate import differences, evaluate, load_run, pick_device
from litdistill.evaluation.figures import PngFiles
from litdistill.export.export import export
from litdistill.export.predict import load
from litdistill.training.train import train
from litdistill.utils.checkpoint import read_metadata
from litdistill.utils.errors import UserError
from litdistill.utils.files import write_text
from tests.conftest import compose_config


@pytest.fixture
def images(tmp_path) -> Path:
    """Two classes, each dark on the left or on the right, that no channel's mean tells apart."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for left, name in ((True, "east"), (False, "west")):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(60, 100, (8, 8, 3), np.uint8)
                pixels[:, slice(0, 4) if left else slice(4, 8)] //= 2
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{i:02}.png")
    return tmp_path / "images"


@pytest.fixture
def own(images, tmp_path) -> Path:
    """A finished run on them."""
    cfg = compose_config(
        tmp_path / "own",
        *("data=folder", f"data.root={images}", "data.image_size=8", "data.batch_size=8", "method=supervised"),
        *("teacher=null", "student.widths=[4,8]", "trainer=cpu", "trainer.max_epochs=1", "logger=none"),
    )
    write_text(tmp_path / "own" / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
    train(cfg)
    return tmp_path / "own"


def test_a_run_is_normalized_as_it_was_trained_though_its_folder_has_grown(own, images):
    before = evaluate(own, device="cpu")
    del before["findings"]  # those on training images, of which there are more
    for i in range(40):
        Image.new("RGB", (8, 8), (250, 250, 200 + i)).save(images / "train" / "east" / f"new{i}.png")
    after = evaluate(own, device="cpu")
    assert {k: v for k, v in after.items() if k != "findings"} == before
    pytest.importorskip("onnxruntime")
    path, check = export(own)
    trained = json.loads((own / "summary.json").read_text())["student"]["test"]["accuracy"]["best"]
    assert check["metric"] == "accuracy"
    assert check["exported"] == check["student"] == trained
    facts = load(path).facts
    assert (facts.mean, facts.std) == (read_metadata(own, "mean"), read_metadata(own, "std"))


def test_a_run_whose_classes_or_images_are_others_now_is_refused(own, images):
    with pytest.raises(UserError, match=r"inputs of \[3, 8, 8\], and its data are \[3, 9, 9\]"):
        export(own, overrides=OmegaConf.create({"data": {"image_size": 9}}))
    for split in ("train", "test"):
        (images / split / "east").rename(images / split / "zenith")
    for again in (export, evaluate):
        with pytest.raises(UserError, match="only then east, only now zenith"):
            again(own)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", b""),
        ("summary.json", b'{"student": {"sha256": 5'),
        ("summary.json", b"[1]"),
        ("summary.json", b'{"student": null, "teacher": null}'),
        ("summary.json", b"\xff\xfe"),
        ("summary.json", b"[" * 100_000),
        (".hydra/config.yaml", b""),
        (".hydra/config.yaml", b"- 1\n- 2\n"),
        (".hydra/config.yaml", b"data: [\n"),
        (".hydra/config.yaml", b"text"),
        (".hydra/config.yaml", b"\xff\xfe\x00"),
        (".hydra/config.yaml", b"data: {name: digits}\n"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(tmp_path, name, content):
    write_text(tmp_path / ".hydra" / "config.yaml", OmegaConf.to_yaml(compose_config(tmp_path)))
    write_text(tmp_path / "summary.json", '{"student": {"sha256": "5"}, "teacher": null}')
    load_run(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is damaged .*Fetch the run's folder anew"):
        load_run(tmp_path)


def test_a_device_that_is_not_there_is_named_with_those_that_are():
    for name in ("tpu", "cuda:99"):
        with pytest.raises(UserError, match=f"device={name} is not there: choose auto, cpu"):
            pick_device(name)
    assert pick_device("cpu") == "cpu"


def test_the_average_of_the_weights_is_what_is_left_and_measured(small):
    cfg = small("ema=0.5", "method=supervised", "logger=none")
    write_text(Path(cfg.folder) / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
    train(cfg)
    assert differences(evaluate(cfg.folder, device="cpu"), load_run(Path(cfg.folder))[1]) == []
    state = torch.load(Path(cfg.folder) / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    left = load_file(Path(cfg.folder) / "student.safetensors")
    assert torch.equal(left["fc.weight"], state["average.module.fc.weight"])
    assert not torch.equal(left["fc.weight"], state["student.fc.weight"])


def test_a_teacher_that_preprocesses_otherwise_than_the_runs_is_refused(small):
    first = small("teacher=null", "method=supervised", "logger=none", name="first")
    train(first)
    taught = [f"teacher.checkpoint={first.folder}", "teacher.widths=[8,8]", "teacher.allow_chance=true"]
    cfg = small(*taught, "logger=none", "trainer.max_epochs=1")
    write_text(Path(cfg.folder) / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
    train(cfg)
    with pytest.raises(UserError, match=r"The run's teacher preprocessed images by .* and now by .*0\.123"):
        evaluate(cfg.folder, OmegaConf.create({"teacher": {"preprocess": {"mean": [0.123], "std": [0.3]}}}), "cpu")


def test_values_that_are_no_numbers_then_and_now_are_reproduced():
    test = {"r2": math.nan, "rmse": {"best": 1.0, "last": 1.0}}
    summary = {"metric": {"name": "rmse"}, "student": {"test": test}}
    assert differences({"student": {"rmse": 1.0, "r2": math.nan}}, summary) == []
    assert differences({"student": {"rmse": 1.0, "r2": 0.5}}, summary) == ["r2: now 0.5, then nan"]


def test_a_file_in_place_of_a_folder_of_pictures_is_refused(tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match="Name another folder"), PngFiles(tmp_path / "taken"):
        pass


def test_figures_are_written_as_png_files(tmp_path):
    from matplotlib.figure import Figure

    with PngFiles(tmp_path / "new" / "pictures") as writer:
        figure = Figure()
        figure.subplots().plot([1, 2])
        writer.add_figure("validation/worst misses", figure, 7)
    (written,) = (tmp_path / "new" / "pictures").iterdir()
    assert written.name == "worst_misses.png"
    assert Image.open(written).size[0] > 100
