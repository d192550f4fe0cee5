"""Images that stay on disk, in folders or in shards: batches equal to those of memory, to the bit; damage has words."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from PIL import Image

from litdistill.data import shards
from litdistill.data.augment import Crop, Flip
from litdistill.data.datamodule import ImageData
from litdistill.data.loading import IndexLoader, Rows
from litdistill.data.mixing import Mixup
from litdistill.data.sources import fingerprint, load
from litdistill.data.streaming import Encoded, Prefetched
from litdistill.utils.errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Three classes of 20 and 5 images of various sizes, some gray, some JPEG."""
    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 5)):
        for label in "abc":
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                shape = (10 + i % 4, 13 - i % 5) if i % 6 == 0 else (10 + i % 4, 13 - i % 5, 3)
                image = Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8))
                image.save(folder / split / label / f"{i:02}.{'jpg' if i % 3 else 'png'}")
    return folder


@pytest.fixture(scope="module")
def sharded(root, tmp_path_factory) -> Path:
    pytest.importorskip("litdata")
    out = tmp_path_factory.mktemp("shards") / "out"
    shards.write(root, out, chunk_bytes=4000)
    assert len(list((out / "train").glob("*.bin"))) > 3
    return out


def data(place: Path, resident: bool, name: str = "folder", **options) -> ImageData:
    options = {"augment": [Crop(1), Flip()], "batch_size": 8, "workers": 2, "eval_batch_size": 7} | options
    found = ImageData(name, place, image_size=9, val_size=0.2, resident=resident, **options)
    found.setup()
    assert isinstance(found.source.train.images, Encoded) is not resident
    return found


class Recorder(LightningModule):
    """Keeps all that a step gets; `stop`: the number of the step before which it raises."""

    def __init__(self, stop: int = -1):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.got, self.stop = [], stop

    def training_step(self, batch, batch_idx):
        if len(self.got) == self.stop:
            raise KeyboardInterrupt
        views = batch.views.tolist() if batch.views is not None else None
        self.got.append((batch.inputs.numpy().tobytes(), batch.targets.tolist(), batch.ids.tolist(), views))
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        self.got.append((batch.inputs.numpy().tobytes(), batch.targets.tolist(), batch.ids.tolist(), None))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(found: ImageData, tmp_path: Path) -> list:
    model = Recorder()
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, datamodule=found)
    return model.got


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for one, other in zip(a, b, strict=True)
        for x, y in zip(one, other, strict=True)
    )


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


# -- shards ------------------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_shards_are_read_through_a_cache_as_from_a_store(sharded, root, tmp_path, monkeypatch):
    """`local:` is the scheme by which LitData treats a folder like an object store."""
    there, here = load("shards", f"local:{sharded}", 9, memory=0), load("folder", root, 9)
    ids = torch.tensor([59, 0, 17])
    assert torch.equal(there.train.images[ids], here.train.images[ids])
    assert there.classes == here.classes
    assert torch.equal(there.train.targets, here.train.targets)


class Evil:
    def __reduce__(self):
        return (os.mkdir, (os.environ["EVIL"],))


def test_shards_of_a_stranger_unpickle_nothing(sharded, tmp_path, monkeypatch):
    from litdata.streaming.writer import BinaryWriter

    trace = tmp_path / "evil"
    monkeypatch.setenv("EVIL", str(trace))
    copy = tmp_path / "copy"
    shutil.copytree(sharded, copy)
    shutil.rmtree(copy / "train")
    writer = BinaryWriter(str(copy / "train"), chunk_bytes=10_000)
    for i in range(60):
        writer[i] = pickle.dumps(Evil())
    writer.done()
    writer.merge()
    index = copy / "train" / "index.json"
    honest = index.read_text()

    def read() -> None:
        load("shards", copy, 9)

    with pytest.raises(UserError, match="cannot be read"):  # bytes that are no image, and nothing more
        read()
    for key, value in (
        ("data_format", ["pickle"]),
        ("data_format", ["bytes", "pickle"]),
        ("data_spec", '[1, {"type": "collections.defaultdict", "context": "{}", "children_spec": []}]'),
        ("item_loader", "ParquetLoader"),
    ):
        changed = json.loads(honest)
        changed["config"][key] = value
        index.write_text(json.dumps(changed))
        with pytest.raises(UserError, match="is refused"):
            read()
    index.write_text(honest.replace('"chunk-0-0.bin"', '"../../chunk-0-0.bin"'))
    with pytest.raises(UserError, match="is refused"):
        read()
    assert not trace.exists()


