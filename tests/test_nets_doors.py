"""The doors to torchvision and timm: stem, head, pretrained weights, and refusals in one line."""

from __future__ import annotations

import os
import pickle
import sys
from urllib.error import URLError

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torchvision.models import get_model, get_model_weights

from litdistill.config.build import build_net
from litdistill.models.adaptations import adaptations_of
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
        for side, stem, kernel in (
            (32, "auto", 3),
            (33, "auto", 7),
            (64, "auto", 7),
            (224, "small", 3),
            (32, "standard", 7),
        ):
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


IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def test_pretrained_weights_are_kept_with_their_transform(hub):
    """At 64 pixels the stem is the published one, and images are resized and normalized as torchvision's transform does it."""
    original = as_downloaded("resnet18", hub)
    net = torchvision_classifier(1000, (3, 64, 64), "resnet18", weights="DEFAULT").eval()
    assert preprocess_of(net).facts() == IMAGENET | {"size": [224, 224]}
    assert isinstance(bare(net).maxpool, nn.MaxPool2d)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    transform = get_model_weights("resnet18").DEFAULT.transforms(resize_size=224)  # without its crop
    with torch.no_grad():  # torchvision rounds the resized image to uint8
        torch.testing.assert_close(net(images), original(transform(images)), rtol=0, atol=0.02)
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_gray_images_are_shown_in_color_to_pretrained_weights(hub):
    original = as_downloaded("resnet18", hub)
    gray = torch.rand(2, 1, 224, 224)
    net = torchvision_classifier(1000, (1, 224, 224), "resnet18", weights="DEFAULT").eval()
    mean, std = (torch.tensor(IMAGENET[k])[:, None, None] for k in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(net(gray), original((gray - mean) / std), rtol=1e-4, atol=1e-4)


def test_kernels_are_summed_over_colors_for_other_channels(hub):
    original = as_downloaded("resnet18", hub)
    gray = torch.randn(2, 1, 96, 96)
    net = torchvision_classifier(1000, (2, 96, 96), "resnet18", weights="DEFAULT").eval()
    assert preprocess_of(net) is None  # of images of two channels its authors say nothing
    with torch.no_grad():
        color, two = gray.expand(-1, 3, -1, -1), gray.expand(-1, 2, -1, -1)
        torch.testing.assert_close(net(two), original(color), rtol=1e-4, atol=1e-4)
    assert "first kernels summed over colors, 3 to 2 channels" in adaptations_of(net)


def test_a_small_stem_of_pretrained_weights_is_made_on_request_alone(hub):
    original = as_downloaded("resnet18", hub)
    assert first_conv(torchvision_classifier(10, (3, 32, 32), "resnet18", weights="DEFAULT")).kernel_size == (7, 7)
    at_32 = torchvision_classifier(
        10, (3, 32, 32), "resnet18", weights="DEFAULT", size=32
    )  # which is not enlarged to 224
    assert torch.equal(bare(at_32).conv1.weight, original.conv1.weight)
    assert isinstance(bare(at_32).maxpool, nn.MaxPool2d)
    small = torchvision_classifier(10, (3, 32, 32), "resnet18", weights="IMAGENET1K_V1", stem="small", size=32)
    assert preprocess_of(small).facts() == IMAGENET | {"size": [32, 32]}
    assert torch.equal(bare(small).conv1.weight, original.conv1.weight[:, :, 2:5, 2:5])
    assert torch.equal(bare(small).layer4[1].conv2.weight, original.layer4[1].conv2.weight)
    assert bare(small).fc.out_features == 10
    said = adaptations_of(small)
    for change in ("stem made small", "no max-pooling", "1000 to 10 classes", "32x32", "own size is 224x224"):
        assert change in said
    assert adaptations_of(torchvision_classifier(10, (3, 64, 64), "resnet18")) == ""  # nothing was changed


def test_every_adaptation_is_said_in_one_line():
    with torch.device("meta"):  # where nothing is fetched
        lines = [
            adaptations_of(torchvision_classifier(3, (1, 64, 64), "mobilenet_v3_small", weights="DEFAULT")),
            adaptations_of(torchvision_classifier(10, (3, 28, 28), "resnet18")),
        ]
    assert lines == [
        "mobilenet_v3_small with weights DEFAULT: standard stem; head new and zero, 1000 to 3 classes; images resized from "
        "64x64 to 224x224; gray images shown as 3 equal channels; the weights' own mean [0.485, 0.456, 0.406] and std [0.229, "
        "0.224, 0.225]; left out of the weights' transform: center crop of 0.875.",
        "resnet18: stem made small, 3x3 with stride 1 and no max-pooling.",
    ]


class Images:
    """What `build_net` reads of data."""

    name, num_classes, class_names = "photos", 3, ("a", "b", "c")
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]

    def __init__(self, channels=3):
        self.input_shape = (channels, 64, 64)
        self.mean, self.std = self.mean[:channels], self.std[:channels]


def built(channels=3, weights="DEFAULT", source=None, statistics=None, **preprocess):
    target = "litdistill.models.torchvision.torchvision_classifier"
    node = {"_target_": target, "name": "resnet18", "weights": weights, "preprocess": preprocess or None}
    node["statistics"] = statistics
    return build_net(OmegaConf.create(node), Images(channels), "student", source)


