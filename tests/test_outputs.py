"""A teacher that is a file of outputs: `teacher.outputs`, `RecordedTeacher`, and the formats of such files."""

from __future__ import annotations

import copy
import csv
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from litdistill.data.datamodule import ImageData
from litdistill.data.mixing import Mixup
from litdistill.data.tables import diabetes
from litdistill.distillation.outputs_numbers import LEFT_OUT
from litdistill.distillation.outputs_tables import read_outputs
from litdistill.distillation.recorded import RecordedTeacher
from litdistill.distillation.teacher import FrozenTeacher
from litdistill.distillation.teacher_cache import CacheOptions
from litdistill.methods import AT, DKD, KD, PKT, Pairs, SimKD
from litdistill.methods.pairs import Pair
from litdistill.tasks import Classification, MultiLabel, Regression
from litdistill.training.distill import distill
from litdistill.training.train import train
from litdistill.types import Batch
from litdistill.utils.errors import UserError
from tests.conftest import compose_config
from tests.fits import digits, example, net, same

ROOT = Path(__file__).resolve().parents[1]
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
    assert summary["teacher"]["test"] == {}
    assert summary["student"]["agreement"] is None
    assert summary["time"]["teacher_s"] >= 0
    assert summary["settings"]["teacher.outputs"]
    assert "teacher._target_" not in summary["settings"]
    longer = small(f"teacher.outputs={tmp_path / 'teacher.npy'}", "logger=none", "trainer.max_epochs=3", name="b")
    shutil.copytree(tmp_path / "a" / "checkpoints", tmp_path / "b" / "checkpoints")
    np.save(tmp_path / "teacher.npy", logits.numpy() + 1)
    with pytest.raises(UserError, match="cannot go on with another teacher"):
        train(longer)
    np.save(tmp_path / "moved.npy", logits.numpy())
    longer.teacher.outputs = str(tmp_path / "moved.npy")
    train(longer)
    assert json.loads((tmp_path / "b" / "summary.json").read_text())["epochs"] == 3


# -- files of any make -------------------------------------------------------------------------------------------------


def test_probabilities_values_and_log_odds_become_logits(logits, data, tmp_path):
    p = logits.double().softmax(1)
    p[0] = 0.0
    p[0, 3] = 1.0
    np.savez(tmp_path / "p.npz", probabilities=p.numpy())
    found = recorded(tmp_path / "p.npz", data).outputs(Batch(None, None, torch.arange(COUNT))).logits
    torch.testing.assert_close(found.double().softmax(1), p, atol=1e-6, rtol=1e-5)
    assert found[0].tolist() == [pytest.approx(math.log(1e-12))] * 3 + [0.0] + [pytest.approx(math.log(1e-12))] * 6
    np.save(tmp_path / "said.npy", p.numpy())  # what is not said is seen
    assert torch.equal(
        recorded(tmp_path / "said.npy", data).outputs(Batch(None, None, torch.arange(COUNT))).logits, found
    )
    several = torch.rand(COUNT, 10, dtype=torch.float64)
    np.savez(tmp_path / "several.npz", probabilities=several.numpy())
    odds = recorded(tmp_path / "several.npz", data, MultiLabel()).outputs(Batch(None, None, torch.arange(COUNT))).logits
    torch.testing.assert_close(odds.double().sigmoid(), several, atol=1e-6, rtol=1e-5)
    task = Regression(mean=[5.0] * 10, std=[2.0] * 10)
    np.save(tmp_path / "values.npy", several.numpy())
    numbers = recorded(tmp_path / "values.npy", data, task).outputs(Batch(None, None, torch.arange(COUNT)))
    torch.testing.assert_close(task.values(numbers), several, atol=1e-6, rtol=1e-6)
    assert "-1" not in str(refused(tmp_path / "p.npz", data, task)).split("p.npz")[1]