def test_even_an_index_that_changes_after_the_check_unpickles_nothing(sharded, tmp_path, monkeypatch):
    trace = tmp_path / "evil"
    monkeypatch.setenv("EVIL", str(trace))
    opened = shards.ShardFiles(sharded, "train", ["a"] * 60)._open()
    for name, serializer in opened.serializers.items():
        if name != "bytes":
            with pytest.raises(UserError, match="plain bytes"):
                serializer.deserialize(pickle.dumps(Evil()))
    assert "pickle" in opened.serializers
    assert not trace.exists()


def test_missing_and_damaged_shards_have_words(sharded, root, tmp_path):
    with pytest.raises(UserError, match="There are no shards"):
        load("shards", tmp_path, 9)
    with pytest.raises(UserError, match="is there already"):
        shards.write(root, sharded)
    copy = tmp_path / "copy"
    shutil.copytree(sharded, copy)
    index = json.loads((copy / "test" / "index.json").read_text())
    index["chunks"] = index["chunks"][1:]
    (copy / "test" / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="should hold 15"):
        load("shards", copy, 9)
    (copy / "train" / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index\.json"):
        load("shards", copy, 9)


def test_the_command_that_writes_shards(root, tmp_path):
    pytest.importorskip("litdata")
    shards.main([str(root), str(tmp_path / "out")])
    assert torch.equal(load("shards", tmp_path / "out", 9).test.images, load("folder", root, 9).test.images)
    with pytest.raises(SystemExit):
        shards.main([str(root), str(tmp_path / "out")])


def test_a_broken_image_is_refused_where_shards_are_written(root, tmp_path):
    pytest.importorskip("litdata")
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    broken = copy / "train" / "b" / "07.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(UserError, match=r"train/b/07\.jpg cannot be read .*(?i:truncated)"):
        shards.write(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    Image.new("RGB", (12, 12), (9, 9, 9)).save(broken)
    shards.write(copy, tmp_path / "out")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_record_that_is_no_image_is_named_by_its_file(sharded, tmp_path, workers):
    copy = tmp_path / "copy"
    shutil.copytree(sharded, copy)
    chunk = copy / "test" / "chunk-0-0.bin"
    content = chunk.read_bytes()
    chunk.write_bytes(content[:1000] + bytes(len(content) - 1000))
    found = data(copy, False, "shards", mean=[0.5] * 3, std=[0.5] * 3, workers=workers)
    with pytest.raises(UserError, match=rf"The image test/[abc]/0\d\.(png|jpg) of {copy}/test cannot be read"):
        list(found.batches("test"))


@pytest.mark.parametrize(("keep", "state"), [(None, "is missing"), (100, r"has 100 bytes of [\d,]+")])
def test_a_missing_and_a_halved_file_of_shards_are_one_line(sharded, tmp_path, keep, state):
    copy = tmp_path / "copy"
    shutil.copytree(sharded, copy)
    chunk = sorted((copy / "train").glob("*.bin"))[1]
    content = chunk.read_bytes()
    chunk.unlink()
    if keep:
        chunk.write_bytes(content[:keep])
    with pytest.raises(UserError, match=rf"{chunk.name} {state}: the shards are incomplete. Copy them again") as error:
        load("shards", copy, 9)
    assert "\n" not in str(error.value)


def test_a_file_of_shards_that_vanishes_in_a_run_names_the_image(sharded, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(sharded, copy)
    files = shards.ShardFiles(copy, "test", [f"test/{i}.png" for i in range(15)])

    class Gone:
        def __getitem__(self, index):
            raise FileNotFoundError("chunk-0-0.bin\nwas not found")

    files._opened = (os.getpid(), Gone())
    with pytest.raises(UserError, match=r"The image test/3\.png of .* cannot be read \(chunk-0-0\.bin was not found\)"):
        files[3]
