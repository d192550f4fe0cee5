"""Backbones under the feature pyramid of a detector: by name, one's own, or the network of a finished classification run."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torchvision.models import resnet18

from litdistill.config.build import build_net
from litdistill.config.trust import check_trusted
from litdistill.evaluation.summary import start_of
from litdistill.features.feature_extractor import FeatureExtractor
from litdistill.models.finetune import freeze
from litdistill.models.preprocess import Preprocess, Preprocessed, bare, preprocess_of
from litdistill.models.profile import count_macs, count_parameters
from litdistill.models.resnet import resnet
from litdistill.models.small import conv4
from litdistill.tasks.detection.backbones import fcos_on
from litdistill.tasks.detection.boxes import padded
from litdistill.tasks.detection.detector import detector_of
from litdistill.training.train import train
from litdistill.utils.checkpoint import load_weights
from litdistill.utils.errors import UserError
from litdistill.utils.files import write_text
from tests.conftest import compose_config

SHAPE = (3, 64, 96)


class Data:
    name, num_classes, class_names, input_shape, mean, std = "scenes", 3, ("a", "b", "c"), SHAPE, None, None


def learns(net):
    targets = padded([torch.tensor([[1.0, 1.0, 20.0, 20.0, 2.0, 0.0]])] * 2)
    net.train()
    sum(detector_of(net).compute_loss(net(torch.rand(2, *SHAPE)), targets).values()).backward()
    return {k for k, p in net.named_parameters() if p.grad is None}


@pytest.mark.parametrize(
    "backbone", ["torchvision:mobilenet_v3_small", "torchvision:resnet18", "timm:mobilenetv3_small_050"]
)
def test_a_backbone_by_name(backbone):
    net = fcos_on(3, SHAPE, backbone, fpn=32, convs=1)
    assert net(torch.rand(2, *SHAPE))["logits"].shape == (2, 8 * 12 + 4 * 6 + 2 * 3, 3)
    assert learns(net) == set(), "no part is left over, as DDP needs it"
    assert net.adaptations.changes == ("FCOS on its maps of strides 8, 16, 32, without its classifier",)
    assert copy.deepcopy(net).eval()(torch.rand(1, 3, 70, 100))["boxes"].shape[1] == 12 * 16 + 6 * 8 + 3 * 4


def test_the_maps_are_those_of_the_network_with_its_classifier():
    inside = resnet18().eval()
    net = fcos_on(3, SHAPE, copy.deepcopy(inside), fpn=32).eval()
    x = torch.rand(2, *SHAPE)
    with torch.no_grad():
        expected = FeatureExtractor(inside, ["layer2", "layer3", "layer4"])(x).features
        for found, map_ in zip(net.backbone.body(x).values(), expected.values(), strict=True):
            torch.testing.assert_close(found, map_)
    assert count_parameters(net.backbone.body) == count_parameters(inside) - count_parameters(inside.fc)
    assert count_macs(net.backbone.body, (3, 224, 224)) == 1_814_073_344 - 512 * 1000  # torchvision says 1.814 GFLOPS


def test_ones_own_backbones():
    net = fcos_on(2, SHAPE, conv4(10, SHAPE, widths=[4, 4, 4, 8]), fpn=32, levels=2)
    assert [m.shape[2] for m in net.backbone.body(torch.rand(2, *SHAPE)).values()] == [16, 8]
    assert net.anchor_generator.sizes == ((4,), (8,))
    known = Preprocessed(resnet(10, SHAPE, 8), Preprocess([0.5] * 3, [0.2] * 3, 32))
    net = fcos_on(3, SHAPE, known, fpn=32)
    assert preprocess_of(net).facts() == {"mean": [0.5] * 3, "std": [0.2] * 3, "size": None}
    assert learns(net) == set()


@pytest.mark.parametrize(
    ("backbone", "options", "said"),
    [
        ("nowhere", {}, "backbone=nowhere names no backbone"),
        ("torchvision:resnet19", {}, "Did you mean"),
        ("timm:resnet19", {}, "timm cannot build"),
        ("timm:vit_tiny_patch16_224", {}, "gives no maps"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64 * 96 * 3, 3)), {}, "no stages with maps|gives no maps"),
        (conv4(3, (1, 64, 96)), {}, "gives no maps"),
        ("torchvision:resnet18", {"fpn": 20}, "multiple of 32"),
        ("torchvision:resnet18", {"levels": 0}, "1 or more"),
        ("torchvision:resnet18", {"sizes": [8, 16]}, "one of each"),
        ("torchvision:resnet18", {"weights": "NONE"}, "offers"),
    ],
)
def test_what_is_no_backbone_is_refused_in_a_line(backbone, options, said):
    with pytest.raises(UserError, match=said) as refusal:
        fcos_on(3, SHAPE, backbone, **options)
    assert "\n" not in str(refusal.value)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished classification run, of digits in colors."""
    cfg = compose_config(
        tmp_path_factory.mktemp("made") / "run",
        *("net@student=resnet8", "method=supervised", "teacher=null", "trainer=cpu", "trainer.max_epochs=1"),
        *("trainer.limit_train_batches=3", "logger=none", "data.mean=[0.3]", "data.std=[0.35]"),
    )
    write_text(f"{cfg.folder}/.hydra/config.yaml", OmegaConf.to_yaml(cfg))
    train(cfg)
    return cfg.folder


