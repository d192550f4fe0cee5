"""A two-stage detector of torchvision as the teacher in whole runs: through the maps of its pyramid, and through its boxes."""

from __future__ import annotations

import pytest
import torch
from torchvision.models import get_model

from litdistill.evaluation.evaluate import evaluate
from litdistill.export.export import export
from litdistill.utils.errors import UserError
from tests.conftest import compose_config
from tests.test_zoo import logged, run

NAME = "fasterrcnn_mobilenet_v3_large_320_fpn"
RUN = [
    *(
        "data=digit_scenes",
        "task=detection",
        "net@student=fcos_slim",
        "net@teacher=torchvision_detector",
        "trainer=cpu",
    ),
    *("data.count=32", "data.val_size=8", "data.labels=8", "data.batch_size=8", "data.eval_batch_size=8"),
    *("student.width=4", "student.fpn=32", "student.convs=1", f"teacher.name={NAME}", "teacher.size=64"),
    *("trainer.max_epochs=1", "trainer.log_every_n_steps=2", "teacher.allow_chance=true"),
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A file of random weights, as a user of torchvision saves them."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "mine.pth"
    state = get_model(NAME, weights=None, weights_backbone=None, num_classes=11).state_dict()
    state["roi_heads.box_predictor.cls_score.bias"][4] = 6.0  # it is sure of something
    torch.save(state, path)
    yield path
    path.unlink()


def config(folder, *more):
    return compose_config(folder, *RUN, *more)


MAPS = "method=pkd method.student_taps=pyramid method.teacher_taps=pyramid teacher.checkpoint={}"
BOXES = "method=pseudo_boxes method.threshold=0.9 teacher.checkpoint=null teacher.weights={}"


@pytest.mark.parametrize(("given", "terms"), [(MAPS, {"hint"}), (BOXES, set())])
def test_a_student_learns_from_a_file_of_weights_is_measured_beside_it_and_ships(file, tmp_path, given, terms):
    folder = run(config(tmp_path / "run", *given.format(file).split()))
    assert set(logged(folder)) - {"total"} == {"cls", "box", "centerness"} | terms
    found = evaluate(folder)
    assert found["teacher"].keys() >= {"map", "map_50"}
    assert "agreement" in found["agreement"]
    if terms:  # of boxes alone the student is no other network
        path, check = export(folder)
        assert path.is_file()
        assert check["agreement"] > 0.999


def test_what_a_two_stage_teacher_cannot_do_is_said_in_a_line(file, tmp_path):
    def said(*more):
        with pytest.raises(UserError) as refusal:
            run(config(tmp_path / "run", *more))
        return str(refusal.value)

    assert "no other is trained here: name one (net@student=fcos_slim)" in said("method=pkd")
    assert "use pkd, cwd or pseudo_boxes" in said("method=dense_kd", f"teacher.checkpoint={file}")
    assert "A two-stage one teaches with weights" in said("method=crosskd", f"teacher.checkpoint={file}")
    assert "do not fit the teacher" in said(
        "method=pkd", f"teacher.checkpoint={file}", "teacher.name=fasterrcnn_resnet50_fpn"
    )
    assert "There is no checkpoint at" in said("method=pkd", "teacher.checkpoint=gone.pth")
