"""`predict` on files that do not fit their manifest or any machine: one line, status 2, nothing that acts on a terminal."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from litdistill.export.predict import main
from tests.exports import onnx, restamp, run_fixture, shipped_fixture  # noqa: F401


@pytest.fixture
def picture(tmp_path) -> str:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def last_words(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.strip().splitlines()) == 1
    return printed.err


def rewritten(path: Path, change) -> str:
    model = onnx.load(path)
    change(model.graph)
    path.write_bytes(model.SerializeToString())
    restamp(path)
    return str(path)


def not_a_number(graph) -> None:
    """Adds NaN to the logits."""
    (out,) = graph.output
    graph.initializer.append(onnx.helper.make_tensor("nan", onnx.TensorProto.FLOAT, [1], [float("nan")]))
    graph.node[-1].output[0] = "before"
    graph.node.append(onnx.helper.make_node("Add", ["before", "nan"], [out.name]))


def test_outputs_that_are_no_numbers_are_no_prediction(shipped, picture, capsys):
    path = rewritten(shipped / "student.onnx", not_a_number)
    assert "The student's outputs for 1 sample of 1 are no finite numbers" in last_words(capsys, path, picture)


@pytest.mark.parametrize(
    "facts", [{"input_shape": [3, 8, 8], "mean": [0.1] * 3, "std": [1.0] * 3}, {"preprocessing": False}]
)
def test_a_manifest_that_does_not_fit_its_file_is_named(shipped, picture, capsys, facts):
    restamp(shipped / "student.onnx", **facts)
    text = last_words(capsys, str(shipped / "student.onnx"), picture)
    assert "cannot be run on inputs of" in text
    assert "which manifest.json states (input_shape, preprocessing)" in text


def huge(graph) -> None:
    """Adds a constant of more bytes than any machine has."""
    (out,) = graph.output
    graph.initializer.append(onnx.helper.make_tensor("size", onnx.TensorProto.INT64, [1], [2**52]))
    graph.node[-1].output[0] = "before"
    graph.node.append(onnx.helper.make_node("ConstantOfShape", ["size"], ["huge"]))
    graph.node.append(onnx.helper.make_node("ReduceMax", ["huge"], ["most"], keepdims=0))
    graph.node.append(onnx.helper.make_node("Add", ["before", "most"], [out.name]))


def claimed(graph) -> None:
    """Claims 16 GiB for a weight of a few bytes."""
    graph.initializer[0].dims[:] = [2**32]


@pytest.mark.parametrize("change", [huge, claimed])
def test_a_constant_that_no_memory_holds_is_one_line(shipped, picture, capsys, change):
    path = rewritten(shipped / "student.onnx", change)
    assert "student.onnx" in last_words(capsys, path, picture)


def test_a_file_name_does_not_act_on_the_terminal(shipped, picture, capsys, tmp_path):
    evil = tmp_path / "\x1b[2Ja\nb\x9b.png"
    Path(picture).rename(evil)
    main([str(shipped / "student.onnx"), str(evil)])
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert "\x1b" not in line
    assert "?[2Ja?b?.png: " in line
    main([str(shipped / "student.onnx"), "--json", str(evil)])
    assert json.loads(capsys.readouterr().out)[0]["image"] == str(evil)
