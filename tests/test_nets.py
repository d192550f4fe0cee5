"""Networks: every yaml builds and runs; sizes agree with counts by hand and with published ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torchvision.models import get_model_weights

from litdistill.cli import nets
from litdistill.models.mobilenet import mobilenet_v2
from litdistill.models.profile import count_parameters
from litdistill.models.resnet import PadShortcut, resnet, resnet_cifar
from litdistill.models.shufflenet import shuffle, shufflenet_v1, shufflenet_v2
from litdistill.models.small import conv4, lenet, mlp
from litdistill.models.torchvision import torchvision_classifier
from litdistill.models.vgg import vgg
from litdistill.models.wrn import WideBlock, wrn
from litdistill.utils.errors import UserError

ROOT = Path(__file__).parents[1]
# Of other data than images, of boxes, of masks, or of a folder that has to be there; test_bert, test_text_nets, test_sequence,
# test_log_mel, test_tables, test_transformers, test_detection_networks and test_segmentation_networks build them.
OTHERS = {
    *("minilm", "embedding_bag", "text_cnn", "text_transformer", "causal_transformer"),
    *("sound_conv", "sound_conv_wide", "on_log_mel", "embedding_mlp", "transformers"),
    *("fcn_slim", "fcos_on", "fcos_slim", "torchvision_detector", "torchvision_segmenter"),
}
YAMLS = {p.stem: p for p in sorted((ROOT / "conf" / "net").glob("*.yaml")) if p.stem not in OTHERS}
DIGITS, GREY, COLOR = (10, (1, 8, 8)), (10, (1, 28, 28)), (100, (3, 32, 32))
REFUSED = {("lenet", DIGITS), ("timm", DIGITS), ("timm", GREY)}
LARGE = {"resnet50", "resnet101", "torchvision", "timm", "efficientnet_lite0", "resnet18", "resnet34", "mobilenet_v1"}
OWN = [name for name in YAMLS if name not in LARGE]


def build(name, case):
    node = OmegaConf.load(YAMLS[name])
    if "weights" in node:
        node.weights = None  # nothing is downloaded
    return instantiate(node, num_classes=case[0], input_shape=case[1])


def assert_refused(name, case):
    with pytest.raises(InstantiationException) as refusal:
        build(name, case)
    assert isinstance(refusal.value.__cause__, UserError)
    assert "\n" not in str(refusal.value.__cause__)


@pytest.mark.parametrize("case", [GREY, COLOR], ids=["28", "32"])
@pytest.mark.parametrize("name", YAMLS)
def test_every_yaml_runs(name, case):
    node = OmegaConf.load(YAMLS[name])
    assert YAMLS[name].read_text().startswith("# ")
    assert "num_classes" not in node
    assert "input_shape" not in node
    if (name, case) in REFUSED:
        assert_refused(name, case)
        return
    net, x = build(name, case), torch.randn(2, *case[1])
    with torch.no_grad():
        for mode in (True, False):
            logits = net.train(mode)(x)
            assert logits.shape == (2, case[0])
            assert logits.isfinite().all()
            assert (logits[0] != logits[1]).any()
    assert not any(getattr(m, "inplace", False) for m in net.modules())


@pytest.mark.parametrize("name", YAMLS)
def test_8x8_runs_or_is_refused_in_one_line(name):
    with torch.device("meta"):
        if (name, DIGITS) in REFUSED:
            assert_refused(name, DIGITS)
        else:
            assert build(name, DIGITS).eval()(torch.empty(3, *DIGITS[1])).shape == (3, 10)


@pytest.mark.parametrize("name", [n for n in OWN if n not in {"mlp", "lenet"}])
def test_stages_and_classifier(name):
    """`layer1`, `layer2`, … are sequential; `fc` comes last and reads (N, C)."""
    with torch.device("meta"):
        net = build(name, COLOR).eval()
        stages = [k for k, _ in net.named_children() if k.startswith("layer")]
        assert stages == [f"layer{i}" for i in range(1, len(stages) + 1)]
        assert len(stages) >= 3
        assert all(isinstance(getattr(net, k), nn.Sequential) for k in stages)
        calls = []
        for key, child in net.named_modules():
            if not list(child.children()):
                child.register_forward_hook(lambda m, given, out, key=key: calls.append((key, given[0].shape)))
        net(torch.empty(2, *COLOR[1]))
    assert calls[-1] == ("fc", (2, net.fc.in_features))
    assert len(calls) == len({key for key, _ in calls}), "a module that runs twice hides its first input from a hook"


@pytest.mark.parametrize(
    ("name", "relu"),
    [("resnet8", "layer2.0.relu2"), ("vgg8", "layer4.2"), ("conv4", "layer3.2"), ("shufflenet_v1", "layer1.3.relu3")],
)
def test_preactivation_survives_the_forward(name, relu):
    net, seen = build(name, GREY).eval(), []
    net.get_submodule(relu).register_forward_hook(lambda m, i, o: seen.extend([i[0], o]))
    with torch.no_grad():
        net(torch.randn(2, 1, 28, 28))
    before, after = seen
    assert (before < 0).any()
    assert torch.equal(before.clamp(min=0), after)


@pytest.mark.parametrize("name", ["conv4", "mlp", "lenet", "resnet8", "wrn_16_1", "vgg8", "shufflenet_v1"])
def test_gradient_reaches_every_parameter(name):
    net = build(name, GREY)
    net(torch.randn(4, 1, 28, 28)).square().sum().backward()
    missing = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing


# Counted by hand from the definitions: a convolution k·k·in·out, a normalization 2·channels, a linear in·out + out.
def conv_n(i, o, k, groups=1):
    return k * k * i * o // groups + 2 * o


def resnet_n(depth, stem, *widths):
    n, total, i = (depth - 2) // 6, conv_n(3, stem, 3), stem
    for stage, w in enumerate(widths):
        total += conv_n(i, w, 3) + (2 * n - 1) * conv_n(w, w, 3) + (conv_n(i, w, 1) if stage or i != w else 0)
        i = w
    return total + (i + 1) * 100


def wrn_n(depth, k):
    n, total, i = (depth - 4) // 6, 27 * 16, 16
    for w in (16 * k, 32 * k, 64 * k):
        total += 2 * i + 9 * i * w + 2 * w + 9 * w * w + (i * w if i != w else 0)
        total += (n - 1) * 2 * (2 * w + 9 * w * w)
        i = w
    return total + 2 * i + (i + 1) * 100


def vgg_n(*per_stage):
    total, i = 0, 3
    for n, w in zip(per_stage, (64, 128, 256, 512, 512), strict=True):
        for _ in range(n):
            total, i = total + conv_n(i, w, 3) + w, w
    return total + (i + 1) * 100


def mobilenet_n():
    total, i = conv_n(3, 16, 3), 16
    for t, o, n in ((1, 8, 1), (6, 12, 2), (6, 16, 3), (6, 32, 4), (6, 48, 3), (6, 80, 3), (6, 160, 1)):
        for _ in range(n):
            total, i = total + conv_n(i, t * i, 1) + conv_n(t * i, t * i, 3, t * i) + conv_n(t * i, o, 1), o
    return total + conv_n(160, 1280, 1) + 1281 * 100


def shuffle_v1_n():
    total, i = conv_n(3, 24, 1), 24
    for o, n in ((240, 4), (480, 8), (960, 4)):
        for j in range(n):
            out = o - i if j == 0 else o
            m = out // 4
            total += conv_n(i, m, 1, 1 if i == 24 else 3) + conv_n(m, m, 3, m) + conv_n(m, out, 1, 3)
            i = o
    return total + 961 * 100


def shuffle_v2_n():
    total, i = conv_n(3, 24, 1), 24
    for o, n in ((116, 3), (232, 7), (464, 3)):
        h = o // 2
        total += conv_n(i, i, 3, i) + 2 * conv_n(i, h, 1) + conv_n(h, h, 3, h) + conv_n(h, h, 1)
        total += n * (2 * conv_n(h, h, 1) + conv_n(h, h, 3, h))
        i = o
    return total + conv_n(464, 1024, 1) + 1025 * 100


COUNTS = {  # 3x32x32, 100 classes: by hand, and the figure that is quoted for it
    **{f"resnet{d}": (resnet_n(d, 16, 16, 32, 64), c) for d, c in ((8, 83_892), (14, 181_108), (20, 278_324))},
    **{f"resnet{d}": (resnet_n(d, 16, 16, 32, 64), c) for d, c in ((32, 472_756), (44, 667_188), (56, 861_620))},
    "resnet110": (resnet_n(110, 16, 16, 32, 64), 1_736_564),
    "resnet8x4": (resnet_n(8, 32, 64, 128, 256), 1_233_540),
    "resnet32x4": (resnet_n(32, 32, 64, 128, 256), 7_433_860),
    "wrn_16_1": (wrn_n(16, 1), 180_916),
    "wrn_16_2": (wrn_n(16, 2), 703_284),
    "wrn_40_1": (wrn_n(40, 1), 569_780),
    "wrn_40_2": (wrn_n(40, 2), 2_255_156),
    "wrn_28_4": (wrn_n(28, 4), 5_872_180),
    "vgg8": (vgg_n(1, 1, 1, 1, 1), 3_965_028),
    "vgg11": (vgg_n(1, 1, 2, 2, 2), 9_277_284),
    "vgg13": (vgg_n(2, 2, 2, 2, 2), 9_462_180),
    "vgg16": (vgg_n(2, 2, 3, 3, 3), 14_774_436),
    "vgg19": (vgg_n(2, 2, 4, 4, 4), 20_086_692),
    "mobilenet_v2": (mobilenet_n(), 812_836),
    "shufflenet_v1": (shuffle_v1_n(), 949_258),
    "shufflenet_v2": (shuffle_v2_n(), 1_355_528),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_of_the_distillation_tables(name):
    with torch.device("meta"):
        net = build(name, COLOR)
    by_hand, published = COUNTS[name]
    assert count_parameters(net) == by_hand == published


def test_parameters_published_elsewhere():
    with torch.device("meta"):
        assert count_parameters(lenet(10, (1, 28, 28))) == count_parameters(lenet(10, (1, 32, 32))) == 61_706
        assert count_parameters(resnet_cifar(10, (3, 32, 32), 18)) == 11_173_962
        assert count_parameters(resnet_cifar(10, (3, 32, 32), 50)) == 23_520_842
        assert count_parameters(resnet(10, (3, 32, 32), 20, shortcut="pad")) == 269_722  # "0.27M" in the ResNet paper
        assert count_parameters(mlp(10, (1, 28, 28), [1200, 1200], 0.5, 0.2)) == 785 * 1200 + 1201 * 1200 + 1201 * 10
        for name in ("resnet50", "resnet101", "squeezenet1_0", "vit_b_16"):
            meta = get_model_weights(name).DEFAULT.meta
            size = (meta.get("min_size") or (224, 224))[0] if name == "vit_b_16" else 224
            published = get_model_weights(name).IMAGENET1K_V1.meta["num_params"]
            assert count_parameters(torchvision_classifier(1000, (3, size, size), name)) == published


def test_zero_padding_shortcut():
    x = torch.randn(2, 16, 4, 4)
    out = PadShortcut(16, 2)(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert out[:, :8].eq(0).all()
    assert out[:, 24:].eq(0).all()


def test_wide_block():
    """Figure 1 (d) of the wide ResNet paper, the shortcut behind the first activation where the width changes."""
    x = torch.randn(2, 4, 6, 6)
    for width, stride in ((4, 1), (8, 2)):
        block = WideBlock(4, width, stride, 0.0).eval()
        first = (x / (1 + 1e-5) ** 0.5).clamp(min=0)  # normalization as it starts: mean 0, variance 1
        second = (F.conv2d(first, block.conv1.weight, None, stride, 1) / (1 + 1e-5) ** 0.5).clamp(min=0)
        kept = x if width == 4 else F.conv2d(first, block.shortcut.weight, None, stride)
        expected = F.conv2d(second, block.conv2.weight, None, 1, 1) + kept
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


def test_channel_shuffle():
    """The order in the ShuffleNet paper's figure 1: the first of each group, then the second of each."""
    x = torch.arange(6.0).view(1, 6, 1, 1)
    assert shuffle(x, 3).flatten().tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: resnet(10, (3, 32, 32), 21),
        lambda: resnet(10, (3, 32, 32), 20, [16, 32]),
        lambda: resnet(10, (3, 32, 32), 20, shortcut="none"),
        lambda: resnet_cifar(10, (3, 32, 32), 99),
        lambda: wrn(10, (3, 32, 32), 41),
        lambda: vgg(10, (3, 32, 32), 12),
        lambda: vgg(10, (3, 7, 32)),
        lambda: lenet(10, (1, 11, 28)),
        lambda: shufflenet_v2(10, (3, 32, 32), 3.0),
    ],
)
def test_wrong_input_is_refused_in_one_line(wrong):
    with torch.device("meta"), pytest.raises(UserError) as refusal:
        wrong()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("build", [lenet, wrn, mobilenet_v2, shufflenet_v1], ids=lambda f: f.__name__)
