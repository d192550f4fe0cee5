"""Sizes of networks: multiply-accumulates by hand and as published, bytes, and a network left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import get_model_weights

from litdistill.models.profile import count_macs, weight_bytes
from litdistill.models.small import conv4, mlp
from litdistill.models.torchvision import torchvision_classifier


def test_macs_by_hand():
    conv = 28 * 28 * 9 * 16 + 14 * 14 * 9 * 16 * 32 + 7 * 7 * 9 * 32 * 64 + 64 * 10
    assert count_macs(conv4(10, (1, 28, 28)), (1, 28, 28)) == conv
    assert count_macs(mlp(10, (1, 28, 28)), (1, 28, 28)) == 784 * 800 + 800 * 800 + 800 * 10
    depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1))
    assert count_macs(depthwise, (8, 5, 6)) == 30 * (9 * 8 + 8 * 4)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vit_b_16"])
def test_macs_published_by_torchvision(name):
    """`_ops` of a torchvision weight's card is in 10⁹ multiply-accumulates, rounded to three places."""
    with torch.device("meta"):
        macs = count_macs(torchvision_classifier(1000, (3, 224, 224), name), (3, 224, 224))
    assert macs / 1e9 == pytest.approx(get_model_weights(name).IMAGENET1K_V1.meta["_ops"], abs=6e-4)


class Attention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


def test_macs_of_attention():
    """Five tokens of width 8: projections in and out, scores, and the weighted sum, also where PyTorch fuses them."""
    assert count_macs(Attention(8, 2, batch_first=True), (5, 8)) == 5 * 8 * 24 + 2 * 5 * 5 * 8 + 5 * 8 * 8


def test_profiling_leaves_the_network_as_it_was():
    net = conv4(10, (1, 8, 8)).train()
    net.layer2.eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    count_macs(net, (1, 8, 8))
    assert net.training
    assert net.layer1[1].training
    assert not net.layer2[1].training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_weight_bytes():
    net = conv4(10, (1, 28, 28))
    norms = sum(2 * w * 4 + 8 for w in (16, 32, 64))  # running mean and variance in float32, the counter in int64
    assert weight_bytes(net) == (9 * 16 + 9 * 16 * 32 + 9 * 32 * 64 + 2 * (16 + 32 + 64) + 650) * 4 + norms
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    tied[1].weight = tied[0].weight
    assert weight_bytes(tied) == 36
    assert weight_bytes(tied.half()) == 18
