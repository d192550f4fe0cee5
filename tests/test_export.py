"""The student that ships: each format against the published weights, refusals, and `predict` without the frameworks."""

import hashlib
import io
import json
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from litdistill.data import tables
from litdistill.data.datamodule import ImageData
from litdistill.data.sources import load as load_data
from litdistill.export import export as export_module
from litdistill.export.export import export, export_student, verify
from litdistill.export.predict import build_net, load, main, predict
from litdistill.models.ensemble import Ensemble
from litdistill.models.preprocess import Preprocess, Preprocessed
from litdistill.models.small import conv4, mlp
from litdistill.report.files import write_teacher
from litdistill.tasks.multilabel import MultiLabel
from litdistill.tasks.regression import Regression
from litdistill.training.train import train
from litdistill.utils.checkpoint import write_text
from litdistill.utils.errors import UserError
from litdistill.utils.manifest import check_facts
from tests.conftest import compose_config

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

RUN = [
    *("method=supervised", "teacher=null", "student.widths=[8,16]", "trainer=cpu", "trainer.max_epochs=10"),
    *("data.per_class=60", "data.batch_size=32", "optimizer.lr=0.01"),
]
CASES = [  # format, precision, preprocessing in the file, file, tolerance
    ("onnx", "fp32", True, "student.onnx", 1e-4),
    ("onnx", "fp32", False, "student-normalized.onnx", 1e-4),
    ("onnx", "fp16", True, "student-fp16.onnx", 2e-2),
    ("onnx", "int8", True, "student-int8.onnx", 0.2),
    ("pt2", "fp32", True, "student.pt2", 1e-4),
    ("pt2", "fp16", False, "student-fp16-normalized.pt2", 2e-2),
    ("safetensors", "fp32", True, "student.safetensors", 1e-4),
    ("safetensors", "fp16", True, "student-fp16.safetensors", 2e-2),
    ("torchscript", "fp32", True, "student.pt", 1e-4),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of one finished run, everything in `CASES` exported from it."""
    cfg = compose_config(tmp_path_factory.mktemp("export") / "run", *RUN)
    folder = Path(cfg.folder)
    write_text(folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
    train(cfg)
    for format, precision, preprocessing, name, _ in CASES:
        path, _ = export(folder, format, precision, preprocessing, calibration=200)
        assert path == folder / "export" / name
    return folder


@pytest.fixture(scope="module")
def reference(run):
    """Test images, their labels and the student's logits in float64, from its weights and the formulas alone."""
    test = load_data("digits", "").test
    w = {k: v.double() for k, v in load_file(run / "student.safetensors").items()}
    facts = json.loads((run / "export" / "manifest.json").read_text())["files"]["student.onnx"]
    x = (test.images.double() / 255 - facts["mean"][0]) / facts["std"][0]
    for layer in ("layer1", "layer2"):
        x = F.conv2d(x, w[f"{layer}.0.weight"], padding=1)
        mean, var, gain, bias = (w[f"{layer}.1.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        column = lambda v: v[:, None, None]  # noqa: E731
        x = (x - column(mean)) / column(var + 1e-5).sqrt() * column(gain) + column(bias)
        x = x.relu()
        x = F.max_pool2d(x, 2) if layer == "layer1" else x.mean((2, 3))
    return test.images.numpy(), test.targets.numpy(), (x @ w["fc.weight"].T + w["fc.bias"]).numpy()


@pytest.fixture
def shipped(run, tmp_path):
    """A copy of the exported files, to spoil."""
    return shutil.copytree(run / "export", tmp_path / "export")


def restamp(path, **changes):
    """Makes the manifest speak of the file as it is now, as whoever changed it could."""
    manifest = path.parent / "manifest.json"
    whole = json.loads(manifest.read_text())
    entry = whole["files"].setdefault(path.name, dict(whole["files"]["student.onnx"]))
    entry |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), **changes}
    manifest.write_text(json.dumps(whole))


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


# -- what is refused ---------------------------------------------------------------------------------------------------


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["student.onnx", "student.safetensors", "student.pt2", "student.pt"])
def test_a_pickled_file_under_a_trusted_name_is_refused_and_does_nothing(shipped, tmp_path, name):
    mark = tmp_path / "executed"
    buffer = io.BytesIO()
    torch.save({"weight": Bomb(mark)}, buffer)
    for content in (pickle.dumps(Bomb(mark)), buffer.getvalue()):
        (shipped / name).write_bytes(content)
        restamp(shipped / name)
        with pytest.raises(UserError, match=r"damaged|refused"):
            load(shipped / name)
        assert not mark.exists()


