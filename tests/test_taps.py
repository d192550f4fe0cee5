"""Taps against the stages that the papers of known networks list, and features against forwards written by hand."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from litdistill.features.feature_extractor import FeatureExtractor, resolve_taps
from litdistill.utils.errors import UserError


class Block(nn.Module):
    """A basic residual block with one activation module called twice."""

    def __init__(self, width: int, out: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, stride, 1), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.skip = nn.Conv2d(width, out, 1, stride) if stride > 1 else nn.Identity()

    def before(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + self.skip(x)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + self.skip(x))


class TinyResNet(nn.Module):
    """Stem and first stage at the image's size, as in CIFAR's ResNets."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(1, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.layer1, self.layer2 = nn.Sequential(Block(4, 4, 1)), nn.Sequential(Block(4, 6, 2), Block(6, 6, 1))
        self.layer3 = nn.Sequential(Block(6, 8, 2))
        self.dropout, self.fc = nn.Dropout(0.5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.relu(self.bn(self.conv(x))))))
        return self.fc(self.dropout(x.mean((2, 3))))


def mlp() -> nn.Module:
    hidden = [nn.Linear(48, 9), nn.ReLU(), nn.Dropout(0.2), nn.Linear(9, 7), nn.ReLU(inplace=True)]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(7, 3))


def images(size: int = 8, channels: int = 1, n: int = 2) -> Tensor:
    return torch.randn(n, channels, size, size + 4, generator=torch.Generator().manual_seed(0))


def test_words_on_a_residual_network() -> None:
    net = TinyResNet()
    assert resolve_taps(net, images(), "stages") == ["layer1", "layer2", "layer3"]
    assert resolve_taps(net, images(), "stages:pre") == ["layer1.0.relu:in", "layer2.1.relu:in", "layer3.0.relu:in"]
    assert resolve_taps(net, images(), "last") == ["layer3"]
    assert resolve_taps(net, images(), "pooled") == ["fc:in"]
    assert resolve_taps(net, images(), ["pooled", "layer2", "last", "layer2"]) == ["fc:in", "layer2", "layer3"]
    assert resolve_taps(net, images(), ()) == []


def test_words_on_an_mlp() -> None:
    x = torch.randn(2, 3, 4, 4)
    assert resolve_taps(mlp(), x, "stages") == ["2", "5"]
    assert resolve_taps(mlp(), x, "stages:pre") == ["2:in", "5:in"]
    assert resolve_taps(mlp(), x, "pooled") == ["6:in"]


# At 64 px. Channels of the stages as the papers' tables give them, counted from the first stage after the stem.
ZOO = {
    "resnet18": ([64, 128, 256, 512], 512),
    "vgg11_bn": ([64, 128, 256, 512, 512], 4096),
    "mobilenet_v3_small": ([16, 24, 48, 576], 1024),
    "densenet121": ([256, 512, 1024, 1024], 1024),
    "shufflenet_v2_x0_5": ([48, 96, 1024], 1024),
    "squeezenet1_1": ([128, 256, 512], 512),
}


@pytest.mark.parametrize("name", ZOO)
def test_stages_of_torchvision_networks(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    net, x = getattr(models, name)(weights=None, num_classes=7), torch.randn(1, 3, 64, 64)
    net.eval()
    stages, pooled = resolve_taps(net, x, "stages"), resolve_taps(net, x, "pooled")
    out = FeatureExtractor(net, stages + pooled)(x)
    channels, width = ZOO[name]
    assert [out.features[s].shape[1] for s in stages] == channels
    sizes = [out.features[s].shape[2] for s in stages]
    assert sizes == sorted(set(sizes), reverse=True)
    assert out.features[pooled[0]].shape == (1, width)
    assert resolve_taps(net, x, "last") == stages[-1:]
    assert len(resolve_taps(net, x, "stages:pre")) == len(stages)


def test_stages_before_their_activations_on_torchvision() -> None:
    models = pytest.importorskip("torchvision.models")
    x = torch.randn(1, 3, 32, 32)
    resnet = models.resnet18(weights=None)
    assert resolve_taps(resnet, x, "stages:pre") == ["layer1.1.relu:in", "layer2.1.relu:in", "layer3.1.relu:in"]
    assert resolve_taps(models.mobilenet_v3_small(weights=None), x, "stages:pre") == [
        "features.1",
        "features.3",
        "features.8",
    ]


def test_vit_gives_evenly_spaced_blocks_of_tokens() -> None:
    timm = pytest.importorskip("timm")
    net, x = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5), torch.randn(1, 3, 32, 32)
    assert resolve_taps(net, x, "stages") == ["blocks.2", "blocks.5", "blocks.8", "blocks.11"]
    assert resolve_taps(net, x, "last") == ["blocks.11"]
    out = FeatureExtractor(net, resolve_taps(net, x, ["last", "pooled"]))(x)
    assert [tuple(f.shape) for f in out.features.values()] == [(1, 5, 192), (1, 192)]


