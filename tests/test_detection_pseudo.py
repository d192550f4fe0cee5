"""Pseudo boxes: which detections become labels of which pictures, what is logged of them, and what is refused."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from litdistill.distillation.running_means import RunningMeans, Seen
from litdistill.methods import Sum
from litdistill.tasks import Classification
from litdistill.tasks.detection.boxes import padded, present
from litdistill.tasks.detection.dense_kd import DenseKD
from litdistill.tasks.detection.pseudo_boxes import PseudoBoxes, pseudo_targets
from litdistill.types import Batch, Outputs, has_label
from litdistill.utils.errors import UserError

NAN = float("nan")


def logit(p: float) -> float:
    return float(torch.logit(torch.tensor(p)))


def dense(*pictures: list[tuple[list[float], int, float]], classes: int = 3, anchors: int = 6) -> dict[str, Tensor]:
    """Heads whose only scores are these (box, class, score) of each picture."""
    logits = torch.full((len(pictures), anchors, classes), -20.0)
    boxes = torch.zeros(len(pictures), anchors, 4)
    for n, picture in enumerate(pictures):
        for a, (box, label, score) in enumerate(picture):
            logits[n, a, label], boxes[n, a] = logit(score), torch.tensor(box)
    return {"logits": logits, "boxes": boxes}


A, B, FAR = [2.0, 3.0, 12.0, 13.0], [2.0, 3.0, 12.0, 12.5], [20.0, 20.0, 30.0, 31.0]
PICTURES = Batch(torch.zeros(3, 3, 32, 40), None, torch.arange(3))


def batch() -> Batch:
    """Three pictures: one with two boxes, one without labels, one that is labelled as empty."""
    targets = padded([torch.tensor([[1, 1, 9, 9, 0, 0], [4, 4, 20, 20, 2, 0]]), torch.zeros(0, 6), torch.zeros(0, 6)])
    targets[1] = NAN
    return PICTURES._replace(targets=targets)


def test_pictures_without_labels_get_the_detections_above_the_threshold():
    teacher = Outputs(
        dense([(A, 1, 0.99)], [(A, 1, 0.9), (B, 1, 0.8), (FAR, 2, 0.7), (A, 0, 0.3), (FAR, 0, 0.6)], [(A, 1, 0.99)])
    )
    method = PseudoBoxes(threshold=0.5)
    given = batch()
    got = method.relabel(teacher, given)
    assert has_label(got.targets).all()
    rows = got.targets[1][present(got.targets)[1]]
    expected = torch.tensor(
        [[*A, 1, 0], [*FAR, 2, 0], [*FAR, 0, 0]]
    )  # B is a duplicate of A; of class 0 all but one are faint
    torch.testing.assert_close(rows, expected)
    # What has labels keeps them, with room for more rows; a labelled picture without objects is no picture without labels.
    assert torch.equal(got.targets[0, :2], given.targets[0])
    assert present(got.targets).sum(1).tolist() == [2, 3, 0]
    assert torch.equal(
        given.targets[1].isnan(), torch.ones(2, 6, dtype=torch.bool)
    )  # the loader's tensor is not written to
    assert got.inputs is given.inputs
    assert got.ids is given.ids
    assert float(method.watched()["pseudo_share"]) == pytest.approx(3 / 5)


def test_a_picture_in_which_the_teacher_finds_nothing_is_background():
    got = PseudoBoxes().relabel(Outputs(dense([], [(A, 1, 0.49)], [])), batch())
    assert has_label(got.targets).all()
    assert present(got.targets).sum(1).tolist() == [2, 0, 0]
    assert (got.targets[1, :, 4] == -1).all()


def test_the_centerness_counts_in_the_score():
    heads = dense([(A, 1, 0.9)])
    low = heads | {"centerness": torch.full((1, 6), logit(0.2))}
    assert present(pseudo_targets(heads, (32, 40), 0.5, 0.6, 100)).sum() == 1
    assert present(pseudo_targets(low, (32, 40), 0.5, 0.6, 100)).sum() == 0  # sqrt(0.9 · 0.2) = 0.42
    assert present(pseudo_targets(low, (32, 40), 0.4, 0.6, 100)).sum() == 1


def test_detections_of_a_two_stage_teacher_are_taken_as_they_are():
    found = torch.tensor([[[*A, 0.9, 1], [*B, 0.8, 1], [*FAR, 0.4, 2], [0, 0, 0, 0, 0, -1]]])
    got = pseudo_targets({"detections": found}, (32, 40), 0.5, 0.6, 100)
    torch.testing.assert_close(got, torch.tensor([[[*A, 1, 0], [*B, 1, 0]]]))


def test_the_best_boxes_are_kept_where_there_are_too_many():
    heads = dense([(A, 1, 0.6), (FAR, 2, 0.9), (A, 0, 0.7)])
    got = pseudo_targets(heads, (32, 40), 0.5, 0.6, 2)
    assert got[0, :, 4].tolist() == [2, 0]


def test_with_labels_for_all_the_batch_is_unchanged_and_a_line_says_so(caplog):
    method = PseudoBoxes()
    given = batch()
    given = given._replace(targets=given.targets.nan_to_num(-1))
    got = method.relabel(Outputs(dense([], [], [])), given)
    assert torch.equal(got.targets, given.targets)
    assert float(method.watched()["pseudo_share"]) == 0
    with caplog.at_level(logging.WARNING):
        for epoch in range(3):
            method.set_epoch(epoch)
    assert [r.message for r in caplog.records] == [
        "pseudo_boxes: all pictures have labels, so that nothing is learned from the teacher."
    ]


def test_in_a_sum_boxes_come_from_one_method_and_terms_from_the_other():
    teacher = Outputs(dense([], [(A, 1, 0.9)], []))
    method = Sum({"pseudo": PseudoBoxes(), "dense": DenseKD(hard=0)})
    assert method.relabels
    assert method.hard == 1
    assert present(method.relabel(teacher, batch()).targets).sum() == 3
    assert set(method.watched()) == {"pseudo_share"}


def test_what_is_watched_is_a_mean_over_minibatches_and_no_term_of_the_loss():
    means = RunningMeans(Classification())
    logits, targets = torch.randn(2, 3), torch.tensor([0, 1])
    for loss, share in ((1.0, 0.5), (2.0, 0.0), (6.0, 0.25)):
        terms = {"hard": torch.tensor(loss)}
        means.add(Seen(terms, Outputs.of(logits), None, targets, 2, {"pseudo_share": torch.tensor(share)}))
    found = means.means()
    assert float(found["loss"]) == 3
    assert float(found["pseudo_share"]) == 0.25


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hard": 0}, "hard must be above 0"),
        ({"threshold": 1.2}, "threshold=1.2"),
        ({"nms": 0}, "nms=0"),
        ({"top": 0}, "top=0"),
    ],
)
def test_options_that_make_no_labels_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        PseudoBoxes(**options)
