"""Rows of a cache on a disk: torn, damaged, shared by processes, killed in a write, without room."""

import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from litdistill.data.augment import Crop
from litdistill.distillation.cache_room import allocated, make_room
from litdistill.distillation.row_store import RowStore, fingerprint
from litdistill.distillation.teacher_cache import CacheOptions, TeacherCache
from litdistill.types import Batch
from litdistill.utils.errors import UserError
from tests.caches import CPU, digits, frozen, run


@pytest.mark.parametrize("damage", ["row", "place", "mark", "half"])
def test_a_row_that_was_torn_or_damaged_does_not_count(tmp_path, damage):
    values = torch.randn(6, 5)
    store = RowStore(6, 5, torch.float32, CPU, tmp_path / "a")
    store.put(torch.arange(4), values[:4])
    again = RowStore(6, 5, torch.float32, CPU, tmp_path / "a")
    assert again.valid.tolist() == [True] * 4 + [False] * 2
    assert torch.equal(again.get(torch.arange(4))[0], values[:4])
    if damage == "row":
        again.values.view(torch.int32)[2, 3] ^= 1  # a single bit
    elif damage == "place":
        again.values[2], again.marks[2] = again.values[3].clone(), again.marks[3].clone()
    elif damage == "mark":
        again.marks[2] = 0
    else:
        again.values[2, :2] = 0
    assert RowStore(6, 5, torch.float32, CPU, tmp_path / "a").valid.tolist() == [True, True, False, True, False, False]


def test_a_fingerprint_is_its_formula_and_never_zero():
    values = torch.zeros(3, 4)
    assert (fingerprint(values, torch.arange(3)) != 0).all()
    assert len(set(fingerprint(values, torch.arange(3)).tolist())) == 3
    swapped = torch.tensor([[1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 3.0, 4.0]])
    marks = fingerprint(swapped, torch.zeros(2, dtype=torch.int64))
    assert marks[0] != marks[1]


def test_a_file_that_is_not_the_teachers_is_dropped_with_a_warning(tmp_path, caplog):
    data, teacher = digits(), frozen()
    batch = data.get_batch("train", data.train_ids, None)
    cache = TeacherCache(teacher, data, CPU, tmp_path)
    right = cache.outputs(batch).logits
    cache.store.put(torch.arange(cache.samples), right[data.train_ids.argsort()] + 1)  # well-formed, and wrong
    other = TeacherCache(teacher, data, CPU, tmp_path)
    assert torch.equal(other.outputs(batch).logits, right)
    assert "computed anew" in caplog.text


def test_processes_that_run_at_once_share_their_rows(tmp_path):
    data, teacher = digits(), frozen()
    batch = data.get_batch("train", data.train_ids, None)
    a, b = (TeacherCache(teacher, data, CPU, tmp_path) for _ in range(2))
    b.outputs(data.get_batch("train", data.train_ids[:1], None))  # both are open before either has computed the rest
    first = a.outputs(batch).logits
    assert torch.equal(b.outputs(batch).logits, first)
    assert b.computed == 1


