"""What of compression a detector takes, what is refused with what to use instead, and how its methods and data are named."""

from __future__ import annotations

import math

import pytest
import torch

from litdistill.compress.low_rank import low_rank
from litdistill.compress.prune import last_layers, prune
from litdistill.compress.quantize import int8
from litdistill.compress.restore import restore
from litdistill.compress.structure import structure_of
from litdistill.distillation.examine import check_teacher
from litdistill.evaluation.summary import method_name
from litdistill.models.profile import count_parameters
from litdistill.tasks.detection.fcos import fcos_slim
from litdistill.tasks.detection.task import Detection
from litdistill.utils.errors import UserError
from tests.conftest import compose_config

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return fcos_slim(3, (3, 64, 64), width=8, fpn=32, convs=1, strides=[4, 8])


def test_a_detector_is_factorized_and_restored():
    small = low_rank(net(), IMAGES, 0.5).eval()
    assert count_parameters(small) <= 0.5 * count_parameters(net())
    again = restore(net(), structure_of(small), IMAGES).eval()
    again.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert all(torch.equal(v, again(IMAGES)[k]) for k, v in small(IMAGES).items())


def test_a_detector_is_pruned_to_its_budget_with_all_its_outputs_and_restored():
    small = prune(net(), IMAGES, 0.5).eval()
    assert count_parameters(small) <= 0.5 * count_parameters(net())
    assert small.backbone.body.stem[0].out_channels < 8
    again = restore(net(), structure_of(small), IMAGES).eval()
    again.load_state_dict(small.state_dict())
    with torch.no_grad():
        whole = net().eval()(IMAGES)
        found, restored = small(IMAGES), again(IMAGES)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in whole.items()}
    assert all(torch.equal(v, restored[k]) for k, v in found.items())


def test_the_last_layers_are_those_that_make_the_outputs():
    whole = net()
    made = list(whole(IMAGES).values())
    names = {name for name, m in whole.named_modules() for last in last_layers(whole, made) if m is last}
    assert names == {
        "head.classification_head.cls_logits",
        "head.regression_head.bbox_reg",
        "head.regression_head.bbox_ctrness",
    }
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2, bias=False))
    assert last_layers(plain, [plain(torch.zeros(2, 4))]) == [plain[2]]


def test_a_detector_is_not_trained_in_int8_and_is_told_what_to_use():
    with pytest.raises(
        UserError, match=r"compress=int8: .*logits, boxes, centerness.*litdistill export .*precision=int8"
    ):
        int8(net(), IMAGES)


@pytest.mark.parametrize("name", ["dense_kd", "pkd_dense_kd", "pseudo_boxes", "crosskd", "fgd", "mgd"])
def test_methods_of_detectors_have_their_short_names_in_tables(tmp_path, name):
    cfg = compose_config(tmp_path, "data=digit_scenes", "task=detection", "net@student=fcos_slim", f"method={name}")
    assert method_name(cfg) == {"pkd_dense_kd": "pkd+dense_kd"}.get(name, name)


def test_a_validation_set_without_objects_is_named_and_the_weights_are_not_blamed():
    nothing = torch.full((4, 2, 6), -1.0)
    with pytest.raises(UserError, match="4 samples have no object"):
        check_teacher(Detection(), {"map": math.nan}, nothing, allow_chance=True)
    some = nothing.clone()
    some[0, 0] = torch.tensor([1.0, 1, 9, 9, 0, 0])
    with pytest.raises(UserError, match="weights are damaged"):
        check_teacher(Detection(), {"map": math.nan}, some)