def test_classes_of_another_order_are_mapped_by_name_and_those_it_lacks_are_left_out(logits, data, tmp_path, caplog):
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    names = [str(int(c)) for c in order]
    save_file({"logits": logits[:, order].contiguous()}, tmp_path / "a.safetensors", {"classes": json.dumps(names)})
    ids = Batch(None, None, torch.tensor([5, 0, 77]))
    assert torch.equal(recorded(tmp_path / "a.safetensors", data).outputs(ids).logits, logits[ids.ids])
    np.savez(tmp_path / "some.npz", logits=logits[:, :5].numpy(), classes=["0", "1", "2", "3", "nine"])
    some = recorded(tmp_path / "some.npz", data)
    assert "lacks 4, 5, 6, 7, 8, 9" in caplog.text
    assert "its nine is left out" in caplog.text
    found = some.outputs(ids)
    assert torch.equal(found.logits[:, :4], logits[ids.ids, :4])
    assert bool((found.logits[:, 4:] == -math.inf).all())
    torch.testing.assert_close(found.heads["members"][:, 0, :4], logits[ids.ids, :4].log_softmax(1))
    top, at = logits.topk(3)
    place = torch.tensor([names.index(str(c)) for c in range(10)])
    save_file(
        {"logits": top.contiguous(), "indices": place[at].to(torch.int16)},
        tmp_path / "top.safetensors",
        {"classes": json.dumps(names), "rest": "drop"},
    )
    full = recorded(tmp_path / "top.safetensors", data).outputs(ids).logits
    assert torch.equal(full.gather(1, at[ids.ids]), top[ids.ids])
    assert int((full == LEFT_OUT).sum()) == 3 * 7


def test_a_student_learns_from_a_file_of_some_of_the_classes(logits, tmp_path):
    np.savez(tmp_path / "some.npz", logits=logits[:, :5].numpy(), classes=list("01234"))
    train_student(read_outputs(tmp_path / "some.npz"), digits(), tmp_path)
    with pytest.raises(UserError, match="needs a teacher of all classes, and this one knows 5 of 10"):
        train_student(read_outputs(tmp_path / "some.npz"), digits(), tmp_path, method=DKD())


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_has_ids_and_a_column_for_each_class(kind, logits, data, tmp_path):
    p = logits.double().softmax(1)
    columns = {"id": list(range(COUNT)), "split": ["train"] * COUNT} | {
        f"{c}": p[:, c].tolist() for c in reversed(range(10))
    }
    columns = {k: [*v, 0 if k == "id" else "test" if k == "split" else 0.1] for k, v in columns.items()}
    path = tmp_path / f"llm.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([columns.keys(), *zip(*columns.values(), strict=True)])
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(columns), path)
    teacher = recorded(path, data)
    found = teacher.outputs(Batch(None, None, torch.arange(COUNT))).logits
    torch.testing.assert_close(found.double().softmax(1), p, atol=1e-6, rtol=1e-5)
    assert teacher.judges("val")
    assert not teacher.judges("test")  # one of 500
    assert teacher.outputs(Batch(None, None, torch.tensor([0])), "test").logits.std() < 1e-6


def test_embeddings_teach_methods_that_compare_pooled_features(data, tmp_path):
    np.savez(tmp_path / "e.npz", embedding=torch.randn(COUNT, 24).numpy())
    teacher = recorded(tmp_path / "e.npz", data)
    assert teacher.outputs(Batch(None, None, torch.tensor([3]))).features["embedding"].shape == (1, 24)
    student = train_student(read_outputs(tmp_path / "e.npz"), digits(), tmp_path, method=PKT())
    assert not same(student.deployed_student, net(8, seed=1))
    pairs = Pairs([Pair("pooled", "embedding", "cosine")])
    train_student(read_outputs(tmp_path / "e.npz"), digits(), tmp_path, method=pairs, max_epochs=1)
    with pytest.raises(UserError, match="gives embedding alone: it has no classes"):
        train_student(read_outputs(tmp_path / "e.npz"), digits(), tmp_path)


