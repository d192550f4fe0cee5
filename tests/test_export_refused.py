"""Exported files that are changed, cut, hostile or of somebody else are refused, and run nothing."""

import io
import json
import pickle
import shutil

import numpy as np
import pytest
import torch

from litdistill.export.predict import build_net, load
from litdistill.utils.errors import UserError
from litdistill.utils.manifest import check_facts
from tests.exports import restamp, run_fixture, shipped_fixture  # noqa: F401

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


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
