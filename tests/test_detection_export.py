"""A detector that ships: files with post-processing inside, against suppression written out in NumPy."""

import json

import numpy as np
import pytest
import torch
from torchvision.ops import nms

from litdistill.data.tensors import TensorData
from litdistill.export import export as export_module
from litdistill.export.export import export_student
from litdistill.export.outputs import Form, _check_form
from litdistill.export.predict import load
from litdistill.models.preprocess import Preprocess, Preprocessed
from litdistill.report.files import write_teacher
from litdistill.tasks.detection.fcos import fcos_slim
from litdistill.tasks.detection.scenes import digit_scenes
from litdistill.tasks.detection.shipping import compared, in_int8
from litdistill.tasks.detection.suppress import at_once, suppress
from litdistill.tasks.detection.task import Detection
from litdistill.utils.errors import UserError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

TASK = Detection(detections=20)
PREPROCESS = Preprocess([0.5] * 3, [0.25] * 3)
CASES = [("onnx", "fp32", "student.onnx"), ("onnx", "fp16", "student-fp16.onnx"), ("pt2", "fp32", "student.pt2")]


@pytest.fixture(scope="module")
def data():
    source = digit_scenes(count=200).source
    few = source._replace(test=source.test.rows(torch.arange(40)))
    found = TensorData(lambda: few, "digit_scenes", "detection", standardize=True)
    found.setup()
    return found


@pytest.fixture(scope="module")
def net(data):
    """A detector after 80 steps: its boxes are poor, and differ from picture to picture."""
    torch.manual_seed(0)
    net = Preprocessed(fcos_slim(10, (3, 64, 64), 8, fpn=32, convs=1, strides=(8, 16)), PREPROCESS).train()
    optimizer = torch.optim.AdamW(net.parameters(), 4e-3)
    for step in range(80):
        batch = data.get_batch("train", data.train_ids[torch.arange(16 * step, 16 * step + 16) % len(data.train_ids)])
        sum(TASK.loss(net, TASK.forward(net, batch, True), batch).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory, net, data):
    folder = tmp_path_factory.mktemp("detector")
    for format, precision, name in CASES:
        path, _ = export_student(folder, net, data, format, precision, task=TASK)
        assert path == folder / "export" / name
    return folder


def by_hand(heads, image_size, threshold=0.05, iou=0.6, top=20):
    """Returns the detections of one picture, rows of x1, y1, x2, y2, score, class, best first: every pair is compared."""
    logits, boxes, center = (heads[k][0].double().numpy() for k in ("logits", "boxes", "centerness"))
    scores = np.sqrt(1 / (1 + np.exp(-logits)) / (1 + np.exp(-center))[:, None])
    boxes = np.clip(boxes, 0, [image_size[1], image_size[0]] * 2)
    every = [(*boxes[i], scores[i, c], c) for i in range(len(boxes)) for c in range(logits.shape[1])]
    kept = []
    for one in sorted(every, key=lambda row: -row[4]):
        if one[4] > threshold and all(one[5] != other[5] or overlap(one, other) <= iou for other in kept):
            kept.append(one)
    return np.array(kept[:top]).reshape(-1, 6)


def overlap(a, b):
    inner = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    area = lambda r: (r[2] - r[0]) * (r[3] - r[1])  # noqa: E731
    return inner / max(area(a) + area(b) - inner, 1e-12)


@pytest.mark.parametrize(("format", "precision", "name"), CASES)
def test_a_file_gives_the_networks_detections_whatever_the_batch(run, net, data, format, precision, name):
    images = data.get_batch("test", torch.arange(6)).inputs
    with torch.no_grad():
        expected = [by_hand(net(images[i : i + 1]), (64, 64)) for i in range(6)]
    assert sum(map(len, expected)) > 12  # there is something to compare
    model = load(run / "export" / name, trust=True)
    found = model.run(images.numpy())
    assert found.dtype == np.float32
    assert found.shape == (6, 20, 6)
    for rows, right in zip(found, expected, strict=True):
        real = rows[rows[:, 5] >= 0]
        if precision == "fp32":
            np.testing.assert_allclose(real, right, atol=2e-3)
        else:
            assert abs(len(real) - len(right)) <= 2
            np.testing.assert_allclose(real[:2], right[:2], atol=0.2)
        assert not rows[len(real) :, :5].any()  # the rest is empty
    for count in (1, 3):
        np.testing.assert_allclose(model.run(images[:count].numpy()), found[:count], atol=1e-3)


