"""`predict` with boxes and masks: places of the user's own picture, drawings, JSON, and files that are not what they seem."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from litdistill.export.pictures import COLORS
from litdistill.export.predict import load, main, predict

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

BOXES = [[32, 4, 48, 12], [0, 0, 64, 64], [0, 40, 20, 60], [8, 8, 16, 16]]
SCORES = [0.9, 0.8, 0.7, 0.3]
LABELS = [1, 0, 1, 0]


def written(folder, kind, outputs, **facts):
    """Writes an ONNX file that gives the same for every picture, as constants, and its manifest; returns its path."""
    h, T = onnx.helper, onnx.TensorProto
    nodes = [h.make_node("Shape", ["images"], ["count"], start=0, end=1)]
    constants, infos = [], []
    for name, array in outputs.items():
        constants.append(onnx.numpy_helper.from_array(array[None], f"{name}_one"))
        constants.append(onnx.numpy_helper.from_array(np.array(array.shape, np.int64), f"{name}_sides"))
        nodes.append(h.make_node("Concat", ["count", f"{name}_sides"], [f"{name}_shape"], axis=0))
        nodes.append(h.make_node("Expand", [f"{name}_one", f"{name}_shape"], [name]))
        infos.append(h.make_tensor_value_info(name, h.np_dtype_to_tensor_dtype(array.dtype), ["N", *array.shape]))
    images = h.make_tensor_value_info("images", T.UINT8, ["N", 3, 64, 64])
    model = h.make_model(h.make_graph(nodes, "g", [images], infos, constants), opset_imports=[h.make_opsetid("", 18)])
    model.ir_version = 9
    (folder / "export").mkdir(parents=True)
    path = folder / "export" / "student.onnx"
    path.write_bytes(model.SerializeToString())
    entry = {
        **{"format": "onnx", "precision": "fp32", "preprocessing": True, "kind": kind, "classes": ["cat", "dog"]},
        **{"mean": [0.5] * 3, "std": [0.5] * 3, "size": None, "input_shape": [3, 64, 64], "net": {}},
        **{"modality": {"kind": "image", "files": {}}, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()},
    } | facts
    (path.parent / "manifest.json").write_text(json.dumps({"files": {path.name: entry}}))
    return path


def detector(folder, boxes=BOXES, labels=LABELS, **facts):
    outputs = {"boxes": np.array(boxes, np.float32), "scores": np.array(SCORES, np.float32), "labels": np.array(labels)}
    return written(folder, facts.pop("kind", "boxes"), outputs, **facts)


@pytest.fixture
def file(tmp_path):
    return detector(tmp_path / "run")


@pytest.fixture
def picture(tmp_path):
    """A picture of 128 x 32, which fills the upper quarter of an input of 64 x 64."""
    Image.new("RGB", (128, 32), "gray").save(tmp_path / "wide.png")
    return tmp_path / "wide.png"


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    printed = capsys.readouterr()
    assert end.value.code == 2
    assert printed.out == ""
    assert len(printed.err.strip().splitlines()) == 1
    return printed.err


def test_boxes_are_in_pixels_of_the_picture(file, picture):
    (found,) = predict(load(file), [picture])
    assert (found["width"], found["height"]) == (128, 32)
    assert [b["box"] for b in found["boxes"]] == [[64, 8, 96, 24], [0, 0, 128, 32]]  # the third lies below the picture
    assert [b["class"] for b in found["boxes"]] == ["dog", "cat"]
    assert [b["score"] for b in found["boxes"]] == pytest.approx([0.9, 0.8])
    assert len(predict(load(file), [picture], score=0.85)[0]["boxes"]) == 1
    assert len(predict(load(file), [picture], score=0.1)[0]["boxes"]) == 3


def test_a_photograph_is_turned_upright_first(file, tmp_path):
    lying = Image.new("RGB", (32, 128), "gray")
    exif = lying.getexif()
    exif[0x0112] = 6
    lying.save(tmp_path / "lying.jpg", exif=exif)
    (found,) = predict(load(file), [tmp_path / "lying.jpg"], out=tmp_path / "out")
    assert (found["width"], found["height"]) == (128, 32)
    assert found["boxes"][0]["box"] == [64, 8, 96, 24]
    assert Image.open(tmp_path / "out" / "lying.png").size == (256, 64)  # enlarged, and upright as well


def test_boxes_are_drawn_and_written(file, picture, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main([str(file.parents[1]), str(picture), str(picture)])  # a run folder names its student.onnx
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith("wide.png: 2 boxes: dog 0.90 at 64 8 96 24; cat 0.80 at 0 0 128 32")
    assert printed[2] == "Drawn to predictions, with predictions.json"
    kept = json.loads((tmp_path / "predictions" / "predictions.json").read_text())
    assert [one["drawn"] for one in kept] == ["wide.png", "wide-2.png"]  # two pictures of one name
    assert kept[0]["boxes"][0] | {"score": 0} == {
        "class": "dog",
        "index": 1,
        "score": 0,
        "box": [64.0, 8.0, 96.0, 24.0],
    }
    drawn = Image.open(tmp_path / "predictions" / "wide.png")
    color = tuple(int(COLORS[1][i : i + 2], 16) for i in (1, 3, 5))
    assert drawn.getpixel((128, 40)) == drawn.getpixel((191, 40)) == color  # both sides of the dog, at twice the size
    assert drawn.getpixel((140, 40)) == (128, 128, 128)
    main([f"run={file.parents[1]}", str(picture)])
    assert (tmp_path / "predictions-2" / "wide.png").is_file()  # nothing is overwritten
    capsys.readouterr()
    assert "there are results in it already" in refused(capsys, file, picture, "--out", "predictions")
    main([str(file), str(picture), "--json"])
    assert json.loads(capsys.readouterr().out)[0]["boxes"][0]["class"] == "dog"
    assert not (tmp_path / "predictions-3").exists()


def test_a_mask_is_that_of_the_picture(picture, tmp_path):
    classes = np.zeros((64, 64), np.int64)
    classes[4:12, 32:48] = 1
    classes[16:] = 1  # below the picture
    path = written(tmp_path / "run", "mask", {"mask": classes})
    (found,) = predict(load(path), [picture], out=tmp_path / "out")
    assert found["areas"] == [
        {"class": "cat", "index": 0, "share": 1 - 32 * 16 / (128 * 32)},
        {"class": "dog", "index": 1, "share": 32 * 16 / (128 * 32)},
    ]
    mask = np.asarray(Image.open(tmp_path / "out" / found["mask"]))
    assert mask.shape == (32, 128)
    assert (mask[8:24, 64:96] == 1).all()
    assert mask.sum() == 32 * 16


def bomb(path):
    """A PNG that says it has 50,000 x 50,000 pixels."""
    Image.new("L", (8, 8)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = (50_000).to_bytes(4, "big") * 2
    import zlib

    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    path.write_bytes(content)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["bomb", "cut", "text", "missing", "empty", "32 bits", "thread"])
def test_a_picture_that_cannot_be_read_is_named_and_those_before_it_are_kept(kind, file, picture, tmp_path, capsys):
    bad = tmp_path / "bad.png"
    if kind == "bomb":
        bomb(bad)
    elif kind == "cut":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(bad)
        bad.write_bytes(bad.read_bytes()[:4000])
    elif kind == "32 bits":
        bad = bad.with_suffix(".tiff")
        Image.fromarray(np.zeros((8, 8), np.float32)).save(bad)
    elif kind == "thread":
        Image.new("RGB", (1, 900)).save(bad)
    elif kind != "missing":
        bad.write_text("" if kind == "empty" else "no picture")
    said = refused(capsys, file, picture, bad, "--out", tmp_path / "out")
    assert f"The image {bad} cannot be read" in said
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())) == 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_pictures_of_any_mode_are_read(mode, file, tmp_path):
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    Image.new(mode, (40, 20)).save(path)
    (found,) = predict(load(file), [path], out=tmp_path / "out")
    assert found["boxes"]
    assert (tmp_path / "out" / "a.png").is_file()


def test_a_manifest_that_does_not_fit_its_file_is_named(tmp_path, picture, capsys):
    assert "gives" in refused(capsys, detector(tmp_path / "a", kind="categorical"), picture)
    assert "finds class 1, and its manifest names 1" in refused(
        capsys, detector(tmp_path / "b", classes=["x"]), picture
    )
    assert "is invalid (kind)" in refused(capsys, detector(tmp_path / "c", kind="cubes"), picture)
    assert "no finite numbers" in refused(capsys, detector(tmp_path / "d", np.full((4, 4), np.nan)), picture)
    assert "cannot be run" in refused(capsys, detector(tmp_path / "e", kind="mask"), picture)
    assert "--score must be from 0 to 1" in _usage(capsys, detector(tmp_path / "f"), picture, "--score", "2")


def _usage(capsys, *arguments):
    with pytest.raises(SystemExit):
        main([str(a) for a in arguments])
    return capsys.readouterr().err


def test_neither_torch_nor_lightning_is_needed(file, picture, tmp_path):
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'torchvision', 'lightning', 'omegaconf'])); "
        "from litdistill.export.predict import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, str(file), str(picture), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "dog 0.90 at 64 8 96 24" in done.stdout
