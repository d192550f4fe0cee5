"""A teacher that is a file of outputs: `teacher.outputs`, `RecordedTeacher`, and the formats of such files."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from litdistill.distillation.outputs_tables import read_outputs
from litdistill.distillation.recorded import RecordedTeacher
from litdistill.distillation.teacher import FrozenTeacher
from litdistill.methods import KD
from litdistill.tasks import Classification
from litdistill.training.distill import distill
from litdistill.training.train import train
from litdistill.utils.errors import UserError
from tests.fits import digits, example, net, same

COUNT = 1297  # digits in the training files, those that are validated on too


@pytest.fixture(scope="module")
def data():
    return digits()


@pytest.fixture(scope="module")
def taught():
    """A network that knows the digits better than chance."""
    data = digits(per_class=60)
    return distill(
        net(16), None, data, max_epochs=6, out="/tmp/unused", trainer={"logger": False, "accelerator": "cpu"}
    ).deployed_student


def logits_of(network, data, split, ids):
    """Its logits in batches of one size, as a run computes them."""
    teacher, rows = FrozenTeacher(copy.deepcopy(network), None, (), example(data)), []
    for part in ids.split(data.batch_size):
        full = torch.cat([part, part[:1].expand(data.batch_size - len(part))])
        rows.append(teacher(data.get_batch(split, full)).logits[: len(part)])
    return torch.cat(rows)


@pytest.fixture(scope="module")
def logits(taught, data):
    """Its logits for all digits of the training files, (1297, 10)."""
    return logits_of(taught, data, "train", torch.arange(COUNT))


def recorded(path, data, task=None):
    return RecordedTeacher(read_outputs(path), task or Classification(), data)


def refused(path, data=None, task=None):
    with pytest.raises(UserError) as error:
        recorded(path, data, task)
    assert "\n" not in str(error.value)
    return str(error.value)


def train_student(teacher, data, tmp_path, **options):
    options = {
        "trainer": {"logger": False, "accelerator": "cpu"},
        "max_epochs": 2,
        "out": tmp_path,
        "method": KD(),
        **options,
    }
    return distill(net(8, seed=1), teacher, data, **options)


# -- a student of the file is the student of the network ---------------------------------------------------------------


@pytest.mark.parametrize("cache", ["off", "memory"])
@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors"])
def test_a_student_of_a_file_is_that_of_the_network_to_the_bit(kind, cache, taught, logits, tmp_path):
    from litdistill.distillation.teacher_cache import CacheOptions

    path, data = tmp_path / f"teacher.{kind}", digits()
    if kind == "npy":
        np.save(path, logits.numpy())
    elif kind == "npz":
        np.savez(path, logits=logits.flip(0).numpy(), ids=np.arange(COUNT)[::-1])
    else:
        save_file({"logits": logits}, path)
    live = train_student(copy.deepcopy(taught), digits(), tmp_path, cache=CacheOptions(cache))
    told = train_student(read_outputs(path), data, tmp_path, cache=CacheOptions(cache))
    assert same(live.deployed_student, told.deployed_student)
    assert told.cache is None
    assert live.on_validation.metrics.keys() == told.on_validation.metrics.keys()
    other = train_student(read_outputs(path), digits(), tmp_path, method=KD(temperature=1.0))
    assert not same(live.deployed_student, other.deployed_student)


def test_a_run_is_taught_by_a_file_and_resumes_with_no_other(small, logits, tmp_path):
    np.save(tmp_path / "teacher.npy", logits.numpy())
    cfg = small(f"teacher.outputs={tmp_path / 'teacher.npy'}", "logger=none", name="a")
    train(cfg)
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["teacher"]["name"] == "teacher"
    assert summary["teacher"]["test"] is None
    assert summary["student"]["agreement"] is None
    assert summary["time"]["teacher_s"] >= 0
    assert summary["settings"]["teacher.outputs"]
    assert "teacher._target_" not in summary["settings"]
    longer = small(f"teacher.outputs={tmp_path / 'teacher.npy'}", "logger=none", "trainer.max_epochs=3", name="b")
    shutil_copy(tmp_path / "a" / "checkpoints", tmp_path / "b" / "checkpoints")
    np.save(tmp_path / "teacher.npy", logits.numpy() + 1)
    with pytest.raises(UserError, match="cannot go on with another teacher"):
        train(longer)
    np.save(tmp_path / "moved.npy", logits.numpy())
    longer.teacher.outputs = str(tmp_path / "moved.npy")
    train(longer)
    assert json.loads((tmp_path / "b" / "summary.json").read_text())["epochs"] == 3


def shutil_copy(source, target):
    import shutil

    shutil.copytree(source, target)