def test_code_formats_are_opened_only_for_whoever_vouches_for_them(shipped):
    for name in ("student.pt2", "student.pt"):
        with pytest.raises(UserError, match="--trust"):
            load(shipped / name)
        assert load(shipped / name, trust=True).facts.format in ("pt2", "torchscript")


def external(model, place):
    """The model with one tensor, in the named place, that lies in another file."""
    tensor = onnx.helper.make_tensor("t", onnx.TensorProto.FLOAT, [1], [1.0])
    tensor.ClearField("float_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../secret.bin")
    if place == "initializer":
        model.graph.initializer.append(tensor)
    elif place == "attribute":
        model.graph.node.append(onnx.helper.make_node("Constant", [], ["t"], value=tensor))
    elif place == "sparse":
        model.graph.sparse_initializer.add().values.CopyFrom(tensor)
    elif place == "subgraph":
        inner = onnx.helper.make_graph([], "g", [], [], [tensor])
        model.graph.node.append(onnx.helper.make_node("If", ["c"], ["t"], then_branch=inner, else_branch=inner))
    elif place == "function":
        node = onnx.helper.make_node("Constant", [], ["t"], value=tensor)
        imports = [onnx.helper.make_opsetid("", 20)]
        model.functions.append(onnx.helper.make_function("own", "f", [], ["t"], [node], imports))
    return model.SerializeToString()


@pytest.mark.parametrize("place", ["initializer", "attribute", "sparse", "subgraph", "function"])
def test_an_onnx_file_with_data_outside_is_refused_before_it_is_opened(shipped, monkeypatch, place):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: pytest.fail("onnxruntime opened it"))
    path = shipped / "student.onnx"
    path.write_bytes(external(onnx.load(path), place))
    restamp(path)
    with pytest.raises(UserError, match="takes weights from other files"):
        load(path)


@pytest.mark.parametrize("name", ["student.onnx", "student.safetensors", "student.pt2"])
def test_a_changed_file_is_refused(shipped, name):
    content = (shipped / name).read_bytes()
    (shipped / name).write_bytes(content + b"\0")
    with pytest.raises(UserError, match="SHA-256"):
        load(shipped / name, trust=True)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("student.onnx", "copy manifest.json"), ("other.onnx", "There is no")],
)
def test_a_file_without_a_manifest_is_refused(run, tmp_path, name, remedy):
    shutil.copy(run / "export" / "student.onnx", tmp_path)
    with pytest.raises(UserError, match=remedy):
        load(tmp_path / name)


def test_a_file_that_the_manifest_does_not_know_is_refused(shipped):
    shutil.copy(shipped / "student.onnx", shipped / "foreign.onnx")
    with pytest.raises(UserError, match=r"has no entry for foreign\.onnx"):
        load(shipped / "foreign.onnx")


@pytest.mark.parametrize("size", [0, 1, 100, 3000])
def test_a_cut_file_is_refused(shipped, size):
    path = shipped / "student.onnx"
    path.write_bytes(path.read_bytes()[:size])
    restamp(path)
    with pytest.raises(UserError, match="damaged"):
        load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": ["0\x1b[2J", *"123456789"]},
        {"classes": "0123456789"},
        {"classes": None},
        {"classes": [{"a": 1}] * 10},
        {"mean": [float("nan")]},
        {"mean": ["__import__('os')"]},
        {"mean": [0.5, 0.5, 0.5]},
        {"std": [0.0]},
        {"input_shape": [1, 10**9, 10**9]},
        {"input_shape": [True, 8, 8]},
        {"preprocessing": "yes"},
        {"format": "torchscript"},
        {"format": ["onnx"]},
        {"net": [1]},
    ],
)
def test_hostile_facts_are_refused(shipped, changes):
    restamp(shipped / "student.onnx", **changes)
    with pytest.raises(UserError, match="is invalid"):
        load(shipped / "student.onnx")


