"""Every file of conf/ composes; every experiment trains a step on generated data of its own shape."""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from scipy.io import wavfile

from litdistill.data import datamodule, sound
from litdistill.data.sources import CIFAR10, CIFAR100, DIGITS, Source, Split
from litdistill.data.tensors import TensorSource, TensorSplit
from litdistill.data.text import docstrings, sets
from litdistill.tasks.detection import bccd, coco
from litdistill.tasks.segmentation import data as segmentation
from litdistill.training.train import train
from litdistill.utils.modality import Modality
from litdistill.utils.paths import CONF
from tests.composed import by_hydra, composed
from tests.conftest import compose_config

SHAPES = {
    "digits": ((1, 8, 8), DIGITS),
    "mnist": ((1, 28, 28), DIGITS),
    "fashion_mnist": ((1, 28, 28), DIGITS),
    "cifar10": ((3, 32, 32), CIFAR10),
    "cifar100": ((3, 32, 32), CIFAR100),
    "folder": ((3, 32, 32), ("cat", "dog", "owl")),
}
# What makes any run a matter of seconds: one step, a handful of images, a teacher of the same.
STEP = [
    "trainer=debug",
    "trainer.max_epochs=1",  # an experiment's own number would stand otherwise
    "trainer.check_val_every_n_epoch=1",
    "++data.val_size=0.5",  # data that hold out what they choose themselves have no such key
    "data.batch_size=8",
    "data.eval_batch_size=64",
    "+data.epoch_size=8",
    "logger=none",
]


def generated_texts(root: str, download: bool, tokens: sets.Tokens) -> TensorSource:
    """Random token ids of two classes, a few texts of each."""
    ids = torch.randint(1, 30522, (16, tokens.length), generator=torch.Generator().manual_seed(0))
    split = TensorSplit(ids, torch.arange(16) % 2)
    return TensorSource(split, split, ("negative", "positive"), Modality("text"), facts={"vocab_size": 30522})


def generated_boxes(*_: object) -> TensorSource:
    """Random pictures with a box each."""
    images = torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = TensorSplit(images, torch.tensor([8.0, 8, 40, 40, 1, 0]).repeat(16, 1, 1))
    return TensorSource(split, split, ("cat", "dog"), Modality(), geometry="boxes")


def generated_masks(*_: object) -> TensorSource:
    """Random pictures with masks of two classes."""
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = TensorSplit(images, images[:, 0].long() % 2)
    return TensorSource(split, split, ("ground", "cat"), Modality(), geometry="mask")


def options(group: str) -> list[str]:
    return sorted(str(p.relative_to(CONF / group).with_suffix("")) for p in (CONF / group).rglob("*.yaml"))


def generated(
    name: str, root: str | Path, image_size: int | None = None, download: bool = True, **options: object
) -> Source:
    """Random images in the data set's own shape and classes, a few of each class."""
    shape, classes = SHAPES[name]
    n = 4 * len(classes)
    draw = torch.Generator().manual_seed(0)

    def split() -> Split:
        return Split(
            torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=draw), torch.arange(n) % len(classes)
        )

    return Source(split(), split(), classes)


OVERRIDES = [
    (),
    ("seed=3", "student.widths=[8,8]", "+schedule.soft=[[0, 0], [20, 1]]", "name='a b'", "++ema=0.9"),
    (
        "method=at",
        "net@teacher=mlp",
        "method.hint=2.5",
        "++teacher.recipe.trainer.max_epochs=4",
        "~callbacks.learning_rate",
    ),
    ("experiment=digits/distilled", "optimizer=sgd", "data.augment=[{_target_: a.Crop, pad: 1}]", "optimizer.lr=1e-3"),
    ("experiment=crd/vgg13_vgg8/kd", "+student.more={a: {b: [1, null]}}", "+student.more={c: true}", "threads=null"),
    ("~data", "+data={_target_: my.Points}", "logger=none", "+data.size=3"),
]