def test_wide_convolutions_and_gates_inside_blocks_are_no_stage() -> None:
    class Expand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.down = nn.Conv2d(4, 16, 1), nn.Conv2d(16, 8, 3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.wide(x))

    net = nn.Sequential(nn.Conv2d(1, 4, 3, 1, 1), Expand(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    assert resolve_taps(net, images(), "stages") == ["0", "1"]


def test_a_block_with_more_than_two_sizes_inside_is_an_encoder_whose_maps_count() -> None:
    class Encoder(nn.Sequential):
        """Takes the stem's size and gives another, as a block does."""

    encoder = Encoder(nn.Conv2d(4, 5, 3, 1, 1), nn.Conv2d(5, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1))
    net = nn.Sequential(nn.Conv2d(1, 4, 3, 1, 1), encoder, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    assert resolve_taps(net, images(), "stages") == ["1.0", "1.1", "1"]


@pytest.mark.parametrize("passing", [nn.Identity, nn.Dropout, nn.Dropout2d])
def test_what_passes_a_map_on_is_no_end_of_a_stage(passing: type[nn.Module]) -> None:
    """Called last it gives an earlier map; right behind the last map it would have holes in it in training."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(1, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1)])
            self.behind, self.skip, self.fc = passing(), passing(), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.convs[0](x)
            return self.fc((self.behind(self.convs[1](x)) + self.skip(x)).mean((2, 3)))

    assert resolve_taps(Net(), images(), "stages") == ["convs.1"]


def test_pooling_alone_makes_no_stage_and_a_lone_strided_stem_is_none() -> None:
    body = [nn.Conv2d(1, 4, 7, 2, 3), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, 1, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1)]
    net = nn.Sequential(*body, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(2, 1, 32, 32)
    net(x)
    assert resolve_taps(net, x, "stages") == ["3", "5"]


def test_an_unpadded_first_convolution_is_a_stage() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.LazyLinear(3)
    )
    net(images(16))
    assert resolve_taps(net, images(16), "stages") == ["1", "3"]


def test_before_activation_of_a_pre_activation_network_is_behind_the_next_norm() -> None:
    first = [nn.Conv2d(1, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
    second = [nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU()]
    net = nn.Sequential(nn.Sequential(*first[:2]), nn.Sequential(*first[2:], *second), nn.Flatten(), nn.LazyLinear(3))
    net(images())
    net[0].register_forward_hook(lambda *_: None)
    assert resolve_taps(net, images(), "stages:pre") == ["1.1:in", "1.4:in"]


def test_finding_leaves_no_trace() -> None:
    net = TinyResNet().train()
    net.layer2.eval()

    def draw(*_: object) -> None:
        torch.rand(3)

    net.layer1.register_forward_hook(draw)
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    state = torch.get_rng_state()
    resolve_taps(net, images(), "stages:pre")
    assert torch.equal(state, torch.get_rng_state())
    assert [m.training for m in net.modules()] == modes
    assert net.relu.inplace
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()) == 1


@pytest.mark.parametrize(
    ("tap", "says"),
    [("layer22", "layer2"), ("layer2:out", "suffix"), ("layer2:", "layer2"), ("stage", "All modules"), ("", "suffix")],
)
def test_unknown_names_are_refused_with_the_nearest(tap: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        resolve_taps(TinyResNet(), images(), [tap])
    with pytest.raises(UserError, match=says):
        FeatureExtractor(TinyResNet(), [tap])


def test_modules_that_are_never_called_are_refused() -> None:
    net = TinyResNet()
    net.aux = nn.Linear(2, 2)
    with pytest.raises(UserError, match="not called"):
        resolve_taps(net, images(), "aux")
    with pytest.raises(UserError, match="not reached"):
        FeatureExtractor(net, ["aux"])(images())


def test_a_network_without_a_classifier_is_told_to_name_its_taps() -> None:
    with pytest.raises(UserError, match="Name it"):
        resolve_taps(nn.Sequential(nn.Flatten(), nn.ReLU()), images(), "pooled")
    with pytest.raises(UserError, match="Name its taps"):
        resolve_taps(nn.Sequential(nn.Flatten(), nn.ReLU()), images(), "stages")


def test_features_are_what_a_forward_by_hand_gives_with_its_gradients() -> None:
    net, x = TinyResNet().eval(), images()
    stem = torch.relu(net.bn(net.conv(x)))
    pre = net.layer1[0].before(stem)
    post = torch.relu(pre)
    expected = torch.autograd.grad((pre**3).sum() + post.sum(), net.conv.weight)[0]

    tapped = FeatureExtractor(net, ["layer1", "layer1.0.relu:in", "layer3:pool", "fc:in"])
    out = tapped(x)
    assert list(out.features) == ["layer1", "layer1.0.relu:in", "layer3:pool", "fc:in"]
    torch.testing.assert_close(out.features["layer1.0.relu:in"], pre)
    torch.testing.assert_close(out.features["layer1"], post)
    torch.testing.assert_close(out.logits, net(x))
    torch.testing.assert_close(out.features["layer3:pool"], net.layer2(post).mean((2, 3)))
    loss = (out.features["layer1.0.relu:in"] ** 3).sum() + out.features["layer1"].sum()
    torch.testing.assert_close(torch.autograd.grad(loss, net.conv.weight)[0], expected)


def test_nothing_is_held_and_all_is_given_back() -> None:
    net = TinyResNet()
    keys = list(net.state_dict())
    tapped = FeatureExtractor(net, ["layer1", "fc:in"])
    tapped(images())
    net(images())
    assert tapped._state.features == {}
    assert list(net.state_dict()) == keys
    assert not net.relu.inplace
    tapped.remove()
    assert net.relu.inplace
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_copies_do_not_write_into_the_original() -> None:
    net = TinyResNet().eval()
    tapped = FeatureExtractor(net, ["layer1"])
    twin = copy.deepcopy(net)
    pickle.loads(pickle.dumps(net))  # a spawned process gets the network this way

    def run_twin(*_: object) -> None:
        twin(torch.zeros_like(images()))

    inner = net.layer3.register_forward_hook(run_twin)
    first = tapped(images()).features["layer1"]
    inner.remove()
    torch.testing.assert_close(first, net.layer1(torch.relu(net.bn(net.conv(images())))))


def test_state_is_cleared_after_an_error() -> None:
    net = TinyResNet()
    tapped = FeatureExtractor(net, ["conv"])
    with pytest.raises(RuntimeError):
        tapped(torch.randn(2, 3, 8, 8))
    assert not tapped._state.active
    assert tapped._state.features == {}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_networks_compiled_in_place(backend: str) -> None:
    net, x = TinyResNet().eval(), images()
    plain = FeatureExtractor(net, ["layer1", "layer1.0.relu:in", "fc:in"])
    expected = plain(x)
    expected_grad = torch.autograd.grad(expected.features["layer1"].square().sum(), net.conv.weight)[0]
    net.compile(backend=backend)
    for _ in range(2):
        out = plain(x)
        assert list(out.features) == list(expected.features)
        for name, feature in expected.features.items():
            torch.testing.assert_close(out.features[name], feature)
        grad = torch.autograd.grad(out.features["layer1"].square().sum(), net.conv.weight)[0]
        torch.testing.assert_close(grad, expected_grad)
        net(x)  # without features: a graph of its own
    assert resolve_taps(net, x, "stages") == ["layer1", "layer2", "layer3"]
