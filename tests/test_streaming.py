"""Images that stay on disk, in folders or in shards: batches equal to those of memory, to the bit; damage has words."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from PIL import Image

from litdistill.data.datamodule import ImageData
from litdistill.data.loading import IndexLoader, Rows
from litdistill.data.mixing import Mixup
from litdistill.data.sources import fingerprint, load
from litdistill.data.streaming import Encoded, Prefetched
from litdistill.utils.errors import UserError
from tests.streams import data, fit, root_fixture, same, sharded_fixture  # noqa: F401


@pytest.mark.process
@pytest.mark.parametrize("mix", [None, Mixup(1.0)])
def test_a_run_sees_what_it_would_see_in_memory(root, sharded, tmp_path, mix):
    expected = fit(data(root, True, mix=mix), tmp_path)
    assert len(expected) == 2 * (6 + 2)
    assert expected == fit(data(root, False, mix=mix), tmp_path)
    assert expected == fit(data(sharded, False, "shards", mix=mix), tmp_path)


def test_without_workers_and_without_a_trainer_too(root, sharded):
    memory = data(root, True)
    for other in (data(root, False, workers=0), data(sharded, False, "shards"), data(sharded, True, "shards")):
        assert (memory.mean, memory.std) == (other.mean, other.std)
        for split in ("train", "val", "test"):
            assert same(list(memory.batches(split)), list(other.batches(split)))
        ids = torch.tensor([40, 3, 3])
        assert same([memory.get_batch("train", ids, ids % 18)], [other.get_batch("train", ids, ids % 18)])
        assert torch.equal(memory.source.test.images[2:5], other.source.test.images[2:5])


@pytest.mark.process
@pytest.mark.parametrize("group", [0, 3])
def test_a_loader_goes_on_in_the_middle_of_an_epoch_and_on_each_rank(root, group):
    def batches(resident: bool, done: int, rank: int, world: int) -> list:
        found = data(root, resident)
        loader = found.train_loader(rank, world, group)
        loader.load_state_dict({"epoch": 3, "done": done})
        loader.set_epoch(3)
        made = [found.make_batch(rows) for rows in loader]
        return [b for g in made for b in g.minibatches()] if group else made

    for rank, world in ((0, 1), (0, 2), (1, 2)):
        whole = batches(True, 0, rank, world)
        assert same(whole, batches(False, 0, rank, world))
        assert same(whole[2:], batches(False, 2, rank, world))
    both = [batches(False, 0, rank, 2)[0].ids for rank in (0, 1)]
    alone = torch.cat([b.ids for b in batches(True, 0, 0, 1)[:2]])
    assert torch.equal(torch.cat(both), alone)


def test_a_batch_that_workers_have_read_ahead_was_not_trained_on(root):
    loader = data(root, False).train_loader()
    batches = iter(loader)
    next(batches), next(batches)
    assert loader.state_dict() == {"epoch": 0, "done": 2}
    again = data(root, True).train_loader()
    again.load_state_dict(loader.state_dict())
    assert same([[next(batches).ids]], [[next(iter(again)).ids]])


def test_epochs_follow_what_is_set_though_workers_live_on(root):
    loader = data(root, False).train_dataloader()
    first = [rows.ids for rows in loader]
    loader.set_epoch(1)
    second = [rows.ids for rows in loader]
    again = [rows.ids for rows in data(root, True).train_dataloader()]
    assert same([first], [again])
    assert sorted(torch.cat(first).tolist()) == sorted(torch.cat(second).tolist())
    assert not same([first], [second])


def test_nothing_is_drawn_from_the_generator_that_dropout_uses(root):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(data(root, False).train_dataloader())
    assert torch.equal(torch.rand(3), expected)


def test_auto_goes_by_bytes(root):
    size = 75 * 3 * 9 * 9
    for factor, resident in ((1.01, True), (0.99, False)):
        found = ImageData("folder", root, 9, val_size=0.2, resident="auto", memory_gb=factor * size / 1e9)
        assert isinstance(found.source.train.images, Encoded) is not resident
    with pytest.raises(UserError, match=r"data\.resident=perhaps"):
        ImageData("folder", root, 9, resident="perhaps")


def test_what_is_known_of_images_changes_with_them(root, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    before = data(copy, False, mean=[0.5] * 3, std=[0.5] * 3)
    assert fingerprint(before.source.train) == fingerprint(load("folder", copy, 9, memory=0).train)
    Image.new("RGB", (12, 12)).save(copy / "train" / "a" / "01.jpg")
    after = data(copy, False, mean=[0.5] * 3, std=[0.5] * 3)
    assert before.sha256 != after.sha256
    assert fingerprint(before.source.test) == fingerprint(after.source.test)


def test_a_damaged_image_is_named(root, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    (copy / "train" / "b" / "07.jpg").write_bytes(b"no image")
    found = data(copy, False, mean=[0.5] * 3, std=[0.5] * 3)
    with pytest.raises(UserError, match=r"b/07\.jpg cannot be read"):
        list(found.batches("train" if 27 in found.train_ids else "val"))


class Killer:
    """Images whose reader is killed at the third batch."""

    def __getitem__(self, ids: torch.Tensor) -> torch.Tensor:
        if 20 in ids.tolist():
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(len(ids), 1, 2, 2, dtype=torch.uint8)


@pytest.mark.parametrize("earlier", [False, True])
def test_a_killed_worker_is_an_error_with_words_and_not_a_hang(monkeypatch, earlier):
    monkeypatch.setattr("litdistill.data.streaming.CHECK", 1)
    rows = IndexLoader(lambda _: Rows("train", torch.arange(80)), 80, 10)
    list(Prefetched({"train": torch.zeros(80)}, lambda rows: rows.ids, workers=1)(rows))  # torch's handler is there
    loader = Prefetched({"train": Killer()}, lambda rows: rows.ids, workers=2)
    handler = signal.getsignal(signal.SIGCHLD)
    if earlier:  # as after a training in this process: Lightning restores what handled signals before it
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        with pytest.raises(UserError, match=r"has ended or hangs \(.+\)\..*data\.workers"):
            list(loader(rows))
    finally:
        signal.signal(signal.SIGCHLD, handler)


def broken_off() -> RuntimeError:
    """What torch makes of a message that ended early, where it has seen by then that the worker is dead."""
    error = RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    error.__cause__ = EOFError()
    return error


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "Connection reset by peer"), broken_off()])
def test_a_worker_that_dies_while_it_sends_is_an_error_with_words_too(monkeypatch, error):
    class Batches:
        ended = False

        def __iter__(self):
            return self

        def __next__(self):
            raise error

        def _shutdown_workers(self):
            self.ended = True

    batches = Batches()
    rows = IndexLoader(lambda _: Rows("train", torch.arange(8)), 8, 2)
    loader = Prefetched({}, lambda rows: rows.ids, workers=0)
    monkeypatch.setattr(loader, "loader", batches)
    with pytest.raises(UserError, match=r"has ended or hangs \(.+\)\..*data\.workers"):
        list(loader(rows))
    assert batches.ended


@pytest.mark.process
def test_a_worker_collects_nothing_that_was_garbage_before_it():
    """In a process of its own, as this one leaves such garbage alone after every fork."""
    program = """
        import gc, os, torch
        from litdistill.data.loading import IndexLoader, Rows
        from litdistill.data.streaming import Prefetched

        class Session:
            def __del__(self):
                os._exit(7)  # the real one never returns

        class Images:
            def __getitem__(self, ids):
                gc.collect()
                return torch.zeros(len(ids))

        gc.disable()
        session = Session()
        session.itself = session
        del session
        rows = IndexLoader(lambda _: Rows("train", torch.arange(4)), 4, 2)
        assert len(list(Prefetched({"train": Images()}, lambda rows: rows.ids, workers=1)(rows))) == 2
        os._exit(0)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Sleeper(Killer):
    def __getitem__(self, ids: torch.Tensor) -> torch.Tensor:
        time.sleep(60)
        return torch.zeros(0)


@pytest.mark.process
def test_a_worker_that_gives_nothing_is_an_error_too(monkeypatch):
    monkeypatch.setattr("litdistill.data.streaming.TIMEOUT", 1)
    rows = IndexLoader(lambda _: Rows("train", torch.arange(8)), 8, 2)
    loader = Prefetched({"train": Sleeper()}, lambda rows: rows.ids, workers=1)
    with pytest.raises(UserError, match="timed out"):
        list(loader(rows))