@pytest.mark.parametrize("overrides", OVERRIDES)
def test_the_configs_of_tests_are_those_of_hydra(overrides):
    for typed in (
        overrides,
        (*overrides, "seed=5"),
        (),
    ):  # composed, made of what is kept, and what is kept is as it was
        assert OmegaConf.to_yaml(composed("train", typed)) == OmegaConf.to_yaml(by_hydra("train", typed))


@pytest.mark.parametrize(
    "override", ["method.temprature=2", "+method.temperature=2", "sed=1", "method=kdd", "~nothing"]
)
def test_what_hydra_refuses_is_refused_in_tests_too(override):
    with pytest.raises(HydraException) as one:
        by_hydra("train", [override])
    with pytest.raises(HydraException) as other:
        composed("train", [override])
    assert str(one.value) == str(other.value)


def test_every_option_of_the_group_hydra_for_train_composes(tmp_path):
    OmegaConf.to_container(compose_config(tmp_path / "run", "hydra=default"), resolve=True)


def test_every_network_composes_as_student_and_as_teacher(tmp_path):
    for option in options("net"):
        cfg = compose_config(tmp_path / "run", f"net@student={option}", f"net@teacher={option}")
        for role in ("student", "teacher"):
            assert cfg[role]["_target_"].startswith(("litdistill.models.", "litdistill.tasks."))
            assert "num_classes" not in cfg[role]


@pytest.mark.parametrize("root", sorted(p.stem for p in CONF.glob("*.yaml")))
def test_every_command_composes_and_says_how_it_is_called(root):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        compose(root)
    assert f"python scripts/{root}.py" in (CONF / f"{root}.yaml").read_text()
    assert (CONF.parent / "scripts" / f"{root}.py").is_file()


def spoken_digits() -> dict[str, bytes]:
    """Fifteen short recordings of each digit by each speaker of the set, of noise."""
    recordings = {}
    for digit, speaker, number in itertools.product(range(10), ("george", "jackson", "lucas", "theo"), range(15)):
        noise = np.random.default_rng([digit, number, *speaker.encode()]).integers(-999, 999, 400, np.int16)
        file = io.BytesIO()
        wavfile.write(file, 8000, noise)
        recordings[f"{digit}_{speaker}_{number}.wav"] = file.getvalue()
    return recordings


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_trains_a_step(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(datamodule, "load", generated)
    monkeypatch.setattr(sound, "archived", lambda *_: spoken_digits())
    monkeypatch.setattr(sets, "_read_movie_reviews", generated_texts)
    monkeypatch.setattr(coco, "_read", generated_boxes)
    monkeypatch.setattr(bccd, "_read", generated_boxes)
    monkeypatch.setattr(segmentation, "_read_folder", generated_masks)
    made_up = [docstrings.Docstring(f"module{i}", f"Returns {i} of the {i % 7} values.") for i in range(99)]
    monkeypatch.setattr(docstrings, "read", lambda root: made_up)
    text = (CONF / "experiment" / f"{experiment}.yaml").read_text()
    assert text.startswith("# @package _global_\n# ")  # a diff on train.yaml that says what it is
    small = [a.replace("+data.epoch_size", "data.epoch_size") for a in STEP]
    cfg = compose_config(tmp_path / "run", f"experiment={experiment}", *small)
    if cfg.teacher is not None:
        cfg.teacher.allow_chance, cfg.teacher.checkpoint, cfg.teacher.ensemble = True, None, None
        cfg.teacher.generations = 1
    for key in {"per_class", "fraction", "labels"} & cfg.data.keys():
        cfg.data[key] = None
    cfg.latency = False  # two files of ONNX: tests/test_detection_latency.py has it in a run
    if "count" in cfg.data:
        cfg.data.count = 32
    for net in (cfg.student, cfg.teacher or {}):
        if str(net.get("weights")).lower().startswith(("imagenet", "all_minilm_l6_v2")):
            net.weights = None  # nothing is downloaded
    if OmegaConf.is_missing(cfg.student, "checkpoint"):  # an experiment on a student that the user names
        cfg.student.checkpoint = None
    assert cfg.name.startswith(tuple(experiment.split("/")))
    train(cfg)
    assert (tmp_path / "run" / "summary.json").is_file()