def test_input_shape_may_be_a_list_and_oblong(build):
    assert build(7, [2, 24, 36]).eval()(torch.randn(1, 2, 24, 36)).shape == (1, 7)


def test_widths_and_dropout_are_taken():
    net = conv4(5, (3, 1, 1), [4, 8])  # one pixel is pooled no further
    assert [m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)] == [4, 8]
    assert net.eval()(torch.randn(2, 3, 1, 1)).shape == (2, 5)
    assert [m.p for m in mlp(5, (1, 8, 8), [6, 7], 0.5, 0.2).modules() if isinstance(m, nn.Dropout)] == [0.2, 0.5, 0.5]


def test_the_table_of_networks(tmp_path, capsys):
    for name in ("mlp", "lenet"):
        (tmp_path / f"{name}.yaml").write_text(YAMLS[name].read_text())
    nets.main(folder=tmp_path)
    shown = capsys.readouterr().out
    assert "1,276,810" in shown
    assert "61,706" in shown
    assert nets.sizes(YAMLS["lenet"], *DIGITS) == ("—", "—")


@pytest.mark.parametrize(("shape", "places"), [((1, 28, 28), 9), ((3, 32, 32), 16), ((1, 8, 8), 1), ((1, 3, 5), 2)])
def test_conv4_can_keep_places_apart(shape, places):
    net = conv4(10, shape, widths=[4, 6, 8], global_pool=False)
    assert net(torch.randn(2, *shape)).shape == (2, 10)
    assert net.fc.in_features == 8 * places
