"""What goes wrong around a run: a disk that is full, a folder that cannot be written or is gone, a process that dies, two
commands at once. Each ends with one line that says what to do, or is no trouble at all; and nothing is lost."""

import os
import shutil
import signal
import socket
import subprocess
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.forked import (
    TINY,
    Setup,
    after_epoch,
    as_rank,
    at_batch,
    call,
    finish,
    finished,
    no_pictures,
    same,
    start,
    weights,
)

pytestmark = pytest.mark.process


def last_words(printed: str) -> str:
    """What a command says at its end, once Hydra has listed the overrides."""
    assert "Traceback" not in printed, printed
    return printed.rstrip().splitlines()[-1]


@contextmanager
def mounted(folder: Path, options: str):
    """A file system of its own in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting needs rights that are not given here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, torch.Tensor]:
    """The numbers that an undisturbed run ends with."""
    cwd = tmp_path_factory.mktemp("whole")
    assert call("train", TINY, cwd, no_pictures)[0] == 0
    return weights(finished(cwd)[0])


# -- the disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kilobytes", [24, 104, 188])  # full at the config, in the teacher's training, in the student's
def test_a_full_disk_is_one_line_and_with_room_again_the_run_goes_on(whole, tmp_path, kilobytes):
    with mounted(tmp_path / "disk", f"size={kilobytes}k"):
        arguments = [*TINY, f"runs={tmp_path}/disk/runs"]
        status, printed = call("train", arguments, tmp_path / "a", no_pictures)
        assert status == 2
        assert "No space left on device. Free some space" in last_words(printed).replace(":", "")
        subprocess.run(["mount", "-o", "remount,size=9m", tmp_path / "disk"], check=True)
        status, printed = call("train", [*arguments, "resume=auto"], tmp_path / "b", no_pictures)
        assert status == 0, printed
        assert same(whole, weights(finished(tmp_path / "disk")[0]))


def test_a_read_only_disk_is_one_line(tmp_path):
    with mounted(tmp_path / "disk", "ro"):
        status, printed = call("train", [*TINY, f"runs={tmp_path}/disk/runs"], tmp_path, no_pictures)
        assert status == 2
        assert "Read-only file system" in last_words(printed)
        assert "choose another folder" in last_words(printed)


def test_a_folder_that_becomes_read_only_is_one_line_and_writable_again_the_run_goes_on(whole, tmp_path):
    def freeze(folder: Path) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder / "checkpoints"], check=True)

    with mounted(tmp_path / "may I", "size=1k"):
        pass
    status, printed = call("train", TINY, tmp_path, partial(after_epoch, 4, freeze))
    (checkpoints,) = tmp_path.glob("runs/one/*/checkpoints")
    subprocess.run(["umount", checkpoints], check=True)
    assert status == 2
    assert "ckpt cannot be written: [Errno 30] Read-only file system" in last_words(printed)
    status, printed = call("train", [*TINY, "resume=auto"], tmp_path, no_pictures)
    assert status == 0, printed
    assert same(whole, weights(finished(tmp_path)[0]))


@pytest.mark.parametrize("epoch", [3, 4, 5])  # the student's first, in the middle, its last
def test_a_run_whose_folder_vanishes_says_so_and_leaves_no_part_of_one(tmp_path, epoch):
    status, printed = call("train", TINY, tmp_path, partial(after_epoch, epoch, shutil.rmtree))
    assert status == 2
    assert "has vanished: somebody deleted or moved it. Start the run again" in last_words(printed)
    assert list(tmp_path.glob("runs/one/*")) == []


def test_a_folder_that_was_moved_away_and_back_is_gone_on_with(whole, tmp_path):
    def move(folder: Path) -> None:
        folder.rename(tmp_path / "elsewhere")

    assert call("train", TINY, tmp_path, partial(after_epoch, 4, move))[0] == 2
    (tmp_path / "elsewhere").rename(tmp_path / "runs" / "one" / "back")
    status, printed = call("train", [*TINY, "resume=auto"], tmp_path, no_pictures)
    assert status == 0, printed
    assert same(whole, weights(tmp_path / "runs" / "one" / "back"))


# -- processes that die ----------------------------------------------------------------------------------------------


def die(_: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def lose_a_worker() -> None:
    """Replaces the training batches by those of a process that reads them, and that the system kills."""
    no_pictures()
    from litdistill.training.grouping import GroupedData

    whole_batches = GroupedData.train_dataloader

    class Rows(torch.utils.data.IterableDataset):
        def __init__(self, loader):
            self.loader = loader

        def __len__(self):
            return len(self.loader)

        def __iter__(self):
            for i, rows in enumerate(self.loader):
                if i == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield rows

    def train_dataloader(self):
        return torch.utils.data.DataLoader(Rows(whole_batches(self)), batch_size=None, num_workers=1)

    GroupedData.train_dataloader = train_dataloader


def test_a_killed_data_worker_is_one_line(tmp_path):
    status, printed = call("train", [*TINY, "group=1"], tmp_path, lose_a_worker)
    assert status == 2, printed
    assert "A process that reads the data has died" in last_words(printed)
    assert "resume=auto" in last_words(printed)


TWO = [
    "data.per_class=12", "data.batch_size=16", "student.widths=[8,8]", "teacher=null", "method=supervised", "trainer=ddp",
    "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_epochs=3", "data.epoch_size=320", "threads=1",
    "optimizer.lr=0.02", "name=one", "group=1",
]  # fmt: skip


def two_ranks(cwd: Path, *extra: str, setups: dict[int, Setup] | None = None) -> list[int]:
    """Runs two gloo ranks of one run at once; the exit status of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [start("train", [*TWO, *extra], cwd, partial(as_rank, r, port, (setups or {}).get(r))) for r in range(2)]
    return [finish(rank, 200) for rank in ranks]  # of gloo's own patience it would be 1,800


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_other_at_once_and_in_one_line(tmp_path, rank):
    status = two_ranks(tmp_path, setups={rank: partial(at_batch, 15, die)})
    assert status[rank] == -signal.SIGKILL
    assert status[1 - rank] == 2
    assert "Another rank of this run has died" in last_words((tmp_path / "output").read_text())


@pytest.mark.parametrize(
    ("rank", "signum"), [(1, signal.SIGUSR1), pytest.param(0, signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_to_one_rank_stops_all_at_the_same_step_and_nothing_is_lost(tmp_path, rank, signum):
    assert two_ranks(tmp_path / "whole") == [0, 0]
    hear = partial(at_batch, 5, lambda _: signal.raise_signal(signum))
    # The first rank's status is that of the run; Lightning kills it where another one fails.
    assert two_ranks(tmp_path / "parts", setups={rank: hear}) == [128 + signum, 0]
    (folder,) = (tmp_path / "parts").glob("runs/one/stamp*")
    last = folder / "checkpoints" / "last.ckpt"
    assert 5 <= torch.load(last, weights_only=True)["global_step"] < 10  # in the middle of the first epoch
    assert two_ranks(tmp_path / "parts", f"hydra.run.dir=runs/one/{folder.name}") == [0, 0]
    assert same(*(weights(finished(tmp_path / name)[0]) for name in ("whole", "parts")))
