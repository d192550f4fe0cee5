"""The student that ships: each format against the published weights, refusals, and `predict` without the frameworks."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from litdistill.data import tables
from litdistill.data.datamodule import ImageData
from litdistill.export import export as export_module
from litdistill.export.export import export, export_student, verify
from litdistill.export.predict import load, predict
from litdistill.models.ensemble import Ensemble
from litdistill.models.preprocess import Preprocess, Preprocessed
from litdistill.models.small import conv4, mlp
from litdistill.report.files import write_teacher
from litdistill.tasks.multilabel import MultiLabel
from litdistill.tasks.regression import Regression
from litdistill.utils.errors import UserError
from tests.exports import CASES, reference_fixture, restamp, run_fixture, shipped_fixture  # noqa: F401

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


# -- what is shipped ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "precision", "preprocessing", "name", "tolerance"), CASES)
def test_a_file_gives_the_students_logits_whatever_the_batch(
    run, reference, format, precision, preprocessing, name, tolerance
):
    images, targets, expected = reference
    model = load(run / "export" / name, trust=True)
    logits = model.run(images)
    assert logits.dtype == np.float32
    assert np.abs(logits - expected).max() <= tolerance * np.abs(expected).max()
    for count in (1, 3):
        np.testing.assert_allclose(model.run(images[:count]), logits[:count], atol=1e-3 * np.abs(expected).max())
    accuracy = (expected.argmax(1) == targets).mean()
    assert accuracy > 0.6  # a student whose predictions say something
    found = json.loads((run / "export" / "manifest.json").read_text())["files"][name]["check"]
    assert found["student"] == pytest.approx(accuracy, abs=0.003)
    assert found["exported"] == pytest.approx((logits.argmax(1) == targets).mean())
    assert found["agreement"] == pytest.approx((logits.argmax(1) == expected.argmax(1)).mean(), abs=0.003)
    assert found["difference"] == pytest.approx(np.abs(logits - expected).max(), abs=1e-5)


def test_the_onnx_file_says_what_it_is_and_keeps_to_itself(run):
    model = onnx.load(run / "export" / "student.onnx")
    onnx.checker.check_model(model, full_check=True)
    facts = {p.key: json.loads(p.value) for p in model.metadata_props}
    assert facts["classes"] == [str(i) for i in range(10)]
    assert facts["input_shape"] == [1, 8, 8]
    assert facts["preprocessing"] is True
    saved = json.loads((run / "export" / "manifest.json").read_text())["files"]["student.onnx"]
    assert (facts["mean"], facts["std"]) == (saved["mean"], saved["std"])
    (given,), (out,) = model.graph.input, model.graph.output
    assert given.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert given.type.tensor_type.shape.dim[0].dim_param  # a name, not a number
    assert [d.dim_value for d in given.type.tensor_type.shape.dim][1:] == [1, 8, 8]
    assert out.name == "logits"


def test_int8_weights_are_eight_bits_with_a_scale_for_each_channel_and_normalization_stays_float(run):
    model = onnx.load(run / "export" / "student-int8.onnx")
    of = {t.name: t for t in model.graph.initializer}
    weights = [t for t in of.values() if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4]
    assert sorted(tuple(t.dims) for t in weights) == [(8, 1, 3, 3), (16, 8, 3, 3)]
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in {t.name for t in weights}:
            assert list(of[node.input[1]].dims) == [of[node.input[0]].dims[0]]
            assert np.abs(onnx.numpy_helper.to_array(of[node.input[0]]).astype(int)).max() <= 64
    first = next(n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] not in of)
    producers = {o: n.op_type for n in model.graph.node for o in n.output}
    assert producers[first.input[0]] in ("Add", "Mul")  # not the image itself


def test_the_safetensors_file_says_what_it_is(run):
    from safetensors import safe_open

    with safe_open(run / "export" / "student-fp16.safetensors", "pt") as file:
        facts = {k: json.loads(v) for k, v in file.metadata().items()}
        assert {file.get_tensor(k).dtype for k in file.keys() if "tracked" not in k} == {torch.float16}  # noqa: SIM118
    assert facts["classes"][3] == "3"
    assert facts["net"]["_target_"] == "litdistill.models.small.conv4"


def test_no_file_tells_the_paths_of_the_machine_it_was_made_on(run):
    for path in (run / "export").iterdir():
        content = path.read_bytes()
        assert b"site-packages" not in content
        assert str(run).encode() not in content
        assert b"litdistill/export/writers.py" not in content


def test_a_file_that_is_not_the_student_is_not_kept(run, monkeypatch, shipped):
    before = {p.name: p.read_bytes() for p in (run / "export").iterdir()}

    def other(student, *rest):
        student = torch.nn.Sequential(student, torch.nn.Linear(10, 10))
        return original(student, *rest)

    original = export_module.write_format
    monkeypatch.setattr(export_module, "write_format", other)
    for format in ("pt2", "torchscript"):
        with pytest.raises(UserError, match="is not the student, so it is not kept"):
            export(run, format)
    assert {p.name: p.read_bytes() for p in (run / "export").iterdir()} == before


def test_the_tolerances_can_be_set(run):
    with pytest.raises(UserError, match=r"at least 101\.00 %"):
        export(run, "safetensors", "fp16", limits=(None, 1.01))
    with pytest.raises(UserError, match="tolerance 0"):
        export(run, "safetensors", "fp16", limits=(0.0, None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": "abc"}, "calibration=abc must be a number of images"),
        ({"calibration": 1.5}, r"calibration=1\.5 must be a number of images"),
        ({"calibration": 0}, "at least 1"),
        ({"preprocessing": "perhaps"}, "preprocessing=perhaps must be true or false"),
        ({"limits": ("abc", None)}, r"tolerance\.difference=abc must be a number"),
        ({"limits": (None, float("nan"))}, r"tolerance\.agreement=nan must be a number"),
    ],
)
def test_a_wrong_option_is_named(run, options, message):
    with pytest.raises(UserError, match=message):
        export(run, **options)


def test_verify_refuses_a_wrong_option(run):
    with pytest.raises(UserError, match=r"tolerance\.difference=abc must be a number"):
        verify(run, limits=("abc", None))
    with pytest.raises(UserError, match="allow_code=perhaps must be true or false"):
        verify(run, allow_code="perhaps")


@pytest.mark.parametrize(("format", "precision"), [("pt2", "int8"), ("torchscript", "fp16"), ("tflite", "fp32")])
def test_what_is_not_offered_is_refused_with_what_is(run, format, precision):
    with pytest.raises(UserError, match="format=onnx with precision=fp32 or fp16 or int8"):
        export(run, format, precision)


def test_a_missing_extra_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"pip install 'litdistill\[export\]'"):
        export(run, "onnx", preprocessing=False)


def test_verify_measures_every_file_again_and_refuses_a_changed_one(run):
    with pytest.raises(UserError, match=r"allow_code=true"):
        verify(run)
    found = verify(run, allow_code=True)
    saved = json.loads((run / "export" / "manifest.json").read_text())["files"]
    assert found.keys() == {case[3] for case in CASES}
    for name in ("student.onnx", "student.pt2", "student-fp16.safetensors"):
        assert found[name]["exported"] == saved[name]["check"]["exported"]
    path = run / "export" / "student-int8.onnx"
    good = path.read_bytes()
    try:
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(UserError, match="SHA-256"):
            verify(run, allow_code=True)
    finally:
        path.write_bytes(good)


# -- the names of classes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["می\u200cرود", "red\u3000panda", "crème\u00a0brûlée", "a\u200db", "x" * 200])
def test_the_names_of_classes_may_be_of_any_language(shipped, name):
    restamp(shipped / "student.onnx", classes=[name, *"123456789"])
    assert load(shipped / "student.onnx").facts.classes[0] == name


@pytest.mark.parametrize(
    "name", ["a\x1b[2J", "a\nb", "a\x9b", "a\u2028b", "a\u202eb", "a\u2066b", "a\udce9", "x" * 201]
)
def test_a_class_whose_name_acts_on_who_reads_it_is_named_before_anything_is_written(run, tmp_path, monkeypatch, name):
    monkeypatch.setattr(export_module, "write_format", lambda *_: pytest.fail("written"))
    data = SimpleNamespace(class_names=(name, *"123456789"))
    with pytest.raises(UserError, match=r"The class .* cannot be exported: its name .* Rename its folder"):
        export_student(tmp_path, torch.nn.Linear(1, 1), data)


# -- preprocessing and tasks -------------------------------------------------------------------------------------------


def digits() -> ImageData:
    data = ImageData("digits", per_class=12)
    data.setup()
    return data


def odd(seed: int = 0, size: int | None = 12, mean: float = 0.4) -> torch.nn.Module:
    """A network whose preprocessing is another than the data's statistics, and that resizes."""
    torch.manual_seed(seed)
    side = size or 8
    return Preprocessed(conv4(10, (1, side, side), widths=[4, 4]), Preprocess([mean], [0.2], size)).eval()


