"""Several processes: the same training as one, one folder, and a learning rate that follows the global batch."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.tensor import DTensor

from litdistill.config import build
from litdistill.config.lr_scaling import Scale
from litdistill.config.recipes import recipe_hash
from litdistill.distillation import sharding
from litdistill.training.train import train
from litdistill.utils.errors import UserError
from litdistill.utils.tags import tag
from tests import forked
from tests.conftest import compose_config

# Without BatchNorm, whose statistics are those of a rank, and by SGD, which leaves rounding what it is.
PLAIN = [
    "net@student=mlp", "student.widths=[16]", "net@teacher=mlp", "teacher.widths=[32]", "teacher.checkpoint=null",
    "teacher.allow_chance=true", "optimizer=sgd", "trainer.max_epochs=2", "trainer.log_every_n_steps=1", "threads=1",
    "name=one",
]  # fmt: skip


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def as_rank(rank: int, port: int, then: Callable[[int], object] = lambda rank: None) -> Callable[[], None]:
    """What torchrun makes of a process, the rank that Lightning finds when it is imported, and what else is to be done."""

    def setup() -> None:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test", "RUN_STAMP": "stamp",
        }  # fmt: skip
        rank_zero_only.rank = rank
        forked.no_pictures()
        then(rank)

    return setup


def two(cwd: Path, arguments: list[str], then: Callable[[int], object] = lambda rank: None) -> Path:
    """The folder of a run of two ranks with gloo."""
    port = free_port()
    ranks = [
        forked.start("train", [*arguments, "trainer.accelerator=cpu"], cwd, as_rank(r, port, then)) for r in (0, 1)
    ]
    assert [forked.finish(r) for r in ranks] == [0, 0], (cwd / "output").read_text()
    (folder,) = (cwd / "runs" / "one").iterdir()
    return folder


def one(cwd: Path, arguments: list[str]) -> Path:
    status, said = forked.call("train", [*arguments, "trainer=cpu"], cwd, forked.no_pictures)
    assert status == 0, said
    (folder,) = (cwd / "runs" / "one").iterdir()
    return folder


def curve(folder: Path, name: str) -> list[float]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [e.value for e in events.Scalars(tag(name))]


@pytest.mark.process
@pytest.mark.parametrize("samples", [96, 101, 97])  # at 32 a step: whole batches; 5 left, 3 and 2; 1 left, and none
def test_two_processes_train_as_one_at_the_same_global_batch(samples, tmp_path):
    common = [*PLAIN, f"data.epoch_size={samples}"]
    a = one(tmp_path / "a", [*common, "data.batch_size=32"])
    b = two(tmp_path / "b", [*common, "data.batch_size=16", "trainer=ddp"])
    whole = [i for i in range(2 * -(-samples // 32)) if i % -(-samples // 32) < 3]
    losses = [[curve(f, "train/loss")[i] for i in whole] for f in (a, b)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert curve(b, "val/nll") == pytest.approx(curve(a, "val/nll"), rel=1e-5)
    found, wanted = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for f in (b, a))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    first, second = (json.loads((f / "summary.json").read_text()) for f in (a, b))
    assert first["steps"] == second["steps"]
    assert second["options"]["train/global_batch"] == 32 == first["options"]["train/global_batch"]
    assert "Global batch 32 = 16 x 2 processes; learning rate 0.05, whatever" in (b / "train.log").read_text()


@pytest.mark.process
def test_a_sharded_teacher_teaches_as_a_whole_one(tmp_path):
    held: Callable[[int], object] = lambda rank: note_share(tmp_path / f"share{rank}")  # noqa: E731
    nets = ["net@student=conv4", "student.widths=[8,8]", "net@teacher=conv4", "teacher.widths=[16,16]"]
    rest = [a for a in PLAIN if not a.startswith(("net", "student.widths", "teacher.widths"))]
    arguments = [*nets, *rest, "data.per_class=8", "data.batch_size=16", "method=fitnet", "teacher.cache.mode=off"]
    a = two(tmp_path / "a", [*arguments, "trainer=ddp"])
    b = two(tmp_path / "b", [*arguments, "trainer=fsdp", "trainer.strategy.block=500"], held)
    assert curve(b, "train/loss") == pytest.approx(curve(a, "train/loss"), rel=1e-5)
    first, second = (json.loads((f / "summary.json").read_text()) for f in (a, b))
    for key in ("sha256", "params", "macs", "bytes"):
        assert second["teacher"][key] == first["teacher"][key]
    assert second["teacher"]["test"] == pytest.approx(first["teacher"]["test"])
    assert second["student"]["agreement"] == pytest.approx(first["student"]["agreement"])
    shares = [json.loads((tmp_path / f"share{r}").read_text()) for r in (0, 1)]
    assert [s["units"] > 1 for s in shares] == [True, True]
    count = first["teacher"]["params"]
    assert sum(s["local"] for s in shares) == count
    assert max(s["local"] for s in shares) < 0.55 * count


def note_share(into: Path) -> None:
    """Has this process write how many of the teacher's parameters it holds itself."""
    shard = sharding.shard

    def noting(net, mesh, block):
        units = shard(net, mesh, block)
        local = sum(p.to_local().numel() for p in net.parameters() if isinstance(p, DTensor))
        into.write_text(json.dumps({"units": units, "local": local}))
        return units

    sharding.shard = noting