def node(**options):
    return OmegaConf.create({"_target_": "litdistill.tasks.detection.backbones.fcos_on", "fpn": 32} | options)


class Gray(Data):
    input_shape, mean, std = (1, 64, 96), [0.1], [0.9]


def test_a_finished_run_is_a_backbone(run):
    net = build_net(node(backbone=str(run)), Gray(), "student", say=False)
    state = load_weights(run, bare(net).state_dict().keys())
    body = bare(net).backbone.body.state_dict()
    assert len(body) > 20
    for key, value in body.items():
        assert torch.equal(value, state[key]), key
    assert preprocess_of(net).facts() == {"mean": [0.3], "std": [0.35], "size": None}
    assert not any(k.startswith("fc") for k in body)
    again = build_net(
        node(backbone={"_target_": "litdistill.models.resnet.resnet", "depth": 8, "checkpoint": str(run)}),
        Gray(),
        "student",
        say=False,
    )
    for key, value in bare(again).backbone.body.state_dict().items():
        assert torch.equal(value, state[key])


def test_a_run_says_that_it_starts_from_that_of_its_backbone(run):
    start = start_of(OmegaConf.create({"student": {"checkpoint": None, "backbone": str(run)}}))
    images = json.loads((Path(run) / "summary.json").read_text())["data"]["train"]
    assert start == {"from": "network", "images": images, "method": "supervised"}
    named = OmegaConf.create({"student": {"checkpoint": None, "backbone": "timm:resnet18", "weights": None}})
    assert start_of(named) is None


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no finished run"):
        build_net(node(backbone=str(tmp_path)), Gray(), "student", say=False)


def test_a_foreign_run_names_no_backbone_by_its_path(run):
    cfg = compose_config(Path(run).parent / "other", "task=detection", "data=digit_scenes")
    cfg.name = "other"
    cfg.student = node(backbone=str(run))
    cfg.folder = str(run)
    with pytest.raises(UserError, match="takes no path"):
        check_trusted(cfg, run)


def test_a_backbone_that_stays_as_it_is_is_frozen_by_name():
    net = fcos_on(3, SHAPE, "torchvision:mobilenet_v3_small", fpn=32)
    freeze(net, ["backbone.fpn", "head"], torch.rand(2, *SHAPE))
    trained = {k.split(".")[0] + "." + k.split(".")[1] for k, p in net.named_parameters() if p.requires_grad}
    assert trained == {"backbone.fpn", "head.classification_head", "head.regression_head"}
    assert not net.backbone.body.training