@pytest.mark.process
def test_a_kill_in_the_middle_of_a_write_leaves_whole_rows_only(tmp_path):
    code = f"""
        import os, torch
        from pathlib import Path
        from litdistill.distillation import row_store
        store = row_store.RowStore(64, 1000, torch.float32, torch.device("cpu"), Path({str(tmp_path)!r}) / "a")
        store.put(torch.arange(10), torch.full((10, 1000), 2.0))
        row_store.fingerprint = lambda *a: os.kill(os.getpid(), 9)   # after the rows, before their marks
        store.put(torch.arange(5, 20), torch.full((15, 1000), 3.0))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -9
    store = RowStore(64, 1000, torch.float32, CPU, tmp_path / "a")
    assert store.valid.nonzero().flatten().tolist() == [0, 1, 2, 3, 4]


def test_a_full_disk_costs_the_file_and_not_the_run(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    losses, *_, distiller = run(tmp_path, CacheOptions("disk", tmp_path / "cache"))
    assert "kept in memory" in caplog.text
    assert "No space left" in caplog.text
    assert distiller.cache.computed == 120
    assert len(losses) == 12


def test_a_bit_far_out_in_a_wide_row_counts_too():
    values = torch.randn(1, 1000)
    before = fingerprint(values, torch.zeros(1, dtype=torch.int64))
    values.view(torch.int32)[0, 900] ^= 1
    assert fingerprint(values, torch.zeros(1, dtype=torch.int64)) != before


def test_a_cache_that_is_used_counts_as_new(tmp_path):
    options = CacheOptions("disk", tmp_path)
    *_, distiller = run(tmp_path, options)
    os.utime(distiller.cache.folder, (1, 1))
    run(tmp_path, options)
    assert distiller.cache.folder.stat().st_mtime > 1e9


def test_the_longest_unused_goes_first(tmp_path):
    for i, name in enumerate("abc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.rows").write_bytes(b"0" * 100)
        os.utime(tmp_path / name, (i, i))
    make_room(tmp_path / "new", needed=50, limit=260)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "c"]
    make_room(tmp_path / "b", needed=160, limit=260)  # one that is there already and has to grow
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "c"]
    make_room(tmp_path / "b", needed=160, limit=250)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"]
    make_room(tmp_path / "new", needed=50, limit=60)
    assert not list(tmp_path.iterdir())


def test_rows_that_are_no_numbers_are_not_believed(tmp_path, caplog):
    options = CacheOptions("disk", tmp_path)
    *_, distiller = run(tmp_path, options)
    store = distiller.cache.store
    rows = store.valid.nonzero().flatten()
    store.put(rows, torch.full((len(rows), 10), torch.nan))  # with the marks that belong to them
    losses, *_ = run(tmp_path, options)
    assert "does not hold the teacher's outputs" in caplog.text
    assert all(map(math.isfinite, losses))


def test_outputs_beyond_half_precision_are_refused():
    store = RowStore(2, 3, torch.float16, CPU)
    store.put(torch.tensor([0]), torch.full((1, 3), 60000.0))
    with pytest.raises(UserError, match="float32"):
        store.put(torch.tensor([1]), torch.full((1, 3), 70000.0))


@pytest.mark.parametrize("folder", [None, "caches"])
def test_few_samples_take_the_room_of_few(tmp_path, folder):
    data = digits(augment=[Crop(1)])
    data.train_ids = torch.tensor([3, 500, 4, 900])
    where = None if folder is None else tmp_path / folder
    teacher = frozen(["layer1"])
    cache = TeacherCache(teacher, data, CPU, where)
    rows = 4 * 9
    assert cache.bytes() == rows * (4 * (16 * 8 * 8 + 10) + 8)
    ids, views = data.train_ids.repeat(9), torch.arange(9).repeat_interleave(4)
    batch = Batch(data.get_batch("train", ids, views).inputs, None, ids, views=views)
    for again in (False, True):
        right, found = teacher(batch), cache.outputs(batch)
        assert torch.allclose(found.heads["logits"], right.heads["logits"], atol=1e-5)
        assert torch.allclose(found.features["layer1"], right.features["layer1"], atol=1e-5)
        assert cache.computed == rows, again
    cache.start_epoch()
    assert cache.complete
    assert len(cache.store.valid) == rows
    if where is not None:
        [file] = where.glob("*/outputs.rows")
        assert file.stat().st_size == rows * 4 * (16 * 8 * 8 + 10)
        data.train_ids = data.train_ids.flip(0)  # in another order they are the same samples
        again = TeacherCache(teacher, data, CPU, where)
        assert torch.equal(again.outputs(batch).heads["logits"], found.heads["logits"])
        assert again.computed == 0


def test_few_samples_have_a_file_of_their_own_and_many_share_one(tmp_path):
    data, teacher = digits(), frozen()
    every, others = list(range(1000)), list(range(500, 1200))
    for ids, new in (([3, 500], 2), ([3, 900, 901], 3), (every, 1000), (others, 200), ([500, 3], 0)):
        data.train_ids = torch.tensor(ids)
        cache = TeacherCache(teacher, data, CPU, tmp_path)
        batch = Batch(data.get_batch("train", data.train_ids).inputs, None, data.train_ids)
        assert torch.allclose(cache.outputs(batch).heads["logits"], teacher(batch).heads["logits"], atol=1e-5)
        assert cache.computed == new
    assert len(list(tmp_path.glob("*/outputs.rows"))) == 3


def test_blocks_that_are_there_are_not_allocated_again(tmp_path, monkeypatch):
    calls, allocate = [], os.posix_fallocate
    monkeypatch.setattr(os, "posix_fallocate", lambda *a: calls.append(a[1:]) or allocate(*a))
    for rows, new in ((64, 2), (64, 0), (32, 0), (128, 1)):  # the marks of 128 rows are in the block of 64
        calls.clear()
        RowStore(rows, 2048, torch.float32, CPU, tmp_path / "a")
        assert len(calls) == new
    assert allocated(tmp_path / "a.rows") == 128 * 4 * 2048
