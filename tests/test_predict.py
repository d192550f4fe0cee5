"""`predict` on exported files: classes by name, without torch, a line for each image."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from PIL import Image

from litdistill.export.predict import load, main, predict
from tests.exports import reference_fixture, run_fixture  # noqa: F401

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


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