def test_batches_of_any_loader_find_their_samples_by_ids(logits, data, tmp_path):
    np.savez(tmp_path / "a.npz", logits=logits.numpy(), ids=np.arange(COUNT))
    batch = data.get_batch("train", data.train_ids)
    rows = [
        {"inputs": x, "labels": y, "ids": i}
        for x, y, i in zip(batch.inputs, batch.targets, data.train_ids, strict=True)
    ]
    train_student(read_outputs(tmp_path / "a.npz"), DataLoader(rows, 40), tmp_path, val=DataLoader(rows, 40))
    pairs = [(row["inputs"], row["labels"]) for row in rows]
    with pytest.raises(UserError, match="these batches have none: yield dicts with ids"):
        train_student(read_outputs(tmp_path / "a.npz"), DataLoader(pairs, 40), tmp_path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for i in range(10):
            Image.fromarray(draw.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(root / name / f"{i:02}.png")
    return root


def test_images_of_a_folder_are_found_by_their_names(photos, tmp_path):
    data = ImageData("folder", photos, image_size=8, val_size=0.2)
    data.setup()
    known = data.sample_names("train")
    assert all((photos / name).is_file() for name in known)
    values = torch.randn(len(known), 2)
    for shorten in (str, lambda name: str(photos / name), lambda name: name.replace("/", "\\")):
        order = torch.randperm(len(known))
        names = [shorten(known[i]) for i in order] + ["cat/of another day.png"]
        rows = torch.cat([values[order], torch.zeros(1, 2)])
        np.savez(tmp_path / "a.npz", logits=rows.numpy(), names=np.array(names), classes=["cat", "dog"])
        assert torch.equal(
            recorded(tmp_path / "a.npz", data).outputs(Batch(None, None, data.train_ids)).logits, values[data.train_ids]
        )
    np.savez(tmp_path / "b.npz", logits=values.numpy(), names=[name.split("/")[1] for name in known])
    assert "stands twice" in refused(tmp_path / "b.npz", data)
    np.savez(tmp_path / "b.npz", logits=values[:1].numpy(), names=["00.png"])
    assert "'00.png' fits 2 files" in refused(tmp_path / "b.npz", data)
    np.savez(tmp_path / "c.npz", logits=values.numpy(), names=[f"bird/{i}.png" for i in range(len(known))])
    assert "none of its 16 names is a file of these data. The first is 'bird/0.png'" in refused(
        tmp_path / "c.npz", data
    )
    np.savez(tmp_path / "d.npz", logits=values[:-3].numpy(), names=list(known[:-3]))
    assert known[int(data.train_ids[data.train_ids >= len(known) - 3][0])] in refused(tmp_path / "d.npz", data)
    assert "no files: give ids" in refused(tmp_path / "d.npz", digits(classes=[0, 1]))


# -- what is refused, in one line --------------------------------------------------------------------------------------


def test_samples_that_do_not_match_are_named(logits, data, tmp_path):
    np.savez(tmp_path / "few.npz", logits=logits[:500].numpy(), ids=np.arange(500))
    first = int(data.train_ids[data.train_ids >= 500][0])
    count = int((data.train_ids >= 500).sum())
    assert f"no outputs of {count} of 120 training samples, the first is id {first}:" in refused(
        tmp_path / "few.npz", data
    )
    np.save(tmp_path / "short.npy", logits[:500].numpy())
    assert "has 500 rows for train samples and no ids, and these data have 1,297" in refused(
        tmp_path / "short.npy", data
    )
    np.savez(tmp_path / "far.npz", logits=logits.numpy(), ids=np.arange(COUNT) + 3)
    said = refused(tmp_path / "far.npz", data)
    assert "3 of 1,297 ids" in said
    assert "the first is 1297" in said
    np.savez(tmp_path / "twice.npz", logits=logits[:2].numpy(), ids=[7, 7])
    assert "7 stands twice" in refused(tmp_path / "twice.npz", data)
    np.savez(tmp_path / "uneven.npz", logits=logits.numpy(), ids=np.arange(5))
    assert "1297 rows of train samples and 5 ids" in refused(tmp_path / "uneven.npz", data)


def test_a_wrong_width_and_wrong_numbers_are_refused(logits, data, tmp_path):
    np.save(tmp_path / "a.npy", logits[:, :7].numpy())
    said = refused(tmp_path / "a.npy", data)
    assert "has 7 numbers for each sample and names no classes, and these data have 10 outputs (0, 1, 2" in said
    np.savez(tmp_path / "b.npz", logits=logits.numpy(), classes=["a", "b"])
    assert "of the classes a, b, and these data have 0, 1" in refused(tmp_path / "b.npz", data)
    np.savez(tmp_path / "c.npz", logits=logits[:, :9].numpy(), classes=list("0123456789"))
    assert "names 10 classes and has 9 numbers" in refused(tmp_path / "c.npz", data)
    for value, words in (
        (math.nan, "NaN or infinite, first for id 11"),
        (math.inf, "NaN or infinite, first for id 11"),
    ):
        bad = logits.clone()
        bad[11, 2] = value
        np.save(tmp_path / "d.npy", bad.numpy())
        assert words in refused(tmp_path / "d.npy", data)
    np.savez(tmp_path / "e.npz", probabilities=logits.numpy())
    assert "outside of 0 to 1: call them logits" in refused(tmp_path / "e.npz", data)
    np.savez(tmp_path / "f.npz", logits=logits[:, :3].numpy(), indices=np.full((COUNT, 3), 12))
    assert "row 0 names a class outside of 0 to 9" in refused(tmp_path / "f.npz", data)


def test_files_that_are_none_are_refused(tmp_path, data):
    cases = {
        "a.npy": (b"", "is damaged, or no .npy file"),
        "b.npz": (b"PK\x03\x04junk", "is damaged, or no .npz file"),
        "c.safetensors": (b"\x10\0\0\0\0\0\0\0{}", "is damaged, or no .safetensors file"),
        "d.csv": (b"", "is empty"),
        "e.csv": (b"id,cat\n1,x\n", "cat is 'x', and no number"),
        "f.csv": (b"id,cat\n1,2,3\n", "line 2: 3 values, and the header names 2"),
        "g.csv": (b"id,cat\n1,\xff\n", "is damaged"),
        "h.csv": (b"id\n1\n", "no column of outputs"),
        "i.txt": (b"", "is one of .safetensors"),
        "j.csv": (b"id,split,cat,dog\n1,dev,1,0\n", "its split is 'dev'; choose train"),
        "l.parquet": (b"PAR1", "is damaged, or no .parquet file"),
    }
    for name, (content, words) in cases.items():
        (tmp_path / name).write_bytes(content)
        assert words in refused(tmp_path / name), name
    assert "does not exist" in refused(tmp_path / "k.npy")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert "is damaged, or no .npy file" in refused(tmp_path / "objects.npy")
    np.savez(tmp_path / "words.npz", what=np.zeros(3))
    assert "has 'what', which no file of outputs has" in refused(tmp_path / "words.npz")


def test_methods_that_need_the_network_say_so(logits, tmp_path):
    np.save(tmp_path / "a.npy", logits.numpy())
    with pytest.raises(UserError, match="is a file of outputs, and here the teacher's network is needed"):
        train_student(read_outputs(tmp_path / "a.npy"), digits(), tmp_path, method=SimKD())
    with pytest.raises(UserError, match="reads features of the teacher"):
        train_student(read_outputs(tmp_path / "a.npy"), digits(), tmp_path, method=AT())


def test_a_teacher_at_chance_is_refused_by_its_file(tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=(COUNT, 10)))
    with pytest.raises(UserError, match="at chance level"):
        train_student(read_outputs(tmp_path / "a.npy"), digits(), tmp_path)


def test_views_of_a_strangers_data_are_taught_what_the_image_is(logits, tmp_path, caplog):
    np.save(tmp_path / "a.npy", logits.numpy())
    told = recorded(tmp_path / "a.npy", digits(augment=["Flip"]))
    assert "has one output a sample, and the data draw views of it" in caplog.text
    views = torch.tensor([1, 0])
    assert torch.equal(told.outputs(Batch(None, None, torch.tensor([4, 9]), views)).logits, logits[[4, 9]])
    assert "these data mix them" in refused(tmp_path / "a.npy", digits(mix=Mixup()))


def test_the_pages_example_of_scikit_learn_teaches(small, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "teachers.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "RandomForest" in block)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "teachers.md", "exec"), {})
    (command,) = [line for line in page.splitlines() if "teacher.outputs=forest.npz" in line]
    words = [word for word in command.split() if "=" in word]
    cfg = compose_config(tmp_path / "run", *words, "trainer=cpu", "trainer.max_epochs=2", "logger=none")
    train(cfg)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["teacher"]["name"] == "forest"
    assert summary["teacher"]["test"]["r2"] > 0.3
    assert summary["student"]["deviation"] > 0


def test_rows_of_a_table_are_found_by_their_number_though_a_test_set_is_held_out_of_them(tmp_path):
    data = diabetes()
    data.setup()
    whole = data.read().train.targets  # 442 rows, of which a fifth is the test set
    np.savez(tmp_path / "a.npz", values=whole.numpy(), names=[str(i) for i in range(len(whole))])
    task = Regression(mean=[150.0], std=[70.0])
    found = recorded(tmp_path / "a.npz", data, task).outputs(Batch(None, None, data.train_ids))
    torch.testing.assert_close(task.values(found).float(), data.train_targets[data.train_ids], atol=1e-3, rtol=1e-5)