def test_a_file_of_other_classes_than_it_claims_is_refused(shipped):
    restamp(shipped / "student.onnx", classes=["a", "b"])
    with pytest.raises(UserError, match="2 outputs"):
        load(shipped / "student.onnx").run(np.zeros((1, 1, 8, 8), np.uint8))


@pytest.mark.parametrize("text", ["", "[]", '{"files": []}', '{"files": {"student.onnx": 3}}', "[" * 100_000, "\ud800"])
def test_a_hostile_manifest_is_refused(shipped, text):
    (shipped / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=r"manifest\.json"):
        load(shipped / "student.onnx")


@pytest.mark.parametrize(
    "net",
    [
        {"_target_": "os.system", "command": "true"},
        {"_target_": "litdistill.export.predict.main"},
        {"_target_": "litdistill.models.small.prod"},
        {"_target_": "litdistill.models.small.nn"},
        {"_target_": "litdistill.models.parts.os.system"},
        {"_target_": "litdistill.models.torchvision.get_model"},
        {
            "_target_": "litdistill.models.torchvision.torchvision_classifier",
            "name": "resnet18",
            "weights": "DEFAULT",
        },
        {"_target_": "litdistill.models.timm.timm_classifier", "name": "resnet18", "checkpoint_path": "x.pt"},
        {"_target_": "litdistill.models.timm.timm_classifier", "name": "hf-hub:stranger/net"},
        {"_target_": ["litdistill.models.small.conv4"]},
        {},
    ],
)
def test_only_networks_of_this_project_are_built_for_safetensors(shipped, net):
    entry = json.loads((shipped / "manifest.json").read_text())["files"]["student.safetensors"] | {"net": net}
    facts = check_facts(entry, shipped / "student.safetensors")
    with pytest.raises(UserError, match="refused"):
        build_net(facts)


# -- predict -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(reference, tmp_path_factory):
    """Five test images as PNG files of 8x8 pixels."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, image in enumerate(reference[0][:5]):
        Image.fromarray(image[0]).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("name", ["student.onnx", "student-normalized.onnx", "student.safetensors"])
def test_predict_names_the_likeliest_classes(run, reference, pictures, name):
    expected = torch.from_numpy(reference[2][:5]).softmax(1)
    found = predict(load(run / "export" / name), pictures, top=3)
    assert [f["image"] for f in found] == [str(p) for p in pictures]
    for one, p in zip(found, expected, strict=True):
        order = p.argsort(descending=True)[:3].tolist()
        assert [c["index"] for c in one["top"]] == order
        assert [c["class"] for c in one["top"]] == [str(i) for i in order]
        assert [c["probability"] for c in one["top"]] == pytest.approx(p[order].tolist(), abs=1e-4)


def test_predict_needs_neither_lightning_nor_hydra_nor_torch(run, pictures, reference):
    program = """
        import sys
        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("torch", "torchvision", "lightning", "hydra", "omegaconf", "onnx", "sklearn"):
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Block())
        sys.argv[0] = "predict"
        import runpy
        runpy.run_module("litdistill.export.predict", run_name="__main__")
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    model = str(run / "export" / "student.onnx")
    done = subprocess.run([*command, model, *map(str, pictures), "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [one["top"][0]["index"] for one in json.loads(done.stdout)] == reference[2][:5].argmax(1).tolist()
    refused = subprocess.run([*command, model.replace("onnx", "safetensors"), str(pictures[0])], capture_output=True)
    assert refused.returncode == 2
    assert b"torch is not installed" in refused.stderr


def test_the_command_prints_a_line_for_each_image_and_ends_with_two_on_wrong_input(run, pictures, capsys, tmp_path):
    model = str(run / "export" / "student.onnx")
    main([model, *map(str, pictures), "--top", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all(line.startswith(f"{p}: ") and line.count("%") == 2 for line, p in zip(lines, pictures, strict=True))
    (tmp_path / "no.png").write_text("no image")
    with pytest.raises(SystemExit) as end:
        main([model, str(tmp_path / "no.png")])
    assert end.value.code == 2
    assert "cannot be read" in capsys.readouterr().err


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
