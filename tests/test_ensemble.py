"""Several networks as one teacher: weights, means, classes that only some know, taps, and what is refused.

pytest tests/test_ensemble.py
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from litdistill.config.members import merged_member
from litdistill.distillation.distiller import Distiller
from litdistill.distillation.teacher import FrozenTeacher
from litdistill.distillation.teacher_cache import _close
from litdistill.evaluation.crowd import disagreement, jensen_shannon
from litdistill.features.feature_extractor import FeatureExtractor, resolve_taps
from litdistill.methods import FitNet
from litdistill.models.classes import class_columns, with_columns
from litdistill.models.ensemble import Ensemble, Members, check_apart
from litdistill.models.preprocess import Preprocess, Preprocessed
from litdistill.models.small import conv4
from litdistill.tasks.classification import Classification
from litdistill.tasks.metrics import of_known_classes, sample_agreement
from litdistill.tasks.multilabel import MultiLabel
from litdistill.types import Batch
from litdistill.utils.errors import UserError
from litdistill.utils.hashing import network_sha256
from tests.ensembles import COLUMNS, KNOWN, WEIGHTS, Fixed, drawn, softmax

# -- means ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_maps_are_averaged_at_each_place(average):
    fine, coarse = drawn(2, 3, 4, 6), drawn(2, 3, 2, 3, seed=1)
    net = Ensemble([Fixed(fine), Fixed(coarse)], [3, 1], average, columns=[[0, 1, 2], [2, 0, 1]])
    found = net(torch.zeros(2, 3, 4, 6))
    resized = torch.nn.functional.interpolate(coarse, (4, 6), mode="bilinear", align_corners=False)[:, [2, 0, 1]]
    assert found.shape == (2, 3, 4, 6)
    for n, y, x in [(0, 0, 0), (1, 3, 5), (1, 2, 1)]:
        own = [m[n, :, y, x].numpy() for m in (fine, resized)]
        if average == "logits":
            expected = 0.75 * own[0] + 0.25 * own[1]
        else:
            expected = np.log(0.75 * softmax(own[0]) + 0.25 * softmax(own[1]))
        np.testing.assert_allclose(found[n, :, y, x].detach(), expected, rtol=1e-6)  # weights are float32
    assert Members(net)(torch.zeros(1)).logits.equal(found)


def test_a_teacher_of_masks_knows_all_classes():
    net = Ensemble([Fixed(drawn(1, 4, 2, 2)), Fixed(drawn(1, 6, 2, 2))], columns=COLUMNS)
    with pytest.raises(UserError, match="A teacher of masks that knows some of the classes"):
        net(torch.zeros(1))


@pytest.mark.parametrize("weights", [None, [2.0, 1.0, 5.0]])
@pytest.mark.parametrize("mean", ["logits", "probabilities"])
def test_the_mean_of_networks_that_know_all_classes(weights, mean):
    logits = [drawn(5, 4, seed=i) for i in range(3)]
    found = Ensemble([Fixed(z) for z in logits], weights, mean)(torch.zeros(5, 1)).detach().numpy()
    w = np.array(weights or [1, 1, 1]) / np.sum(weights or [1, 1, 1])
    for n in range(5):
        rows = [z[n].numpy() for z in logits]
        if mean == "logits":
            expected = sum(a * b for a, b in zip(w, rows, strict=True))
        else:
            expected = np.log(sum(a * softmax(b) for a, b in zip(w, rows, strict=True)))
        assert np.allclose(found[n], expected, atol=1e-6)


@pytest.mark.parametrize("mean", ["logits", "probabilities"])
def test_a_network_counts_where_it_knows_a_class(mean):
    logits = [drawn(5, 4, seed=1), drawn(5, 3, seed=2)]
    ensemble = Ensemble([Fixed(z) for z in logits], WEIGHTS, mean, [[*c, -1] for c in COLUMNS])  # nobody knows the last
    assert ensemble.partial
    found = {k: v.detach().numpy() for k, v in ensemble(torch.zeros(5, 1)).items()}
    for n in range(5):
        p = [dict(zip(k, softmax(z[n].numpy()), strict=True)) for k, z in zip(KNOWN, logits, strict=True)]
        for c in range(6):
            knows = [(w, q[c]) for w, q in zip(WEIGHTS, p, strict=True) if c in q]
            total = sum(w for w, _ in knows)
            if mean == "logits":
                expected = sum(w * math.log(q) for w, q in knows) / total
            else:
                expected = math.log(sum(w * q for w, q in knows) / total)
            assert found["logits"][n, c] == pytest.approx(expected, abs=1e-5)
        assert found["logits"][n, 6] == -math.inf
        for i, (w, q) in enumerate(zip([0.75, 0.25], p, strict=True)):
            for c in range(7):
                joint = math.exp(found["members"][n, i, c])
                assert joint == pytest.approx(w * q[c] if c in q else 0, abs=1e-6)


def test_labels_that_only_some_know_are_averaged_one_by_one():
    logits = [drawn(5, 2, seed=1), drawn(5, 2, seed=2)]
    ensemble = Ensemble([Fixed(z) for z in logits], [3, 1], columns=[[0, 1, -1], [-1, 0, 1]], kind="bernoulli")
    found = ensemble(torch.zeros(5, 1))
    assert torch.allclose(found[:, 0], logits[0][:, 0], atol=1e-6)
    assert torch.allclose(found[:, 1], 0.75 * logits[0][:, 1] + 0.25 * logits[1][:, 0], atol=1e-6)
    assert torch.allclose(found[:, 2], logits[1][:, 1], atol=1e-6)
    nets = [Fixed(z) for z in logits]
    mixed = Ensemble(nets, [3, 1], "probabilities", [[0, 1, -1], [-1, 0, 1]], "bernoulli")(torch.zeros(5, 1))
    expected = 0.75 * logits[0][:, 1].sigmoid() + 0.25 * logits[1][:, 0].sigmoid()
    assert torch.allclose(mixed[:, 1].sigmoid(), expected, atol=1e-5)
    with pytest.raises(UserError, match="each label of several is known by one teacher at least"):
        Ensemble(nets, columns=[[0, 1, -1], [-1, 0, -1]], kind="bernoulli")
    with pytest.raises(UserError, match="all values of the data"):
        Ensemble(nets, columns=[[0, 1, -1], [-1, 0, 1]], kind="real")


def test_the_outputs_of_each_member_are_read_beside_their_mean():
    logits = [drawn(5, 4), drawn(5, 4, seed=1)]
    ensemble = Ensemble([Fixed(z) for z in logits], columns=[None, [1, 0, 3, 2]])
    assert not ensemble.partial
    found = Members(ensemble)(torch.zeros(5, 1))
    assert torch.equal(found.heads["members"][:, 0], logits[0])
    assert torch.equal(found.heads["members"][:, 1], logits[1][:, [1, 0, 3, 2]])
    assert torch.equal(found.logits, ensemble(torch.zeros(5, 1)))


# -- taps ----------------------------------------------------------------------------------------------------------------


def crowd() -> Ensemble:
    nets = [conv4(4, (1, 8, 8), widths=[4, 8]), conv4(4, (1, 16, 16), widths=[6, 10, 12])]
    return Ensemble(
        [Preprocessed(net, Preprocess([0.5], [0.2], size)) for net, size in zip(nets, (8, 16), strict=True)]
    )


def test_a_tap_names_the_member():
    net, x = crowd().eval(), torch.rand(2, 1, 8, 8)
    names = resolve_taps(net, x, ["1.stages", "0.last", "0.layer1"])
    assert names == ["1.layer1", "1.layer2", "1.layer3", "0.layer2", "0.layer1"]
    found = FeatureExtractor(net, names)(x)
    alone = [FeatureExtractor(member, ["layer1"])(x).features["layer1"] for member in net.parts().values()]
    assert torch.equal(found.features["0.layer1"], alone[0])
    assert torch.equal(found.features["1.layer1"], alone[1])
    assert found.features["1.layer1"].shape[1] == 6
    assert resolve_taps(net, x, "1.pooled") == ["1.fc:in"]


@pytest.mark.parametrize("taps", ["stages", "pooled", "layer1", "2.layer1"])
def test_a_tap_of_no_member_is_refused(taps):
    with pytest.raises(UserError, match=r"the teacher is 2 networks.*Say whose.*teacher_taps=0\."):
        resolve_taps(crowd(), torch.rand(2, 1, 8, 8), taps)


def test_of_one_network_the_number_may_be_left_out():
    net = Ensemble([conv4(4, (1, 8, 8), widths=[4, 8])], columns=[[0, 1, 2, 3, -1]]).eval()
    x = torch.rand(2, 1, 8, 8)
    assert resolve_taps(net, x, "stages") == resolve_taps(net, x, "0.stages") == ["0.layer1", "0.layer2"]
    with pytest.raises(UserError, match="No tap 'nowhere'"):
        resolve_taps(net, x, "nowhere")


def test_a_method_reads_the_features_of_the_member_that_it_names():
    student, batch = conv4(4, (1, 8, 8), widths=[4, 8]), Batch(torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))
    found = Distiller(student, FitNet(teacher_taps="1.stages"), crowd(), batch)
    assert list(found.teacher(batch).features) == ["1.layer1", "1.layer2", "1.layer3"]
    with pytest.raises(UserError, match="the teacher is 2 networks"):
        Distiller(student, FitNet(), crowd(), batch)


# -- classes by name -----------------------------------------------------------------------------------------------------


def test_columns_of_classes_by_name():
    assert class_columns(["a", "b"], ["a", "b"], "x", "teacher") is None
    assert class_columns(None, ["a", "b"], "x", "teacher") is None
    assert class_columns(["b", "a", "c"], ["a", "b"], "x", "teacher") == [1, 0]
    assert class_columns(["d", "b", "a"], ["a", "b", "c"], "x", "teacher") == [2, 1, -1]
    with pytest.raises(UserError, match="only there d, e, only here b, c"):
        class_columns(["a", "d", "e"], ["a", "b", "c"], "x", "teacher")  # of one class it says nothing
    with pytest.raises(UserError, match=r"knows Dog, and these data have dog.*Rename"):
        class_columns(["cat", "Dog", "cow"], ["cat", "dog", "cow"], "x", "teacher")
    with pytest.raises(UserError, match=r"only there c, only here none.*student\.head=new"):
        class_columns(["a", "b", "c"], ["a", "b"], "x", "student")
    with pytest.raises(UserError, match="other classes"):
        class_columns(["a", "b", "b"], ["a", "b"], "x", "teacher")


def test_outputs_are_selected_in_the_last_layer():
    net, x = conv4(6, (1, 8, 8), widths=[4, 8]).eval(), torch.rand(3, 1, 8, 8)
    before = net(x)
    assert with_columns(net, [4, 0, 3], x)
    assert torch.allclose(net(x), before[:, [4, 0, 3]])
    assert net.fc.out_features == 3
    assert not with_columns(net, [1, -1, 0], x)  # one that it does not know


def test_a_teacher_is_judged_on_the_classes_that_it_knows():
    logits = torch.tensor([[2.0, 1.0, -math.inf], [0.0, 1.0, -math.inf], [0.0, 1.0, -math.inf]])
    assert of_known_classes(logits, torch.tensor([0, 2, 1])).tolist() == [True, False, True]
    student = torch.randn(3, 3)
    values = sample_agreement(student, logits)
    p, q = logits[:, :2].double().softmax(1), student[:, :2].double().softmax(1)
    assert torch.allclose(values["kl"], (p * (p / q).log()).sum(1))


# -- disagreement --------------------------------------------------------------------------------------------------------


def test_disagreement_is_among_the_classes_that_both_know():
    task, targets = Classification(), torch.tensor([0, 1, 2, 3, 1])
    nets = [Fixed(drawn(5, 4, seed=i)) for i in range(2)]
    ensemble = Ensemble([*nets, Fixed(drawn(5, 2, seed=5))], columns=[[0, 1, 2, 3], [0, 1, 2, 3], [-1, 0, 1, -1]])
    each = ensemble.each(torch.zeros(5, 1)).detach()
    found = disagreement(task, ensemble, each, targets)
    z = [each[:, i].numpy() for i in range(3)]
    decisions, js = [], []
    for i, j, classes, rows in ((0, 1, [0, 1, 2, 3], range(5)), (0, 2, [1, 2], [1, 2, 4]), (1, 2, [1, 2], [1, 2, 4])):
        a, b = ([softmax(z[k][n][classes]) for n in rows] for k in (i, j))
        decisions.append(np.mean([x.argmax() != y.argmax() for x, y in zip(a, b, strict=True)]))
        divergence = lambda x, y: float((x * np.log(x / y)).sum())  # noqa: E731
        js.append(
            np.mean([(divergence(x, (x + y) / 2) + divergence(y, (x + y) / 2)) / 2 for x, y in zip(a, b, strict=True)])
        )
        assert found["by_pair"][i][j] == found["by_pair"][j][i] == pytest.approx(decisions[-1])
    assert found["decisions"] == pytest.approx(np.mean(decisions))
    assert found["js"] == pytest.approx(np.mean(js))
    assert found["pairs"] == 3


def test_networks_without_a_common_class_are_not_compared():
    ensemble = Ensemble([Fixed(drawn(5, 2)), Fixed(drawn(5, 2, seed=1))], columns=[[0, 1, -1, -1], [-1, -1, 0, 1]])
    each = ensemble.each(torch.zeros(5, 1))
    found = disagreement(Classification(), ensemble, each, torch.tensor([0, 1, 2, 3, 1]))
    assert found == {"pairs": 0, "by_pair": [[0.0, None], [None, 0.0]]}


def test_the_divergence_of_labels_is_the_sum_of_theirs():
    first, second = drawn(4, 3), drawn(4, 3, seed=1)
    each = [
        jensen_shannon(torch.stack([a, torch.zeros_like(a)], 1), torch.stack([b, torch.zeros_like(b)], 1))
        for a, b in zip(first.T, second.T, strict=True)
    ]
    assert torch.allclose(jensen_shannon(first, second, "bernoulli"), sum(each))
    far = torch.tensor([[80.0, 0.0], [0.0, 80.0]])
    assert jensen_shannon(far[:1], far[1:]).item() == pytest.approx(math.log(2))
    ensemble = Ensemble([Fixed(first), Fixed(second)], kind="bernoulli")
    found = disagreement(MultiLabel(), ensemble, torch.stack([first, second], 1), torch.ones(4, 3))
    assert found["decisions"] == pytest.approx(((first > 0) != (second > 0)).double().mean().item())


# -- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [[1, 0], [1, -1], [1, math.nan], [1, math.inf]])
def test_weights_are_above_0(weights):
    with pytest.raises(UserError, match=r"weights=.* must be above 0"):
        Ensemble([Fixed(drawn(2, 2)), Fixed(drawn(2, 2))], weights)


def test_what_is_no_ensemble_is_refused():
    net, other = Fixed(drawn(2, 2)), Fixed(drawn(2, 3))
    for arguments, line in (
        (([],), "one network or more"),
        (([net, net],), "each of them once"),
        (([net, other], [1]), "are 1, and the ensemble has 2"),
        (([net, other], None, "median"), "choose logits or probabilities"),
        (([net, other], None, "logits", [[0, 1], [-1, -1]]), "Member 1 of the ensemble knows none"),
        (([net, other], None, "logits", [[0, 1], [0, 1, 2]]), "one list for each member"),
    ):
        with pytest.raises(UserError, match=line):
            Ensemble(*arguments)
    with pytest.raises(UserError, match=r"outputs of other shapes \(a \(2, 2\), b \(2, 3\)\)"):
        Ensemble([net, other], names=["a", "b"])(torch.zeros(2, 1))
    with pytest.raises(UserError, match=r"Members 0 and 1 of teacher\.ensemble are the same network"):
        check_apart([net, Fixed(net.logits.detach().clone())])


def test_an_ensemble_measured_with_its_members_stays_in_eval_mode():
    from litdistill.evaluation.predictions import predict_split
    from litdistill.models.ensemble import with_members

    class Data:
        def batches(self, split, device="cpu"):
            yield Batch(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]))

    net = crowd().eval()
    predict_split(with_members(net), Data(), "val")
    assert not any(m.training for m in net.modules())


def test_rows_of_a_cache_with_classes_that_nobody_knows_are_compared():
    rows = torch.tensor([[1.0, -math.inf], [2.0, -math.inf]])
    assert _close(rows, rows.clone(), 1e-3)
    assert not _close(rows, rows + torch.tensor([0.1, 0.0]), 1e-3)
    assert not _close(rows, torch.tensor([[1.0, 3.0], [2.0, -math.inf]]), 1e-3)
    assert not _close(rows, torch.tensor([[1.0, math.nan], [2.0, -math.inf]]), 1e-3)


def test_a_frozen_ensemble_in_its_faster_form_gives_the_same():
    net, batch = crowd(), Batch(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]))
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_()
        expected = net.eval()(batch.inputs)
    teacher = FrozenTeacher(net, example=batch)
    assert teacher.run is not net
    assert torch.allclose(teacher(batch).logits, expected, atol=1e-4)
    assert torch.allclose(teacher.with_members(batch).heads["members"].mean(1), expected, atol=1e-4)


def test_a_cache_knows_weights_mean_and_classes():
    nets = [Fixed(drawn(2, 2)), Fixed(drawn(2, 2, seed=1))]
    columns = [[0, 1, -1], [-1, 0, 1]]
    found = [
        Ensemble(nets),
        Ensemble(nets, [1, 3]),
        Ensemble(nets, average="probabilities"),
        Ensemble(nets, columns=columns),
        Ensemble(nets, columns=columns[::-1]),
        Ensemble(nets[::-1]),
    ]
    assert len({network_sha256(ensemble) for ensemble in found}) == len(found)
    assert network_sha256(Ensemble(nets, [2, 2])) == network_sha256(found[0])


def test_a_member_of_another_network_takes_none_of_the_options_of_the_first():
    teacher = OmegaConf.create(
        {
            "_target_": "litdistill.models.conv4",
            "widths": [8],
            "depth": 3,
            "checkpoint": "auto",
            "ensemble_weights": [1, 2],
        }
    )
    same = merged_member(teacher, {"recipe": {"seed": 1}})
    assert (same.widths, same.depth, same.recipe.seed, same.ensemble_weights) == ([8], 3, 1, None)
    other = merged_member(teacher, {"_target_": "litdistill.models.mlp", "hidden": [4]})
    assert {k for k, v in other.items() if v is not None} == {"_target_", "hidden", "checkpoint"}
    assert teacher.widths == [8]
