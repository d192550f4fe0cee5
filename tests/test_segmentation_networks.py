"""Networks of masks: shapes, counts, names of taps, and weights of torchvision's keys from a file."""

from __future__ import annotations

import pytest
import torch
from torchvision.models import get_model

from litdistill.features.feature_extractor import resolve_taps
from litdistill.models.adaptations import adaptations_of
from litdistill.models.preprocess import Preprocessed, bare
from litdistill.models.segmentation import fcn_slim, torchvision_segmenter
from litdistill.utils.errors import UserError

NAMES = ("lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "fcn_resnet50")


@pytest.mark.parametrize("size", [(64, 64), (33, 50)])
def test_fcn_slim_gives_a_map_of_the_pictures_size(size):
    net = fcn_slim(5, (3, *size), [4, 6, 8], depth=2, pyramid=7)
    assert net(torch.rand(2, 3, *size)).shape == (2, 5, *size)


def test_fcn_slim_has_the_parameters_of_its_layers():
    stages = sum(9 * i * o + 2 * o for i, o in ((3, 16), (16, 32), (32, 64), (64, 64)))
    pyramid = sum(c * 32 + 32 for c in (16, 32, 64, 64)) + 9 * 32 * 32 + 2 * 32
    assert sum(p.numel() for p in fcn_slim(11, (3, 64, 64)).parameters()) == stages + pyramid + 32 * 11 + 11


def test_its_classifier_and_stages_are_taps():
    net, images = fcn_slim(5, (3, 64, 64)), torch.rand(2, 3, 64, 64)
    assert resolve_taps(net, images, ["classifier"]) == ["classifier"]
    stages = resolve_taps(net, images, "stages")
    assert stages[-1] == "fuse"
    assert len(stages) == 4


def test_pictures_that_vanish_are_refused():
    with pytest.raises(UserError, match="fcn_slim needs images of at least 16x16"):
        fcn_slim(5, (3, 6, 6))
    with pytest.raises(UserError, match="needs channels of one stage"):
        fcn_slim(5, (3, 64, 64), [])


@pytest.mark.parametrize("name", NAMES)
def test_the_door_gives_the_map_of_torchvisions_own_network(name, tmp_path):
    own = get_model(name, weights=None, weights_backbone=None, num_classes=4).eval()
    torch.save(own.state_dict(), tmp_path / "own.pth")
    net = torchvision_segmenter(4, (3, 64, 48), name, weights=str(tmp_path / "own.pth")).eval()
    assert isinstance(net, Preprocessed)  # ImageNet's mean and std come with such weights
    images = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        found, expected = bare(net)(images), own(images)["out"]
    torch.testing.assert_close(found, expected)
    assert bare(net).state_dict().keys() == own.state_dict().keys()
    assert resolve_taps(net, torch.rand(2, 3, 64, 48), ["classifier"]) == ["classifier"]


@pytest.mark.parametrize("name", NAMES)
def test_other_classes_replace_the_head_and_a_line_says_so(name, tmp_path):
    options = {} if name.startswith("lraspp") else {"aux_loss": True}
    own = get_model(name, weights=None, weights_backbone=None, num_classes=21, **options)
    torch.save(own.state_dict(), tmp_path / "voc.pth")
    net = torchvision_segmenter(4, (3, 64, 64), name, weights=str(tmp_path / "voc.pth"))
    assert "head new and zero, 21 to 4 classes" in adaptations_of(bare(net))
    state = bare(net).state_dict()
    assert not any(k.startswith("aux_classifier") for k in state)
    kept = [k for k, v in state.items() if v.shape == own.state_dict()[k].shape]
    assert all(torch.equal(state[k], own.state_dict()[k]) for k in kept)
    assert {k.removesuffix(".weight").removesuffix(".bias") for k in state.keys() - set(kept)} <= {
        *("classifier.4", "classifier.low_classifier", "classifier.high_classifier"),
    }
    with torch.no_grad():
        assert net.eval()(torch.rand(1, 3, 64, 64)).abs().max() == 0


def test_gray_pictures_have_a_kernel_of_their_own():
    assert torchvision_segmenter(4, (1, 64, 64)).eval()(torch.rand(1, 1, 64, 64)).shape == (1, 4, 64, 64)


def test_bad_names_and_files_are_refused_in_a_line(tmp_path):
    for options, said in (
        ({"name": "deeplabv3_resnet5"}, "no segmentation network 'deeplabv3_resnet5'. Did you mean deeplabv3_resnet50"),
        (
            {"weights": "IMAGENET"},
            "weights=IMAGENET: lraspp_mobilenet_v3_large offers COCO_WITH_VOC_LABELS_V1, DEFAULT",
        ),
        ({"weights": str(tmp_path / "none.pth")}, "none.pth"),
    ):
        with pytest.raises(UserError, match=said):
            torchvision_segmenter(4, (3, 64, 64), **options)
    torch.save(get_model(NAMES[0], weights=None, weights_backbone=None).state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match="do not fit the network"):
        torchvision_segmenter(4, (3, 64, 64), NAMES[1], weights=str(tmp_path / "other.pth"))