def test_an_onnx_file_names_its_outputs_and_holds_no_operator_of_ours(run):
    proto = onnx.load(run / "export" / "student.onnx")
    assert [o.name for o in proto.graph.output] == ["boxes", "scores", "labels"]
    assert {i.domain for i in proto.opset_import} == {""}
    assert [n.op_type for n in proto.graph.node].count("NonMaxSuppression") == 1
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    boxes, scores, labels = session.run(None, {"images": np.zeros((2, 3, 64, 64), np.uint8)})
    assert boxes.shape == (2, 20, 4)
    assert scores.shape == labels.shape == (2, 20)
    assert labels.dtype == np.int64
    assert ((labels == -1) == (scores == 0)).all()
    entry = json.loads((run / "export" / "manifest.json").read_text())["files"]["student.onnx"]
    assert entry["kind"] == "boxes"
    assert entry["check"]["agreement"] >= 0.999
    assert entry["check"]["exported"] == pytest.approx(entry["check"]["student"], abs=1e-4)
    assert entry["check"]["samples"] == 40


def test_a_file_of_other_boxes_is_refused(run, net, data, tmp_path, monkeypatch):
    right = export_module.runtime

    def moved(*arguments):
        inner = right(*arguments)
        return lambda images: inner(images) + np.float32([4, 0, 4, 0, 0, 0])

    monkeypatch.setattr(export_module, "runtime", moved)
    with pytest.raises(UserError, match=r"student.onnx is not the student, so it is not kept: scores of the same box"):
        export_student(tmp_path, net, data, task=TASK)
    assert not (tmp_path / "export" / "student.onnx").exists()


@pytest.mark.parametrize("format", ["safetensors", "torchscript"])
def test_formats_without_a_place_for_post_processing_are_refused(net, data, tmp_path, format):
    with pytest.raises(UserError, match="no place for the post-processing of a boxes task: use format=onnx or pt2"):
        export_student(tmp_path, net, data, format, task=TASK)


def rows(*found):
    whole = torch.zeros(1, 4, 6)
    whole[..., 5] = -1
    for i, row in enumerate(found):
        whole[0, i] = torch.tensor(row)
    return whole


def test_boxes_are_compared_by_place_class_and_score():
    a, b, c = (0.0, 0, 10, 10, 0.9, 1), (20.0, 0, 30, 10, 0.6, 2), (40.0, 0, 50, 10, 0.5, 2)
    assert compared(rows(a, b, c), rows(a, b, c)) == pytest.approx((0, 0.9, 1))
    assert compared(rows(b, a), rows(a, b)) == pytest.approx((0, 0.9, 1))  # the order does not count
    assert compared(rows(a, b), rows(a, b, c))[2] == pytest.approx(4 / 5)  # one of ours is not found
    assert compared(rows(a, b, c), rows(a, b))[2] == pytest.approx(4 / 5)  # one is found that is not ours
    assert compared(rows(a, (*b[:5], 1)), rows(a, b))[2] == pytest.approx(2 / 4)  # of another class
    assert compared(rows(a, (21.0, 0, 31, 10, 0.6, 2)), rows(a, b))[2] == pytest.approx(2 / 4)  # IoU 9 / 11
    assert compared(rows(a, (20.5, 0, 30.5, 10, 0.6, 2)), rows(a, b))[2] == pytest.approx(1)  # IoU 9.5 / 10.5
    assert compared(rows(a, (*b[:4], 0.55, 2)), rows(a, b)) == pytest.approx((0.05, 0.9, 1))
    assert compared(rows(a, (*b[:4], 0.3, 2)), rows(a, b)) == pytest.approx((0.3, 0.9, 0.5))
    line, sliver = (0.0, 30, 10, 30, 0.4, 1), (0.0, 20, 10, 20.001, 0.4, 1)
    assert compared(rows(a, line, line), rows(a)) == pytest.approx((0, 0.9, 1))  # boxes without area do not count
    assert compared(rows(a, sliver), rows(a, (*sliver[:3], 20.003, *sliver[4:])))[2] == 1
    assert compared(rows(), rows())[2] == 1
    assert compared(rows(a), rows())[2] == 0
    assert np.isnan(compared(rows((*a[:4], float("nan"), 1)), rows(a))[0])


