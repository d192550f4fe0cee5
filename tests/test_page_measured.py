"""What the page measures of real runs: the file of an int8 student, the temperature, and the images that are spoilt."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from litdistill.evaluation import robustness
from litdistill.evaluation.calibration import fit_temperature
from litdistill.evaluation.evaluate import rebuild
from litdistill.evaluation.predictions import collect, spread_out
from litdistill.export.predict import load
from litdistill.report import collect as page
from litdistill.report.collect import Seed, Settings, groups
from litdistill.report.sections import starts_from
from litdistill.training.train import train
from litdistill.types import Batch
from litdistill.utils.files import write_text
from tests.conftest import SMALL, compose_config

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def measured(teachers, tmp_path_factory):
    """A float and an int8 run, and their page's rows by precision."""
    folder = tmp_path_factory.mktemp("measured")
    for name, *overrides in (("float",), ("int8", "compress=int8", "technique=int8")):
        if overrides:
            pytest.importorskip("torchao")
        cfg = compose_config(folder / name, *SMALL, *overrides)
        cfg.runs = str(teachers)
        write_text(folder / name / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
        train(cfg)
    (group,) = groups([folder], folder / "page", Settings(robustness=0, device="cpu"))
    assert group.problems == []
    return group, {row.precision: row for row in group.rows if not row.teacher}


def test_an_int8_row_is_measured_with_its_file(measured):
    row = measured[1]["int8"]
    (seed,) = row.seeds
    data, distiller = rebuild(seed.folder)
    file = load(seed.folder / "export" / "student-int8.onnx").run
    images = data.source.test.images[data.test_ids]
    chunks = images.split(data.eval_batch_size)
    expected = np.concatenate([file(chunk.numpy()) for chunk in chunks])
    assert np.array_equal(seed.test.logits.numpy(), expected)
    assert not torch.equal(
        seed.test.logits, collect(distiller.deployed_student, data, "test")[0]
    )  # which rounds elsewhere
    assert np.array_equal(seed.val.logits.numpy(), file(data.source.train.images[data.val_ids].numpy()))
    assert torch.equal(seed.test_targets, data.source.test.targets[data.test_ids])
    assert torch.equal(seed.val_targets, data.source.train.targets[data.val_ids])
    assert row.file == seed.folder / "export" / "student-int8.onnx"


def test_the_temperature_is_fitted_on_the_validation_set(measured):
    group, rows = measured
    for row in (rows["fp32"], group.teacher):
        (seed,) = row.seeds
        data, distiller = rebuild(seed.folder)
        net = distiller.teacher.net if row.teacher else distiller.deployed_student
        assert seed.temperature == fit_temperature(*collect(net, data, "val"))
        assert seed.temperature != fit_temperature(*collect(net, data, "test"))
    (seed,) = rows["int8"].seeds
    assert seed.temperature == fit_temperature(seed.val.logits, seed.val_targets)


# -- the images that are spoilt ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "of"), [(1, 1), (1, 9), (9, 9), (20, 9), (7, 300), (999, 1000), (10_000, 10_001)])
def test_images_are_evenly_spaced_and_none_comes_twice(n, of):
    chosen = spread_out(n, of)
    assert len(chosen.unique()) == len(chosen) == min(n, of)
    assert chosen[0] == 0
    assert n == 1 or chosen[-1] == of - 1
    steps = chosen.diff()
    assert n == 1 or int(steps.max() - steps.min()) <= 1


class Sorted:
    """As much of a data set as is asked for: sorted by class, each image of its class' gray, which the network reads."""

    class_names = tuple("abcde")
    val_ids = test_ids = torch.arange(100)

    def __init__(self, shift: int = 0):
        self.targets = torch.arange(5).repeat_interleave(20)
        gray = (40 * self.targets + shift).to(torch.uint8)[:, None, None, None]
        self.images = gray.expand(100, 1, 8, 8).contiguous()

    def batches(self, split, device="cpu"):
        yield Batch(self.images, self.targets, torch.arange(100))


class Gray(torch.nn.Module):
    def forward(self, x):
        return -((x.float().mean((1, 2, 3))[:, None] - 40 * torch.arange(5)) ** 2) / 100


def spoil(monkeypatch, out: Path, data: Sorted) -> tuple[Seed, list[torch.Tensor], list[torch.Tensor]]:
    """A seed measured on a few images, what was corrupted, and the targets that accuracies were of."""
    seen, compared, correct = [], [], robustness.correct
    monkeypatch.setattr(robustness, "CORRUPTIONS", {"none": lambda images, severity: seen.append(images) or images})
    monkeypatch.setitem(robustness.STRENGTHS, "quick", {"none": lambda logits_of, images, targets, epsilon: images})
    monkeypatch.setattr(robustness, "correct", lambda run, x, y: compared.append(y) or correct(run, x, y))
    group, spoilt, settings = page.Group("sorted", {"name": "sorted"}), {}, Settings(robustness=10, epsilons=(4,))
    page._adopt(group, data, spoilt, settings)
    seed = Seed({}, out, sha256="s")
    page._measure(seed, Gray(), None, data, "cpu", group, spoilt, out, settings)
    return seed, seen, compared


def test_of_images_sorted_by_class_every_class_is_spoilt(monkeypatch, tmp_path):
    seed, seen, compared = spoil(monkeypatch, tmp_path, Sorted())
    for images in seen:
        assert (images[:, 0, 0, 0].int() // 40).bincount().tolist() == [2, 2, 2, 2, 2]
    for targets in compared:
        assert targets.bincount().tolist() == [2, 2, 2, 2, 2]
    assert compared
    # The network is always right, so that an image that met another one's label would show.
    assert seed.robustness == {
        "corruptions": {"none": [1.0] * 5},
        "attacks": {"none": [1.0, 1.0], "all at once": [1.0, 1.0]},
    }


def test_what_was_kept_for_other_images_is_not_taken(monkeypatch, tmp_path):
    assert spoil(monkeypatch, tmp_path, Sorted())[2]
    assert not spoil(monkeypatch, tmp_path, Sorted())[2]  # the same images: read
    assert spoil(monkeypatch, tmp_path, Sorted(shift=1))[2]


# -- what a row starts from --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (None, "nothing"),
        ({"from": "teacher", "images": 1168, "method": "supervised"}, "the teacher (1,168 images)"),
        ({"from": "teacher", "images": None}, "the teacher (unknown images)"),
        ({"from": "network", "images": 100, "method": "kd", "run": "x"}, "a network of 100 images (kd)"),
        ({"from": "network", "images": None}, "a network of unknown images"),
        ({"from": "published", "images": None}, "published weights"),
    ],
)
def test_what_a_row_starts_from_is_said(start, words):
    assert starts_from({"start": json.loads(json.dumps(start))}) == words