def test_an_override_leaves_the_rest_of_the_transform_to_the_weights(hub, caplog):
    """`preprocess={size: 64}` sets the size alone; what is not given is the weights' own, then the data's."""
    as_downloaded("resnet18", hub)
    caplog.set_level("INFO")
    assert preprocess_of(built()).facts() == IMAGENET | {"size": [224, 224]}
    assert preprocess_of(built(size=64)).facts() == IMAGENET | {"size": [64, 64]}
    assert "resized from" not in caplog.messages[-1]
    assert "images of 64x64 (the weights' own size is 224x224)" in caplog.messages[-1]
    std = preprocess_of(built(std=[1, 1, 1]))
    assert std.facts() == {"mean": IMAGENET["mean"], "std": [1, 1, 1], "size": [224, 224]}
    assert "student.preprocess sets std" in caplog.messages[-1]
    assert preprocess_of(built(mean=[0.5], size=32)).facts() == {**IMAGENET, "mean": [0.5] * 3, "size": [32, 32]}
    assert preprocess_of(built(channels=1, size=48)).facts() == IMAGENET | {"size": [48, 48]}
    plain = preprocess_of(built(weights=None, size=48)).facts()
    assert plain == {"mean": Images.mean, "std": Images.std, "size": [48, 48]}


def test_a_network_with_weights_of_its_own_needs_no_published_ones(hub, caplog):
    """A rebuilt run loads its own weights: the file of the published ones may be gone, and structure and transform stay."""
    caplog.set_level("INFO")
    file = hub / get_model_weights("resnet18").DEFAULT.url.rsplit("/", 1)[-1]
    as_downloaded("resnet18", hub)
    first = built(channels=1, size=48)
    file.unlink()
    caplog.clear()
    again = built(channels=1, size=48, source=first)
    assert preprocess_of(again).facts() == preprocess_of(first).facts()
    state = again.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in first.state_dict().items())
    assert not caplog.messages


@pytest.mark.parametrize("name", ["squeezenet1_0", "shufflenet_v2_x0_5", "mobilenet_v3_small", "googlenet"])
def test_pretrained_head_is_fitted(name, hub):
    as_downloaded(name, hub)
    net = torchvision_classifier(6, (1, 28, 28), name, weights="DEFAULT")
    assert net(torch.randn(3, 1, 28, 28)).shape == (3, 6)


def test_pretrained_networks_are_fine_tuned_with_fixed_statistics_and_a_head_of_zeros(hub):
    """As published weights bring them, unless the config says otherwise; scale and bias of the layers are trained."""
    as_downloaded("resnet18", hub)
    net, head = built(), bare(built()).fc
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 20
    assert net.training
    assert not any(m.training for m in norms)
    assert all(p.requires_grad for m in norms for p in m.parameters())
    assert not any(p.any() for p in head.parameters())
    before = [m.running_mean.clone() for m in norms]
    nn.functional.cross_entropy(net(torch.rand(4, 3, 64, 64)), torch.tensor([0, 1, 2, 0])).backward()
    assert all(torch.equal(m.running_mean, mean) for m, mean in zip(norms, before, strict=True))
    assert bare(net).fc.weight.grad.any()

    def fixed(**options):
        found = [m.training for m in built(**options).modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(set(found)) == 1
        return not found[0]

    assert not fixed(weights=None)
    assert not fixed(statistics="learned")
    assert fixed(weights=None, statistics="fixed")
    assert not fixed(source=net)  # a starting point of one's own
    with pytest.raises(UserError, match=r"student\.statistics=kept"):
        built(statistics="kept")


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


def test_pretrained_weights_of_timm_bring_their_transform(tmp_path):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("resnet10t").eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "input_size": (3, 96, 96), "mean": (0.1, 0.2, 0.3)}
    options = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    net = timm_classifier(1000, (1, 64, 64), "resnet10t", **options).eval()
    facts = preprocess_of(net).facts()
    assert facts == {"mean": [0.1, 0.2, 0.3], "std": IMAGENET["std"], "size": [96, 96]}
    gray = torch.rand(2, 1, 96, 96)
    mean, std = (torch.tensor(facts[k])[:, None, None] for k in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(net(gray), theirs((gray - mean) / std), rtol=1e-4, atol=1e-4)
    small = timm_classifier(5, (3, 64, 64), "resnet10t", size=64, **options)
    assert preprocess_of(small).size == (64, 64)
    said = adaptations_of(small)
    assert "1000 to 5 classes" in said
    assert "images of 64x64 (the weights' own size is 96x96)" in said
    vit = {"name": "vit_tiny_patch16_224", "pretrained": True, "depth": 1, "fetch": False}
    assert timm_classifier(5, (3, 64, 64), **vit)(torch.rand(2, 3, 64, 64)).shape == (2, 5)  # at 224, its own size
    assert bare(timm_classifier(5, (3, 64, 64), size=96, **vit)).patch_embed.num_patches == 36


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
