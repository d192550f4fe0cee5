"""The doors to torchvision and timm: stem, head, pretrained weights, and refusals in one line."""

from __future__ import annotations

import os
import pickle
import sys
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torchvision.models import get_model, get_model_weights

from litdistill.models.preprocess import bare, preprocess_of
from litdistill.models.resnet import resnet_cifar
from litdistill.models.timm import timm_classifier
from litdistill.models.torchvision import torchvision_classifier
from litdistill.utils.errors import UserError


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: torchvision_classifier(10, (3, 32, 32), "resnet19"),
        lambda: torchvision_classifier(10, (3, 32, 32), "fcn_resnet50"),
        lambda: torchvision_classifier(10, (3, 32, 32), "resnet18", stem="tiny"),
        lambda: torchvision_classifier(10, (3, 32, 32), "resnet18", weights="IMAGENET22K"),
        lambda: torchvision_classifier(10, (3, 32, 32), "resnet18", color="red"),
        lambda: torchvision_classifier(10, (3, 32, 32), "vgg11", stem="small"),
        lambda: torchvision_classifier(10, (3, 32, 48), "vit_b_16"),
        lambda: torchvision_classifier(10, (1, 28, 28), "vit_b_16"),
        lambda: torchvision_classifier(10, (1, 28, 28), "vgg11_bn"),
        lambda: torchvision_classifier(10, (3, 32, 32), "inception_v3"),
    ],
)
def test_wrong_input_is_refused_in_one_line(wrong):
    with torch.device("meta"), pytest.raises(UserError) as refusal:
        wrong()
    assert "\n" not in str(refusal.value)


def first_conv(net):
    return next(m for m in net.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("resnet18", (1, 28, 28)),
        ("mobilenet_v3_small", (1, 28, 28)),
        ("vgg11_bn", (3, 32, 32)),
        ("vit_b_16", (3, 32, 32)),
        ("shufflenet_v2_x0_5", (1, 28, 28)),
        ("squeezenet1_0", (1, 28, 28)),
        ("efficientnet_b0", (1, 28, 28)),
        ("densenet121", (2, 28, 28)),
        ("googlenet", (1, 28, 28)),
        ("swin_t", (1, 28, 28)),
    ],
)
def test_torchvision_fits(name, shape):
    with torch.device("meta"):
        net = torchvision_classifier(7, shape, name)
        assert net.training
        assert net(torch.empty(2, *shape)).shape == (2, 7)
    assert first_conv(net).in_channels == shape[0]
    if not name.startswith(("vit", "swin")):
        assert first_conv(net).kernel_size == (3, 3)
        assert first_conv(net).stride == (1, 1)
    assert not any(getattr(m, "inplace", False) for m in net.modules())


def test_small_stem_of_torchvision_is_the_cifar_resnet():
    """Two definitions of one network agree: with the same weights in the same order they give the same logits."""
    ours, theirs = resnet_cifar(10, (3, 32, 32), 18).eval(), torchvision_classifier(10, (3, 32, 32), "resnet18").eval()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_stem_follows_the_image_size():
    with torch.device("meta"):
        for side, stem, kernel in ((64, "auto", 3), (65, "auto", 7), (224, "small", 3), (32, "standard", 7)):
            net = torchvision_classifier(10, (3, side, side), "resnet18", stem=stem)
            assert first_conv(net).kernel_size == (kernel, kernel)
            assert isinstance(net.maxpool, nn.Identity) == (kernel == 3)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty torch hub folder, and no network."""

    def no_network(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def as_downloaded(name, hub):
    net = get_model(name, weights=None, **({"init_weights": False} if name == "googlenet" else {})).eval()
    torch.save(net.state_dict(), hub / get_model_weights(name).DEFAULT.url.rsplit("/", 1)[-1])
    return net


def test_pretrained_weights_are_kept(hub):
    original = as_downloaded("resnet18", hub)
    grey = torch.randn(2, 1, 96, 96)
    net = torchvision_classifier(1000, (1, 96, 96), "resnet18", weights="DEFAULT").eval()
    with torch.no_grad():
        torch.testing.assert_close(net(grey), original(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)
    small = torchvision_classifier(10, (3, 32, 32), "resnet18", weights="IMAGENET1K_V1")
    assert preprocess_of(small).facts() == {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "size": None}
    assert preprocess_of(net) is None  # of grey images its authors say nothing
    small = bare(small)
    assert torch.equal(small.conv1.weight, original.conv1.weight[:, :, 2:5, 2:5])
    assert torch.equal(small.layer4[1].conv2.weight, original.layer4[1].conv2.weight)
    assert small.fc.out_features == 10
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize("name", ["squeezenet1_0", "shufflenet_v2_x0_5", "mobilenet_v3_small", "googlenet"])
def test_pretrained_head_is_fitted(name, hub):
    as_downloaded(name, hub)
    net = torchvision_classifier(6, (1, 28, 28), name, weights="DEFAULT")
    assert net(torch.randn(3, 1, 28, 28)).shape == (3, 6)


def test_weights_that_cannot_be_had(hub):
    with pytest.raises(UserError, match="weights=null") as refusal:
        torchvision_classifier(10, (3, 32, 32), "resnet18", weights="DEFAULT")
    assert str(hub) in str(refusal.value)


class Trap:
    def __reduce__(self):
        return os.system, ("touch sprung",)


def test_a_weight_file_runs_no_code(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = hub / get_model_weights("resnet18").DEFAULT.url.rsplit("/", 1)[-1]
    for save in (lambda: torch.save({"fc.weight": Trap()}, path), lambda: path.write_bytes(pickle.dumps(Trap()))):
        save()
        with pytest.raises(UserError, match="plain weights"):
            torchvision_classifier(10, (3, 32, 32), "resnet18", weights="DEFAULT")
    assert not (tmp_path / "sprung").exists()


def test_timm_fits():
    pytest.importorskip("timm")
    with torch.device("meta"):
        vit = timm_classifier(7, (1, 28, 28), "vit_tiny_patch16_224", patch_size=4, depth=2)
        assert vit(torch.empty(2, 1, 28, 28)).shape == (2, 7)
        assert vit.patch_embed.num_patches == 49
        net = timm_classifier(7, (1, 28, 28), "resnet10t")
        assert net(torch.empty(2, 1, 28, 28)).shape == (2, 7)
    assert not any(getattr(m, "inplace", False) for m in net.modules())


def test_timm_refuses_in_one_line(monkeypatch, tmp_path):
    pytest.importorskip("timm")
    import huggingface_hub.constants as hf

    monkeypatch.setattr(hf, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hf, "HF_HUB_CACHE", str(tmp_path))
    for match, name, options in (
        ("Did you mean", "resnet5O", {}),
        ("pretrained=false", "resnet10t", {"pretrained": True}),
        ("pretrained=false", "vit_tiny_patch16_224", {"pretrained": True, "patch_size": 4}),
        ("cannot build", "resnet10t", {"colour": "red"}),
        ("patch_size", "vit_tiny_patch16_224", {}),
    ):
        with pytest.raises(UserError, match=match) as refusal:
            timm_classifier(10, (1, 28, 28), name, **options)
        assert "\n" not in str(refusal.value)


def test_timm_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install 'litdistill\[models\]'"):
        timm_classifier(10, (1, 28, 28), "resnet18")