@pytest.mark.process
def test_a_teacher_on_one_device_is_not_sharded(tmp_path):
    status, said = forked.call(
        "train", [*PLAIN, "trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=1"], tmp_path
    )
    assert status == 2
    assert "choose trainer=auto" in said


@pytest.mark.process
def test_ranks_do_what_the_first_one_has_found(tmp_path):
    """The second sees the teacher's folder finished where the first did not: another job wrote it in between."""

    def late(rank: int) -> None:
        if rank == 1:
            answers = iter([True])
            build.is_complete = lambda folder: next(answers, False)

    arguments = [a for a in PLAIN if not a.startswith("teacher.checkpoint")] + ["data.per_class=8", "trainer=ddp"]
    folder = two(tmp_path, [*arguments, "+teacher.recipe.trainer.max_epochs=1"], late)
    assert json.loads((folder / "summary.json").read_text())["device"]["world_size"] == 2
    (teacher,) = (tmp_path / "runs" / "teachers").glob("*/summary.json")
    assert json.loads(teacher.read_text())["device"]["world_size"] == 2


# -- the learning rate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "batch", "lr", "text"),
    [
        (Scale(128, 2, 1, None, "linear", 0.1), 256, 0.1, "256 = 128 x 2 processes; learning rate 0.1, whatever"),
        (Scale(128, 2, 1, 64, "linear", 0.1), 256, 0.4, "learning rate 0.1 x 4 (linear in the batch, from 64) = 0.4."),
        (Scale(64, 8, 2, 64, "sqrt", 0.001), 1024, 0.004, "1024 = 64 x 8 processes x 2 accumulated; learning rate 0.001 x 4"),
        (Scale(32, 1, 1, 64, "linear", 0.1), 32, 0.05, "32 = 32 x 1 process; "),
    ],
)  # fmt: skip
def test_the_learning_rate_follows_the_global_batch(scale, batch, lr, text):
    assert scale.batch == batch
    assert scale.lr == pytest.approx(lr)
    assert text in str(scale)


def test_the_scaled_rate_is_what_the_optimizer_gets_and_what_is_written_down(small):
    cfg = small("scale.reference_batch=128", "scale.rule=sqrt", "data.batch_size=32", "optimizer.lr=0.01", "teacher=null",
                "method=supervised")  # fmt: skip
    train(cfg)
    folder = Path(cfg.folder)
    assert curve(folder, "lr-Adam")[0] == pytest.approx(0.005)
    options = json.loads((folder / "summary.json").read_text())["options"]
    assert (options["train/lr"], options["train/scaled_lr"]) == (0.01, pytest.approx(0.005))
    assert (options["train/batch_size"], options["train/global_batch"]) == (32, 32)


@pytest.mark.parametrize(("wrong", "words"), [("rule=cubic", "linear or sqrt"), ("reference_batch=0", "or null")])
def test_a_scale_that_is_none_is_refused(small, wrong, words):
    with pytest.raises(UserError, match=words):
        train(small(f"scale.{wrong}"))


def test_a_scaled_run_is_another_recipe_and_an_unscaled_one_is_what_it_was(tmp_path):
    plain = compose_config(tmp_path / "run")
    assert recipe_hash(compose_config(tmp_path / "run", "scale.rule=sqrt")) == recipe_hash(plain)
    assert recipe_hash(compose_config(tmp_path / "run", "scale.reference_batch=64")) != recipe_hash(plain)