@pytest.mark.parametrize(
    ("format", "precision"), [("onnx", "fp32"), ("onnx", "int8"), ("pt2", "fp16"), ("safetensors", "fp32")]
)
def test_a_file_holds_the_networks_own_preprocessing(tmp_path, format, precision):
    data, net = digits(), odd()
    options = {"_target_": "litdistill.models.small.conv4", "widths": [4, 4]}
    path, entry = export_student(tmp_path, net, data, format, precision, net_options=options)
    assert (entry["mean"], entry["std"], entry["size"], entry["input_shape"]) == ([0.4], [0.2], [12, 12], [1, 8, 8])
    images = data.get_batch("test", data.test_ids[:50]).inputs
    logits = load(path, trust=True).run(images.numpy())
    with torch.no_grad():
        expected = net(images).numpy()
    assert (
        np.abs(logits - expected).max() <= {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.3}[precision] * np.abs(expected).max()
    )
    with pytest.raises(UserError, match=r"resizes its images to \(12, 12\)"):
        export_student(tmp_path, net, data, "onnx", preprocessing=False)


def test_networks_that_preprocess_in_several_ways_are_timed_but_not_shipped(tmp_path):
    both, data = Ensemble([odd(), odd(1, None, 0.1)]).eval(), digits()
    path = write_teacher(both, data, tmp_path / "teacher.onnx")
    images = data.get_batch("test", data.test_ids[:5]).inputs
    found = onnxruntime.InferenceSession(path).run(None, {"images": images.numpy()})[0]
    assert np.abs(found - both(images).detach().numpy()).max() < 1e-4
    with pytest.raises(UserError, match="preprocess images in different ways"):
        export_student(tmp_path, both, data)


@pytest.mark.parametrize(("name", "task"), [("diabetes", Regression([150.0], [70.0])), ("multilabel", MultiLabel())])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_network_of_features_is_exported_by_its_tasks_metric(tmp_path, name, task, precision):
    data = getattr(tables, name)()
    data.setup()
    torch.manual_seed(0)
    net = mlp(data.num_classes, data.input_shape, widths=[16]).eval()
    path, entry = export_student(tmp_path, net, data, precision=precision, task=task)
    assert (entry["preprocessing"], entry["mean"], entry["input"]) == (False, [], "float32 (N, F) as in the data")
    assert path.name == ("student.onnx" if precision == "fp32" else "student-int8.onnx")
    assert entry["check"]["metric"] == task.monitor[0]
    assert entry["check"]["exported"] == pytest.approx(entry["check"]["student"], rel=0.1)
    inputs = data.get_batch("test", data.test_ids[:7]).inputs
    model = load(path)
    assert model.run(inputs.numpy()).shape == (7, data.num_classes)
    with pytest.raises(UserError, match="there is no such file"):
        predict(model, ["a.png"])