def test_of_an_int8_file_the_boxes_that_are_decided_are_compared():
    a, low = (0.0, 0, 10, 10, 0.9, 1), (20.0, 0, 30, 10, 0.3, 2)
    assert in_int8(rows(a), rows(a, low))[2] == 1  # one that is not counted is lost
    assert compared(rows(a), rows(a, low))[2] == pytest.approx(2 / 3)
    near, below = (*low[:4], 0.51, 2), (*low[:4], 0.49, 2)
    assert in_int8(rows(a, below), rows(a, near))[2] == 1  # nothing is lost where a score falls below what is counted
    assert in_int8(rows(a, near), rows(a, below))[2] == 1
    assert in_int8(rows(a), rows(a, near))[2] == pytest.approx(2 / 3)
    assert in_int8(rows(a, near), rows(a))[2] == pytest.approx(2 / 3)
    assert in_int8(rows(a, (*low[:4], 0.39, 2)), rows(a, near))[2] == pytest.approx(2 / 3)  # its score is another
    assert in_int8(rows(low), rows(low, (40.0, 0, 50, 10, 0.2, 2)))[2] == pytest.approx(2 / 3)  # none is decided
    assert np.isnan(in_int8(rows((*a[:4], float("nan"), 1)), rows(a))[0])
    assert TASK.least_metric(0.8, 0.95, "int8") == pytest.approx(0.76)
    assert TASK.least_metric(0.8, 0.999, "fp16") is None


@pytest.fixture(scope="module")
def int8_file(tmp_path_factory, net, data):
    folder, anything = tmp_path_factory.mktemp("int8"), (None, 0.0)
    return export_student(folder, net, data, precision="int8", calibration=16, limits=anything, task=TASK)[0]


def test_an_int8_file_of_less_map_is_refused(int8_file, net, data, tmp_path, monkeypatch):
    right = export_module.check

    def worse(*arguments):
        found = right(*arguments)
        assert found["tolerance"]["metric"] == pytest.approx(0.95 * found["student"])
        assert found["compared"][1] == "boxes with a score of at least 0.5 are the same"
        return {**found, "agreement": 1.0, "exported": 0.9 * found["student"]}

    monkeypatch.setattr(export_module, "write_format", lambda *a: a[2].write_bytes(int8_file.read_bytes()))
    monkeypatch.setattr(export_module, "check", worse)
    with pytest.raises(
        UserError, match=r"student-int8.onnx is not the student.*100.00 % of boxes with.*\(at least 0\."
    ):
        export_student(tmp_path, net, data, precision="int8", task=TASK)
    assert not (tmp_path / "export" / "student-int8.onnx").exists()


def test_the_last_convolutions_and_group_normalization_of_an_int8_file_are_in_float(int8_file):
    graph = onnx.load(int8_file).graph
    maker = {name: node for node in graph.node for name in node.output}
    weights = {i.name: i.data_type for i in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    in_float = [node for node in convolutions if node.input[1] in weights]
    assert len(in_float) == 6  # classes, boxes and centerness of two maps
    assert {weights[node.input[1]] for node in in_float} == {onnx.TensorProto.FLOAT}
    for node in convolutions:
        if node not in in_float:
            assert maker[node.input[1]].op_type == "DequantizeLinear"
            assert weights[maker[node.input[1]].input[0]] == onnx.TensorProto.INT8
    assert len(convolutions) > 2 * len(in_float)
    norms = [node for node in graph.node if node.op_type == "InstanceNormalization"]
    assert len(norms) == 4
    for norm in norms:
        node = norm
        for kind in ("Reshape", "Mul", "Add", "Relu"):
            (node,) = [n for n in graph.node if node.output[0] in n.input and n.op_type != "Shape"]
            assert node.op_type == kind, "no rounding in between"


def test_suppression_of_a_batch_is_torchvisions_of_each_picture():
    torch.manual_seed(0)
    corner = torch.rand(5, 60, 2) * 40
    boxes = torch.cat([corner, corner + 5 + torch.rand(5, 60, 2) * 20], 2)
    scores = torch.rand(5, 60)
    scores[:, ::3] = 0
    scores[3] = 0
    more = torch.zeros(5, 60, dtype=torch.long), 0.4, 1, 60
    for kept in (suppress(boxes, scores, *more), at_once(boxes, scores, *more)):
        for i in range(5):
            scored = scores[i].nonzero()[:, 0]
            expected = scored[nms(boxes[i, scored], scores[i, scored], 0.4)].sort().values
            assert torch.equal(kept[i].nonzero()[:, 0], expected)
        assert 0 < int(kept.sum()) < int((scores > 0).sum())
    assert not suppress(boxes, torch.full_like(scores, torch.nan), *more).any()
    torch.library.opcheck(suppress, (boxes, scores, *more))


def test_a_teacher_is_written_for_timing_with_its_post_processing(net, data, tmp_path):
    path = write_teacher(net, data, tmp_path / "teacher.onnx", TASK)
    assert [o.name for o in onnx.load(path).graph.output] == ["boxes", "scores", "labels"]


def test_a_file_of_dense_outputs_is_refused(data):
    with pytest.raises(UserError, match="networks of Detection give them at every place"):
        _check_form(Form(), data, TASK)
