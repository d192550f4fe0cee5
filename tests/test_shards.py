"""Shards of images: written, read through a cache, and refused where they are damaged or a stranger's."""

import json
import os
import pickle
import shutil

import pytest
import torch
from PIL import Image

from litdistill.data import shards
from litdistill.data.sources import load
from litdistill.utils.errors import UserError
from tests.streams import data, root_fixture, sharded_fixture  # noqa: F401

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
